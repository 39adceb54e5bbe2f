"""The record of the kernels that ran, for those who listen."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

from fxquant.runtime.launch import Kernel

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
