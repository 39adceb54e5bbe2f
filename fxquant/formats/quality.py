"""How much of a tensor its encoding keeps."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from fxquant.formats.blocks import block_grid, run_length
from fxquant.formats.decode import decode
from fxquant.formats.packed import PackedWeight

_CHUNK = 1 << 18
_ENOUGH = 1 << 22


def sqnr_db(original: Tensor, packed: PackedWeight) -> float:
    """Signal to quantization noise ratio in dB: infinite when exact, minus infinite for no signal.

    Decodes piece by piece, so that the extra memory stays small beside a layer. Of a weight with
    more than 2**22 elements every second, third .. piece is looked at: a part of that size tells
    the ratio to a few hundredths of a dB, and decoding all would take as long as packing.

    Args:
        original: What was packed, in the same shape.
        packed: What became of it.
    """
    flat = original.detach().reshape(-1)
    signal = noise = 0.0
    for start, piece in _pieces(packed, every=max(1, packed.numel() // _ENOUGH)):
        exact = flat[start : start + piece.numel()].double()
        signal += float(exact.square().sum())
        noise += float((exact - piece.reshape(-1)).square().sum())
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal else -math.inf


def _pieces(packed: PackedWeight, every: int = 1) -> Iterator[tuple[int, Tensor]]:
    """Every so-manieth piece with its first element's number, float32, whole blocks at a time.

    One piece is all there is where blocks are no runs of the flattened tensor.
    """
    encoding = packed.encoding
    grid = block_grid(encoding, tuple(packed.shape))
    width = run_length(grid)
    # A piece has to begin on a byte of codes and on a block of scales.
    aligned = math.lcm(8, encoding.scale.block[0]) if encoding.scale else 8
    if width is None or (encoding.scale and encoding.scale.block[0] == -1):
        yield 0, packed.dequantize(torch.float32)
        return
    runs = _Runs(packed, width)
    whole, rest = divmod(packed.numel(), width)
    step = max(1, _CHUNK // (width * aligned)) * aligned
    for first in range(0, whole, step * every):
        yield first * width, runs.decode(first, min(first + step, whole), width)
    if rest:
        yield whole * width, runs.decode(whole, whole + 1, rest)


class _Runs:
    """A packed weight whose blocks are runs of the flattened tensor, seen as rows."""

    def __init__(self, packed: PackedWeight, width: int) -> None:
        self.encoding = dataclasses.replace(packed.encoding, block=(1, -1))
        self.parts = dict(zip(self.encoding.parts, packed.tensors(), strict=True))
        self.width = width

    def decode(self, first: int, last: int, length: int) -> Tensor:
        """Blocks first to last, the first `length` elements of each: ``[last - first, length]``."""
        bits = self.encoding.bits
        begin = first * self.width * bits
        end = begin + (last - first) * length * bits
        parts = {**self.parts, "codes": self.parts["codes"][begin // 8 : -(-end // 8)]}
        for name in ("scales", "zeros"):
            if name in parts:
                parts[name] = parts[name][first:last]
        if self.encoding.scale is not None:
            group = self.encoding.scale.block[0]
            parts["nested"] = parts["nested"][first // group : -(-last // group)]
        return decode(list(parts.values()), self.encoding, (last - first, length), torch.float32)
