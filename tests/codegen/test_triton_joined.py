"""Printed Triton kernels of several weights and several results, interpreted.

The interpreter multiplies bfloat16 as integers in ``tl.dot``, so these run in float16 and float32.
"""

import dataclasses

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fxquant.codegen import Header, reference
from fxquant.codegen.epilogue import Epilogue, EpilogueNode, EpilogueOperand, EpilogueResult
from fxquant.codegen.spec import KernelSpec, Outliers
from fxquant.codegen.triton import render
from fxquant.formats import Encoding, decode_int8
from tests.bounds import assert_close_within
from tests.codegen import harness, plain_int8
from tests.codegen.specs import joined_specs

UNIT = 2.0**-24
NF4 = Encoding(4, "nf4", (64,), scale=Encoding(8, "dynamic8", (256,), offset=True))
INT8 = Encoding(8, block=(1, -1))
GATED = Epilogue(
    (),
    (
        EpilogueNode("aten.silu.default", ("%acc",)),
        EpilogueNode("aten.mul.Tensor", ("%0", "%acc1")),
    ),
)
# NumPy, which the interpreter computes with, warns of what is defined here.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def sums_of(spec, x, weights, extra):
    """What each weight's sums are of absolute values, and how far two kernels may be apart.

    At most k additions round and nine more for an int8 sum's scales (`plain_int8.sums`), in either;
    decoded weights may be neighbours (`harness.bound`).
    """
    if spec.outliers is not None:
        first, found = len(spec.epilogue.operands), []
        for number, one in enumerate(weights):
            own = [*extra[first : first + 1], *extra[first + 1 + number :][:1]]
            found.append(plain_int8.sums(spec, x, one, own, decoded_apart=True))
        return [(one.magnitude, 2 * one.bound) for one in found]
    compute = getattr(torch, spec.compute_dtype)
    moved = 0.0
    if spec.compute_dtype != "int8":
        rows, turned = x.to(compute).double().abs(), []
        turned = [reference.operand(spec.weight, one, compute).double().abs() for one in weights]
        moved = 4 * UNIT + (0.0 if compute == torch.float32 else torch.finfo(compute).eps)
    else:
        amax = x.float().abs().amax(-1).clamp_min(2.0**-100)
        rows = torch.round(x.float() * (torch.full_like(amax, 127.0) / amax).unsqueeze(-1))
        if spec.is_quantized:
            rows, amax = x, extra[-1].reshape(x.shape[:-1])
        rows = rows.double().abs() * (amax.double() / 127).unsqueeze(-1)
        steps = reference.view_steps(spec.weight)
        turned = []
        for one in weights:
            found = decode_int8(one, spec.weight.encoding, spec.weight.shape).double().abs()
            for method, arguments in steps:
                found = getattr(found, method)(*arguments)
            turned.append(found)
    reach = [rows @ one.transpose(-1, -2) for one in turned]
    return [(size, size * (2 * (spec.weight.k + 9) * UNIT + moved)) for size in reach]


def through(spec, sums, extra):
    """The size and the error of every result of `joined_specs`: adding and relu pass errors on.

    ``silu(a) * b``: the derivative of silu is below 1.1, and ``abs(silu(a)) <= abs(a)``.
    """
    values = {f"%acc{number or ''}": found for number, found in enumerate(sums)}
    for number, node in enumerate(spec.epilogue.nodes):
        size, error = values[node.args[0]]
        if node.op == "aten.silu.default":
            error = 1.1 * error
        elif node.op == "aten.mul.Tensor":
            other, other_error = values[node.args[1]]
            error = error * (other + other_error) + size * other_error
            size = size * other
        elif node.op == "aten.add.Tensor":
            operand = int(node.args[1].removeprefix("%in"))
            dims = spec.epilogue.operands[operand].dims
            axes = "emn" if spec.weight.batch else "mn"
            sizes = zip(axes, size.shape, strict=True)
            shape = [length if axis in dims else 1 for axis, length in sizes]
            size = size + extra[operand].double().abs().reshape(shape)
        values[f"%{number}"] = size, error
    found = [(spec.epilogue.result, spec.out_dtype)]
    found += [(result.value, result.dtype) for result in spec.epilogue.more]
    for value, dtype in found:
        size, error = values[value]
        # A subnormal of float16 is not relative.
        least = torch.finfo(getattr(torch, dtype)).smallest_normal
        yield error + (size + least) * (torch.finfo(getattr(torch, dtype)).eps + 16 * UNIT)


def check(spec, module, rows, seed=0):
    stored = [
        harness.stored(spec.weight.encoding, spec.weight.shape, seed + 10 * number)
        for number in range(spec.weights)
    ]
    weight = [tensor for one in stored for tensor in one]
    x = harness.activation(spec, rows, seed + 1)
    extra = harness.operands(spec, rows, seed + 2)
    got, want = module.run(x, weight, extra), reference.run(spec, x, weight, extra)
    if not spec.epilogue.more:
        got, want = [got], (want,)
    assert isinstance(got, list)
    bounds = list(through(spec, sums_of(spec, x, stored, extra), extra))
    assert len(got) == len(want) == len(bounds)
    for ours, theirs, bound in zip(got, want, bounds, strict=True):
        assert ours.dtype == theirs.dtype
        assert_close_within(ours, theirs, bound)
    return got


@settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(joined_specs(), st.sampled_from((0, 1, 3, 17)), st.integers(0, 2**16))
def test_drawn_specs(tmp_path, spec, rows, seed):
    check(spec, harness.load(spec, tmp_path, interpreted=True), rows, seed)


@pytest.mark.parametrize(
    ("encoding", "compute"), [(NF4, "float16"), (INT8, "int8"), (NF4, "int8"), (INT8, "float32")]
)
def test_gate_and_up_with_splits(tmp_path, encoding, compute):
    x = "float32" if compute == "int8" else compute
    spec = KernelSpec(harness.whole(encoding, 64, 1024), x, compute, x, GATED, "gate_up", weights=2)
    module = harness.load(spec, tmp_path, interpreted=True)
    harness.split(module)
    for rows in (1, 17, 70):
        check(spec, module, rows)


def test_query_key_and_value_are_three_results(tmp_path):
    biased = tuple(
        EpilogueNode("aten.add.Tensor", (name, f"%in{number}"))
        for number, name in enumerate(("%acc1", "%acc2", "%acc"))
    )
    more = (EpilogueResult("%0", "float16"), EpilogueResult("%1", "float32"))
    epilogue = Epilogue((EpilogueOperand("n", "float16"),) * 3, biased, more)
    spec = KernelSpec(harness.whole(NF4, 48, 512), *["float16"] * 3, epilogue, "q_k_v", weights=3)
    query, key, value = check(spec, harness.load(spec, tmp_path, interpreted=True), 20)
    assert (query.dtype, key.dtype, value.dtype) == (torch.float16, torch.float16, torch.float32)
    assert not torch.equal(query, key)


@pytest.mark.parametrize(
    "outliers", [Outliers("float16", threshold=2.0), Outliers("float16", columns=21)]
)
def test_outliers_of_several_weights(tmp_path, outliers):
    more = (EpilogueResult("%acc1", "float32"),)
    spec = KernelSpec(
        harness.whole(INT8, 24, 96), "float32", "int8", "float32", Epilogue((), (), more), "two",
        outliers, weights=2,
    )  # fmt: skip
    module = harness.load(spec, tmp_path, interpreted=True)
    got = check(spec, module, 5)
    alone = dataclasses.replace(spec, epilogue=Epilogue(), weights=1)
    own = harness.load(alone, tmp_path, interpreted=True)
    x, extra = harness.activation(spec, 5, 1), harness.operands(spec, 5, 2)
    for number, result in enumerate(got):
        stored = harness.stored(INT8, (24, 96), 10 * number)
        assert torch.equal(own.run(x, stored, [*extra[:1], *extra[number + 1 :][:1]]), result)
    assert not torch.equal(*got)


def test_columns_are_counted_for_every_weight_once_a_call(tmp_path):
    more = (EpilogueResult("%acc1", "float32"),)
    spec = KernelSpec(
        harness.whole(INT8, 24, 96), "float32", "int8", "float32", Epilogue((), (), more), "two",
        Outliers("float16", threshold=2.0), weights=2,
    )  # fmt: skip
    module = harness.load(spec, tmp_path, interpreted=True)
    weight = [*harness.stored(INT8, (24, 96)), *harness.stored(INT8, (24, 96), 1)]
    x, counters = harness.activation(spec, 40), [torch.tensor([5, 50]), torch.tensor([0, 0])]
    columns = int((x.abs() >= 2).any(0).sum())
    for calls in (1, 2):
        module.run(x, weight, [], counters=counters)
        assert counters[0].tolist() == [5 + calls, 50 + calls * columns]
        assert counters[1].tolist() == [calls, calls * columns]
    assert 0 < columns < 96


def test_every_result_keeps_its_leading_dimensions(tmp_path):
    epilogue = Epilogue((), (), (EpilogueResult("%acc1", "float32"),))
    spec = KernelSpec(harness.whole(NF4, 16, 64), *["float32"] * 3, epilogue, "two", weights=2)
    module = harness.load(spec, tmp_path, interpreted=True)
    first, second = harness.stored(NF4, (16, 64)), harness.stored(NF4, (16, 64), 1)
    x = torch.randn(2, 3, 64)
    one, two = module.run(x, [*first, *second], [])
    assert one.shape == two.shape == (2, 3, 16)
    flipped = module.run(x, [*second, *first], [])
    assert torch.equal(flipped[0], two)
    assert torch.equal(flipped[1], one)
    assert [t.shape for t in module.run(x[:0], [*first, *second], [])] == [(0, 3, 16)] * 2


@pytest.mark.parametrize(("dtype", "kernels"), [("float16", 1), ("float32", 2)])
def test_the_activation_is_read_once(dtype, kernels):
    single = KernelSpec(harness.whole(NF4, 256, 256), *[dtype] * 3, name="one")
    joined = dataclasses.replace(single, epilogue=GATED, weights=2)
    loads = "x0 = tl.load(" if dtype == "float16" else "x_tile = tl.load("
    assert render(joined, Header()).count(loads) == kernels
    assert render(single, Header()).count(loads) == kernels
    assert render(joined, Header()).count("= decode(") == 2 * kernels
