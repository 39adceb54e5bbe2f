"""Every entry of the pointwise table: torch against the reference against printed Triton."""

import re

import pytest
import torch
from torch import fx
from torch._inductor.lowering import lowerings

from fxquant import errors
from fxquant.codegen import Header, graphs, pointwise, reference
from fxquant.codegen.epilogue import Epilogue, EpilogueNode, EpilogueOperand
from fxquant.codegen.spec import KernelSpec
from fxquant.codegen.triton import render
from fxquant.codegen.triton.ops import TritonOps
from fxquant.formats import Encoding
from tests.codegen import harness

A, B = "%acc", "%in0"
POSITIVE = (("aten.abs.default", (A,)), ("aten.add.Tensor", ("%0", 0.25)))
ONLY_B = (("aten.mul.Tensor", (A, 0)), ("aten.add.Tensor", ("%0", B)))
GATE = (("aten.gt.Scalar", (A, 0)),)
ROUNDED = ("aten.round.default", (B,))
BOUNDED = (("aten.sin.default", (A,)), ("aten.mul.Tensor", ("%0", 0.9)))

# name -> nodes (op, args, kwargs) that end in the op; `POSITIVE` makes the argument positive.
CASES = {
    "add": [("aten.add.Tensor", (A, B), {"alpha": 3})],
    "sub": [("aten.sub.Tensor", (A, B), {"alpha": 2})],
    "rsub": [("aten.rsub.Scalar", (A, 1))],
    "mul": [("aten.mul.Tensor", (A, B))],
    "div": [("aten.div.Tensor", (A, 3))],
    "neg": [("aten.neg.default", (A,))],
    "reciprocal": [*POSITIVE, ("aten.reciprocal.default", ("%1",))],
    "abs": [("aten.abs.default", (A,))],
    "exp": [("aten.exp.default", (A,))],
    "exp2": [("aten.exp2.default", (A,))],
    "log": [*POSITIVE, ("aten.log.default", ("%1",))],
    "log2": [*POSITIVE, ("aten.log2.default", ("%1",))],
    "sqrt": [*POSITIVE, ("aten.sqrt.default", ("%1",))],
    "rsqrt": [*POSITIVE, ("aten.rsqrt.default", ("%1",))],
    "erf": [("aten.erf.default", (A,))],
    "sin": [("aten.sin.default", (A,))],
    "cos": [("aten.cos.default", (A,))],
    "floor": [*ONLY_B, ("aten.floor.default", ("%1",))],
    "ceil": [*ONLY_B, ("aten.ceil.default", ("%1",))],
    "tanh": [("aten.tanh.default", (A,))],
    "sigmoid": [("aten.sigmoid.default", (A,))],
    "silu": [("aten.silu.default", (A,))],
    "gelu": [("aten.gelu.default", (A,))],
    "gelu tanh": [("aten.gelu.default", (A,), {"approximate": "tanh"})],
    "relu": [("aten.relu.default", (A,))],
    "leaky_relu": [("aten.leaky_relu.default", (A, 0.1))],
    "hardtanh": [("aten.hardtanh.default", (A,))],
    "square": [("aten.square.default", (A,))],
    "pow 2": [("aten.pow.Tensor_Scalar", (A, 2))],
    "pow 3": [("aten.pow.Tensor_Scalar", (A, 3))],
    "pow 5": [("aten.pow.Tensor_Scalar", (A, 5))],
    "pow -0.5": [*POSITIVE, ("aten.pow.Tensor_Scalar", ("%1", -0.5))],
    "pow 1.7": [*POSITIVE, ("aten.pow.Tensor_Scalar", ("%1", 1.7))],
    "pow of scalar": [("aten.pow.Scalar", (2, A))],
    "pow of tensors": [*POSITIVE, ("aten.pow.Tensor_Tensor", ("%1", B))],
    "maximum": [("aten.maximum.default", (A, B))],
    "minimum": [("aten.minimum.default", (A, B))],
    "clamp": [("aten.clamp.default", (A, -1, 0.5))],
    "clamp above": [("aten.clamp.default", (A,), {"max": 0.5})],
    "clamp_min": [("aten.clamp_min.default", (A, 0.1))],
    "clamp_max": [("aten.clamp_max.default", (A, 0.1))],
    "where": [*GATE, ("aten.where.self", ("%0", A, B))],
    "eq": [("aten.eq.Tensor", (A, A)), ("aten.where.self", ("%0", A, B))],
    "ne": [("aten.ne.Tensor", (A, A)), ("aten.where.self", ("%0", A, B))],
    "lt": [("aten.lt.Tensor", (A, B)), ("aten.where.self", ("%0", A, B))],
    "le": [("aten.le.Tensor", (A, B)), ("aten.where.self", ("%0", A, B))],
    "ge": [("aten.ge.Tensor", (A, B)), ("aten.where.self", ("%0", A, B))],
    "gt": [("aten.gt.Tensor", (A, B)), ("aten.where.self", ("%0", A, B))],
    "logical": [
        ("aten.gt.Scalar", (A, 0)),
        ("aten.lt.Scalar", (B, 0)),
        ("aten.logical_and.default", ("%0", "%1")),
        ("aten.logical_not.default", ("%2",)),
        ("aten.logical_or.default", ("%3", "%1")),
        ("aten.where.self", ("%4", A, B)),
    ],
    # Finite: of infinity ATen makes NaN here, Inductor and kernels make infinity.
    "div floor": [
        ("aten.clamp.default", (A, -1e30, 1e30)),
        ("aten.div.Tensor_mode", ("%0", 0.3), {"rounding_mode": "floor"}),
    ],
    "div trunc": [("aten.div.Tensor_mode", (A, B), {"rounding_mode": "trunc"})],
    "fmod": [("aten.fmod.Tensor", (A, B))],
    "remainder": [("aten.remainder.Tensor", (A, B))],
    "remainder of a number": [("aten.remainder.Scalar", (A, -0.7))],
    "ldexp": [ROUNDED, ("aten.ldexp.Tensor", (A, "%0"))],
    "addcmul": [("aten.addcmul.default", (A, B, A), {"value": 0.3})],
    "addcdiv": [*POSITIVE, ("aten.addcdiv.default", (A, B, "%1"), {"value": -2})],
    "round": [*ONLY_B, ("aten.round.default", ("%1",))],
    "trunc": [*ONLY_B, ("aten.trunc.default", ("%1",))],
    "sign": [("aten.sign.default", (A,)), ("aten.mul.Tensor", ("%0", B))],
    "signbit": [("aten.signbit.default", (A,)), ("aten.where.self", ("%0", A, B))],
    "copysign": [("aten.copysign.Tensor", (A, B))],
    "copysign of a number": [("aten.copysign.Scalar", (A, -1))],
    "hypot": [("aten.hypot.default", (A, B))],
    "isnan": [("aten.isnan.default", (A,)), ("aten.where.self", ("%0", A, B))],
    "isinf": [("aten.isinf.default", (A,)), ("aten.where.self", ("%0", A, B))],
    "expm1": [("aten.expm1.default", (A,))],
    "log1p": [*POSITIVE, ("aten.log1p.default", ("%0",))],
    "log10": [*POSITIVE, ("aten.log10.default", ("%1",))],
    "erfc": [("aten.erfc.default", (A,))],
    "tan": [("aten.tanh.default", (A,)), ("aten.tan.default", ("%0",))],
    "sinh": [("aten.sinh.default", (A,))],
    "cosh": [("aten.cosh.default", (A,))],
    "asin": [*BOUNDED, ("aten.asin.default", ("%1",))],
    "acos": [*BOUNDED, ("aten.acos.default", ("%1",))],
    "atan": [("aten.atan.default", (A,))],
    "atan2": [("aten.atan2.default", (A, B))],
    "asinh": [("aten.asinh.default", (A,))],
    "acosh": [
        ("aten.cosh.default", (A,)),
        ("aten.add.Tensor", ("%0", 0.1)),
        ("aten.acosh.default", ("%1",)),
    ],
    "atanh": [*BOUNDED, ("aten.atanh.default", ("%1",))],
    "logical_xor": [
        *GATE,
        ("aten.lt.Scalar", (B, 0)),
        ("aten.logical_xor.default", ("%0", "%1")),
        ("aten.where.self", ("%2", A, B)),
    ],
    "bitwise": [
        *GATE,
        ("aten.lt.Scalar", (B, 0)),
        ("aten.bitwise_xor.Tensor", ("%0", "%1")),
        ("aten.bitwise_and.Tensor", ("%0", "%2")),
        ("aten.bitwise_not.default", ("%3",)),
        ("aten.bitwise_or.Tensor", ("%4", "%1")),
        ("aten.where.self", ("%5", A, B)),
    ],
    "sum of booleans": [
        *GATE,
        ("aten.lt.Scalar", (B, 0)),
        ("aten.add.Tensor", ("%0", "%1")),
        ("aten.maximum.default", ("%2", "%0")),
        ("aten.mul.Tensor", ("%3", A)),
    ],
    "_to_copy": [("aten._to_copy.default", (A,), {"dtype": "float16"})],
    "convert": [
        ("aten._to_copy.default", (A,), {"dtype": "float16"}),
        ("aten._to_copy.default", ("%0",), {"dtype": "float32"}),
    ],
}


def make(nodes, *, dims="n", dtype="float32"):
    written = tuple(
        EpilogueNode(node[0], node[1], tuple((node[2] if len(node) > 2 else {}).items()))
        for node in nodes
    )
    epilogue = Epilogue((EpilogueOperand(dims, dtype),), written)
    weight = harness.whole(Encoding(8, block=(1, -1)), 16, 16)
    return KernelSpec(weight, "float32", "float32", "float32", epilogue, "pointwise")


def by_hand(spec, acc, operand):
    """The nodes as calls of torch."""
    values = {"%acc": acc, "%in0": operand}

    def value(item):
        if item in ("float16", "float32"):
            return getattr(torch, item)
        return values.get(item, item) if isinstance(item, str) else item

    for number, node in enumerate(spec.epilogue.nodes):
        _, name, overload = node.op.split(".")
        op = getattr(getattr(torch.ops.aten, name), overload)
        values[f"%{number}"] = op(*map(value, node.args), **{k: value(v) for k, v in node.kwargs})
    return values[spec.epilogue.result]


@pytest.mark.parametrize("name", CASES)
def test_op(name, tmp_path):
    spec = make(CASES[name])
    tensors = harness.stored(spec.weight.encoding, spec.weight.shape)
    x = harness.activation(spec, 3) / 4
    extra = harness.operands(spec, 3)
    acc = x @ reference.operand(spec.weight, tensors, torch.float32).t()
    want = by_hand(spec, acc, extra[0]).float()
    got = reference.run(spec, x, tensors, extra)
    torch.testing.assert_close(got, want, atol=2e-6, rtol=2e-5)
    printed = harness.load(spec, tmp_path, interpreted=True).run(x, tensors, extra)
    loose = 1e-3 if name in ("_to_copy", "convert") else 1e-5
    torch.testing.assert_close(printed, want, atol=loose, rtol=max(loose, 2e-5))


SPECIAL_FUNCTIONS = {
    *("digamma", "erfinv", "i0", "igamma", "igammac", "lgamma", "polygamma"),
    *("special_erfcx", "special_log_ndtr", "special_ndtri", "special_zeta"),
}
"""Of mathematics, as are Bessel functions and polynomials: Inductor has them from a library."""
NOT_OF_FLOATS = {
    *("__ilshift__", "__ixor__", "__lshift__", "__rshift__", "__xor__", "gcd", "frexp"),
    *("bitwise_left_shift", "bitwise_right_shift", "angle", "clone"),
    "nextafter",  # steps of its dtype, where epilogues compute in float32
}


def test_every_entry_is_tested():
    tested = {node[0].split(".")[1] for nodes in CASES.values() for node in nodes}
    assert set(pointwise.OPS) - tested == {"convert_element_type"}


def test_every_pointwise_op_of_inductor_has_an_entry():
    ops = [op for op in lowerings if isinstance(op, torch._ops.OpOverload)]
    names = {
        op._schema.name.removeprefix("aten::")
        for op in ops
        if op.namespace == "aten" and torch.Tag.pointwise in op.tags and not op._schema.is_mutable
    }
    decomposed = {"max", "min", "true_divide"}
    library = {name for name in names if re.search("polynomial|bessel|airy|_i[01]", name)}
    missing = names - set(pointwise.OPS) - decomposed - library
    assert missing <= SPECIAL_FUNCTIONS | NOT_OF_FLOATS
    assert len(names & set(pointwise.OPS)) > 60


@pytest.mark.parametrize("op", ["maximum", "minimum", "relu", "clamp"])
def test_nan_is_passed_on(op, tmp_path):
    spec = make(CASES[op])
    tensors = harness.stored(spec.weight.encoding, spec.weight.shape)
    x = torch.full((2, 16), float("nan"))
    got = harness.load(spec, tmp_path, interpreted=True).run(x, tensors, harness.operands(spec, 2))
    assert got.isnan().all()


def test_power_has_the_signs_of_c(tmp_path):
    spec = make([*ONLY_B, ("aten.pow.Tensor_Scalar", ("%1", 5))])
    tensors = harness.stored(spec.weight.encoding, spec.weight.shape)
    base = torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0, -0.5, 0.5, 3.0] * 2)
    got = harness.load(spec, tmp_path, interpreted=True).run(torch.ones(1, 16), tensors, [base])
    torch.testing.assert_close(got[0], base**5)


@pytest.mark.parametrize("dtype", ["float16", "bool"])
def test_operands_of_other_dtypes(tmp_path, dtype):
    nodes = [("aten.where.self", (B, A, A))] if dtype == "bool" else CASES["add"]
    spec = make(nodes, dims="mn", dtype=dtype)
    tensors, x = (
        harness.stored(spec.weight.encoding, spec.weight.shape),
        harness.activation(spec, 3),
    )
    extra = harness.operands(spec, 3)
    got = harness.load(spec, tmp_path, interpreted=True).run(x, tensors, extra)
    torch.testing.assert_close(got, reference.run(spec, x, tensors, extra))


def test_unknown_op_is_an_error_that_lists_the_known():
    spec = make([("aten.cumsum.default", (A, 0))])
    with pytest.raises(errors.KernelError, match=r"aten.cumsum.default has no entry.*sigmoid"):
        render(spec, Header())
    rounded = EpilogueNode("aten.round.decimals", (A,), (("decimals", 2),))
    with pytest.raises(errors.KernelError, match=r"aten\.round\.decimals"):
        TritonOps().call(rounded, {A: "acc"})
    assert not pointwise.is_spelled(rounded)


def test_fx_graphs_and_back():
    for nodes in CASES.values():
        epilogue = make(nodes).epilogue
        graph = graphs.to_fx(epilogue)
        graph.lint()
        assert graphs.from_fx(graph, epilogue.operands) == epilogue
    assert graphs.from_fx(graphs.to_fx(Epilogue()), ()) == Epilogue()


def test_fx_graph_of_an_epilogue_computes_it():
    spec = make(CASES["gelu tanh"])
    module = fx.GraphModule(torch.nn.Module(), graphs.to_fx(spec.epilogue))
    acc = torch.randn(3, 16)
    want = torch.nn.functional.gelu(acc, approximate="tanh")
    torch.testing.assert_close(module(acc, torch.ones(16)), want)


def test_graph_with_something_else_is_refused():
    graph = fx.Graph()
    acc = graph.placeholder("acc")
    graph.output(graph.call_function(torch.ops.aten.sum.default, (acc,)))
    with pytest.raises(errors.KernelError, match=r"aten\.sum\.default"):
        graphs.from_fx(graph, ())
