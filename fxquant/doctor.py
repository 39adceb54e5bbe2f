"""`fxquant doctor`: what this machine has, what fxquant makes of it, and what to do about gaps.

Every check works when the thing it looks for is missing or broken.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fxquant import __version__, errors
from fxquant.runtime import cache, dump, launch, rates, toolchain, tuning
from fxquant.runtime.cpp import usable_threads

OK, NOTE, BAD = "ok", "note", "bad"
STYLES = {OK: "green", NOTE: "yellow", BAD: "red"}
OLDEST_PYTHON, OLDEST_TORCH, OLDEST_TRITON = (3, 10), (2, 11), (3, 6)
EXTRAS = ("demo", "triton", "test", "peers")


@dataclass(frozen=True)
class Finding:
    """What one check found.

    Attributes:
        name: What was looked at.
        status: ``"ok"``, ``"note"`` (fxquant works, with less) or ``"bad"`` (it does not).
        detail: What is there.
        advice: A sentence that says what to do, or ``""``.
    """

    name: str
    status: str
    detail: str
    advice: str = ""


def findings() -> list[Finding]:
    """What every check found, in the order in which they are shown."""
    return [check() for check in CHECKS]


def show(console: Console) -> bool:
    """Prints the findings and the advice; False when something that fxquant needs is missing."""
    found = findings()
    table = Table(title=f"fxquant {__version__}", title_justify="left")
    for column in ("what", "", "found"):
        table.add_column(column, overflow="fold")
    for finding in found:
        style = STYLES[finding.status]
        table.add_row(finding.name, f"[{style}]{finding.status}[/{style}]", escape(finding.detail))
    console.print(table)
    advice = [finding.advice for finding in found if finding.advice]
    for line in advice:
        console.print(f"- {line}", highlight=False, markup=False)
    if not advice:
        console.print("Nothing to do: everything that fxquant can use is here.")
    return all(finding.status != BAD for finding in found)


def check_python() -> Finding:
    """The interpreter."""
    detail = f"{platform.python_version()}, {sys.executable}"
    if sys.version_info[:2] < OLDEST_PYTHON:
        return Finding("Python", BAD, detail, "Use Python 3.10 or later.")
    return Finding("Python", OK, detail)


def check_torch() -> Finding:
    """Torch's version."""
    if _version(torch.__version__) < OLDEST_TORCH:
        return Finding("torch", BAD, torch.__version__, "Install torch 2.11 or later.")
    return Finding("torch", OK, torch.__version__)


def check_triton() -> Finding:
    """Triton: found, new enough, and able to compile a kernel."""
    try:
        import triton
    except ImportError:
        return Finding(
            "Triton",
            NOTE,
            "not found",
            "Without Triton there are no GPU kernels: pip install 'fxquant[triton]' (Linux).",
        )
    version = triton.__version__
    if _version(version) < OLDEST_TRITON:
        return Finding("Triton", BAD, version, "Install Triton 3.6 or later.")
    try:
        _compile_tiny_kernel()
    # Whatever is wrong with the installation is the finding.
    except Exception as error:  # noqa: BLE001
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        advice = f"Triton {version} cannot compile: install it again, or use target='torch'."
        return Finding("Triton", BAD, f"{version}, compiling a kernel failed: {reason}", advice)
    return Finding("Triton", OK, f"{version}, compiles for sm_80")


def _compile_tiny_kernel() -> None:
    """Compiles a copy kernel to a cubin, which needs no GPU.

    Raises:
        Exception: Whatever Triton raises when it cannot.
    """
    import triton
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    def copy(x, y, n: tl.constexpr):  # type: ignore[no-untyped-def]
        at = tl.arange(0, n)
        tl.store(y + at, tl.load(x + at))

    # JITFunction rather than triton.jit: that one gives an interpreted function when
    # TRITON_INTERPRET is set, which cannot be compiled.
    source = ASTSource(
        triton.runtime.jit.JITFunction(copy),
        {"x": "*fp32", "y": "*fp32", "n": "constexpr"},
        {"n": 128},
    )
    with triton.knobs.compilation.scope():
        triton.knobs.compilation.always_compile = True
        triton.compile(source, target=GPUTarget("cuda", 80, 32))


def check_gpu() -> Finding:
    """GPUs that torch can use."""
    if not torch.cuda.is_available():
        return Finding("GPU", NOTE, "none that this torch can use")
    names = []
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        memory = device.total_memory / 2**30
        names.append(f"{device.name} (sm_{device.major}{device.minor}, {memory:.0f} GiB)")
    return Finding("GPU", OK, ", ".join(names))


def check_compiler() -> Finding:
    """The C++ compiler, and what it builds for: kernels on the CPU, ours and Inductor's."""
    name = "C++ compiler"
    try:
        chain, reason = toolchain.toolchain(), toolchain.obstacle()
    except errors.OptionError as error:
        return Finding(name, BAD, str(error), f"Unset {toolchain.ISA}, or name another.")
    if chain is None:
        missing = reason == toolchain.NOT_FOUND
        return Finding(
            name,
            NOTE if missing else BAD,
            "not found" if missing else reason,
            "Without a C++ compiler there are no kernels for the CPU, neither ours nor Inductor's, "
            "and models there run op by op: install g++ or clang, or set CXX.",
        )
    threads = "OpenMP" if chain.openmp else "no OpenMP: one thread"
    detail = f"{chain.compiler.path} ({chain.compiler.summary}), {chain.isa.name}, {threads}"
    refused = toolchain.refused()
    detail += f"; {refused}" if refused else ""
    return Finding(name, OK if chain.openmp and not refused else NOTE, detail)


def check_rates() -> Finding:
    """What was measured of this processor, for the choice between a kernel's skeletons."""
    name = "CPU rates"
    try:
        chain = toolchain.toolchain()
    except errors.OptionError:
        chain = None
    if chain is None:
        return Finding(name, NOTE, "none: there are no C++ kernels")
    threads = usable_threads(openmp=chain.openmp)
    found = rates.rates(chain, threads)
    lanes = chain.isa.lanes
    each = {"bf16": 2 * lanes, "int8": 4 * lanes, "f32": lanes}
    speeds = [
        f"{path} {rate * threads * each[path] / 1e9:.0f}" for path, rate in found.many.items()
    ]
    detail = (
        f"{threads} threads read {found.bandwidth / 1e9:.0f} GB/s; 10^9 multiply-adds a second: "
        f"{', '.join(speeds)}; kernels tuned: {tuning.tuned_kernels()}"
    )
    return Finding(name, OK, detail)


def check_cache() -> Finding:
    """The kernel cache's folder."""
    return _check_folder("kernel cache", cache.root(), cache.ENVIRONMENT)


def check_dump() -> Finding:
    """The folder that kernels are written to, when there is one."""
    folder = os.environ.get(dump.ENVIRONMENT)
    if not folder:
        return Finding("kernel dump", OK, f"off ({dump.ENVIRONMENT}=folder turns it on)")
    return _check_folder("kernel dump", Path(folder), dump.ENVIRONMENT)


def _check_folder(name: str, folder: Path, variable: str) -> Finding:
    """Whether a file can be written in a folder, or in the first parent of it that exists."""
    existing = folder
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    try:
        with tempfile.TemporaryFile(dir=existing):
            return Finding(name, OK, str(folder))
    except OSError as error:
        detail = f"{folder} cannot be written ({error.strerror})"
        return Finding(name, BAD, detail, f"Point {variable} at a folder that can be written.")


def check_extras() -> Finding:
    """The optional packages, by the names of the extras that bring them."""
    missing = {}
    for extra in EXTRAS:
        absent = [name for name in _packages_of(extra) if not _is_installed(name)]
        if absent:
            missing[extra] = absent
    if not missing:
        return Finding("extras", OK, ", ".join(EXTRAS))
    detail = "; ".join(
        f"{extra}: {'no ' + ', '.join(missing[extra]) if extra in missing else 'yes'}"
        for extra in EXTRAS
    )
    advice = ""
    if "demo" in missing:
        advice = "For the demo: pip install 'fxquant[demo]'."
    return Finding("extras", NOTE, detail, advice)


def _packages_of(extra: str) -> list[str]:
    """The distributions that an extra names, other than fxquant itself."""
    names = []
    for requirement in importlib.metadata.requires("fxquant") or []:
        name = re.match(r"[A-Za-z0-9._-]+", requirement)
        wanted = re.search(r"extra == ['\"](\w+)['\"]", requirement)
        if name and wanted and wanted[1] == extra and name[0] != "fxquant":
            names.append(name[0])
    return names


def _is_installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def check_target() -> Finding:
    """What ``target="auto"`` means on this machine."""
    name, cpu = 'target="auto"', torch.device("cpu")
    try:
        reason = launch.obstacle("cpp", cpu)
    except errors.OptionError as error:
        reason = str(error)
    on_cpu = "torch operations, one by one," if reason else "C++ kernels"
    detail = f"{on_cpu} for models on the CPU"
    if torch.cuda.is_available() and launch.runs_triton(torch.device("cuda")):
        detail = f"Triton kernels for models on a GPU, {detail}"
    return Finding(name, NOTE if reason else OK, detail)


def _version(text: str) -> tuple[int, int]:
    """The first two numbers of a version."""
    numbers = [int(number) for number in re.findall(r"\d+", text)[:2]]
    return (numbers[0], numbers[1])


CHECKS: tuple[Callable[[], Finding], ...] = (
    check_python,
    check_torch,
    check_triton,
    check_gpu,
    check_compiler,
    check_rates,
    check_cache,
    check_dump,
    check_extras,
    check_target,
)
