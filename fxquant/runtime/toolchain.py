"""The C++ compiler: found once, asked once what it can do, and run through the kernel cache."""

from __future__ import annotations

import functools
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fxquant import errors
from fxquant._version import __version__
from fxquant.codegen.cpp.isa import ISAS, Isa
from fxquant.codegen.cpp.support import headers
from fxquant.runtime import cache, precompiled, tile_unit

LOG = logging.getLogger("fxquant.toolchain")
COMPILERS = ("g++", "c++", "clang++")
CXX, ISA = "CXX", "FXQUANT_ISA"
# Kernels keep IEEE arithmetic: no -ffast-math, which would drop NaN and reorder sums.
FLAGS = (*("-std=c++17", "-O3", "-fPIC", "-shared"), *("-fno-math-errno", "-fno-trapping-math"))
OPENMP = "-fopenmp"
LIMIT_S = 300
PROBE = """#ifdef _OPENMP
#include <omp.h>
extern "C" int fxquant_probe(void) { return omp_get_max_threads(); }
#endif
"""
NOT_FOUND = "no C++ compiler was found (install g++, or set CXX)"


@dataclass(frozen=True)
class Compiler:
    """A C++ compiler.

    Attributes:
        path: Of the program.
        version: What it says of itself when asked with ``--version``.
    """

    path: str
    version: str

    @property
    def summary(self) -> str:
        """The first line of the version."""
        return self.version.splitlines()[0] if self.version else "of unknown version"


@dataclass(frozen=True)
class Toolchain:
    """A compiler with what it is told for this machine.

    Attributes:
        compiler: The program.
        isa: The instruction set that kernels are printed for.
        openmp: Whether it builds with OpenMP; without, kernels run on one thread.
    """

    compiler: Compiler
    isa: Isa
    openmp: bool

    @property
    def flags(self) -> tuple[str, ...]:
        """The compiler's arguments."""
        return (*FLAGS, *self.isa.flags, *((OPENMP,) if self.openmp else ()))


def compiler() -> Compiler | None:
    """The C++ compiler: ``$CXX`` if that works, else the first of `COMPILERS`; None without one."""
    return _find(os.environ.get(CXX, ""), os.environ.get("PATH", ""))


@functools.lru_cache(maxsize=16)
def _find(named: str, search: str) -> Compiler | None:
    if named:
        found = _asked(named, search)
        if found is not None:
            return found
        LOG.warning("%s is %r, which does not run: looking for another C++ compiler", CXX, named)
    return next((found for name in COMPILERS if (found := _asked(name, search))), None)


def _asked(name: str, search: str) -> Compiler | None:
    """A program that says its version when asked."""
    path = shutil.which(name, path=search)
    if path is None:
        return None
    try:
        done = subprocess.run(
            [path, "--version"], capture_output=True, text=True, check=True, timeout=LIMIT_S
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return Compiler(str(Path(path).absolute()), done.stdout.strip())


def host_isa() -> Isa:
    """The best instruction set of this processor, or the one that ``FXQUANT_ISA`` names.

    Raises:
        OptionError: ``FXQUANT_ISA`` names no instruction set, or one that the processor lacks or
            that this process may not use.
    """
    named, features = os.environ.get(ISA, ""), cpu_features()
    if not named:
        usable = (isa for isa in ISAS.values() if runs(isa))
        return next(isa for isa in usable if not isa.makers or cpu_maker() in isa.makers)
    if named not in ISAS:
        raise errors.unknown_isa(ISA, named, ISAS)
    missing = [name for name in ISAS[named].features if name not in features]
    if missing:
        raise errors.unsupported_isa(ISA, named, missing)
    if not runs(ISAS[named]):
        raise errors.refused_isa(ISA, named, tile_unit.refusal())
    return ISAS[named]


def runs(isa: Isa) -> bool:
    """Whether this process can use an instruction set."""
    if not cpu_features().issuperset(isa.features):
        return False
    return not (isa.has_tiles and tile_unit.refusal())


def refused() -> str:
    """Why a tile unit that the processor has is not used, or ``""``."""
    has_tiles = any(
        isa.has_tiles and cpu_features().issuperset(isa.features) for isa in ISAS.values()
    )
    return tile_unit.refusal() if has_tiles else ""


@functools.lru_cache(maxsize=1)
def cpu_features() -> frozenset[str]:
    """What the processor can do, as ``/proc/cpuinfo`` spells it; empty where it does not say."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return frozenset()
    return frozenset(_told("flags").split())


@functools.lru_cache(maxsize=1)
def cpu_maker() -> str:
    """Who made the processor, as ``/proc/cpuinfo`` spells it; empty where it does not say."""
    return _told("vendor_id")


@functools.lru_cache(maxsize=1)
def cpu_name() -> str:
    """The processor's name: what tells measurements on it from those on another."""
    return _told("model name") or platform.processor() or platform.machine()


def _told(key: str) -> str:
    """What ``/proc/cpuinfo`` says of the first processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(key)), "")


def toolchain() -> Toolchain | None:
    """What kernels are built with on this machine; `obstacle` says why where there is nothing.

    Raises:
        OptionError: ``FXQUANT_ISA`` cannot be used.
    """
    found, isa = compiler(), host_isa()
    able = _able(found, isa, bool(os.environ.get(ISA))) if found else None
    return able if isinstance(able, Toolchain) else None


def obstacle() -> str:
    """Why there is no toolchain, in a clause, or ``""``."""
    found, isa = compiler(), host_isa()
    if found is None:
        return NOT_FOUND
    able = _able(found, isa, bool(os.environ.get(ISA)))
    return able if isinstance(able, str) else ""


@functools.lru_cache(maxsize=16)
def _able(found: Compiler, isa: Isa, forced: bool) -> Toolchain | str:
    """The best that a compiler builds anything with, else what it says.

    Older compilers do not know every instruction set, and some have no OpenMP.
    """
    below = list(ISAS.values())[list(ISAS).index(isa.name) :]
    said = ""
    for candidate in [isa] if forced else below:
        for openmp in (True, False):
            tried = Toolchain(found, candidate, openmp)
            said = _fails(tried)
            if not said:
                if candidate is not isa:
                    LOG.warning(
                        "%s does not know %s: kernels use %s", found.path, isa.name, candidate.name
                    )
                if not openmp:
                    LOG.warning("%s has no OpenMP: kernels use one thread", found.path)
                return tried
    kept = _keep("nothing.cpp", PROBE)
    error = errors.compiler_failed("nothing", " ".join(_command(tried, kept)), said, kept)
    LOG.warning("%s", error)
    return error.reason


def _fails(chain: Toolchain) -> str:
    """What the compiler says when it is given next to nothing to build, ``""`` if it does it."""
    with tempfile.TemporaryDirectory(prefix="fxquant-") as folder:
        try:
            _compile(chain, Path(folder), PROBE)
        except _CompilerError as error:
            return str(error)
    return ""


def build(chain: Toolchain, name: str, source: str) -> Path:
    """Compiles one kernel, or finds what was compiled from the same text.

    Args:
        chain: What to build with.
        name: Of the kernel, for the message.
        source: A C++17 file.

    Returns:
        The shared object; its source lies beside it.

    Raises:
        CompilerError: The compiler failed. The source is kept, and the message says where.
        FolderError: The kernel cache cannot be written.
    """
    key = _key(chain, source)

    def compile_(path: Path) -> None:
        _compile(chain, path, source, _precompiled(chain))

    try:
        folder = cache.get_or_build("cpp", key, compile_)
    except _CompilerError as error:
        kept = _keep(f"{name}_{key[:8]}.cpp", source)
        command = " ".join(_command(chain, kept))
        raise errors.compiler_failed(name, command, str(error), kept) from error
    return folder / "kernel.so"


def _key(chain: Toolchain, source: str) -> str:
    found = chain.compiler
    return cache.key_of(__version__, found.path, found.version, *chain.flags, cache.code_of(source))


def _precompiled(chain: Toolchain) -> list[str]:
    lines = [*headers(chain.isa), *(["#include <omp.h>"] if chain.openmp else [])]
    command = (chain.compiler.path, *chain.flags)
    return precompiled.arguments(command, chain.compiler.version, "\n".join(lines), LIMIT_S)


class _CompilerError(Exception):
    """The compiler failed; the first lines that it said of an error."""


def _command(chain: Toolchain, source: Path, ahead: Sequence[str] = ()) -> list[str]:
    result = str(source.with_suffix(".so"))
    return [chain.compiler.path, *chain.flags, *ahead, str(source), "-o", result]


def _compile(chain: Toolchain, folder: Path, source: str, ahead: Sequence[str] = ()) -> None:
    path = folder / "kernel.cpp"
    path.write_text(source, encoding="utf-8")
    command = _command(chain, path, ahead)
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            check=False,
            timeout=LIMIT_S,
            env={**os.environ, "LC_ALL": "C"},
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise _CompilerError(error) from error
    if done.returncode != 0 or not path.with_suffix(".so").exists():
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        # Warnings may come first, which are not why.
        first = next((at for at, line in enumerate(lines) if "error" in line), 0)
        said = " | ".join(lines[first : first + 3]).replace(str(path), path.name)
        raise _CompilerError(said or f"nothing, with exit code {done.returncode}")


def _keep(name: str, source: str) -> Path:
    """Puts a source that did not compile where it can be read."""
    kept = cache.root() / "failed" / name
    kept.parent.mkdir(parents=True, exist_ok=True)
    cache.write_atomically(kept, source)
    return kept
