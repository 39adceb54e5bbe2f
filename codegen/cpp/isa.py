"""Instruction sets that C++ kernels are printed for, and how to tell the compiler of them."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Isa:
    """An instruction set.

    Attributes:
        name: As in `ISAS`.
        vectors: The name of the one whose vector instructions it has.
        lanes: 32-bit lanes of a vector.
        flags: Arguments that make g++ and clang++ use it.
        features: What a processor must have to run it, as ``/proc/cpuinfo`` spells it.
        sums: Registers that few rows keep their sums in.
        sums_at_once: How many of them different outputs or rows have, others being for turns.
        few_heights: Rows of a panel that is multiplied with codes decoded in registers, the most
            first.
        many_heights: Rows of a panel that is multiplied with a decoded tile, the most first.
        dot_bf16: There is an instruction for dot products of bfloat16 pairs.
        dot_int8: There is an instruction for dot products of four bytes.
        looks_up_bytes: There is a look-up of bytes in all of a vector, or of two.
        holds_totals: There are registers for totals beside the sums that are added to them.
        makers: Of the processors that it is the best for, as ``/proc/cpuinfo`` spells them; none
            are all that have it.
        looks_ahead: Its processors read ahead by themselves as well as by being asked.
        has_tiles: There is a unit that multiplies tiles of bfloat16 pairs and of bytes, once the
            kernel of the system permits a process to use it.
    """

    name: str
    vectors: str
    lanes: int
    sums: int
    sums_at_once: int
    few_heights: tuple[int, ...]
    many_heights: tuple[int, ...]
    flags: tuple[str, ...] = ()
    features: tuple[str, ...] = ()
    dot_bf16: bool = False
    dot_int8: bool = False
    looks_up_bytes: bool = False
    holds_totals: bool = False
    makers: tuple[str, ...] = ()
    looks_ahead: bool = True
    has_tiles: bool = False

    @property
    def splits_bytes(self) -> bool:
        """Whether products of bytes are made of products of words, which halves of them become."""
        return self.vectors == "avx2" and not self.dot_int8


_FLAGS_512 = (
    *("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni"),
    *("-mfma", "-mf16c", "-mprefer-vector-width=512"),
)
_FEATURES_512 = ("avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni", "fma", "f16c")
AVX512 = Isa(
    "avx512",
    "avx512",
    16,
    24,
    24,
    (16, 12, 8, 6, 4, 3, 2, 1),
    (12, 8, 4),
    (*_FLAGS_512, "-mavx512vbmi", "-mavx512bf16"),
    (*_FEATURES_512, "avx512vbmi", "avx512_bf16"),
    dot_bf16=True,
    dot_int8=True,
    looks_up_bytes=True,
    holds_totals=True,
    # Of Intel's processors a product of pairs takes twice as long as two of floats.
    makers=("AuthenticAMD", "HygonGenuine"),
)
AMX = replace(
    AVX512,
    name="amx",
    flags=(*AVX512.flags, "-mamx-tile", "-mamx-bf16", "-mamx-int8"),
    features=(*AVX512.features, "amx_tile", "amx_bf16", "amx_int8"),
    makers=(),
    looks_ahead=False,
    has_tiles=True,
)
AVX512_VBMI = replace(
    AVX512,
    name="avx512vbmi",
    flags=(*_FLAGS_512, "-mavx512vbmi"),
    features=(*_FEATURES_512, "avx512vbmi"),
    dot_bf16=False,
    makers=(),
    looks_ahead=False,
)
AVX512_VNNI = replace(
    AVX512_VBMI,
    name="avx512vnni",
    flags=_FLAGS_512,
    features=_FEATURES_512,
    looks_up_bytes=False,
)
AVX2 = Isa(
    "avx2",
    "avx2",
    8,
    10,
    4,
    (8, 4, 3, 2, 1),
    (6, 4, 2),
    ("-mavx2", "-mfma", "-mf16c"),
    ("avx2", "fma", "f16c"),
)
AVX2_VNNI = replace(
    AVX2,
    name="avx2vnni",
    flags=(*AVX2.flags, "-mavxvnni"),
    features=(*AVX2.features, "avx_vnni"),
    dot_int8=True,
)
PORTABLE = Isa("portable", "portable", 8, 8, 8, (8, 4, 2, 1), (4, 2))

ISAS = {isa.name: isa for isa in (AMX, AVX512, AVX512_VBMI, AVX512_VNNI, AVX2_VNNI, AVX2, PORTABLE)}
"""The instruction sets by name, the best first."""
