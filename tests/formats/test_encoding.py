"""What an `Encoding` accepts, and what it is written down as."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fxquant import errors
from fxquant.formats import Encoding

SCALES = st.builds(
    Encoding,
    st.just(8),
    st.sampled_from(["dynamic8", "e4m3"]),
    st.sampled_from([(256,), (-1,), (16,)]),
    offset=st.booleans(),
)
EXTENTS = st.sampled_from([1, -1, 16, 64, 128, 4096])
BLOCKS = st.one_of(
    st.sampled_from([(16,), (64,), (4096,), (-1,)]),
    st.lists(EXTENTS, min_size=2, max_size=3).map(tuple),
)
CLIPS = st.one_of(st.none(), st.floats(0.5, 1.0))


@st.composite
def encodings(draw: st.DrawFn) -> Encoding:
    bits = draw(st.sampled_from([2, 4, 8]))
    shared = {
        "block": draw(BLOCKS),
        "scale": draw(st.one_of(st.none(), SCALES)),
        "clip": draw(CLIPS),
    }
    if draw(st.booleans()):
        zero_point = draw(st.booleans())
        full_range = draw(st.booleans()) and not zero_point
        return Encoding(bits, zero_point=zero_point, full_range=full_range, **shared)
    names = {2: ["nf2"], 4: ["nf4", "fp4"], 8: ["nf8", "dynamic8", "e4m3"]}[bits]
    table = st.lists(st.floats(-1, 1, width=32), min_size=2**bits, max_size=2**bits).map(tuple)
    levels = draw(st.one_of(st.sampled_from(names), table) if bits < 8 else st.sampled_from(names))
    return Encoding(bits, levels, **shared)


@given(encodings())
def test_json_is_an_exact_inverse(encoding: Encoding) -> None:
    again = Encoding.from_json(json.loads(json.dumps(encoding.to_json())))
    assert again == encoding
    assert hash(again) == hash(encoding)
    assert Encoding.from_text(str(encoding)) == encoding


def test_defaults_are_left_out_of_json() -> None:
    assert Encoding(4, "nf4").to_json() == {"bits": 4, "levels": "nf4"}


@pytest.mark.parametrize("size", [0, 3, 8, 15, 17, 48, 8192, -2, 1, True, 64.0, "64", None])
def test_block_sizes(size: object) -> None:
    with pytest.raises(errors.EncodingError, match="block size must be a power of two") as caught:
        Encoding(4, "nf4", (size,))
    assert repr(size) in str(caught.value)
    if size != 1 or size is True:
        with pytest.raises(errors.EncodingError, match="block size"):
            Encoding(8, block=(1, size))


@pytest.mark.parametrize("block", [(), [64], 64, None])
def test_blocks_are_tuples(block: object) -> None:
    with pytest.raises(errors.EncodingError, match="block size"):
        Encoding(4, "nf4", block)


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"bits": 3}, "bits must be 2, 4 or 8, got 3"),
        ({"bits": 4.0}, "bits must be"),
        ({"bits": True}, "bits must be"),
        ({"bits": 4, "levels": "nf5"}, "one of uniform, nf4, fp4 at 4 bits, got 'nf5'"),
        ({"bits": 8, "levels": "nf4"}, "at 8 bits, got 'nf4'"),
        ({"bits": 2, "levels": (0.0, 1.0)}, "tuple of 4 finite numbers"),
        ({"bits": 2, "levels": [0.0, 1.0, 2.0, 3.0]}, "tuple of 4 finite numbers"),
        ({"bits": 2, "levels": (0.0, 1.0, 2.0, float("nan"))}, "finite"),
        ({"bits": 2, "levels": (0.0, 1.0, 2.0, "a")}, "finite"),
        ({"bits": 2, "levels": None}, "levels must be"),
        ({"bits": 4, "levels": "nf4", "full_range": True}, "full_range must be False"),
        ({"bits": 4, "levels": "nf4", "zero_point": True}, "zero_point must be False"),
        ({"bits": 4, "full_range": True, "zero_point": True}, "full_range must be False"),
        ({"bits": 4, "offset": 1}, "offset must be True or False"),
        ({"bits": 4, "clip": 0.0}, "clip must be above 0"),
        ({"bits": 4, "clip": 1.5}, "clip must be above 0"),
        ({"bits": 4, "clip": float("nan")}, "clip must be above 0"),
        ({"bits": 4, "clip": "1"}, "clip must be above 0"),
        ({"bits": 4, "scale": "e4m3"}, "scale must be an Encoding"),
        ({"bits": 4, "scale": Encoding(8)}, "scale must be an 8-bit codebook"),
        ({"bits": 4, "scale": Encoding(4, "nf4")}, "scale must be an 8-bit codebook"),
        ({"bits": 4, "scale": Encoding(8, "e4m3", (1, 64))}, "scale must be an 8-bit codebook"),
    ],
)
def test_fields_that_no_tensor_can_have(fields: dict, match: str) -> None:
    with pytest.raises(errors.EncodingError, match=match):
        Encoding(**fields)


def test_parts() -> None:
    scale = Encoding(8, "e4m3", (256,))
    with_offset = Encoding(8, "e4m3", (256,), offset=True)
    assert Encoding(4, "nf4").parts == ("codes", "scales")
    assert Encoding(4, scale=scale).parts == ("codes", "scales", "nested")
    assert Encoding(4, scale=with_offset, zero_point=True).parts == (
        "codes",
        "scales",
        "nested",
        "offset",
        "zeros",
    )


@pytest.mark.parametrize(
    ("block", "ndim", "n_dims", "k_dims", "expected"),
    [
        ((64,), 2, (0,), (1,), (64,)),
        ((1, -1), 2, (0,), (1,), (1, -1)),
        ((1, -1), 2, (1,), (0,), (-1, 1)),
        ((1, 128), 2, (1,), (0,), (128, 1)),
        ((1, -1), 3, (1,), (2,), (1, -1)),
        ((1, -1), 3, (2,), (1,), (-1, 1)),
        ((1, -1), 4, (0,), (1, 2, 3), (-1, -1, -1)),
        ((1, 64), 4, (0,), (1, 2, 3), (64, 1, 1)),
        ((16, 1, -1), 3, (1,), (2,), (16, 1, -1)),
        ((16, 1, -1), 3, (2,), (1,), (16, -1, 1)),
        ((-1, -1), 3, (0, 1), (2,), (-1, -1, -1)),
    ],
)
def test_oriented(block, ndim, n_dims, k_dims, expected) -> None:
    assert Encoding(8, block=block).oriented(ndim, n_dims, k_dims).block == expected
