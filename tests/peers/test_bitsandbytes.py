"""Bit for bit what bitsandbytes makes of the same weights on the CPU, and its files."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fxquant import checkpoint
from fxquant.codegen import reference
from fxquant.codegen.spec import KernelSpec, Outliers, WeightOperand
from fxquant.formats import Encoding, levels, pack
from fxquant.formats.codebooks import dynamic8, fp4

DYNAMIC = Encoding(8, "dynamic8", (256,), offset=True)
BLOCKS = [32, 64, 128, 256, 512, 1024, 2048, 4096]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def assert_equal(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """The same bits (NaN would differ from itself, and 0 equal -0)."""
    assert ours.dtype == theirs.dtype
    theirs = theirs.reshape(ours.shape)
    assert ours.numpy().tobytes() == theirs.contiguous().numpy().tobytes()


def compare(bnb, weight: torch.Tensor, levels: str, block: int) -> None:
    for scale in (None, DYNAMIC):
        theirs, state = bnb.functional.quantize_4bit(
            weight, blocksize=block, quant_type=levels, compress_statistics=scale is not None
        )
        ours = pack(weight, Encoding(4, levels, (block,), scale=scale))
        codes, absmax, *rest = ours.tensors()
        assert_equal(codes, theirs)
        assert_equal(absmax, state.absmax)
        if scale is not None:
            nested, offset = rest
            assert_equal(nested, state.state2.absmax)
            assert_equal(offset, state.offset)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("levels", ["nf4", "fp4"])
def test_codes_and_scales(bnb, levels: str, block: int, dtype: torch.dtype) -> None:
    torch.manual_seed(block)
    for shape in ((64, 64), (257, 333), (1, 1), (5,), (3, 17, 129), (1024, 384)):
        compare(bnb, (torch.randn(shape) * 0.05).to(dtype), levels, block)


@settings(max_examples=60, deadline=None)
@given(
    shape=st.lists(st.integers(1, 70), min_size=1, max_size=3),
    block=st.sampled_from(BLOCKS),
    dtype=st.sampled_from(DTYPES),
    exponent=st.integers(-40, 30),
)
def test_any_shape_and_size(bnb, shape, block, dtype, exponent) -> None:
    weight = torch.randn(shape) * 10.0**exponent
    weight *= torch.rand(shape) < 0.8
    limit = torch.finfo(dtype).max
    weight = weight.clamp(-limit, limit).to(dtype)
    for levels_ in ("nf4", "fp4"):
        compare(bnb, weight, levels_, block)


@pytest.mark.parametrize("levels", ["nf4", "fp4"])
def test_values_on_and_next_to_every_midpoint(bnb, levels: str) -> None:
    book = torch.tensor(sorted(bnb.functional.get_4bit_type(levels, device="cpu").tolist()))
    midpoints = (book[:-1] + book[1:]) / 2
    down = torch.nextafter(midpoints, torch.tensor(-2.0))
    up = torch.nextafter(midpoints, torch.tensor(2.0))
    values = torch.cat([midpoints, down, up, torch.tensor([1.0, -0.0, 0.0])])
    for factor in (1.0, 0.3, 7.7):
        compare(bnb, values * factor, levels, 64)


@pytest.mark.parametrize("values", [0.0, 1e-45, -3e-39, 9e-39, 1.1e-38, 3.4e38])
def test_blocks_at_the_edges(bnb, values: float) -> None:
    for count in (64, 65, 127, 128):
        weight = torch.full((count,), values)
        weight[3::7] = -weight[3::7] / 3
        for levels_ in ("nf4", "fp4"):
            compare(bnb, weight, levels_, 64)


@pytest.mark.parametrize("block", [64, 256, 4096])
def test_eight_bit_blocks(bnb, block: int) -> None:
    torch.manual_seed(0)
    for shape in ((257, 333), (64, 64), (7,)):
        weight = torch.randn(shape)
        theirs, state = bnb.functional.quantize_blockwise(weight, blocksize=block)
        codes, absmax = pack(weight, Encoding(8, "dynamic8", (block,))).tensors()
        assert_equal(codes, theirs)
        assert_equal(absmax, state.absmax)


def test_codebooks(bnb) -> None:
    functional = bnb.functional
    assert list(dynamic8()) == functional.create_dynamic_map().tolist()
    assert list(fp4()) == functional.get_4bit_type("fp4", device="cpu").tolist()
    nf4 = torch.tensor(levels(Encoding(4, "nf4")))
    assert torch.equal(nf4, functional.get_4bit_type("nf4", device="cpu"))


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("levels", ["nf4", "fp4"])
def test_decodes_to_the_same_numbers(bnb, levels: str, double: bool) -> None:
    weight = torch.randn(130, 66, generator=torch.Generator().manual_seed(0))
    functional = bnb.functional
    theirs, state = functional.quantize_4bit(
        weight, blocksize=64, quant_type=levels, compress_statistics=double
    )
    packed = pack(weight, Encoding(4, levels, (64,), scale=DYNAMIC if double else None))
    # Their vectorised decoder may contract a product and a sum: one rounding less.
    torch.testing.assert_close(
        packed.dequantize(), functional.dequantize_4bit(theirs, state), rtol=2**-22, atol=0
    )


def bnb_linear(bnb, weight: torch.Tensor, levels: str, double: bool) -> nn.Linear:
    linear = bnb.nn.Linear4bit(
        weight.shape[1],
        weight.shape[0],
        bias=True,
        compute_dtype=torch.float32,
        quant_type=levels,
        compress_statistics=double,
    )
    with torch.no_grad():
        linear.weight.data = weight.clone()
        linear.bias.fill_(0.25)
    return linear.to("cpu")


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("levels", ["nf4", "fp4"])
def test_loads_what_it_saved(bnb, levels: str, double: bool, tmp_path: Path) -> None:
    weight = torch.randn(48, 66, generator=torch.Generator().manual_seed(0))
    theirs = bnb_linear(bnb, weight, levels, double)
    safetensors.torch.save_file(theirs.state_dict(), tmp_path / "file")
    ours = nn.Linear(66, 48)
    checkpoint.load(ours, tmp_path / "file")
    encoding = Encoding(4, levels, (64,), scale=DYNAMIC if double else None)
    assert ours.weight.encoding == encoding
    expected = pack(weight, encoding)
    for mine, other in zip(ours.weight.tensors(), expected.tensors(), strict=True):
        assert torch.equal(mine, other)
    assert torch.equal(ours.bias, theirs.bias)


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("levels", ["nf4", "fp4"])
def test_it_loads_what_we_saved(bnb, levels: str, double: bool, tmp_path: Path) -> None:
    weight = torch.randn(48, 66, generator=torch.Generator().manual_seed(0))
    encoding = Encoding(4, levels, (64,), scale=DYNAMIC if double else None)
    ours = nn.Linear(66, 48)
    ours.weight = nn.Parameter(pack(weight, encoding), requires_grad=False)
    checkpoint.save(ours, tmp_path / "file", layout="bitsandbytes")
    stored = safetensors.torch.load_file(tmp_path / "file")
    theirs = bnb_linear(bnb, weight, levels, double).state_dict()
    assert stored.keys() == theirs.keys()
    for name, tensor in theirs.items():
        if "quant_state" not in name and name != "bias":
            assert_equal(stored[name], tensor)
    parameter = bnb.nn.Params4bit.from_prequantized(
        data=stored["weight"],
        quantized_stats={k: v for k, v in stored.items() if k.startswith("weight.")},
        device="cpu",
    )
    decoded = bnb.functional.dequantize_4bit(parameter.data, parameter.quant_state)
    assert parameter.quant_state.nested is double
    torch.testing.assert_close(decoded, ours.weight.dequantize(), rtol=2**-22, atol=0)


@pytest.mark.parametrize("threshold", [0.0, 6.0])
@pytest.mark.parametrize("rows", [2, 9])
def test_llm_int8(bnb, rows: int, threshold: float) -> None:
    """The same product where outlier columns hold nothing but outliers.

    In a column with both, bitsandbytes lets what is below the threshold count for the largest
    magnitude of its row. Their int8 part is scaled with 6.200124e-5 for 127**-2 (2e-5 off) and
    rounded to float16, the outlier part is added to it and the sum rounded again; a weight of the
    outlier part may be the neighbour in float16, and an element may take the other integer where
    it lies within three roundings of a tie.
    """
    torch.manual_seed(0)
    k, n = 128, 40
    x = torch.randn(rows, k).clamp(-5.5, 5.5)
    outlying = [3, 77] if threshold else []
    x[:, outlying] = (6 + 20 * torch.rand(rows, len(outlying))) * x[:, outlying].sign()
    x = x.half()
    codes, absmax, _ = bnb.functional.int8_vectorwise_quant(torch.randn(n, k).half())
    state = bnb.MatmulLtState()
    state.CB, state.SCB, state.has_fp16_weights = codes, absmax, False
    state.threshold = threshold
    weight = codes.clone()
    theirs = bnb.autograd._functions.MatMul8bitLt.apply(x, weight, None, None, state)

    encoding = Encoding(8, block=(1, -1))
    operand = WeightOperand.whole(encoding, (n, k), transposed=False)
    outliers = Outliers("float16", threshold=threshold) if threshold else None
    spec = KernelSpec(operand, "float16", "int8", "float32", outliers=outliers)
    ours = reference.run(spec, x, [codes, absmax / 127], [])

    inner, outer = x.float(), torch.zeros(rows, k)
    outer[:, outlying] = inner[:, outlying]
    inner[:, outlying] = 0
    decoded = (codes * (absmax / 127)[:, None]).abs()
    step = inner.abs().amax(-1, keepdim=True) / 127
    from_tie = ((inner / step).frac().abs() - 0.5).abs()
    near_tie = (from_tie <= 3 * 127 * 2.0**-24).float()
    int8_part = reference.run(spec, inner.half(), [codes, absmax / 127], []).abs()
    by_int8, by_floats = inner.abs() @ decoded.t(), outer.abs() @ decoded.t()
    bound = step * (near_tie @ decoded.t())
    bound += int8_part * (2e-5 + 2.0**-11) + by_floats * 2.0**-10
    bound += (int8_part + by_floats) * 2.0**-11 * 1.01 + (by_int8 + by_floats) * k * 2.0**-24
    assert ((ours - theirs.float()).abs() <= bound).all()
    if outliers is not None:
        without = reference.run(
            dataclasses.replace(spec, outliers=None), x, [codes, absmax / 127], []
        )
        assert ((without - theirs.float()).abs() > bound).any(-1).all()
