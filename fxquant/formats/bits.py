"""Codes of 2 and 4 bits inside bytes, the first in the highest bits."""

from __future__ import annotations

import sys

import torch
from torch import Tensor


def packed_size(count: int, bits: int) -> int:
    """Bytes that `count` codes take."""
    return -(-count * bits // 8)


def pack_codes(codes: Tensor, bits: int, out: Tensor, fill: int = 0) -> None:
    """Packs codes into bytes.

    Args:
        codes: uint8, flat, contiguous, one code each; overwritten.
        bits: 2, 4 or 8.
        out: uint8, flat, ``packed_size(codes.numel(), bits)`` long.
        fill: The code that fills up the last byte.
    """
    missing = -codes.numel() % (8 // bits)
    if missing:
        codes = torch.nn.functional.pad(codes, (0, missing), value=fill)
    if bits == 2:
        codes = _join_pairs(codes, 2).to(torch.uint8)
    out.copy_(codes if bits == 8 else _join_pairs(codes, 4))


def _join_pairs(codes: Tensor, bits: int) -> Tensor:
    """Neighbours joined in the low byte of an int16 each, the even one in the higher bits."""
    pairs = codes.view(torch.int16)
    if sys.byteorder == "big":
        return pairs.bitwise_or_(pairs >> (8 - bits))
    # A pair reads as odd * 256 + even. Times 2**(8 + bits) + 1, modulo 2**16, that is
    # even * 2**(8 + bits) + odd * 256 + even: the joined byte above one that is shifted out.
    return pairs.mul_((1 << (8 + bits)) + 1).bitwise_right_shift_(8)
