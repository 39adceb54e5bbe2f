"""Instruction sets that C++ kernels are printed for, and how to tell the compiler of them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Isa:
    """An instruction set.

    Attributes:
        name: ``"avx512"``, ``"avx2"`` or ``"portable"``.
        lanes: 32-bit lanes of a vector.
        flags: Arguments that make g++ and clang++ use it.
        features: What a processor must have to run it, as ``/proc/cpuinfo`` spells it.
        sums: Registers that few rows keep their sums in.
        few_heights: Rows of a panel that is multiplied with codes decoded in registers, the most
            first.
        many_heights: Rows of a panel that is multiplied with a decoded tile, the most first.
        dot_bf16: There is an instruction for dot products of bfloat16 pairs.
        dot_int8: There is an instruction for dot products of four bytes.
        holds_totals: There are registers for totals beside the sums that are added to them.
    """

    name: str
    lanes: int
    sums: int
    few_heights: tuple[int, ...]
    many_heights: tuple[int, ...]
    flags: tuple[str, ...] = ()
    features: tuple[str, ...] = ()
    dot_bf16: bool = False
    dot_int8: bool = False
    holds_totals: bool = False


AVX512 = Isa(
    "avx512",
    16,
    24,
    (16, 12, 8, 6, 4, 3, 2, 1),
    (12, 8, 4),
    (
        *("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vbmi"),
        *("-mavx512vnni", "-mavx512bf16", "-mfma", "-mf16c", "-mprefer-vector-width=512"),
    ),
    (
        *("avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512vbmi"),
        *("avx512_vnni", "avx512_bf16", "fma", "f16c"),
    ),
    dot_bf16=True,
    dot_int8=True,
    holds_totals=True,
)
AVX2 = Isa(
    "avx2",
    8,
    10,
    (8, 4, 3, 2, 1),
    (6, 4, 2),
    ("-mavx2", "-mfma", "-mf16c"),
    ("avx2", "fma", "f16c"),
)
PORTABLE = Isa("portable", 8, 8, (8, 4, 2, 1), (4, 2))

ISAS = {isa.name: isa for isa in (AVX512, AVX2, PORTABLE)}
"""The instruction sets by name, the best first."""
