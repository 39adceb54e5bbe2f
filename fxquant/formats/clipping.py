"""Clipping: a block's scale from a quantile of its magnitudes instead of the largest one."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from fxquant.formats.blocks import BlockGrid


def rank(clip: float, count: int) -> int:
    """Which of `count` magnitudes, from 1, is the `clip` quantile: never an interpolated one."""
    return max(1, math.ceil(clip * count))


def clip_peaks(peaks: Tensor, limits: Tensor) -> Tensor:
    """Peaks, lowered to the limits.

    A limit of 0 is none: it would wipe out a block that is mostly zeros. NaN and Inf stay, for the
    caller to find.
    """
    keep = (limits == 0) | ~torch.isfinite(peaks)
    return torch.where(keep, peaks, torch.minimum(peaks, limits))


def row_limits(x: Tensor, clip: float) -> Tensor:
    """The `clip` quantile of the magnitudes of each row, ``[rows]``."""
    return x.abs().kthvalue(rank(clip, x.shape[-1])).values


def block_limits(values: Tensor, grid: BlockGrid, clip: float, chunk: int) -> Tensor:
    """The `clip` quantile of the magnitudes of each block, ``[blocks]``, one block at a time.

    Args:
        values: Of shape ``grid.shape``.
        grid: The blocks.
        clip: The quantile.
        chunk: Elements to look at together.
    """
    limits = torch.empty(grid.count, device=values.device)
    dims = [
        [slice(start, start + extent) for start in range(0, size, extent)]
        for size, extent in zip(grid.shape, grid.extents, strict=True)
    ]
    for i, block in enumerate(itertools.product(*dims)):
        pieces = values[block].reshape(-1).split(chunk)
        limits[i] = _kth_magnitude(pieces, rank(clip, values[block].numel()))
    return limits


def _kth_magnitude(pieces: tuple[Tensor, ...], k: int) -> Tensor:
    """The k-th smallest magnitude (from 1) by counting bits: no sorted copy of the values.

    Magnitudes of float32 order as their bits do. One pass counts the upper 16 bits, a second one
    the lower 16 bits of those that share the upper ones of the answer.
    """

    def bits(piece: Tensor) -> Tensor:
        return piece.float().abs().view(torch.int32)

    def find(counts: Tensor, k: int) -> tuple[int, int]:
        totals = counts.cumsum(0)
        found = int(torch.searchsorted(totals, k))
        return found, k - int(totals[found] - counts[found])

    upper_counts = sum(torch.bincount(bits(piece) >> 16, minlength=1 << 15) for piece in pieces)
    upper, k = find(torch.as_tensor(upper_counts), k)
    lower_counts = torch.zeros(1 << 16, dtype=torch.int64, device=pieces[0].device)
    for piece in pieces:
        found = bits(piece)
        lower_counts += torch.bincount(found[found >> 16 == upper] & 0xFFFF, minlength=1 << 16)
    lower, _ = find(lower_counts, k)
    return torch.tensor(upper << 16 | lower, dtype=torch.int32).view(torch.float32)
