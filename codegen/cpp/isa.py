"""Instruction sets that C++ kernels are printed for, and how to tell the compiler of them."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Isa:
    """An instruction set.

    Attributes:
        name: ``"amx"``, ``"avx512"``, ``"avx2"`` or ``"portable"``.
        vectors: The name of the one whose vector instructions it has.
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
        looks_ahead: Its processors read ahead by themselves as well as by being asked.
        has_tiles: There is a unit that multiplies tiles of bfloat16 pairs and of bytes, once the
            kernel of the system permits a process to use it.
    """

    name: str
    vectors: str
    lanes: int
    sums: int
    few_heights: tuple[int, ...]
    many_heights: tuple[int, ...]
    flags: tuple[str, ...] = ()
    features: tuple[str, ...] = ()
    dot_bf16: bool = False
    dot_int8: bool = False
    holds_totals: bool = False
    looks_ahead: bool = True
    has_tiles: bool = False


AVX512 = Isa(
    "avx512",
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
AMX = replace(
    AVX512,
    name="amx",
    flags=(*AVX512.flags, "-mamx-tile", "-mamx-bf16", "-mamx-int8"),
    features=(*AVX512.features, "amx_tile", "amx_bf16", "amx_int8"),
    looks_ahead=False,
    has_tiles=True,
)
AVX2 = Isa(
    "avx2",
    "avx2",
    8,
    10,
    (8, 4, 3, 2, 1),
    (6, 4, 2),
    ("-mavx2", "-mfma", "-mf16c"),
    ("avx2", "fma", "f16c"),
)
PORTABLE = Isa("portable", "portable", 8, 8, (8, 4, 2, 1), (4, 2))

ISAS = {isa.name: isa for isa in (AMX, AVX512, AVX2, PORTABLE)}
"""The instruction sets by name, the best first."""
