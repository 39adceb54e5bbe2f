"""Printed Triton modules: imported through the kernel cache, with the tiles of this GPU."""

from __future__ import annotations

import importlib.util
import sys
import threading
from pathlib import Path
from types import ModuleType

from fxquant import errors
from fxquant._version import __version__
from fxquant.runtime import cache

_LOADING = threading.Lock()


def load_module(name: str, source: str) -> ModuleType:
    """Imports a printed Python module through the kernel cache.

    Triton reads the source of its functions back from their file, so the text has to lie in one.

    Raises:
        FolderError: The kernel cache cannot be written.
    """
    key = cache.key_of(__version__, "python", cache.code_of(source))
    folder = cache.get_or_build("triton", key, lambda path: _write_module(path, source))
    qualified = f"fxquant_kernels.{name}_{key}"
    with _LOADING:
        if qualified in sys.modules:
            return sys.modules[qualified]
        spec = importlib.util.spec_from_file_location(qualified, folder / "kernel.py")
        if spec is None or spec.loader is None:
            raise errors.unwritable_folder(
                "kernel cache", folder, cache.ENVIRONMENT, "not readable"
            )
        module = importlib.util.module_from_spec(spec)
        sys.modules[qualified] = module
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[qualified]
            raise
        return module


def _write_module(folder: Path, source: str) -> None:
    (folder / "kernel.py").write_text(source, encoding="utf-8")
