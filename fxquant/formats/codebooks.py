"""Codebooks: what a code stands for, before it is multiplied by its block's scale.

Every table is normalised so that the largest magnitude is 1, and is listed in code order: the
level of code 0 first.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from statistics import NormalDist

import torch

NF4: tuple[float, ...] = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)


@dataclass(frozen=True)
class Codebook:
    """A named table of levels.

    Attributes:
        name: As in `Encoding.levels`.
        levels: ``2**bits`` finite numbers in code order.
        source: Where the table comes from.
        grid: Points of an even grid over [-1, 1] that a value is moved to before the nearest level
            is looked up; 0 for none. bitsandbytes' CPU kernels look 8-bit codes up in such a table
            of 65536 entries, which decides values next to a midpoint differently.
        unused: Codes that are never produced.
    """

    name: str
    levels: tuple[float, ...]
    source: str
    grid: int = 0
    unused: frozenset[int] = frozenset()

    @property
    def bits(self) -> int:
        """Bits a code."""
        return len(self.levels).bit_length() - 1


@dataclass(frozen=True)
class Thresholds:
    """How to find the nearest level of a value by comparisons alone.

    Attributes:
        codes: The codes by rising level (equal levels: by rising code).
        midpoints: Between neighbours, computed in float32. A value takes ``codes[r]``, r being the
            number of midpoints that it lies strictly above.
    """

    codes: tuple[int, ...]
    midpoints: tuple[float, ...]


@functools.cache
def normal_float(bits: int, offset: float = 0.9677083) -> tuple[float, ...]:
    """NormalFloat-k: levels that standard normal values use equally often.

    QLoRA (Dettmers et al., 2023, arXiv:2305.14314), section 3 and equation 4: ``2**(bits-1)``
    quantiles for the negative half and ``2**(bits-1) + 1`` for the positive one, one of the two
    zeros dropped, divided by the largest. `offset` is the probability of the outermost quantile.
    ``normal_float(4)`` is the published NF4 table to 1.1e-7.

    Args:
        bits: Bits a code, at least 2.
        offset: Probability at the outermost positive level.
    """
    half = 2 ** (bits - 1)
    quantile = NormalDist().inv_cdf

    def side(count: int) -> list[float]:
        # Probabilities and quotients in float32, as when the published table was made.
        probabilities = torch.linspace(offset, 0.5, count + 1, dtype=torch.float32)
        return [quantile(p) for p in probabilities[:-1].tolist()]

    values = torch.tensor(sorted([*side(half), 0.0, *(-value for value in side(half - 1))]))
    return tuple((values / values.max()).tolist())


@functools.cache
def fp4() -> tuple[float, ...]:
    """FP4 of bitsandbytes: one sign, two exponent and one mantissa bit, in its own bit order."""
    magnitudes = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)
    half = (torch.tensor(magnitudes) / 12.0).tolist()
    return (*half, *(0.0 - value for value in half))


@functools.cache
def dynamic8() -> tuple[float, ...]:
    """The signed 8-bit dynamic data type of bitsandbytes.

    8-bit Approximations for Parallelism in Deep Learning (Dettmers, 2016, arXiv:1511.04561),
    section 2: a sign, a unary decimal exponent from 0 to -6, and a linear fraction in what bits
    are left; each level is the middle of its interval between 0.1 and 1. Plus 0 and 1.
    """
    levels = [0.0, 1.0]
    for exponent in range(7):
        edges = torch.linspace(0.1, 1.0, 2**exponent + 1, dtype=torch.float32)
        middles = 10.0 ** (exponent - 6) * ((edges[:-1] + edges[1:]) / 2.0)
        levels += middles.tolist() + (-middles).tolist()
    return tuple(sorted(levels))


@functools.cache
def e4m3() -> tuple[float, ...]:
    """FP8 E4M3 divided by its largest number, 448, in bit order.

    FP8 Formats for Deep Learning (Micikevicius et al., 2022, arXiv:2209.05433), table 1. The two
    NaN codes (127 and 255) stand for 0 here and are never produced.
    """
    values = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).to(torch.float32)
    return tuple((torch.nan_to_num(values, nan=0.0) / 448.0).tolist())


@functools.cache
def _registry() -> dict[str, Codebook]:
    qlora = "QLoRA, arXiv:2305.14314, section 3"
    books = [
        Codebook("nf4", NF4, f"{qlora}, appendix E"),
        Codebook("fp4", fp4(), "bitsandbytes, FP4 (E2M1 in its own bit order)"),
        Codebook("nf2", normal_float(2), qlora),
        Codebook("nf8", normal_float(8), qlora),
        Codebook("dynamic8", dynamic8(), "arXiv:1511.04561, section 2", grid=65536),
        Codebook("e4m3", e4m3(), "arXiv:2209.05433, table 1", unused=frozenset((127, 255))),
    ]
    return {book.name: book for book in books}


def codebooks() -> dict[str, Codebook]:
    """The named codebooks."""
    return dict(_registry())


@functools.cache
def get_codebook(levels: str | tuple[float, ...]) -> Codebook:
    """The codebook behind `Encoding.levels`.

    Args:
        levels: A name out of `codebooks`, or the levels themselves.

    Raises:
        KeyError: No codebook has that name.
    """
    if isinstance(levels, str):
        return _registry()[levels]
    return Codebook("", levels, "given with the encoding")


@functools.cache
def thresholds(book: Codebook) -> Thresholds:
    """The comparisons that find a codebook's nearest level."""
    codes = [code for code in range(len(book.levels)) if code not in book.unused]
    codes.sort(key=lambda code: book.levels[code])
    levels = torch.tensor([book.levels[code] for code in codes], dtype=torch.float32)
    return Thresholds(tuple(codes), tuple(((levels[:-1] + levels[1:]) / 2).tolist()))


def is_table(levels: tuple[float, ...], bits: int) -> bool:
    """Whether these can be the levels of an encoding of `bits` bits."""
    return len(levels) == 2**bits and all(
        isinstance(level, (int, float)) and math.isfinite(level) for level in levels
    )
