"""Signal to noise, piece by piece, equals that of the whole tensor."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fxquant.formats import Encoding, pack, quality, sqnr_db

NF4 = Encoding(4, "nf4", (64,), Encoding(8, "dynamic8", (256,), offset=True))
ENCODINGS = {
    "nf4": NF4,
    "nf4 single": dataclasses.replace(NF4, scale=None),
    "int8 rows": Encoding(8, block=(1, -1)),
    "int4 groups": Encoding(4, block=(1, 32)),
    "int4 zeros": Encoding(4, block=(16,), zero_point=True),
    "int8 columns": Encoding(8, block=(-1, 1)),
    "int2": Encoding(2, block=(16,), full_range=True),
}


@pytest.mark.parametrize("name", ENCODINGS)
@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 200),
    chunk=st.sampled_from([1, 256, 1 << 14]),
)
def test_pieces_are_the_whole(name: str, rows: int, columns: int, chunk: int) -> None:
    torch.manual_seed(rows * columns)
    weight = torch.randn(rows, columns).t().contiguous().t()
    packed = pack(weight, ENCODINGS[name])
    whole = packed.dequantize(torch.float32).double()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quality, "_CHUNK", chunk)
        pieces = torch.cat([piece.reshape(-1) for _, piece in quality._pieces(packed)])
        found = sqnr_db(weight, packed)
    assert torch.equal(pieces.double(), whole.reshape(-1))
    noise = float((weight.double() - whole).square().sum())
    if noise:
        expected = 10 * math.log10(float(weight.double().square().sum()) / noise)
        assert found == pytest.approx(expected, abs=1e-6)


def test_edges() -> None:
    assert sqnr_db(torch.zeros(4, 16), pack(torch.zeros(4, 16), NF4)) == math.inf
    weight = torch.randn(256, 256)
    assert 19 < sqnr_db(weight, pack(weight, NF4)) < 22


def test_a_part_of_a_large_weight_tells_the_ratio(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    weight = torch.randn(1000, 1030)
    packed = pack(weight, NF4)
    whole = sqnr_db(weight, packed)
    monkeypatch.setattr(quality, "_ENOUGH", 1 << 17)
    monkeypatch.setattr(quality, "_CHUNK", 1 << 14)
    looked_at = sum(piece.numel() for _, piece in quality._pieces(packed, every=7))
    assert looked_at < packed.numel() / 6
    # The noise of 2**17 elements varies by 1 / sqrt(2**17), 0.3 % or 0.012 dB: five times that.
    assert sqnr_db(weight, packed) == pytest.approx(whole, abs=0.06)
    assert sqnr_db(weight, packed) != whole
