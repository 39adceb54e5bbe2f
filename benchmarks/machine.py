"""What the machine can do: its DRAM read rate and the rates of its dot-product instructions.

The loops are in `machine.cpp`, built with the compiler that builds the kernels; what a tile unit
does is what the cost model of the kernels reckons with.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import platform
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from fxquant.runtime import rates, toolchain

UNITS = ("float32", "bfloat16", "int8")
"""What the operands of a dot product can be."""

_SAMPLES = 9
_TURNS = 1_000_000
_BUFFER_CACHES, _QUICK_CACHES = 8, 2


@dataclass(frozen=True)
class Rates:
    """What bounds a product on this machine, with all threads.

    Attributes:
        read: Bytes read from DRAM a second.
        dots: Multiply-adds a second, by what is multiplied (`UNITS`); 0 without an instruction.
    """

    read: float
    dots: dict[str, float]

    def least_seconds(self, moved: float, multiplied: float, unit: str) -> float:
        """The roofline: no less time than the slower of reading and multiplying takes.

        Args:
            moved: Bytes.
            multiplied: Multiply-adds.
            unit: One of `UNITS`. Without an instruction for it, as fast as float32.
        """
        rate = self.dots[unit] or self.dots["float32"]
        return max(moved / self.read, multiplied / rate if rate else 0.0)


class Machine:
    """Measures rates, and empties the caches.

    Args:
        threads: As many as the contenders use.
        quick: Caches are emptied in a quarter of the time, and not wholly.
    """

    def __init__(self, threads: int, *, quick: bool = False) -> None:
        self.threads = threads
        self.cache_bytes = last_level_cache()
        # Reading twice the last-level cache leaves a part of it in place: replacement is not
        # strictly by age. Eight times leaves nothing that a timing shows.
        size = self.cache_bytes * (_QUICK_CACHES if quick else _BUFFER_CACHES)
        memory = mmap.mmap(-1, size)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            memory.madvise(mmap.MADV_HUGEPAGE)
        self._buffer = torch.frombuffer(memory, dtype=torch.uint8)
        self._buffer.fill_(1)
        self._library = _library()

    def evict(self) -> float:
        """Empties the caches; returns the bytes a second at which DRAM was read for that."""
        start = time.perf_counter()
        self._library.read_once(self._buffer.data_ptr(), self._buffer.nbytes, self.threads)
        return self._buffer.nbytes / (time.perf_counter() - start)

    def read(self, tensor: torch.Tensor) -> None:
        """Reads a tensor's memory once, on all threads."""
        self._library.read_once(tensor.data_ptr(), tensor.nbytes, self.threads)

    def rates(self) -> Rates:
        """Measures; takes less than a second."""
        dots = {unit: self._dots(unit) for unit in UNITS}
        return Rates(_median(self.evict), {**dots, **self._tiles()})

    def _tiles(self) -> dict[str, float]:
        """Multiply-adds of the tile unit, where kernels use one."""
        chain = toolchain.toolchain()
        if chain is None or not chain.isa.has_tiles:
            return {}
        found = rates.rates(chain, self.threads).many
        each = {"bfloat16": 2 * found["bf16"], "int8": 4 * found["int8"]}
        return {unit: rate * chain.isa.lanes * self.threads for unit, rate in each.items()}

    def _dots(self, unit: str) -> float:
        loop = getattr(self._library, f"dot_{unit}")

        def sample() -> float:
            start = time.perf_counter()
            return loop(_TURNS, self.threads) / (time.perf_counter() - start)

        return _median(sample)


def _median(sample: Callable[[], float]) -> float:
    sample()
    return statistics.median(sample() for _ in range(_SAMPLES))


@functools.lru_cache(maxsize=1)
def _library() -> ctypes.CDLL:
    compiler = toolchain.compiler()
    if compiler is None:
        raise SystemExit("The benchmarks measure the machine in C++: install g++, or set CXX.")
    source = Path(__file__).with_name("machine.cpp")
    with tempfile.TemporaryDirectory(prefix="fxquant-bench-") as folder:
        built = Path(folder) / "machine.so"
        flags = ["-std=c++17", "-O3", "-march=native", "-fopenmp", "-fPIC", "-shared"]
        subprocess.run([compiler.path, *flags, str(source), "-o", str(built)], check=True)
        library = ctypes.CDLL(str(built))
    library.read_once.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int]
    library.read_once.restype = ctypes.c_int64
    for unit in UNITS:
        function = getattr(library, f"dot_{unit}")
        function.argtypes = [ctypes.c_int64, ctypes.c_int]
        function.restype = ctypes.c_int64
    return library


def last_level_cache() -> int:
    """Bytes of the largest cache that a core reaches; 32 MiB where the system does not say."""
    sizes = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    known = [int(path.read_text().strip().removesuffix("K")) * 1024 for path in sizes]
    return max(known, default=32 << 20)


def processor() -> str:
    """The processor's name."""
    listed = Path("/proc/cpuinfo")
    names = listed.read_text().splitlines() if listed.exists() else []
    found = [line.split(":", 1)[1].strip() for line in names if line.startswith("model name")]
    return found[0] if found else platform.processor()
