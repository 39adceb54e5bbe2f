"""Memory for kernels, aligned and in huge pages, and what is freed for it given back."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import threading

import torch
from torch import Tensor

HUGE = 2 << 20
"""Bytes of a huge page on the processors that there are kernels for."""
MOST_SPARE = 16
"""The part of a block, one so-many-th, that its last huge page may be larger than what it holds."""
FREED_AT_ONCE = 64 << 20
"""Bytes that wait for each other: to go through all that is free takes milliseconds."""
_trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
_PRIVATE = (
    # The default is memory that a forked child shares: its results would be everybody's.
    {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
)


class Block:
    """Zeroed memory, aligned to 64 bytes and to huge pages where it fills any.

    A product against one row reads the whole weight once, and with pages of 4 KB looks up the
    address of each: Linux gives huge pages to whom asks. The last one is asked for only if it would
    hardly be larger than what it holds.

    Args:
        size: In bytes.
    """

    __slots__ = ("_map", "_view", "address", "size")

    def __init__(self, size: int) -> None:
        spare = HUGE if size >= HUGE else 0
        self._map = mmap.mmap(-1, max(size, 1) + spare, **_PRIVATE)
        self._view = ctypes.c_char.from_buffer(self._map)
        start = ctypes.addressof(self._view)
        self.address = -(-start // HUGE) * HUGE if spare else start
        self.size = size
        if spare and hasattr(mmap, "MADV_HUGEPAGE"):
            first, whole = self.address - start, size // HUGE * HUGE
            if -size % HUGE <= size // MOST_SPARE:
                whole += HUGE
            with contextlib.suppress(OSError):
                self._map.madvise(mmap.MADV_HUGEPAGE, first, min(whole, len(self._map) - first))
                if whole < size:  # or they may come unasked
                    self._map.madvise(mmap.MADV_NOHUGEPAGE, first + whole)

    def tensor(self) -> Tensor:
        """The memory as uint8 ``[size]``, for as long as the block lives."""
        memory = (ctypes.c_uint8 * self.size).from_address(self.address)
        return torch.frombuffer(memory, dtype=torch.uint8)


class Freed:
    """Returns large tensors that were freed to the system, some at a time.

    glibc keeps them for later: the stored codes of a model would stay beside the repacked ones.
    """

    _waiting = 0

    @classmethod
    def add(cls, size: int) -> None:
        """Counts bytes that were freed, or are about to be."""
        cls._waiting += size
        if cls._waiting >= FREED_AT_ONCE:
            cls._waiting = 0
            if _trim is not None:
                _trim(0)


class Scratch(threading.local):
    """One buffer for each Python thread, which only grows."""

    def __init__(self) -> None:
        self._block = Block(0)

    def at_least(self, size: int) -> int:
        """The address of the calling thread's buffer, of this many bytes or more."""
        if size > self._block.size:
            # Half as much again: a length that grows row by row asks seldom.
            self._block = Block(size + size // 2)
        return self._block.address
