"""Printed Triton kernels of int8 products, interpreted, against the reference.

The interpreter multiplies bfloat16 as integers in ``tl.dot``, so outliers are in other dtypes here.
"""

import dataclasses

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fxquant.codegen import Header, reference
from fxquant.codegen.epilogue import Epilogue
from fxquant.codegen.indexing import WeightIndex
from fxquant.codegen.quantize import QuantizeSpec
from fxquant.codegen.spec import KernelSpec, Outliers, WeightOperand
from fxquant.codegen.triton import render
from fxquant.codegen.triton.plan import plan_for
from fxquant.formats import Encoding, decode_int8
from tests.bounds import assert_close_within
from tests.codegen import harness, plain_int8
from tests.codegen.specs import INTERPRETED_DTYPES, int8_specs

INT8 = Encoding(8, block=(1, -1))
NF4 = Encoding(4, "nf4", (64,), scale=Encoding(8, "dynamic8", (256,), offset=True))
# NumPy, which the interpreter computes with, warns of what is defined here.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def scaling_of(spec):
    return plan_for(spec, WeightIndex.of(spec.weight)).form.scaling


def bound(spec, x, tensors, extra):
    """`plain_int8.sums`, for the kernel and the reference each.

    Where scales change inside of a tile, products are summed one by one: k roundings more.
    """
    found = plain_int8.sums(spec, x, tensors, extra, decoded_apart=True)
    single = spec.weight.k * plain_int8.UNIT if scaling_of(spec) == "elements" else 0.0
    error = 2 * found.bound + found.magnitude * single
    return harness.through_epilogue(spec, found.magnitude, error, extra)


def check(spec, module, x, seed=0):
    tensors = harness.stored(spec.weight.encoding, spec.weight.shape, seed)
    extra = harness.operands(spec, x.shape[-2], seed + 2)
    got = module.run(x, tensors, extra)
    want = reference.run(spec, x, tensors, extra)
    assert got.dtype == want.dtype
    assert_close_within(got, want, 2 * bound(spec, x, tensors, extra))
    return got


def load(spec, folder):
    return harness.load(spec, folder, interpreted=True)


def spec_of(encoding, shape, *, x="float32", outliers=None, out="float32", name="int8"):
    return KernelSpec(harness.whole(encoding, *shape), x, "int8", out, Epilogue(), name, outliers)


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(int8_specs(INTERPRETED_DTYPES), st.sampled_from((0, 1, 3, 17)), st.integers(0, 2**16))
def test_drawn_specs(tmp_path, spec, rows, seed):
    check(spec, load(spec, tmp_path), harness.activation(spec, rows, seed + 1), seed)


@pytest.mark.parametrize(
    ("encoding", "scaling"),
    [
        (INT8, "output"),
        (Encoding(8, block=(1, -1), zero_point=True), "output"),
        (Encoding(4, block=(1, 64)), "tile"),
        (Encoding(4, block=(1, 32), zero_point=True), "tile"),
        (Encoding(8, block=(1, 128), zero_point=True), "tile"),
        (Encoding(2, block=(32,), full_range=True), "tile"),
        (Encoding(2, block=(1, 16)), "elements"),
    ],
)
def test_sums_of_integers_are_exact(tmp_path, encoding, scaling):
    """With scales that are powers of two nothing is rounded: sums stay below 2**24."""
    shape = (32, 256)
    spec = spec_of(encoding, shape, x="int8")
    assert scaling_of(spec) == scaling
    tensors = harness.stored(encoding, shape)
    exponents = torch.arange(tensors[1].numel()).reshape(tensors[1].shape)
    tensors[1].copy_(2.0 ** (exponents % 2))
    q = torch.randint(-127, 128, (5, 256), generator=torch.Generator().manual_seed(1))
    q[0] = 127
    amax = 127 * 2.0 ** torch.arange(5)
    got = load(spec, tmp_path).run(q.to(torch.int8), tensors, [amax])
    weight = decode_int8(tensors, encoding, shape)
    exact = q.double() @ weight.t() * (amax / 127).unsqueeze(-1)
    assert torch.equal(got.double(), exact)
    assert torch.equal(got, reference.run(spec, q.to(torch.int8), tensors, [amax]))


@pytest.mark.parametrize("encoding", [Encoding(4, "fp4", (-1,)), Encoding(8, "nf8", (64,)), NF4])
def test_codebooks_are_their_integers(tmp_path, encoding):
    """One nonzero input an output: a level times a scale, with the roundings of `plain_int8`."""
    spec = spec_of(encoding, (64, 64), x="int8")
    tensors = harness.stored(encoding, (64, 64))
    q = torch.eye(64).to(torch.int8) * 127
    amax = torch.full((64,), 127.0)
    got = load(spec, tmp_path).run(q, tensors, [amax])
    exact = 127 * decode_int8(tensors, encoding, (64, 64)).t()
    assert_close_within(got, exact, exact.abs() * 10 * plain_int8.UNIT)
    floats = 127 * reference.operand(spec.weight, tensors, torch.float32).t()
    assert (got - floats).abs().max() > 1e-3 * floats.abs().max()


def test_two_steps_are_the_one_inside_a_product(tmp_path):
    inside = spec_of(NF4, (48, 192), x="float16")
    apart = dataclasses.replace(inside, x_dtype="int8")
    rows = load(QuantizeSpec(192, "float16"), tmp_path)
    x, tensors = harness.activation(inside, 6), harness.stored(NF4, (48, 192))
    x[2, 100], x[4] = float("nan"), 0.0
    want = load(inside, tmp_path).run(x, tensors, [])
    codes, amax = rows.run(x, [])
    module = load(apart, tmp_path)
    got = module.run(codes, tensors, [amax])
    assert torch.equal(got.nan_to_num(9e9), want.nan_to_num(9e9))
    assert got[2].isnan().all()
    assert (got[4] == 0).all()
    assert got[[0, 1, 3, 5]].isfinite().all()
    wide = torch.zeros(6, 200, dtype=torch.int8)
    wide[:, :192] = codes
    again = module.run(wide[:, :192], tensors, [amax])
    assert torch.equal(again.nan_to_num(9e9), want.nan_to_num(9e9))
    leading = module.run(codes.reshape(2, 3, 192), tensors, [amax.reshape(2, 3)])
    assert torch.equal(leading.flatten(0, 1).nan_to_num(9e9), want.nan_to_num(9e9))


@pytest.mark.parametrize(("encoding", "shape"), [(INT8, (64, 1024)), (NF4, (96, 512))])
def test_whole_tiles_and_splits(tmp_path, encoding, shape):
    spec = spec_of(encoding, shape, out="float16")
    spec = dataclasses.replace(spec, epilogue=Epilogue.bias("float16"))
    module = load(spec, tmp_path)
    harness.split(module)
    for rows in (1, 17, 130):
        check(spec, module, harness.activation(spec, rows))


def test_experts(tmp_path):
    spec = spec_of(NF4, (3, 40, 128), x="float16", outliers=Outliers("float16", threshold=4.0))
    spec = dataclasses.replace(spec, epilogue=Epilogue.bias("float16", "en"))
    module = load(spec, tmp_path)
    x = harness.activation(spec, 20)
    x[0, 3, 7], x[1, :, 8:30], x[2, 19, 127] = 50.0, 9.0, -4.0
    check(spec, module, x)
    check(spec, module, x[:, :2])
    check(spec, module, x.transpose(0, 1).contiguous().transpose(0, 1))
    codes = dataclasses.replace(spec, x_dtype="int8", outliers=None)
    q = torch.randint(-127, 128, (3, 5, 128)).to(torch.int8)
    tensors, extra = harness.stored(NF4, (3, 40, 128)), harness.operands(codes, 5)
    amax = torch.rand(3, 5) + 1
    got = load(codes, tmp_path).run(q, tensors, [*extra, amax])
    want = reference.run(codes, q, tensors, [*extra, amax])
    size = decode_int8(tensors, NF4, (3, 40, 128)).abs().transpose(1, 2)
    magnitude = q.double().abs() @ size * (amax / 127).unsqueeze(-1)
    # Two tiles, and the nine roundings that `plain_int8.sums` counts; the reference rounds twice.
    off = magnitude * 13 * plain_int8.UNIT
    assert_close_within(got, want, harness.through_epilogue(codes, magnitude, off, extra))


def test_any_stride_and_given_results(tmp_path):
    spec = spec_of(INT8, (16, 64), outliers=Outliers("float32", columns=2))
    module = load(spec, tmp_path)
    check(spec, module, torch.randn(5, 100)[:, 7:71])
    check(spec, module, torch.randn(64, 5).t())
    check(spec, module, torch.randn(1, 64).expand(5, 64))
    tensors, extra, x = (
        harness.stored(INT8, (16, 64)),
        harness.operands(spec, 6),
        torch.randn(6, 64),
    )
    want = module.run(x, tensors, extra)
    out = torch.empty(16, 3, 2).permute(2, 1, 0)
    assert module.run(x.reshape(2, 3, 64), tensors, extra, out) is out
    assert torch.equal(out.reshape(6, 16), want)


def test_what_int32_cannot_hold_goes_to_float32_tile_by_tile():
    zero = Encoding(8, block=(1, -1), zero_point=True)
    assert scaling_of(spec_of(zero, (2, 66_000))) == "output"
    assert scaling_of(spec_of(zero, (2, 67_000))) == "tile"
    assert scaling_of(spec_of(INT8, (2, 132_000))) == "output"
    assert scaling_of(spec_of(INT8, (2, 133_000))) == "tile"


def test_large_weights_use_wide_indices():
    big = WeightOperand.whole(Encoding(4, block=(1, 64)), (2**17, 2**15), transposed=False)
    found = Outliers("float16", threshold=6.0)
    spec = KernelSpec(big, "float16", "int8", "float16", outliers=found)
    text = render(spec, Header())
    text = text[text.index("def decode(") : text.index("def linear_gather(")]
    functions = text.split("@triton.jit")
    assert len(functions) == 4
    assert all("to(tl.int64)" in function for function in functions[:3])
    small = render(dataclasses.replace(spec, weight=harness.whole(INT8, 64, 64)), Header())
    assert "int64" not in small[small.index("def decode(") : small.index("def linear_gather(")]


def test_the_largest_integers_everywhere(tmp_path):
    """255 * 127 * 67000 is above 2**31, and above what float32 holds exactly."""
    k = 67_000
    spec = spec_of(Encoding(8, block=(1, -1), zero_point=True), (2, k), x="int8")
    codes = torch.full((2, k), 255, dtype=torch.uint8)
    codes[1, :3] = 0
    tensors = [codes, torch.ones(2), torch.zeros(2, dtype=torch.uint8)]
    q, amax = torch.full((1, k), 127, dtype=torch.int8), torch.tensor([127.0])
    got = load(spec, tmp_path).run(q, tensors, [amax]).double()
    want = 127.0 * 255 * torch.tensor([[k, k - 3.0]], dtype=torch.float64)
    assert_close_within(got, want, want * (k / 128 + 4) * plain_int8.UNIT)
    assert got[0, 0] != got[0, 1]
