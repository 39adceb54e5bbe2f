"""The outlier part of printed Triton kernels, interpreted: columns, counts, and what they add."""

import dataclasses
import math

import pytest
import torch

from fxquant.codegen import Header, reference
from fxquant.codegen.epilogue import Epilogue
from fxquant.codegen.spec import KernelSpec, Outliers
from fxquant.codegen.triton import render
from fxquant.formats import Encoding
from tests.bounds import assert_close_within
from tests.codegen import harness, plain_int8

INT8 = Encoding(8, block=(1, -1))
NF4 = Encoding(4, "nf4", (64,), scale=Encoding(8, "dynamic8", (256,), offset=True))
FOUND = Outliers("float16", threshold=6.0)
GIVEN = Outliers("float16", columns=3)
SHAPE = (24, 96)
# NumPy, which the interpreter computes with, warns of what is defined here.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def spec_of(outliers, encoding=INT8, shape=SHAPE, x="float32"):
    return KernelSpec(
        harness.whole(encoding, *shape), x, "int8", "float32", Epilogue(), "apart", outliers
    )


def load(spec, folder):
    return harness.load(spec, folder, interpreted=True)


def check(spec, module, x, **more):
    tensors = harness.stored(spec.weight.encoding, spec.weight.shape)
    extra = harness.operands(spec, x.shape[-2])
    got = module.run(x, tensors, extra, **more)
    found = plain_int8.sums(spec, x, tensors, extra, decoded_apart=True)
    limit = harness.through_epilogue(spec, found.magnitude, 2 * found.bound, extra)
    assert_close_within(got, reference.run(spec, x, tensors, extra), limit)
    return got, found, limit


def planted(rows, columns, seed=0, k=96):
    """An activation in which a row of each of these columns is large, the rest below 1."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(rows, k, generator=generator) * 2 - 1
    for number, column in enumerate(columns):
        x[number * 7 % rows, column] = (-1) ** number * (6.0 + number)
    return x


@pytest.mark.parametrize("rows", [1, 3, 40, 70])
@pytest.mark.parametrize("columns", [[], [95], [4, 0, 64, 63], range(96)])
def test_columns_are_found_listed_in_order_and_counted(tmp_path, rows, columns):
    """40 and 70 rows are those of two and three programs."""
    columns = list(columns)
    spec = spec_of(FOUND)
    module = load(spec, tmp_path)
    x = planted(rows, columns)
    x[rows // 2, 1] = x[rows // 2, 1] if 1 in columns else 5.9999995
    q, amax, listed, count = module.quantize(x, None)
    want = (x.abs() >= 6).any(0).nonzero().flatten()
    assert count.tolist() == [len(want)]
    assert listed[: len(want)].tolist() == want.tolist()
    assert sorted(columns) == want.tolist()
    inner = x.clone()
    inner[:, want] = 0
    peak = inner.abs().amax(-1).clamp_min(2.0**-100)
    assert torch.equal(amax, peak)
    exact = torch.round(inner * (torch.full_like(peak, 127.0) / peak).unsqueeze(-1))
    assert torch.equal(q, exact.to(torch.int8))

    counter = torch.tensor([10, 100])
    check(spec, module, x, counter=counter)
    assert counter.tolist() == [11, 100 + len(want)]
    check(spec, module, x[:, :], counter=counter)
    assert counter.tolist() == [12, 100 + 2 * len(want)]


def test_columns_of_many_rows_are_found_in_larger_tiles(tmp_path):
    """The marks are the same: a large number in any row, the last one too, and NaN is none."""
    module = load(spec_of(FOUND, shape=(1, 600)), tmp_path)
    few, many = module.STEPS["find"], module.STEPS["find_many"]
    rows = 577
    x = planted(rows, [4, 511, 512, 599], k=600)
    x[rows - 1, 100], x[rows - 1, 101], x[3, 102], x[17, 103] = -6.0, 5.9999995, math.nan, math.inf
    _, _, listed, count = module.quantize(x, None)
    assert listed[: count[0]].tolist() == [4, 100, 103, 511, 512, 599]
    module.STEPS |= {"find": many, "find_many": few}
    _, _, again, other = module.quantize(x, None)
    assert torch.equal(other, count)
    assert torch.equal(again[: other[0]], listed[: count[0]])


@pytest.mark.parametrize(
    ("k", "columns"),
    [
        (2049, [0, 2047, 2048]),
        (5000, [2048, 4095, 4096, 4999]),
        (5000, []),
        (5000, range(5000)),
        (18500, [1, 8191, 8192, 10000, 16383, 16384, 18499]),
    ],
)
def test_several_programs_list_the_columns_of_long_rows(tmp_path, k, columns):
    """Each counts the marks before its own 2048, 8192 at a time."""
    module = load(spec_of(FOUND, shape=(1, k)), tmp_path)
    x = torch.zeros(2, k)
    x[1, list(columns)] = 7.0
    counter = torch.tensor([10, 100])
    _, _, listed, count = module.quantize(x, counter)
    assert listed[: len(columns)].tolist() == list(columns)
    assert count.tolist() == [len(columns)]
    assert counter.tolist() == [11, 100 + len(columns)]


def test_several_programs_list_the_columns_of_every_matrix(tmp_path):
    module = load(spec_of(FOUND, shape=(2, 1, 5000)), tmp_path)
    x = torch.zeros(2, 1, 5000)
    x[0, 0, [7, 4500]], x[1, 0, [2047, 2048, 4999]] = 7.0, -7.0
    _, _, listed, count = module.quantize(x, None)
    assert count.tolist() == [2, 3]
    assert listed[0, :2].tolist() == [7, 4500]
    assert listed[1, :3].tolist() == [2047, 2048, 4999]


def test_the_counter_of_a_batch_counts_calls_once(tmp_path):
    spec = spec_of(FOUND, shape=(3, 8, 32))
    x = torch.zeros(3, 2, 32)
    x[0, 0, 4], x[2, 1, 5:8] = 9.0, -9.0
    counter = torch.zeros(2, dtype=torch.int64)
    check(spec, load(spec, tmp_path), x, counter=counter)
    assert counter.tolist() == [1, 4]


def test_nothing_waits_for_the_host_and_no_shape_depends_on_data():
    """What is allocated and launched is a function of the shapes alone."""
    text = render(spec_of(FOUND), Header())
    called = text[text.index("def quantize(") :]
    for word in (".item", ".cpu", ".tolist", "nonzero", "synchronize", "unique", "bool(", "int("):
        assert word not in called
    launched = called.count("kernel[grid](") + called.count("add_shares[grid](")
    assert launched == 4 + text.count("REDUCTIONS = {")
    # And the list is read up to a number in memory.
    product = text[text.index("def apart_gemm(") : text.index("TYPES = {")]
    assert "found = tl.load(count)" in product
    assert "in range(share * 16, tl.minimum(found, GATHERED), 16 * SPLIT)" in product
    assert "in tl.range(GATHERED + share * 16, found, 16 * SPLIT" in product


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("encoding", [INT8, NF4, Encoding(4, block=(1, 32), zero_point=True)])
def test_without_its_outlier_part_a_product_is_another(tmp_path, encoding, rows):
    spec = spec_of(FOUND, encoding)
    module = load(spec, tmp_path)
    x = planted(rows, [5, 17, 80])
    x[:, [5, 17, 80]] = 30.0
    got, found, limit = check(spec, module, x)
    assert found.outliers[0].nonzero()[0].tolist() == [5, 17, 80]
    tensors = harness.stored(encoding, SHAPE)
    rounded = dataclasses.replace(spec, outliers=None)
    dropped = x.clone()
    dropped[:, [5, 17, 80]] = 0
    moved = x.roll(1, -1)
    for wrong in (
        reference.run(spec, dropped, tensors, []),
        reference.run(spec, moved, tensors, []),
        reference.run(rounded, x, tensors, []),
    ):
        assert ((wrong - got).abs() > 2 * limit).any(-1).all()


@pytest.mark.parametrize("encoding", [Encoding(8, "nf8", (64,)), Encoding(4, "fp4", (-1,)), NF4])
def test_columns_are_decoded_with_the_floats_of_a_codebook(tmp_path, encoding):
    """All columns are outliers: nothing of the integers' rounding is left."""
    spec = spec_of(Outliers("float32", threshold=1e-6), encoding)
    x = planted(2, [])
    got, _, _ = check(spec, load(spec, tmp_path), x)
    weight = reference.operand(spec.weight, harness.stored(encoding, SHAPE), torch.float32)
    exact = x.double() @ weight.double().t()
    off = (x.double().abs() @ weight.double().abs().t()) * (96 + 4) * plain_int8.UNIT
    assert_close_within(got, exact, off)


def test_given_columns_replace_what_the_codes_say(tmp_path):
    spec = spec_of(GIVEN)
    module = load(spec, tmp_path)
    tensors, extra = harness.stored(INT8, SHAPE), harness.operands(spec, 5)
    x = harness.activation(spec, 5)
    want, _, limit = check(spec, module, x)
    columns = extra[0].long()
    codes = tensors[0].view(SHAPE).clone()
    codes[:, columns] = 77
    assert torch.equal(module.run(x, [codes.view_as(tensors[0]), tensors[1]], extra), want)
    order = torch.tensor([2, 0, 1])
    again = module.run(x, tensors, [extra[0][order], extra[1][:, order]])
    assert_close_within(again, want, 2 * limit)
    other = module.run(x, tensors, [extra[0], extra[1][:, order]])
    assert ((other - want).abs() > 20 * limit).any()
    q, _ = module.quantize(x, extra[0])
    assert not q[:, columns].any()


def test_more_given_columns_than_one_product_takes(tmp_path):
    spec = spec_of(Outliers("float32", columns=37), NF4, (40, 200))
    check(spec, load(spec, tmp_path), harness.activation(spec, 3))


@pytest.mark.parametrize("outliers", [None, FOUND, GIVEN])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("x_dtype", ["float32", "float16"])
def test_rows_that_are_not_finite(tmp_path, outliers, value, x_dtype):
    spec = spec_of(outliers, x=x_dtype)
    module = load(spec, tmp_path)
    tensors, extra = harness.stored(INT8, SHAPE), harness.operands(spec, 3)
    x = harness.activation(spec, 3)
    inside = next(c for c in range(96) if outliers is not GIVEN or c not in extra[0])
    x[1, inside] = value
    got = module.run(x, tensors, extra)
    assert got[[0, 2]].isfinite().all()
    want = reference.run(spec, x, tensors, extra)
    if math.isinf(value) and outliers is FOUND:
        assert got[1].isinf().any()
        assert torch.equal(got[1].nan_to_num(0.5, 1.5, -1.5), want[1].nan_to_num(0.5, 1.5, -1.5))
    else:
        assert got[1].isnan().all()
    if outliers is GIVEN:
        x[1, inside], x[0, extra[0][1].long()] = 0.0, value
        got = module.run(x, tensors, extra)
        want = reference.run(spec, x, tensors, extra)
        assert torch.equal(got[0].isnan(), want[0].isnan())
        assert torch.equal(got[0].isinf(), want[0].isinf())
        assert got[1:].isfinite().all()


@pytest.mark.parametrize("outliers", [None, FOUND, GIVEN])
@pytest.mark.parametrize("tiny", [0.0, 1e-45, 1e-31, 1e-29])
def test_zero_and_tiny_rows(tmp_path, outliers, tiny):
    spec = spec_of(outliers)
    x = harness.activation(spec, 3)
    x[1] = tiny
    got, found, _ = check(spec, load(spec, tmp_path), x)
    assert got.isfinite().all()
    assert (found.q[0, 1] != 0).any() == (tiny >= 1e-31)
