"""Times contenders side by side: interleaved, on rotated weights that are in no cache.

Each round calls every contender once, in an order drawn anew, so that a noisy neighbour disturbs
all of them alike. Before each timed call the caches are emptied and the contender multiplies with
another copy of its weights, as if that were the layer before: its code is warm then, and OpenMP's
threads are awake (after a pause they take milliseconds to come to the first parallel region), and
the weights of the timed call are in DRAM.
"""

from __future__ import annotations

import itertools
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

Run = Callable[[], object]


@dataclass(frozen=True)
class Timing:
    """Seconds that a call took.

    Attributes:
        median: Over all rounds.
        low: The first quartile.
        high: The third quartile.
        rounds: Calls timed.
    """

    median: float
    low: float
    high: float
    rounds: int

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Timing:
        """Median and quartiles of two calls or more."""
        low, median, high = statistics.quantiles(seconds, n=4, method="inclusive")
        return cls(median, low, high, len(seconds))


def interleave(
    contenders: Mapping[str, Sequence[Run]],
    rounds: int,
    evict: Callable[[], object],
    done: Callable[[], object] = lambda: None,
) -> dict[str, Timing]:
    """Times every contender `rounds` times.

    Args:
        contenders: By name, the same call once for each copy of its weights; the copies take turns.
            One copy does where it is many times larger than the caches.
        rounds: Two or more.
        evict: Empties the caches.
        done: Called after each round.
    """
    # What a first call sets up (repacked weights, thread-local buffers) is no part of a call.
    for run in itertools.chain.from_iterable(contenders.values()):
        run()
    order = list(contenders)
    draw = random.Random(0)
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(rounds):
        draw.shuffle(order)
        for name in order:
            copies = contenders[name]
            run, before = copies[turn % len(copies)], copies[(turn + 1) % len(copies)]
            evict()
            before()
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
        done()
    return {name: Timing.of(values) for name, values in seconds.items()}
