"""The assembly that turns a word of eight 4-bit codes into eight 16-bit floats on NVIDIA's GPUs."""

from __future__ import annotations

from collections.abc import Sequence

import torch

BYTES = "level_bytes"
"""The pointer to every other word of `level_words`. A permutation takes one constant at most, and
of further ones the assembler would make a copy each time."""

COPIES = 16
"""Of each word, one for every word of codes along a tile: what differs between threads, as far as
the compiler knows, stays in their own registers."""


def level_words(book: Sequence[float], dtype: str) -> tuple[int, ...]:
    """The lower bytes of 16 levels in a 16-bit dtype as four words, then the upper bytes."""
    bits = torch.tensor(book, dtype=getattr(torch, dtype)).view(torch.int16).tolist()
    words = []
    for shift in (0, 8):
        found = [b >> shift & 0xFF for b in bits]
        words += [sum(found[i + j] << 8 * j for j in range(4)) for i in range(0, 16, 4)]
    return tuple(word - (word >> 31 << 32) for word in words)


def constraints() -> str:
    """Eight results of 16 bits; the word and every other word of `level_words`."""
    return ",".join(["=h"] * 8 + ["r"] * 5)


def assembly(book: Sequence[float], dtype: str) -> list[str]:
    """PTX. Of every four codes: `s` their lower three bits, `t` what picks the half of the table.

    A nibble of a selector picks one byte out of eight. ``l`` and ``u`` are the lower and the upper
    bytes of four levels; the last permutations pair them, the upper nibble of a byte first.
    """
    first, second, third, fourth = (f"{w & 0xFFFFFFFF:#x}" for w in level_words(book, dtype)[1::2])
    lines = [
        "{",
        ".reg .b32 s, t, low, high, l, u, r0, r1, r2, r3;",
        "and.b32 s, $8, 0x77777777;",
        "shr.u32 t, $8, 1;",
        "lop3.b32 t, t, 0x44444444, 0x32103210, 0xea;",
    ]
    for half in range(2):
        if half:
            lines += ["shr.u32 s, s, 16;", "shr.u32 t, t, 16;"]
        lines += [
            f"prmt.b32 low, $9, {first}, s;",
            f"prmt.b32 high, $10, {second}, s;",
            "prmt.b32 l, low, high, t;",
            f"prmt.b32 low, $11, {third}, s;",
            f"prmt.b32 high, $12, {fourth}, s;",
            "prmt.b32 u, low, high, t;",
            f"prmt.b32 r{2 * half}, l, u, 0x4051;",
            f"prmt.b32 r{2 * half + 1}, l, u, 0x6273;",
        ]
    lines += [f"mov.b32 {{${2 * i}, ${2 * i + 1}}}, r{i};" for i in range(4)]
    return [*lines, "}"]
