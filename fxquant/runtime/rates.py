"""What this machine does in a second, measured once and kept: what the cost model reckons with."""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import json
import logging
import math
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fxquant import errors
from fxquant.codegen.cpp.cost import Rates, usual_rates
from fxquant.codegen.cpp.rates import render_rates
from fxquant.codegen.cpp.support import paths
from fxquant.runtime import cache, toolchain
from fxquant.runtime.memory import Block

LOG = logging.getLogger("fxquant.rates")
READ_BYTES = 64 << 20
TURN_S = 1e-3
ROUNDS = 8
_MEASURING = threading.Lock()


def rates(chain: toolchain.Toolchain, threads: int) -> Rates:
    """The rates of this machine.

    Read from the kernel cache, or measured in about a tenth of a second and written there. Where
    neither works, the usual rates of the instruction set, with a warning.

    Args:
        chain: What kernels are built with.
        threads: That read memory together.
    """
    with _MEASURING:
        return _rates(chain, threads, cache.root())


@functools.lru_cache(maxsize=16)
def _rates(chain: toolchain.Toolchain, threads: int, root: Path) -> Rates:
    path = _path(chain, threads, root)
    try:
        return _read(path, chain)
    except FileNotFoundError:
        pass
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        LOG.warning("measured rates %s cannot be read (%r): measuring again", path, error)
    try:
        found = _measure(chain, threads)
    except (errors.FxquantError, OSError, ValueError) as error:
        LOG.warning("this machine's rates cannot be measured, usual ones are taken: %s", error)
        return usual_rates(chain.isa)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        named = {"isa": chain.isa.name, "cpu": toolchain.cpu_name(), "threads": threads}
        cache.write_atomically(path, json.dumps({**named, **dataclasses.asdict(found)}, indent=1))
    except OSError as error:
        LOG.warning("measured rates cannot be written to %s: %s", path, error)
    return found


def _path(chain: toolchain.Toolchain, threads: int, root: Path) -> Path:
    # A processor's name stands for it: a cache folder may be shared by machines.
    parts = [chain.isa.name, toolchain.cpu_name(), str(threads), render_rates(chain.isa)]
    return root / "rates" / f"{cache.key_of(*parts)}.json"


def _read(path: Path, chain: toolchain.Toolchain) -> Rates:
    data = json.loads(path.read_text(encoding="utf-8"))
    few, many = (
        {name: _positive(data[skeleton][name]) for name in paths(chain.isa)}
        for skeleton in ("few", "many")
    )
    return Rates(_positive(data["bandwidth"]), few, many, _positive(data["vectors"]))


def _positive(value: Any) -> float:
    rate = float(value)
    if not 0 < rate < math.inf:
        raise ValueError(f"{rate} is no rate")
    return rate


def _measure(chain: toolchain.Toolchain, threads: int) -> Rates:
    """Measures by the best of several short turns, taken in turn: others may be at work."""
    library = ctypes.CDLL(str(toolchain.build(chain, "rates", render_rates(chain.isa))))
    names = ["vectors"]
    names += [f"{skeleton}_{path}" for skeleton in ("few", "many") for path in paths(chain.isa)]
    loops = {name: _loop(library, name) for name in names}
    turns = {name: _turns(loop) for name, loop in loops.items()}
    loops["bandwidth"], turns["bandwidth"] = _reading(library, threads), 1
    best = dict.fromkeys(loops, 0.0)
    for _ in range(ROUNDS):
        for name, loop in loops.items():
            best[name] = max(best[name], loop(turns[name]))
    few, many = (
        {path: _positive(best[f"{skeleton}_{path}"]) for path in paths(chain.isa)}
        for skeleton in ("few", "many")
    )
    return Rates(_positive(best["bandwidth"]), few, many, _positive(best["vectors"]))


def _loop(library: ctypes.CDLL, name: str) -> Callable[[int], float]:
    """A loop as a function of its turns that gives instructions a second."""
    function = library[f"fxquant_{name}"]
    function.argtypes, function.restype = [ctypes.c_int64], ctypes.c_int64

    def run(turns: int) -> float:
        start = time.perf_counter()
        done: int = function(turns)
        return done / max(time.perf_counter() - start, 1e-9)

    return run


def _turns(loop: Callable[[int], float]) -> int:
    """Turns that take about `TURN_S`."""
    turns = 100
    while True:
        start = time.perf_counter()
        loop(turns)
        took = time.perf_counter() - start
        if took > TURN_S / 4:
            return max(1, int(turns * TURN_S / took))
        turns *= 4


def _reading(library: ctypes.CDLL, threads: int) -> Callable[[int], float]:
    """Reading what no cache holds, as a function of its turns that gives bytes a second."""
    block = Block(READ_BYTES)
    # Memory that was never written to is one page of zeros, over and over.
    ctypes.memset(block.address, 1, READ_BYTES)
    read = library.fxquant_read
    read.argtypes, read.restype = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int], ctypes.c_int64

    def run(turns: int) -> float:
        start = time.perf_counter()
        for _ in range(turns):
            read(block.address, READ_BYTES, threads)
        return turns * READ_BYTES / max(time.perf_counter() - start, 1e-9)

    return run
