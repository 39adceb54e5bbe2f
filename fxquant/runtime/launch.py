"""Which kernel runs for a spec on a device, and the record of those that ran."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import sys
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from fxquant import errors
from fxquant._version import __version__
from fxquant.codegen import RENDERERS, Header, reference
from fxquant.codegen.spec import KernelSpec
from fxquant.runtime import cache


@dataclass(frozen=True)
class Kernel:
    """A kernel's text and what it is for.

    Attributes:
        target: What it is printed for: ``"triton"`` or ``"torch"``.
        name: What it does, as an identifier.
        source: The text: a Python module.
        spec: What it computes.
        note: Why it did not run here, or ``""``.
    """

    target: str
    name: str
    source: str
    spec: KernelSpec
    note: str = ""


@functools.lru_cache(maxsize=4096)
def parse_spec(text: str) -> KernelSpec:
    """The spec behind an op's argument."""
    return KernelSpec.from_json(text)


def has_triton() -> bool:
    """Whether the triton package is there."""
    return importlib.util.find_spec("triton") is not None


def runs_triton(device: torch.device) -> bool:
    """Whether a Triton kernel can run on tensors of this device.

    On a CPU it can when it is interpreted (``TRITON_INTERPRET=1``).
    """
    # This is on the path of a call: looking for a package that is not there comes last.
    able = device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"
    return able and has_triton()


def make_kernel(spec: KernelSpec, target: str, header: Header, note: str = "") -> Kernel:
    """Prints the kernel of a spec for a target."""
    source = RENDERERS[target](spec, header)
    if note:
        source = f"# Not run: {note}\n{source}"
    return Kernel(target, spec.name, source, spec, note)


def run(spec: str, x: Tensor, weight: list[Tensor], extra: list[Tensor]) -> Tensor:
    """Computes a spec (as JSON) with the kernel for the tensors' device.

    Raises:
        DeviceError: The operands lie on different devices.
    """
    device = x.device
    if device != weight[0].device:
        raise errors.device_mismatch(parse_spec(spec).name, device, weight[0].device)
    if runs_triton(device):
        return _triton_module(spec).run(x, weight, extra)
    return reference.run(parse_spec(spec), x, weight, extra)


_headers: dict[str, Header] = {}


def prepare(spec: str, header: Header, device: torch.device) -> None:
    """Builds a spec's Triton module ahead of its first call.

    Its tables have to lie on the device before a CUDA graph is captured.

    Args:
        spec: As JSON.
        header: Whom the kernel serves, for its source; the first call for a spec counts.
        device: Where it will run.
    """
    _headers.setdefault(spec, header)
    tables = getattr(_triton_module(spec), "prepare", None)
    if tables is not None:
        tables(device)


@functools.lru_cache(maxsize=4096)
def _triton_module(spec: str) -> ModuleType:
    parsed = parse_spec(spec)
    source = make_kernel(parsed, "triton", _headers.get(spec, Header())).source
    return load_module(parsed.name, source)


_LOADING = threading.Lock()


def load_module(name: str, source: str) -> ModuleType:
    """Imports a printed Python module through the kernel cache.

    Triton reads the source of its functions back from their file, so the text has to lie in one.

    Raises:
        FolderError: The kernel cache cannot be written.
    """
    key = cache.key_of(__version__, "python", source)
    folder = cache.get_or_build("triton", key, lambda path: _write_module(path, name, source))
    qualified = f"fxquant_kernels.{name}_{key}"
    with _LOADING:
        if qualified in sys.modules:
            return sys.modules[qualified]
        spec = importlib.util.spec_from_file_location(qualified, folder / f"{name}.py")
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


def _write_module(folder: Path, name: str, source: str) -> None:
    (folder / f"{name}.py").write_text(source, encoding="utf-8")


# --- the record of what ran ------------------------------------------------------------------

_collectors: list[dict[tuple[str, str], Kernel]] = []


def record(kernels: Iterable[Kernel]) -> None:
    """Tells whoever listens that these kernels ran."""
    for collector in _collectors:
        for kernel in kernels:
            collector.setdefault((kernel.target, kernel.source), kernel)


def is_recording() -> bool:
    """Whether anyone listens."""
    return bool(_collectors)


@contextlib.contextmanager
def recording() -> Iterator[dict[tuple[str, str], Kernel]]:
    """Collects the kernels that run while it is entered, each once, in the order of first runs."""
    seen: dict[tuple[str, str], Kernel] = {}
    _collectors.append(seen)
    try:
        yield seen
    finally:
        _collectors[:] = [collector for collector in _collectors if collector is not seen]
