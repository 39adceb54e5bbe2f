"""Printed Triton kernels that take rows to int8, interpreted: bit for bit the reference's."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fxquant.codegen import Header
from fxquant.codegen.quantize import QuantizeSpec, run
from fxquant.codegen.triton import render
from tests.codegen import harness

WAYS = [("token", False), ("token", True), ("tensor", False), ("tensor", True), ("static", False)]
# NumPy, which the interpreter computes with, warns of what is defined here.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def check(module, spec, x, limit=1.0):
    """The kernel's codes and scales; what lay beyond a limit is counted."""
    extra = [torch.tensor([limit])] if spec.has_limit else []
    want_codes, want_amax = run(spec, x, extra)
    if spec.has_limit:
        counter = torch.full((1,), 5, dtype=torch.int64)
        codes, amax = module.run(x, extra, counter=counter)
        beyond = (x.float().abs() > want_amax.unsqueeze(-1)).sum()
        assert counter.item() == 5 + beyond
    else:
        codes, amax = module.run(x, extra)
    assert codes.dtype == torch.int8
    assert codes.is_contiguous()
    assert torch.equal(codes, want_codes)
    assert amax.dtype == torch.float32
    assert amax.shape == want_amax.shape
    assert torch.equal(amax.isnan(), want_amax.isnan())
    assert torch.equal(amax.nan_to_num(), want_amax.nan_to_num())
    return codes, amax


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    way=st.sampled_from(WAYS),
    dtype=st.sampled_from(("float16", "bfloat16", "float32")),
    shape=st.sampled_from([(1,), (0, 3), (5, 1), (2, 3, 7), (4, 64), (3, 33), (40, 520)]),
    limit=st.sampled_from([0.0, 2.0**-120, 0.25, 1.0, 50.0, 1e30]),
    planted=st.sampled_from((None, float("nan"), float("inf"), 0.0, 3e4)),
    turned=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_equals_the_reference(tmp_path, *, way, dtype, shape, limit, planted, turned, seed):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(getattr(torch, dtype))
    if turned and x.ndim > 1:
        x = x.transpose(0, -1).contiguous().transpose(0, -1)
    if planted is not None and x.numel():
        x[(0,) * x.ndim] = planted
    spec = QuantizeSpec(shape[-1], dtype, *way)
    check(harness.load(spec, tmp_path, interpreted=True), spec, x, limit)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_ties_and_what_lies_beside_them(tmp_path, dtype):
    """Where one rounding more, or a product fused with a sum, would give another integer."""
    generator = torch.Generator().manual_seed(0)
    peak = 1 + 4 * torch.rand(32, 1, generator=generator)
    x = (torch.randint(-127, 127, (32, 64), generator=generator) + 0.5) * (peak / 127)
    x[:, :1] = peak
    x[1::2] = torch.nextafter(x[1::2], torch.tensor(9.0))
    x = x.to(getattr(torch, dtype))
    spec = QuantizeSpec(64, dtype)
    codes, amax = check(harness.load(spec, tmp_path, interpreted=True), spec, x)
    # The data can tell: dividing by amax / 127 is another rounding.
    other = torch.round(x.float() / (amax / 127).unsqueeze(-1)).to(torch.int8)
    assert (codes != other).any()


@pytest.mark.parametrize("way", [("token", False), ("tensor", True)])
def test_rows_longer_than_a_tile(tmp_path, way):
    spec = QuantizeSpec(8200, "float16", *way)
    x = torch.randn(2, 8200, generator=torch.Generator().manual_seed(1)).half()
    x[0, 8199], x[1, 3] = 9.0, -12.0
    module = harness.load(spec, tmp_path, interpreted=True)
    _, amax = check(module, spec, x, 7.0)
    assert amax.tolist() == ([7.0, 7.0] if spec.clipped else [9.0, 12.0])


def test_a_tensor_takes_two_launches_and_no_more_than_all_its_parts(tmp_path):
    """More rows than programs of the first launch: each of them takes several."""
    spec = QuantizeSpec(16, "float32", "tensor")
    text = render(spec, Header())
    assert text.count("kernel[") == 2
    module = harness.load(spec, tmp_path, interpreted=True)
    # Two programs instead of 512, so that the interpreter is done in time.
    few = text[text.index("def quantize(") :].replace(", 512)\n", ", 2)\n")
    assert few not in text
    exec(few, module.__dict__)
    rows = 5 * module.STEPS["peaks"][1]["BLOCK_M"] - 1
    for row in (0, rows // 2, rows - 1):
        x = torch.randn(rows, 16, generator=torch.Generator().manual_seed(row))
        x[row, 5] = -50.0
        _, amax = check(module, spec, x)
        assert (amax == 50.0).all()


def test_what_is_not_limited_has_no_counter(tmp_path):
    module = harness.load(QuantizeSpec(16, "float32"), tmp_path, interpreted=True)
    with pytest.raises(TypeError, match="counter"):
        module.run(torch.randn(2, 16), [], counter=torch.zeros(1, dtype=torch.int64))
    spec = QuantizeSpec(16, "float32", "static")
    module = harness.load(spec, tmp_path, interpreted=True)
    x, limit = torch.randn(2, 16), [torch.tensor(1.0)]
    assert torch.equal(module.run(x, limit)[0], run(spec, x, limit)[0])
