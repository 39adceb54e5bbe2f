"""How often kernels are called and how long they take, where they are dumped.

A launch whose target ends in `TIMED` goes through a `Timed` runner; others do without. On a GPU
events are recorded around the launch, and read when someone asks.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

TIMED = ":timed"
"""What a target of a launch ends in, where its calls are counted."""
_MOST_TIMES = 1000
_MOST_EVENTS = 100


def named(target: str, *, wanted: bool) -> str:
    """What a launch calls a target, according to whether its calls are counted."""
    return target + TIMED if wanted and target != "torch" else target


@dataclass(frozen=True)
class Calls:
    """The calls of a kernel with one number of rows.

    Attributes:
        rows: The number.
        count: How many there were.
        seconds: Of the last 1000 (on a GPU: 100), the median; None if none could be timed.
    """

    rows: int
    count: int
    seconds: float | None


@dataclass
class _Times:
    count: int = 0
    seconds: deque[float] = field(default_factory=lambda: deque(maxlen=_MOST_TIMES))
    events: deque[Any] = field(default_factory=lambda: deque(maxlen=_MOST_EVENTS))

    def median(self) -> float | None:
        """Of what was timed; waits for a GPU."""
        for start, end in self.events:
            end.synchronize()
            self.seconds.append(start.elapsed_time(end) / 1e3)
        self.events.clear()
        return statistics.median(self.seconds) if self.seconds else None


_known: dict[tuple[str, str], dict[int, _Times]] = {}
_lock = threading.Lock()


def timed(
    key: tuple[str, str], runner: Callable[..., Any], rows: Callable[..., int]
) -> Callable[..., Any]:
    """A runner that counts its calls and times them.

    Args:
        key: The spec as JSON, and the target.
        runner: Runs the kernel.
        rows: The number of rows, of a call's operands.
    """
    with _lock:
        kept = _known.setdefault(key, {})
    return Timed(kept, runner, rows)


class Timed:
    """Counts the calls of a kernel; see `timed`."""

    def __init__(
        self, kept: dict[int, _Times], runner: Callable[..., Any], rows: Callable[..., int]
    ) -> None:
        self._kept, self._runner, self._rows = kept, runner, rows
        self.__self__ = getattr(runner, "__self__", None)  # as of the method that it stands for

    def __call__(self, *operands: Any) -> Any:
        """Computes the spec."""
        times = self._kept.setdefault(self._rows(operands), _Times())
        first = operands[0] if isinstance(operands[0], Tensor) else operands[0][0]
        times.count += 1
        if first.is_cuda:
            return self._on_gpu(times, operands)
        start = time.perf_counter()
        result = self._runner(*operands)
        times.seconds.append(time.perf_counter() - start)
        return result

    def _on_gpu(self, times: _Times, operands: Any) -> Any:
        if torch.cuda.is_current_stream_capturing():
            return self._runner(*operands)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        result = self._runner(*operands)
        end.record()
        times.events.append((start, end))
        return result


def calls(spec: str, target: str) -> list[Calls]:
    """The calls of a kernel so far, by the number of rows."""
    found = dict(_known.get((spec, target), {}))
    return [Calls(rows, found[rows].count, found[rows].median()) for rows in sorted(found)]
