"""The reference, against plain float64 arithmetic and under every way of tracing."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx

from fxquant.codegen import RENDERERS, Header, graphs, reference
from fxquant.codegen.epilogue import Epilogue
from fxquant.codegen.spec import KernelSpec, WeightOperand
from fxquant.formats import Encoding, decode
from tests.codegen import harness
from tests.codegen.specs import joined_specs, specs, weights

NF4 = Encoding(4, "nf4", (64,), scale=Encoding(8, "dynamic8", (256,), offset=True))


@settings(max_examples=80, deadline=None)
@given(weights())
def test_operand_is_the_strided_view(weight):
    tensors = harness.stored(weight.encoding, weight.shape)
    flat = decode(tensors, weight.encoding, weight.shape, torch.float32).flatten()
    want = flat.as_strided(weight.sizes, weight.strides, weight.offset)
    got = reference.operand(weight, tensors, torch.float32)
    assert torch.equal(got, want if weight.batch else want[0])


def test_views_are_plain_where_strides_nest():
    whole = harness.whole(NF4, 6, 64)
    assert reference.view_steps(whole) == ()
    turned = harness.whole(NF4, 64, 6, transposed=True)
    assert reference.view_steps(turned) == (("transpose", (-2, -1)),)
    part = WeightOperand(NF4, (48, 64), None, 16, 64, (0, 64, 1), 16 * 64)
    assert all(method != "as_strided" for method, _ in reference.view_steps(part))
    skewed = WeightOperand(NF4, (48, 64), None, 4, 4, (0, 65, 1))
    assert [method for method, _ in reference.view_steps(skewed)] == ["as_strided"]


@settings(max_examples=60, deadline=None)
@given(specs())
def test_equals_float64(spec):
    rows = 3
    tensors = harness.stored(spec.weight.encoding, spec.weight.shape)
    x, extra = harness.activation(spec, rows), harness.operands(spec, rows)
    compute = getattr(torch, spec.compute_dtype)
    w = reference.operand(spec.weight, tensors, compute).double()
    acc = x.to(compute).double() @ w.transpose(-1, -2)
    want = harness.plain_epilogue(spec, acc, [t.double() for t in extra])
    got = reference.run(spec, x, tensors, extra)
    assert got.dtype == getattr(torch, spec.out_dtype)
    assert got.shape == want.shape
    bound = harness.bound(spec, x.to(compute), w, [t.double() for t in extra])
    assert ((got.double() - want).abs() <= bound).all()


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_traces_with_symbolic_rows(dtype):
    spec = KernelSpec(harness.whole(NF4, 24, 64), dtype, dtype, dtype, Epilogue.bias(dtype))
    tensors = harness.stored(NF4, (24, 64))
    x, extra = harness.activation(spec, 5), harness.operands(spec, 5)

    def call(x, weight, extra):
        return reference.run(spec, x, weight, extra)

    traced = make_fx(call, tracing_mode="symbolic")(x, tensors, extra)
    for rows in (5, 9):
        x = harness.activation(spec, rows)
        assert torch.equal(traced(x, tensors, extra), call(x, tensors, extra))


def test_leading_dimensions_and_no_rows():
    spec = KernelSpec(harness.whole(NF4, 24, 64), "float32", "float32", "float32")
    tensors = harness.stored(NF4, (24, 64))
    x = torch.randn(2, 3, 64)
    got = reference.run(spec, x, tensors, [])
    torch.testing.assert_close(
        got.reshape(6, 24), reference.run(spec, x.reshape(6, 64), tensors, [])
    )
    assert reference.run(spec, torch.empty(0, 64), tensors, []).shape == (0, 24)
    assert reference.run(spec, torch.ones(64), tensors, []).shape == (24,)


def test_fused_bias_equals_the_float32_detour():
    spec = KernelSpec(
        harness.whole(NF4, 24, 64), "bfloat16", "bfloat16", "bfloat16", Epilogue.bias("bfloat16")
    )
    assert "addmm" in reference.source(spec)
    detour = dataclasses.replace(spec, out_dtype="float32")
    assert "addmm" not in reference.source(detour)
    tensors = harness.stored(NF4, (24, 64))
    x, extra = harness.activation(spec, 7), harness.operands(spec, 7)
    fused = reference.run(spec, x, tensors, extra)
    torch.testing.assert_close(fused, reference.run(detour, x, tensors, extra).bfloat16())


def test_source_is_what_runs_and_says_where_it_is_used():
    spec = KernelSpec(harness.whole(NF4, 24, 64), "float32", "float32", "float32")
    text = RENDERERS["torch"](spec, Header(("encoder.0",), "nf4"))
    namespace = {}
    exec(compile(text, "dump", "exec"), namespace)
    tensors, x = harness.stored(NF4, (24, 64)), harness.activation(spec, 3)
    assert torch.equal(namespace["run"](x, tensors, []), reference.run(spec, x, tensors, []))
    assert "encoder.0" in text


def results(out):
    return list(out) if isinstance(out, tuple) else [out]


@settings(max_examples=60, deadline=None)
@given(joined_specs())
def test_several_weights_are_several_products_and_one_epilogue(spec):
    rows = 3
    stored = [
        harness.stored(spec.weight.encoding, spec.weight.shape, seed)
        for seed in range(spec.weights)
    ]
    x, extra = harness.activation(spec, rows), harness.operands(spec, rows)
    got = results(reference.run(spec, x, [t for one in stored for t in one], extra))
    operands = len(spec.epilogue.operands)
    alone = dataclasses.replace(spec, weights=1, epilogue=Epilogue(), out_dtype="float32")
    columns, aparts = extra[operands : operands + 1], extra[operands + 1 :]
    beside = [[*columns, *aparts[i : i + 1]] for i in range(spec.weights)]
    sums = [reference.run(alone, x, *each) for each in zip(stored, beside, strict=True)]
    graph = fx.GraphModule(torch.nn.Module(), graphs.to_fx(spec.epilogue))
    want = results(graph(*sums[: spec.epilogue.sums], *(t.float() for t in extra[:operands])))
    dtypes = [spec.out_dtype, *(result.dtype for result in spec.epilogue.more)]
    assert [t.dtype for t in got] == [getattr(torch, dtype) for dtype in dtypes]
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs.to(ours.dtype))
