"""What calibration sees: statistics of activations, collected while a graph runs.

An observed graph is Dynamo's graph in full precision with a call of `observe` before each product
(`fxquant.passes.observe` puts them there). It runs op by op. Dynamo reuses one graph for many
blocks and models, so the weight that a product counts for is the one that arrives.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from fxquant.calibration import SAMPLE, Calibration, SiteStats, plain_name
from fxquant.formats import anchor_of


@dataclass(frozen=True)
class Site:
    """A product's weight in an observed graph.

    Attributes:
        index: Its position among Dynamo's inputs.
        name: Its path in the model that was compiled.
    """

    index: int
    name: str


class ObservedGraph:
    """Dynamo's graph in full precision, telling a collector what goes into its products.

    Args:
        run: Takes Dynamo's inputs.
        sites: The products' weights, by the numbers that the graph passes to `observe`.
    """

    def __init__(self, run: Callable[..., Any], sites: Sequence[Site]) -> None:
        self.run = run
        self.sites = tuple(sites)

    def __call__(self, collector: Collector | None, args: Sequence[Any]) -> Any:
        """Runs the graph; without a collector nothing is computed beyond it."""
        frames = _frames()
        frames.append((self, collector, args))
        try:
            return self.run(*args)
        finally:
            frames.pop()


def observe(x: Tensor, numbers: Sequence[int]) -> None:
    """Counts an activation ``[.., k]`` for the products with these numbers of the running graph."""
    graph, collector, args = _frames()[-1]
    if collector is None or x.numel() == 0:
        return
    with torch.no_grad():
        seen = _seen(x.detach(), collector.moments)
    for number in numbers:
        site = graph.sites[number]
        collector.add(args[site.index], site.name, seen)


class Collector:
    """Statistics by weight; weights are held weakly.

    Args:
        moments: Whether to sum second moments.
        names: All names of a weight, from the weight's anchor and the name it was met with.
    """

    def __init__(
        self,
        *,
        moments: bool = False,
        names: Callable[[Any, str], Sequence[str]] = lambda _, met: [plain_name(met)],
    ) -> None:
        self.moments = moments
        self.names = names
        self._tallies: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._lock = threading.Lock()

    def add(self, parameter: Tensor, name: str, seen: _Seen) -> None:
        """Counts an activation for a weight, which is named as it was when it came first."""
        with self._lock:
            tally = self._tallies.setdefault(anchor_of(parameter), _Tally(name))
            tally.add(seen)

    def not_finite(self) -> str:
        """Name of the first weight whose activations held NaN or Inf, or ``""``."""
        with self._lock:
            tallies = list(self._tallies.items())
        bad = (self.names(anchor, t.name)[0] for anchor, t in tallies if not t.is_finite())
        return next(bad, "")

    def calibration(self) -> Calibration:
        """What was seen."""
        with self._lock:
            found = [(a, tally.name, tally.stats()) for a, tally in self._tallies.items()]
        stats = {name: s for anchor, met, s in found for name in self.names(anchor, met)}
        return Calibration(stats, [(anchor, s) for anchor, _, s in found])


@contextlib.contextmanager
def collecting(collector: Collector) -> Iterator[None]:
    """While entered, the graphs of `active` observe for this collector, in this thread."""
    before = active()
    _LOCAL.active = collector
    try:
        yield
    finally:
        _LOCAL.active = before


def active() -> Collector | None:
    """The collector of the calibration that this thread runs, or None."""
    return getattr(_LOCAL, "active", None)


_LOCAL = threading.local()


def _frames() -> list[tuple[ObservedGraph, Collector | None, Sequence[Any]]]:
    """The observed graphs that this thread is running, the innermost last."""
    if not hasattr(_LOCAL, "frames"):
        _LOCAL.frames = []
    return _LOCAL.frames


@dataclass(frozen=True)
class _Seen:
    """Statistics of one activation, float32 and on its device; `maxima` are its rows'."""

    amax: Tensor
    low: Tensor
    high: Tensor
    maxima: Tensor
    moments: Tensor | None


def _seen(x: Tensor, moments: bool) -> _Seen:
    rows = x.reshape(-1, x.shape[-1]).float()
    magnitudes = rows.abs()
    low, high = rows.aminmax()
    second = rows.T @ rows if moments else None
    return _Seen(magnitudes.amax(0), low, high, magnitudes.amax(1), second)


class _Tally:
    """Running statistics of one weight's activations, on their device."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.tokens = 0
        self.sums: _Seen | None = None
        self.priorities = torch.empty(0, dtype=torch.int64)

    def add(self, seen: _Seen) -> None:
        before = self.sums
        count = len(seen.maxima)
        fresh = _priorities(self.tokens, count, seen.maxima.device)
        self.tokens += count
        if before is None:
            self.priorities, self.sums = fresh, seen
        else:
            self.priorities = torch.cat([self.priorities, fresh])
            self.sums = _Seen(
                torch.maximum(before.amax, seen.amax),
                torch.minimum(before.low, seen.low),
                torch.maximum(before.high, seen.high),
                torch.cat([before.maxima, seen.maxima]),
                _sum(before.moments, seen.moments),
            )
        if len(self.priorities) > 2 * SAMPLE:
            self._thin()

    def _thin(self) -> None:
        """Keeps the rows that come first by priority."""
        assert self.sums is not None
        kept = self.priorities.argsort()[:SAMPLE]
        self.priorities = self.priorities[kept]
        s = self.sums
        self.sums = _Seen(s.amax, s.low, s.high, s.maxima[kept], s.moments)

    def is_finite(self) -> bool:
        """Whether all that was seen is a number: NaN and Inf stay in the maxima."""
        return self.sums is not None and bool(self.sums.amax.isfinite().all())

    def stats(self) -> SiteStats:
        self._thin()
        assert self.sums is not None
        s = self.sums
        return SiteStats(
            amax=s.amax.cpu(),
            low=float(s.low),
            high=float(s.high),
            token_amax=s.maxima.sort().values.cpu(),
            tokens=self.tokens,
            moments=None if s.moments is None else s.moments.cpu(),
        )


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return None if a is None or b is None else a + b


def _priorities(first: int, count: int, device: torch.device) -> Tensor:
    """Numbers for rows in the order of their coming that look random and are always the same.

    The multiplication by an odd constant and the folding of the high bits are those of a usual
    integer hash: a stride through the rows would meet the same place of every sequence.
    """
    x = torch.arange(first, first + count, dtype=torch.int64, device=device)
    for _ in range(2):
        x = (x ^ (x >> 29)) * -4658895280553007687
    return x ^ (x >> 32)
