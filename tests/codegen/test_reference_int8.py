"""int8 products and their outliers: the reference against integers in NumPy."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.fx.experimental.proxy_tensor import make_fx

from fxquant.codegen import reference
from fxquant.codegen.epilogue import Epilogue
from fxquant.codegen.spec import KernelSpec, Outliers, WeightOperand
from fxquant.formats import Encoding, decode, decode_int8, int8_levels, levels
from tests.bounds import assert_close_within
from tests.codegen import harness, plain_int8
from tests.codegen.specs import int8_specs, weights

NF4 = Encoding(4, "nf4", (64,), scale=Encoding(8, "dynamic8", (256,), offset=True))
INT8 = Encoding(8, block=(1, -1))
BY_THRESHOLD = Outliers("bfloat16", threshold=6.0)
BY_COLUMNS = Outliers("float16", columns=3)


def spec_of(encoding=INT8, shape=(24, 64), *, outliers=None, dtype="float32", out=None, bias=None):
    weight = WeightOperand.whole(encoding, shape, transposed=False)
    epilogue = Epilogue.bias(bias) if bias else Epilogue()
    return KernelSpec(weight, dtype, "int8", out or dtype, epilogue, "linear", outliers)


def with_outliers(spec, rows, columns=(5, 17), seed=1):
    """An activation in which these columns are about thirty times the rest."""
    x = harness.activation(spec, rows, seed)
    x[..., list(columns)] *= 30
    return x


def check(spec, x, seed=0):
    tensors = harness.stored(spec.weight.encoding, spec.weight.shape, seed)
    extra = harness.operands(spec, x.shape[-2], seed + 2)
    got = reference.run(spec, x, tensors, extra)
    found = plain_int8.sums(spec, x, tensors, extra)
    want = harness.plain_epilogue(spec, found.exact, [t.double() for t in extra])
    assert got.dtype == getattr(torch, spec.out_dtype)
    assert_close_within(got, want, harness.int8_bound(spec, x, tensors, extra))
    return got, found


@settings(max_examples=100, deadline=None)
@given(int8_specs(), st.sampled_from((0, 1, 3)), st.integers(0, 2**16))
def test_equals_sums_of_integers(spec, rows, seed):
    _, found = check(spec, harness.activation(spec, rows, seed + 1), seed)
    assert found.q.size == 0 or abs(found.q).max() <= 127


@settings(max_examples=50, deadline=None)
@given(weights())
def test_weight_is_its_integers_and_scales(weight):
    tensors = harness.stored(weight.encoding, weight.shape)
    found = plain_int8.weight_of(weight, tensors)
    flat = decode_int8(tensors, weight.encoding, weight.shape).flatten()
    got = flat.as_strided(weight.sizes, weight.strides, weight.offset)
    want = torch.from_numpy(found.integers * found.scales)
    torch.testing.assert_close(got, want, rtol=2.0**-51, atol=0)
    whole = decode(tensors, weight.encoding, weight.shape, torch.float32).flatten()
    floats = whole.as_strided(weight.sizes, weight.strides, weight.offset)
    assert torch.equal(floats, torch.from_numpy(found.floats))


def test_integers_of_codebooks():
    integers, unit = int8_levels(Encoding(4, "nf4"))
    assert integers == (-127, -88, -67, -50, -36, -23, -12, 0, 10, 20, 31, 43, 56, 71, 92, 127)
    assert unit == 1 / 127
    # Half of 127 is a tie, and goes to the even neighbour.
    assert int8_levels(Encoding(4, "fp4"))[0][:8] == (0, 1, 85, 127, 42, 64, 21, 32)
    # Levels of any range: the largest is 127.
    assert int8_levels(Encoding(2, (-4.0, 0.0, 1.0, 2.0))) == ((-127, 0, 32, 64), 4 / 127)
    assert int8_levels(Encoding(2, (0.0, 0.0, 0.0, 0.0))) == ((0, 0, 0, 0), 0.0)
    assert int8_levels(Encoding(4)) == (None, 1.0)
    for name, bits in (("nf4", 4), ("nf8", 8), ("nf2", 2)):
        encoding = Encoding(bits, name)
        integers, unit = int8_levels(encoding)
        off = [abs(i * unit - level) for i, level in zip(integers, levels(encoding), strict=True)]
        assert max(off) <= unit / 2 * (1 + 1e-12)


def test_the_error_of_rounding_is_half_a_step_an_input():
    """The result is the product of floats but for half a step of every input."""
    spec = spec_of()
    tensors, x = harness.stored(INT8, (24, 64)), harness.activation(spec, 50)
    weight = reference.operand(spec.weight, tensors, torch.float64)
    step = x.double().abs().amax(-1, keepdim=True) / 127
    off = (reference.run(spec, x, tensors, []).double() - x.double() @ weight.t()).abs()
    most = step / 2 * weight.abs().sum(-1)
    assert (off <= most * (1 + 1e-5)).all()
    assert (off > most * 1e-3).any()


def test_ties_go_to_the_even_integer():
    spec = spec_of(shape=(1, 8))
    codes, scales = torch.ones(1, 8, dtype=torch.int8), torch.ones(1)
    x = torch.tensor([[127.0, 0.5, 0, 0, 0, 0, 0, 0], [127.0, 1.5, 2.5, -0.5, 0, 0, 0, 0]])
    got = reference.run(spec, x, [codes, scales], [])
    assert got.flatten().tolist() == [127.0, 127.0 + 2 + 2]


@pytest.mark.parametrize("outliers", [None, BY_THRESHOLD, BY_COLUMNS])
@pytest.mark.parametrize("tiny", [0.0, 1e-45, 1e-38, 1e-31, 1e-29])
def test_zero_and_tiny_rows(outliers, tiny):
    spec = spec_of(outliers=outliers)
    x = harness.activation(spec, 3)
    x[1] = tiny
    got, found = check(spec, x)
    assert got.isfinite().all()
    if tiny == 0 and (outliers is None or outliers.columns is None):
        assert (got[1] == 0).all()
    # Rows apart from it are what they are without it.
    others = x[[0, 2]]
    assert torch.equal(got[[0, 2]], check(spec, others)[0])
    assert (found.q[0, 1] != 0).any() == (tiny >= 1e-31)


@pytest.mark.parametrize("outliers", [None, BY_THRESHOLD, BY_COLUMNS])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_rows_that_are_not_finite(outliers, value, dtype):
    spec = spec_of(outliers=outliers, dtype=dtype, bias="float32")
    tensors, extra = harness.stored(INT8, (24, 64)), harness.operands(spec, 3)
    x = harness.activation(spec, 3)
    inside = 9 if outliers is not BY_COLUMNS else next(c for c in range(64) if c not in extra[1])
    x[1, inside] = value
    got = reference.run(spec, x, tensors, extra)
    by_threshold = outliers is BY_THRESHOLD
    if math.isinf(value) and by_threshold:
        # An infinity is always an outlier: what it is times the weight (NaN times 0).
        weight = reference.operand(spec.weight, tensors, torch.float32)
        torch.testing.assert_close(
            got[1], value * weight[:, inside], equal_nan=True, check_dtype=False
        )
    else:
        assert got[1].isnan().all()
    assert got[[0, 2]].isfinite().all()
    clean = x.clone()
    clean[1] = 0
    if not by_threshold:
        assert torch.equal(got[[0, 2]], reference.run(spec, clean, tensors, extra)[[0, 2]])


def test_what_is_not_finite_in_a_given_column_is_a_float():
    spec = spec_of(outliers=BY_COLUMNS)
    tensors, extra = harness.stored(INT8, (24, 64)), harness.operands(spec, 3)
    x = harness.activation(spec, 3)
    x[0, extra[0][1].long()] = float("inf")
    x[1, extra[0][1].long()] = float("nan")
    got = reference.run(spec, x, tensors, extra)
    assert got[0].isinf().all()
    assert got[1].isnan().all()
    assert got[2].isfinite().all()


@pytest.mark.parametrize("outliers", [None, BY_THRESHOLD, BY_COLUMNS])
def test_no_rows_and_leading_dimensions(outliers):
    spec = spec_of(outliers=outliers)
    tensors, extra = harness.stored(INT8, (24, 64)), harness.operands(spec, 6)
    x = with_outliers(spec, 6)
    want = reference.run(spec, x, tensors, extra)
    assert torch.equal(reference.run(spec, x.reshape(2, 3, 64), tensors, extra).flatten(0, 1), want)
    assert reference.run(spec, x[:0], tensors, extra).shape == (0, 24)
    assert reference.run(spec, x[0], tensors, extra).shape == (24,)


def test_the_threshold_is_of_a_call_and_of_a_batch_element():
    spec = spec_of(Encoding(8, block=(1, -1)), (2, 24, 64), outliers=BY_THRESHOLD)
    x = harness.activation(spec, 4)
    x[0, 2, 7] = 40.0
    x[1, 1, 8] = -6.0
    x[1, 3, 9] = 5.9999995
    _, found = check(spec, x)
    assert found.outliers.nonzero()[0].tolist() == [0, 1]
    assert found.outliers.nonzero()[1].tolist() == [7, 8]
    # A row is summed in another way beside one with an outlier than by itself.
    tensors = harness.stored(INT8, (2, 24, 64))
    together = reference.run(spec, x, tensors, [])
    alone = reference.run(spec, x[:, :1], tensors, [])
    assert not torch.equal(together[:, :1], alone)


@pytest.mark.parametrize("rows", [1, 7])
@pytest.mark.parametrize("encoding", [INT8, NF4])
def test_without_its_outlier_part_a_product_is_another(encoding, rows):
    """What must not match: outliers rounded to int8, dropped, or columns mixed up."""
    spec = spec_of(encoding, outliers=BY_THRESHOLD)
    tensors, x = harness.stored(encoding, (24, 64)), with_outliers(spec, rows)
    x[:, [5, 17]] = x[:, [5, 17]].sign() * x[:, [5, 17]].abs().clamp_min(6)
    got, found = check(spec, x)
    assert found.outliers[0].nonzero()[0].tolist() == [5, 17]
    limit = harness.int8_bound(spec, x, tensors, [])
    dropped = x.clone()
    dropped[:, [5, 17]] = 0
    moved = x.clone()
    moved[:, [6, 17]] = x[:, [5, 17]]
    moved[:, 5] = x[:, 6]
    rounded = dataclasses.replace(spec, outliers=None)
    for wrong in (
        reference.run(spec, dropped, tensors, []),
        reference.run(spec, moved, tensors, []),
        reference.run(rounded, x, tensors, []),
    ):
        assert ((wrong - got).abs() > 100 * limit).any(-1).all()
    # And it is nearer to the product of floats by far.
    true = x @ reference.operand(spec.weight, tensors, torch.float32).t()
    with_part = (got - true).norm() / true.norm()
    without = (reference.run(rounded, x, tensors, []) - true).norm() / true.norm()
    assert with_part < without / 3 or encoding is NF4


def test_given_columns_replace_what_the_codes_say():
    spec = spec_of(outliers=BY_COLUMNS)
    tensors, extra = harness.stored(INT8, (24, 64)), harness.operands(spec, 5)
    x = harness.activation(spec, 5)
    want = reference.run(spec, x, tensors, extra)
    columns = extra[0].long()
    codes = tensors[0].view(24, 64).clone()
    codes[:, columns] = 77
    assert torch.equal(reference.run(spec, x, [codes.view_as(tensors[0]), tensors[1]], extra), want)
    order = torch.tensor([2, 0, 1])
    again = reference.run(spec, x, tensors, [extra[0][order], extra[1][:, order]])
    torch.testing.assert_close(again, want, rtol=1e-5, atol=1e-5)
    other = reference.run(spec, x, tensors, [extra[0], extra[1][:, order]])
    assert not torch.allclose(other, want, rtol=1e-2, atol=1e-2)


def test_sums_that_float32_and_int32_cannot_hold():
    """The largest integers everywhere: 255 * 127 * 70000 is above 2**31."""
    k = 70000
    encoding = Encoding(8, block=(1, -1), zero_point=True)
    spec = spec_of(encoding, (2, k), dtype="float32")
    codes = torch.full((2, k), 255, dtype=torch.uint8)
    codes[1, :3] = 0
    tensors = [codes, torch.ones(2), torch.zeros(2, dtype=torch.uint8)]
    got = reference.run(spec, torch.full((1, k), 127.0), tensors, [])
    want = torch.tensor([[127.0 * 255 * k, 127.0 * 255 * (k - 3)]], dtype=torch.float64)
    assert torch.equal(got, want.float())
    assert got[0, 0] != got[0, 1]


@pytest.mark.parametrize("outliers", [None, BY_THRESHOLD, BY_COLUMNS])
def test_traces_with_symbolic_rows(outliers):
    spec = spec_of(NF4, outliers=outliers, dtype="bfloat16", bias="bfloat16")
    tensors, extra = harness.stored(NF4, (24, 64)), harness.operands(spec, 5)

    def call(x, weight, extra):
        return reference.run(spec, x, weight, extra)

    traced = make_fx(call, tracing_mode="symbolic")(with_outliers(spec, 5), tensors, extra)
    for rows in (5, 9):
        x = with_outliers(spec, rows, (3, 40), rows)
        assert torch.equal(traced(x, tensors, extra), call(x, tensors, extra))


@pytest.mark.parametrize(
    "outliers", [None, Outliers("float32", threshold=6.0), Outliers("float32", columns=3)]
)
def test_inductor_finds_the_same_integers(outliers):
    """One integer apart would be 1 / 127 of a row's largest magnitude: the bound is far below.

    Outliers are in float32 here: Inductor leaves out roundings to 16 bits that are undone at once.
    """
    spec = spec_of(outliers=outliers)
    tensors, extra = harness.stored(INT8, (24, 64)), harness.operands(spec, 64)
    # Numbers at and beside the ties of rows whose largest magnitude is `peak`.
    generator = torch.Generator().manual_seed(0)
    peak = 1 + 4 * torch.rand(64, 1, generator=generator)
    x = (torch.randint(-127, 127, (64, 64), generator=generator) + 0.5) * (peak / 127)
    x[:, :1] = peak
    x[1::2] = torch.nextafter(x[1::2], torch.tensor(9.0))
    x[:, 31] *= 9 if outliers is not None and outliers.columns is None else 0
    traced = make_fx(lambda x, t, e: reference.run(spec, x, t, e))(x, tensors, extra)
    compiled = torch.compile(traced)
    want = check(spec, x)[0]
    limit = 2 * harness.int8_bound(spec, x, tensors, extra)
    assert_close_within(compiled(x, tensors, extra), want, limit)
