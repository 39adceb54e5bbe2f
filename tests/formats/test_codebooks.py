"""Tables of levels against their definitions."""

from __future__ import annotations

import math

import pytest
import torch

from fxquant.formats.codebooks import NF4, codebooks, dynamic8, e4m3, fp4, normal_float, thresholds


def test_normal_float_reproduces_nf4() -> None:
    assert max(abs(a - b) for a, b in zip(normal_float(4), NF4, strict=True)) <= 1.1e-7


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_normal_float_of_any_size(bits: int) -> None:
    levels = normal_float(bits)
    assert len(set(levels)) == 2**bits
    assert list(levels) == sorted(levels)
    assert (levels[0], levels[-1]) == (-1.0, 1.0)
    assert 0.0 in levels


def test_fp4_is_e2m1_in_bitsandbytes_order() -> None:
    assert [round(level * 12, 5) for level in fp4()] == [
        *(0, 0.0625, 8, 12, 4, 6, 2, 3),
        *(0, -0.0625, -8, -12, -4, -6, -2, -3),
    ]


def test_e4m3_has_every_finite_value_over_448() -> None:
    levels = e4m3()
    assert max(levels) == 1.0
    assert levels[0b0_1000_000] == torch.tensor(2.0 / 448).item()
    assert levels[0b1_0000_001] == torch.tensor(-(2.0**-9) / 448).item()
    assert levels[127] == levels[255] == 0.0
    assert len(set(levels)) == 253


def test_dynamic8_has_seven_decades_without_minus_one() -> None:
    levels = dynamic8()
    assert len(set(levels)) == 256
    assert levels[-1] == 1.0
    assert levels[0] == pytest.approx(-0.99297, abs=1e-5)
    assert min(level for level in levels if level > 0) == pytest.approx(5.5e-7)


@pytest.mark.parametrize("name", codebooks())
def test_every_codebook_is_sound(name: str) -> None:
    book = codebooks()[name]
    assert len(book.levels) == 2**book.bits
    assert all(math.isfinite(level) for level in book.levels)
    assert max(abs(level) for level in book.levels) == 1.0
    assert all(torch.tensor(level).item() == level for level in book.levels)
    assert book.source
    found = thresholds(book)
    assert len(found.midpoints) == len(found.codes) - 1
    assert list(found.midpoints) == sorted(found.midpoints)
    assert not book.unused & set(found.codes)
