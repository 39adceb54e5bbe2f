"""Codes of 2 and 4 bits inside bytes, the first in the highest bits."""

from __future__ import annotations

import sys

import torch
from torch import Tensor


def packed_size(count: int, bits: int) -> int:
    """Bytes that `count` codes take."""
    return -(-count * bits // 8)


def pack_codes(codes: Tensor, bits: int, fill: int = 0) -> Tensor:
    """Packs codes into bytes.

    Args:
        codes: uint8, flat, contiguous, one code each. May be overwritten.
        bits: 2, 4 or 8.
        fill: The code that fills up the last byte.

    Returns:
        uint8, flat, ``packed_size(codes.numel(), bits)`` long.
    """
    missing = -codes.numel() % (8 // bits)
    if missing:
        codes = torch.nn.functional.pad(codes, (0, missing), value=fill)
    while bits < 8:
        codes = _merge_pairs(codes, bits)
        bits *= 2
    return codes


def _merge_pairs(codes: Tensor, bits: int) -> Tensor:
    """Neighbours joined, the even one in the higher bits."""
    # Two bytes are read as one int16, so that this runs on contiguous vectors; a shift by 8 is
    # arithmetic, but codes under 128 never set the sign.
    pairs = codes.view(torch.int16)
    if sys.byteorder == "little":
        return ((pairs << bits) | (pairs >> 8)).to(torch.uint8)
    return ((pairs >> (8 - bits)) | pairs).to(torch.uint8)


def unpack_codes(packed: Tensor, bits: int, count: int) -> Tensor:
    """The inverse of `pack_codes`: uint8, flat, `count` long."""
    shifts = torch.arange(8 - bits, -1, -bits, dtype=torch.uint8, device=packed.device)
    fields = (packed.view(-1, 1) >> shifts) & (2**bits - 1)
    return fields.view(-1)[:count]
