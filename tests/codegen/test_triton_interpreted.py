"""Printed Triton kernels in Triton's interpreter, against the reference.

The interpreter multiplies bfloat16 as integers in ``tl.dot``, so these run in float16 and float32.
"""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fxquant.codegen import Header, reference
from fxquant.codegen.epilogue import Epilogue, EpilogueOperand
from fxquant.codegen.spec import KernelSpec, WeightOperand
from fxquant.codegen.triton import render
from fxquant.formats import Encoding
from tests.codegen import harness
from tests.codegen.specs import specs

NF4 = Encoding(4, "nf4", (64,), scale=Encoding(8, "dynamic8", (256,), offset=True))


def check(spec, module, rows, seed=0, x=None):
    tensors = harness.stored(spec.weight.encoding, spec.weight.shape, seed)
    x = harness.activation(spec, rows, seed + 1) if x is None else x
    extra = harness.operands(spec, rows, seed + 2)
    got = module.run(x, tensors, extra)
    want = reference.run(spec, x, tensors, extra)
    assert got.shape == want.shape
    assert got.dtype == want.dtype
    compute = getattr(torch, spec.compute_dtype)
    w = reference.operand(spec.weight, tensors, compute)
    bound = 2 * harness.bound(spec, x.to(compute), w, extra, decoded_apart=True)
    assert ((got.double() - want.double()).abs() <= bound).all()


@settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(specs(), st.sampled_from((0, 1, 2, 3, 5, 17)), st.integers(0, 2**16))
def test_drawn_specs(tmp_path, spec, rows, seed):
    check(spec, harness.load(spec, tmp_path, interpreted=True), rows, seed)


@pytest.mark.parametrize(("shape", "dtype"), [((96, 256), "float32"), ((64, 1024), "float16")])
def test_whole_tiles_and_splits(tmp_path, shape, dtype):
    spec = KernelSpec(
        harness.whole(NF4, *shape), dtype, dtype, dtype, Epilogue.bias(dtype), "tiled"
    )
    module = harness.load(spec, tmp_path, interpreted=True)
    harness.split(module)
    for rows in (1, 4, 16, 140):
        check(spec, module, rows)


def test_experts(tmp_path):
    weight = harness.whole(NF4, 3, 40, 128)
    spec = KernelSpec(
        weight, "float16", "float16", "float16", Epilogue.bias("float16", "en"), "experts"
    )
    module = harness.load(spec, tmp_path, interpreted=True)
    for rows in (1, 20):
        check(spec, module, rows)


def test_any_activation_stride(tmp_path):
    spec = KernelSpec(harness.whole(NF4, 16, 64), "float32", "float32", "float32")
    module = harness.load(spec, tmp_path, interpreted=True)
    check(spec, module, 5, x=torch.randn(5, 100)[:, 7:71])
    check(spec, module, 5, x=torch.randn(64, 5).t())
    check(spec, module, 5, x=torch.randn(1, 64).expand(5, 64))


def test_leading_dimensions_and_given_results(tmp_path):
    spec = KernelSpec(harness.whole(NF4, 16, 64), "float32", "float32", "float32")
    module = harness.load(spec, tmp_path, interpreted=True)
    tensors, x = harness.stored(NF4, (16, 64)), torch.randn(2, 3, 64)
    want = module.run(x, tensors, [])
    assert want.shape == (2, 3, 16)
    for out in (torch.empty(2, 3, 16), torch.empty(16, 3, 2).permute(2, 1, 0)):
        assert module.run(x, tensors, [], out) is out
        assert torch.equal(out, want)


def test_results_do_not_change_from_run_to_run(tmp_path):
    spec = KernelSpec(harness.whole(NF4, 16, 512), "float32", "float32", "float32")
    module = harness.load(spec, tmp_path, interpreted=True)
    tensors, x = harness.stored(NF4, (16, 512)), torch.randn(8, 512)
    assert torch.equal(module.run(x, tensors, []), module.run(x, tensors, []))


@pytest.mark.parametrize("dims", ["", "e", "m", "n", "em", "en", "mn", "emn"])
def test_every_shape_of_operand(tmp_path, dims):
    epilogue = Epilogue((EpilogueOperand(dims, "float32"),), Epilogue.bias("float32").nodes)
    spec = KernelSpec(
        harness.whole(NF4, 2, 8, 32), "float32", "float32", "float32", epilogue, "operand"
    )
    check(spec, harness.load(spec, tmp_path, interpreted=True), 3)


def test_masks_and_divisions_fall_away():
    exact = render(KernelSpec(harness.whole(NF4, 512, 1024), *["float16"] * 3), Header())
    body = exact[exact.index("def decode(") : exact.index("def finish(")]
    assert "mask" not in body
    assert "%" not in body
    ragged = render(KernelSpec(harness.whole(NF4, 500, 1000), *["float16"] * 3), Header())
    assert "n < 500" in ragged


def test_large_weights_use_wide_indices():
    big = WeightOperand.whole(Encoding(4, "nf4"), (2**17, 2**15), transposed=False)
    small = harness.whole(NF4, 512, 1024)
    for dtype, wide in (("float32", "n0, k0 = n0.to(tl.int64)"), ("float16", "n[:, None].to(tl")):
        assert wide in render(KernelSpec(big, *[dtype] * 3), Header())
        assert wide not in render(KernelSpec(small, *[dtype] * 3), Header())


def test_kernels_are_short_and_fit_the_page():
    text = render(KernelSpec(harness.whole(NF4, 384, 1536), *["float16"] * 3), Header())
    assert max(map(len, text.splitlines())) <= 120
    for kernel in text.split("@triton.jit")[1:]:
        assert len(kernel.split("\n\n\n")[0].splitlines()) <= 80
