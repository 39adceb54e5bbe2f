"""The inverse of ``fxquant_prepare``: from a repacked weight back to the stored codes, bit for bit.

Scales need no inverse: they are small, and stay stored.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from fxquant.codegen.cpp.layout import segment_of_codes
from fxquant.codegen.cpp.plan import TILE, Plan
from fxquant.formats.bits import pack_codes, packed_size

_AT_ONCE = 1 << 21
"""Elements that are worked on at a time: temporaries stay small beside the weight."""


def can_restore(plan: Plan) -> bool:
    """Whether the repacked weight says all of the stored codes.

    It does not where it is a part of the stored tensor, or where bytes are kept as the integers
    that they stand for and two codes stand for one.
    """
    if _has_integers(plan) and len(set(plan.integers)) < len(plan.integers):
        return False
    weight, dense = plan.spec.weight, 1
    for stride, size in sorted(zip(weight.strides, weight.sizes, strict=True)):
        if size > 1 and stride != dense:
            return False
        dense *= size
    return weight.offset == 0 and dense == weight.numel


def restore(plan: Plan, prepared: Tensor, last: Tensor) -> Tensor:
    """The stored codes.

    Args:
        plan: Of a kernel for which `can_restore`.
        prepared: The repacked weight: uint8, ``[prepared_bytes]``.
        last: The last byte of the codes, ``[1]``, in their dtype. What fills it up is not repacked.

    Returns:
        Flat, in the dtype of `last` and in memory of its own.
    """
    bits, weight = plan.encoding.bits, plan.spec.weight
    start, count = segment_of_codes(plan)
    stored = prepared[start : start + 4 * count]
    if _has_integers(plan):
        codes = torch.empty(256, dtype=torch.uint8)
        codes[torch.tensor(plan.integers) + plan.byte_bias] = torch.arange(256, dtype=torch.uint8)
        stored = codes[stored.int()]
    batch, _, k = weight.sizes
    flat = torch.empty(weight.numel, dtype=torch.uint8)
    matrices = flat.as_strided(weight.sizes, weight.strides)
    tiles = stored.view(batch, plan.n_tiles, -1, TILE, 4)
    step = max(1, _AT_ONCE // (TILE * plan.k_padded))
    for e, first in itertools.product(range(batch), range(0, plan.n_tiles, step)):
        some = tiles[e, first : first + step]
        parts = [some >> shift & 2**bits - 1 for shift in range(0, 8, bits)]
        # [tile, group, output, place]; where a place's input stands, `Plan.places` says.
        each = torch.stack(parts, -1).view(*some.shape[:3], plan.side_by_side, -1)
        each = each.permute(0, 2, 1, 4, 3).reshape(-1, plan.k_padded)
        here = matrices[e, first * TILE : (first + step) * TILE]
        here.copy_(each[: len(here), :k])
    out = torch.empty(packed_size(flat.numel(), bits), dtype=torch.uint8)
    pack_codes(flat, bits, out)
    out = out.view(last.dtype)
    out[-1:] = last
    return out


def _has_integers(plan: Plan) -> bool:
    return plan.path == "int8" and plan.encoding.bits == 8
