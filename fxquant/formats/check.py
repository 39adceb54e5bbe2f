"""Whether stored parts fit their encoding: what a file says is not to be believed."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fxquant.formats.bits import packed_size
from fxquant.formats.blocks import block_grid
from fxquant.formats.encoding import Encoding


def expected_parts(
    encoding: Encoding, shape: Sequence[int]
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of each part of an encoded tensor, by the part's name."""
    shape = tuple(shape)
    blocks = block_grid(encoding, shape).count
    signed = encoding.bits == 8 and encoding.is_uniform and not encoding.zero_point
    codes = torch.int8 if signed else torch.uint8
    parts: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
        "codes": ((packed_size(math.prod(shape), encoding.bits),), codes),
        "scales": ((blocks,), torch.float32 if encoding.scale is None else torch.uint8),
        "offset": ((), torch.float32),
        "zeros": ((blocks,), torch.uint8),
    }
    if encoding.scale is not None:
        parts["nested"] = ((block_grid(encoding.scale, (blocks,)).count,), torch.float32)
    return {name: parts[name] for name in encoding.parts}


def misfit(tensors: Sequence[Tensor], encoding: Encoding, shape: Sequence[int]) -> str | None:
    """What is wrong with stored parts, in a clause; None when nothing is."""
    if any(size < 1 for size in shape):
        return f"it is empty, shape {tuple(shape)}"
    for (name, (size, dtype)), tensor in zip(
        expected_parts(encoding, shape).items(), tensors, strict=True
    ):
        if (tuple(tensor.shape), tensor.dtype) != (size, dtype):
            return (
                f"its {name} are {tensor.dtype} {tuple(tensor.shape)} where {dtype} {size} belong"
            )
    return None
