"""The device: what it can do, and how calls on it are timed.

`Device` is a GPU. `Rehearsal` has the same methods on a CPU, so that everything else can be run
where there is none; its times say nothing about any GPU.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.timing import Run, Timing

_FLUSHED_BYTES = 512 << 20  # ten times the L2 of an H100
_READ_BYTES = 4 << 30
_SAMPLES = 9


@dataclass(frozen=True)
class Rates:
    """What bounds a product.

    Attributes:
        read: Bytes a second.
        flops: Operations a second (a multiply-add is two) of the matrix unit, by dtype.
    """

    read: float
    flops: dict[str, float]

    def shares(self, moved: float, operations: float, unit: str, seconds: float) -> dict[str, Any]:
        """Fractions of the measured bandwidth and of the measured throughput that a call reached.

        Args:
            moved: Bytes that it has to read and write.
            operations: Twice its multiply-adds.
            unit: Its dtype, a key of `flops`.
            seconds: What it took.
        """
        return {
            "bandwidth_share": moved / seconds / self.read,
            "throughput_share": operations / seconds / self.flops[unit],
        }


@dataclass(frozen=True)
class _Replay:
    """A call as a graph. What the graph reads has to stay where it was, so the call is kept."""

    graph: torch.cuda.CUDAGraph
    call: Run
    result: object

    def __call__(self) -> object:
        self.graph.replay()
        return self.result


class Device:
    """A GPU."""

    is_gpu = True
    target = "triton"

    def __init__(self) -> None:
        self.torch = torch.device("cuda")
        found = torch.cuda.get_device_properties(0)
        self.facts: dict[str, Any] = {
            "device": found.name,
            "processors": found.multi_processor_count,
            "memory_bytes": found.total_memory,
            "l2_bytes": getattr(found, "L2_cache_size", 0),
            "capability": list(torch.cuda.get_device_capability(0)),
            "cuda": torch.version.cuda,
            "hip": torch.version.hip,
        }
        self._buffer = torch.ones(_FLUSHED_BYTES // 4, dtype=torch.int32, device=self.torch)

    def synchronize(self) -> None:
        """Waits for what was launched."""
        torch.cuda.synchronize()

    def flush(self) -> None:
        """Takes everything else out of L2, by reading: what is written has to go back to memory."""
        self._buffer.max()

    def captured(self, run: Run) -> tuple[Run, bool]:
        """A call as a CUDA graph, where it can be one, and whether it is.

        Launching from Python takes longer than the shortest kernels do.
        """
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                run()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                result = run()
        except RuntimeError:
            # What waits for the host cannot be captured: it is timed as it is.
            torch.cuda.synchronize()
            return run, False
        return _Replay(graph, run, result), True

    def interleave(self, runs: Mapping[str, Run], rounds: int) -> dict[str, Timing]:
        """Times everyone once a round, in an order drawn anew, each with nothing of it in L2."""
        draw, order = random.Random(0), list(runs)
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(rounds):
            draw.shuffle(order)
            for name, value in self._round(order, runs).items():
                seconds[name].append(value)
        return {name: Timing.of(values) for name, values in seconds.items()}

    def _round(self, order: list[str], runs: Mapping[str, Run]) -> dict[str, float]:
        events = {}
        for name in order:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            # The host runs ahead while L2 is flushed, so the device never waits for it.
            self.flush()
            start.record()
            runs[name]()
            end.record()
            events[name] = start, end
        torch.cuda.synchronize()
        return {name: start.elapsed_time(end) / 1e3 for name, (start, end) in events.items()}

    def rates(self) -> Rates:
        """Measures reading and the matrix unit; takes a second."""
        size = 8192
        floats = torch.randn(size, size, device=self.torch, dtype=torch.bfloat16)
        codes = torch.randint(-127, 128, (size, size), device=self.torch, dtype=torch.int8)
        operations = 2.0 * size**3
        flops = {"bfloat16": operations / self._best(lambda: floats @ floats)}
        flops["int8"] = operations / self._best(lambda: torch._int_mm(codes, codes.t()))
        return Rates(self._read_rate(), flops)

    def _read_rate(self) -> float:
        """The better one of adding up and of copying, where half is written."""
        words = torch.ones(_READ_BYTES // 4, dtype=torch.float32, device=self.torch)
        copy = torch.empty_like(words)
        summed, copied = self._best(words.sum), self._best(lambda: copy.copy_(words))
        return _READ_BYTES / min(summed, copied / 2)

    def _best(self, run: Run) -> float:
        """Median seconds of a call that is far longer than its launch."""
        return self.interleave({"": run}, _SAMPLES)[""].median

    def peak_memory(self) -> int:
        """Most bytes that were allocated since `forget_peak`, but for what empties L2."""
        return int(torch.cuda.max_memory_allocated()) - self._buffer.nbytes

    def forget_peak(self) -> None:
        """Starts counting anew."""
        torch.cuda.reset_peak_memory_stats()


class Rehearsal(Device):
    """A CPU in the place of the GPU: runs the logic, measures nothing of interest."""

    is_gpu = False
    target = "torch"

    def __init__(self) -> None:
        self.torch = torch.device("cpu")
        self.facts = {"device": "a CPU: a rehearsal, no GPU measurement"}

    def synchronize(self) -> None:
        """Nothing runs by itself."""

    def flush(self) -> None:
        """Its caches do not matter."""

    def captured(self, run: Run) -> tuple[Run, bool]:
        """There are no graphs."""
        return run, False

    def _round(self, order: list[str], runs: Mapping[str, Run]) -> dict[str, float]:
        return {name: _seconds(runs[name]) for name in order}

    def rates(self) -> Rates:
        """Of a small copy and a small product."""
        words = torch.ones(1 << 16)
        copied = statistics.median(_seconds(words.clone) for _ in range(_SAMPLES))
        size = 128
        floats = torch.ones(size, size)
        product = statistics.median(_seconds(lambda: floats @ floats) for _ in range(_SAMPLES))
        rate = 2.0 * size**3 / product
        return Rates(words.nbytes / copied, {"bfloat16": rate, "int8": rate})

    def peak_memory(self) -> int:
        """Is not counted."""
        return 0

    def forget_peak(self) -> None:
        """Is not counted."""


def _seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def obstacle() -> str:
    """Why nothing can be measured here, in a sentence, or ``""``."""
    if not torch.cuda.is_available():
        return "No GPU: torch finds no CUDA or ROCm device, so there is nothing to measure."
    try:
        import triton  # noqa: F401
    except ImportError:
        return "No Triton: the kernels need it; run: pip install triton."
    return ""
