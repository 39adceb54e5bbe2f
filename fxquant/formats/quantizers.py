"""What one block becomes: its scale from its largest values, its codes from its scale.

A quantizer sees values in float32 and *peaks*: for each block the largest magnitude (one row), or
the largest of ``-x`` and of ``x`` (two rows) where the two ends matter. Peaks of two halves of a
block combine by `maximum`, so a block can be looked at piecemeal.

A quantizer keeps scratch memory between chunks (fresh pages cost more than the arithmetic), so one
serves one thread, and values handed to it are overwritten.
"""

from __future__ import annotations

import abc
import functools
import itertools

import numpy as np
import torch
from torch import Tensor

from fxquant.formats.codebooks import Codebook, get_codebook, thresholds
from fxquant.formats.encoding import Encoding

TINY = 1e-38
"""What the absmax of a codebook block is raised to before it divides, as bitsandbytes does."""

FEW = 16
"""Up to this many levels, comparing with every midpoint is faster than a search."""


class Quantizer(abc.ABC):
    """Block arithmetic of one encoding.

    Attributes:
        peak_rows: 1 when peaks are the magnitude's, 2 when they are of ``-x`` and ``x``.
        fill: The code that stands for 0, which fills up the last byte.
        cut_short_floor: What the peaks of the shorter last block of a flat encoding are raised to.
    """

    peak_rows = 1
    fill = 0
    cut_short_floor = -torch.inf

    def __init__(self) -> None:
        self._scratch: dict[torch.dtype, Tensor] = {}

    def peaks(self, x: Tensor) -> Tensor:
        """Peaks over the last dimension: ``[peak_rows, *x.shape[:-1]]``."""
        if self.peak_rows == 2:
            # A sum with 0 is never -0: which zero of several is the largest would depend on luck.
            return torch.stack([-x.amin(-1), x.amax(-1)]).add_(0.0)
        magnitudes = self.scratch(torch.float32, x).view(x.shape)
        return torch.abs(x, out=magnitudes).amax(-1).unsqueeze(0)

    @abc.abstractmethod
    def codes(self, x: Tensor, peaks: Tensor, *, cut_short: bool = False) -> Tensor:
        """Codes of `x`, one a byte, uint8, flat; valid until the next call.

        Args:
            x: float32, contiguous; overwritten.
            peaks: ``[peak_rows, ...]``, broadcast against `x` without the first dimension.
            cut_short: The block is the shorter last one of a flat encoding.
        """

    @abc.abstractmethod
    def parts(self, peaks: Tensor) -> tuple[Tensor, Tensor | None]:
        """Scales (float32) and zero points (uint8) of blocks with these peaks."""

    def scratch(self, dtype: torch.dtype, like: Tensor) -> Tensor:
        """Flat memory for as many elements, the same at every call."""
        kept = self._scratch.get(dtype)
        if kept is None or kept.numel() < like.numel():
            kept = torch.empty(like.numel(), dtype=dtype, device=like.device)
            self._scratch[dtype] = kept
        return kept[: like.numel()]


class TableQuantizer(Quantizer):
    """The nearest level of a codebook; the scale is the block's absmax."""

    def __init__(self, book: Codebook) -> None:
        super().__init__()
        self.book = book
        self.thresholds = thresholds(book)
        if not book.grid:
            self.cut_short_floor = TINY
        below_zero = sum(midpoint < 0 for midpoint in self.thresholds.midpoints)
        self.fill = self.thresholds.codes[below_zero]

    def codes(self, x: Tensor, peaks: Tensor, *, cut_short: bool = False) -> Tensor:
        """Ranks among the midpoints, of ``x`` over the block's absmax."""
        absmax = peaks[0]
        if self.book.grid:
            return self._codes_on_grid(x.mul_(1.0 / absmax).view(-1))
        absmax = absmax.clamp(min=TINY)
        scaled = (x.div_(absmax) if cut_short else x.mul_(1.0 / absmax)).view(-1)
        if len(self.thresholds.codes) <= FEW:
            return self._codes_by_comparison(scaled)
        midpoints = torch.tensor(self.thresholds.midpoints, device=x.device)
        ranks = torch.bucketize(scaled, midpoints, out_int32=True)
        table = torch.tensor(self.thresholds.codes, dtype=torch.uint8, device=x.device)
        return torch.index_select(table, 0, ranks)

    def parts(self, peaks: Tensor) -> tuple[Tensor, Tensor | None]:
        """The absmax."""
        return peaks[0], None

    def _codes_by_comparison(self, scaled: Tensor) -> Tensor:
        """Adds up one comparison a midpoint, each weighted with the step to the next code."""
        codes, midpoints = self.thresholds.codes, self.thresholds.midpoints
        steps = [(after - before) % 256 for before, after in itertools.pairwise(codes)]
        out = self.scratch(torch.uint8, scaled).fill_(codes[0])
        above = self.scratch(torch.bool, scaled)
        # NumPy compares into bytes with full vectors where torch goes element by element (0.06
        # against 0.8 ns on a CPU).
        climb = climb_with_numpy if scaled.device.type == "cpu" else climb_with_torch
        climb(scaled, list(zip(midpoints, steps, strict=True)), above, out)
        return out

    def _codes_on_grid(self, scaled: Tensor) -> Tensor:
        """The nearest level of the nearest point of an even grid, by a table over its points."""
        # A block of zeros gives 0 * inf = NaN here, and takes the first code.
        scaled.nan_to_num_(nan=-1.0).clamp_(-1.0, 1.0).add_(1.0).mul_(0.5)
        # bitsandbytes rounds once (a fused multiply-add), hence float64 in between.
        exact = self.scratch(torch.float64, scaled).copy_(scaled)
        point = scaled.copy_(exact.mul_(self.book.grid - 1).add_(0.5)).to(torch.int32)
        return torch.index_select(_grid_table(self.book).to(scaled.device), 0, point)


def climb_with_torch(
    values: Tensor, stairs: list[tuple[float, int]], above: Tensor, total: Tensor
) -> None:
    """For each midpoint and step: ``total += step`` (modulo 256) where values are above it.

    Args:
        values: float32, flat.
        stairs: The midpoints and steps.
        above: Scratch memory, bool.
        total: uint8.
    """
    for midpoint, step in stairs:
        torch.gt(values, midpoint, out=above)
        total.add_(above.view(torch.uint8), alpha=step)


def climb_with_numpy(
    values: Tensor, stairs: list[tuple[float, int]], above: Tensor, total: Tensor
) -> None:
    """As `climb_with_torch`, for tensors on the CPU."""
    numbers, mask, codes = values.numpy(), above.numpy(), total.numpy()
    ones = mask.view(np.uint8)
    for midpoint, step in stairs:
        np.greater(numbers, np.float32(midpoint), out=mask)
        if step != 1:
            np.multiply(ones, np.uint8(step), out=ones)
        np.add(codes, ones, out=codes)


@functools.cache
def _grid_table(book: Codebook) -> Tensor:
    """The code of every point of a codebook's grid."""
    found = thresholds(book)
    points = torch.arange(book.grid, dtype=torch.float32)
    points = (points + points) / float(book.grid - 1) - 1.0
    ranks = torch.bucketize(points, torch.tensor(found.midpoints))
    return torch.tensor(found.codes, dtype=torch.uint8)[ranks]


class UniformQuantizer(Quantizer):
    """Two's complement integers around 0; the largest magnitude takes the largest integer.

    ``scale = absmax / (2**(bits-1) - 1)``, ``code = round(x / scale)``, halves to even, saturated.
    """

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.bits = bits
        self.largest = 2 ** (bits - 1) - 1
        self.smallest = -self.largest

    def codes(self, x: Tensor, peaks: Tensor, *, cut_short: bool = False) -> Tensor:  # noqa: ARG002
        """Rounded quotients."""
        scales, _ = self.parts(peaks)
        whole = x.div_(_divisor(scales)).round_().clamp_(self.smallest, self.largest).view(-1)
        out = self.scratch(torch.int8, x).copy_(whole).view(torch.uint8)
        return out if self.bits == 8 else out.bitwise_and_(2**self.bits - 1)

    def parts(self, peaks: Tensor) -> tuple[Tensor, Tensor | None]:
        """The absmax over the largest integer."""
        return peaks[0] / self.largest, None


class FullRangeQuantizer(UniformQuantizer):
    """Two's complement integers with ``-2**(bits-1)``, which the extreme value takes.

    The scale carries the sign: it is negative where the extreme is positive, so that the extreme
    is met exactly and no value saturates by more than half a step on the other side of a
    one-sided block.
    """

    peak_rows = 2

    def __init__(self, bits: int) -> None:
        super().__init__(bits)
        self.smallest = -(2 ** (bits - 1))

    def parts(self, peaks: Tensor) -> tuple[Tensor, Tensor | None]:
        """The extreme value over the smallest integer."""
        low, high = peaks
        return torch.where(high > low, -high, low) / -self.smallest, None


class ZeroPointQuantizer(Quantizer):
    """Unsigned integers from a zero point: ``x`` is near ``(code - zero) * scale``.

    The block's range, widened to hold 0, is cut into ``2**bits - 1`` steps, so that 0 is exact.
    """

    peak_rows = 2

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.largest = 2**bits - 1

    def codes(self, x: Tensor, peaks: Tensor, *, cut_short: bool = False) -> Tensor:  # noqa: ARG002
        """Rounded quotients, moved by the zero point."""
        scales, zeros = self.parts(peaks)
        assert zeros is not None, "zero points come with the scales"
        whole = x.div_(_divisor(scales)).round_().add_(zeros).clamp_(0, self.largest)
        return self.scratch(torch.uint8, x).copy_(whole.view(-1))

    def parts(self, peaks: Tensor) -> tuple[Tensor, Tensor | None]:
        """The range over the largest integer, and where in it 0 lies."""
        low, high = peaks.clamp(min=0.0)
        # Divided first: the width of a block that spans float32 must not overflow.
        scales = (low / self.largest) + (high / self.largest)
        zeros = low.div(_divisor(scales)).round_().clamp_(0, self.largest)
        return scales, zeros.to(torch.uint8)


def _divisor(scales: Tensor) -> Tensor:
    """The scales, with Inf for 0: what is divided by it takes code 0."""
    return torch.where(scales == 0, torch.inf, scales)


def quantizer(encoding: Encoding) -> Quantizer:
    """The block arithmetic of an encoding."""
    if not encoding.is_uniform:
        return TableQuantizer(get_codebook(encoding.levels))
    if encoding.zero_point:
        return ZeroPointQuantizer(encoding.bits)
    return (FullRangeQuantizer if encoding.full_range else UniformQuantizer)(encoding.bits)
