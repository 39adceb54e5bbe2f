"""Makes the package importable from a checkout that is not installed.

``passes/`` and ``codegen/`` are installed as `fxquant.passes` and `fxquant.codegen`. On a machine
where nothing can be installed, a folder of links does the same.
"""

from __future__ import annotations

import importlib
import os
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent


def make_importable() -> None:
    """Puts the checkout on `sys.path`, and into the environment for what is started from here."""
    try:
        importlib.import_module("fxquant.codegen")
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith("fxquant"):
            raise
    else:
        return
    for name in [name for name in sys.modules if name.split(".")[0] == "fxquant"]:
        del sys.modules[name]
    tree = Path(tempfile.mkdtemp(prefix="fxquant-tree-"))
    package = tree / "fxquant"
    package.mkdir()
    for source in (*(ROOT / "fxquant").iterdir(), ROOT / "passes", ROOT / "codegen"):
        (package / source.name).symlink_to(source)
    sys.path[:0] = [str(tree), str(ROOT)]
    before = os.environ.get("PYTHONPATH")
    parts = [str(tree), str(ROOT), *([before] if before else [])]
    os.environ["PYTHONPATH"] = os.pathsep.join(parts)
