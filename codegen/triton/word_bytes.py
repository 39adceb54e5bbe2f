"""The assembly that turns eight 4-bit codes into eight 16-bit floats on NVIDIA's GPUs."""

from __future__ import annotations

from collections.abc import Sequence

import torch

BYTES = "level_bytes"
"""The pointer to every other word of `level_words`. A permutation takes one constant at most, and
of further ones the assembler would make a copy each time."""

COPIES = 16
"""Of each word, one for every word of codes along a tile: what differs between threads, as far as
the compiler knows, stays in their own registers."""

LEGEND = (
    "# Four codes at a time: s are their lower three bits, t says which half of the table their",
    "# fourth bits pick, l and u are the lower and upper bytes of their levels, r0 to r3 pairs.",
)
"""Stands above the assembly, in whose words codes are looked up."""


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
    """PTX: the codes of a word in the order of inputs, the upper nibble of a byte first."""
    own = [f"${number}" for number in range(9, 13)]
    lines = ["{", ".reg .b32 s, t, low, high, l, u, r0, r1, r2, r3;"]
    lines += _lookups(book, dtype, "$8", own, ("0x4051", "0x6273"))
    lines += [f"mov.b32 {{${2 * i}, ${2 * i + 1}}}, r{i};" for i in range(4)]
    return [*lines, "}"]


def byte_constraints(*, scaled: bool) -> str:
    """Two results of four 16-bit numbers each; four bytes, and as many scales in two parts."""
    return ",".join(["=r"] * 4 + ["r"] * (5 if scaled else 1))


def byte_assembly(book: Sequence[float], dtype: str, *, scaled: bool) -> list[str]:
    """PTX: of four bytes the levels of the upper nibbles, then those of the lower ones.

    With scales: their products, rounded once, for ``level * rest`` is small.
    """
    lines = ["{", ".reg .b32 s, t, low, high, l, u, r0, r1, r2, r3, b0, b1, b2, b3;"]
    table = level_words(book, dtype)[::2]
    lines += [f"mov.b32 b{number}, {w & 0xFFFFFFFF:#x};" for number, w in enumerate(table)]
    lines += _lookups(book, dtype, "$4", ["b0", "b1", "b2", "b3"], ("0x6240", "0x7351"))
    kind = {"bfloat16": "bf16x2", "float16": "f16x2"}[dtype]
    for number, found in enumerate(("r1", "r3", "r0", "r2")):
        if scaled:
            scale, rest = f"${5 + number % 2}", f"${7 + number % 2}"
            lines.append(f"mul.rn.{kind} l, {found}, {rest};")
            lines.append(f"fma.rn.{kind} ${number}, {found}, {scale}, l;")
        else:
            lines.append(f"mov.b32 ${number}, {found};")
    return [*lines, "}"]


def _lookups(
    book: Sequence[float], dtype: str, word: str, table: Sequence[str], pairs: tuple[str, str]
) -> list[str]:
    """The levels of eight codes, in pairs in ``r0`` to ``r3``; `LEGEND` says what is what.

    A nibble of a selector picks one byte out of eight.
    """
    odd = [f"{w & 0xFFFFFFFF:#x}" for w in level_words(book, dtype)[1::2]]
    lines = [
        f"and.b32 s, {word}, 0x77777777;",
        f"shr.u32 t, {word}, 1;",
        "lop3.b32 t, t, 0x44444444, 0x32103210, 0xea;",
    ]
    for half in range(2):
        if half:
            lines += ["shr.u32 s, s, 16;", "shr.u32 t, t, 16;"]
        lines += [
            f"prmt.b32 low, {table[0]}, {odd[0]}, s;",
            f"prmt.b32 high, {table[1]}, {odd[1]}, s;",
            "prmt.b32 l, low, high, t;",
            f"prmt.b32 low, {table[2]}, {odd[2]}, s;",
            f"prmt.b32 high, {table[3]}, {odd[3]}, s;",
            "prmt.b32 u, low, high, t;",
            *(f"prmt.b32 r{2 * half + number}, l, u, {pair};" for number, pair in enumerate(pairs)),
        ]
    return lines
