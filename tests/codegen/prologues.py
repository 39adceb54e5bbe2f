"""Prologues to test with: norms as models have them, gates, and random ones; and their checks."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fxquant.codegen import quantize
from fxquant.codegen.epilogue import EpilogueNode, EpilogueResult
from fxquant.codegen.prologue import Prologue, PrologueOperand, cast
from fxquant.codegen.quantize import QuantizeSpec
from fxquant.codegen.row_bounds import enclosures

Runner = Callable[[Sequence[Tensor], Sequence[Tensor]], list[Tensor]]


class Nodes(list[EpilogueNode]):
    """Nodes in the making."""

    def call(self, op: str, *args: Any, **kwargs: Any) -> str:
        """Adds an ATen op and gives its reference."""
        self.append(EpilogueNode(f"aten.{op}", args, tuple(kwargs.items())))
        return f"%{len(self) - 1}"

    def rounded(self, value: str, dtype: str) -> str:
        """Adds a cast where it rounds."""
        if dtype == "float32":
            return value
        self.append(cast(value, dtype))
        return f"%{len(self) - 1}"


def layer_norm(dtype: str, *, residual: bool = True) -> Prologue:
    """``layer_norm(x + y)`` with a weight in float32; the result is written out, too."""
    nodes, x = Nodes(), "%in0"
    rows = [PrologueOperand("mk", dtype)] * (1 + residual)
    weight, bias = f"%in{len(rows)}", f"%in{len(rows) + 1}"
    if residual:
        x = nodes.rounded(nodes.call("add.Tensor", "%in0", "%in1"), dtype)
    centred = nodes.call("sub.Tensor", x, nodes.call("mean.dim", x))
    variance = nodes.call("mean.dim", nodes.call("mul.Tensor", centred, centred))
    scale = nodes.call("rsqrt.default", nodes.call("add.Tensor", variance, 1e-5))
    weighted = nodes.call("mul.Tensor", nodes.call("mul.Tensor", centred, scale), weight)
    result = nodes.rounded(nodes.call("add.Tensor", weighted, bias), dtype)
    vectors = [PrologueOperand("k", "float32")] * 2
    return Prologue((*rows, *vectors), tuple(nodes), (EpilogueResult(result, dtype),))


def rms_norm(dtype: str, *, residual: bool = True) -> Prologue:
    """``rms_norm(x + y)`` with a weight; the sum, which the next residual reads, is written out."""
    nodes, x, more = Nodes(), "%in0", ()
    rows = [PrologueOperand("mk", dtype)] * (1 + residual)
    if residual:
        x = nodes.rounded(nodes.call("add.Tensor", "%in0", "%in1"), dtype)
        more = (EpilogueResult(x, dtype),)
    square = nodes.call("mean.dim", nodes.call("pow.Tensor_Scalar", x, 2))
    scale = nodes.call("rsqrt.default", nodes.call("add.Tensor", square, 1e-6))
    scaled = nodes.rounded(nodes.call("mul.Tensor", x, scale), dtype)
    nodes.rounded(nodes.call("mul.Tensor", f"%in{len(rows)}", scaled), dtype)
    return Prologue((*rows, PrologueOperand("k", dtype)), tuple(nodes), more)


def gate(dtype: str) -> Prologue:
    """``silu(gate) * up``, times a vector: what comes before ``down``, smoothed."""
    nodes = Nodes()
    turned = nodes.rounded(nodes.call("silu.default", "%in0"), dtype)
    product = nodes.rounded(nodes.call("mul.Tensor", turned, "%in1"), dtype)
    nodes.rounded(nodes.call("mul.Tensor", product, "%in2"), dtype)
    vector = PrologueOperand("k", "float32")
    return Prologue((*[PrologueOperand("mk", dtype)] * 2, vector), tuple(nodes))


def soft(dtype: str) -> Prologue:
    """A softmax, masked and scaled by numbers of rows and of all."""
    nodes = Nodes()
    kept = nodes.call("where.ScalarOther", "%in1", nodes.call("mul.Tensor", "%in0", "%in3"), -30.0)
    shifted = nodes.call("sub.Tensor", kept, nodes.call("amax.default", kept))
    power = nodes.call("exp.default", shifted)
    share = nodes.call("div.Tensor", power, nodes.call("sum.dim_IntList", power))
    nodes.call("mul.Tensor", share, nodes.call("neg.default", "%in2"))
    axes = (("mk", dtype), ("mk", "bool"), ("m", dtype), ("", "float32"))
    return Prologue(tuple(PrologueOperand(*each) for each in axes), tuple(nodes))


_UNARY = ("neg.default", "abs.default", "relu.default", "sigmoid.default", "silu.default")
_BINARY = ("add.Tensor", "sub.Tensor", "mul.Tensor", "maximum.default", "minimum.default")
_REDUCTIONS = ("mean.dim", "sum.dim_IntList", "amax.default")


def random_prologue(
    seed: int, dtypes: Sequence[str] = ("float16", "bfloat16", "float32")
) -> Prologue:
    """Some ops, reductions and casts on values of all axes; several values are written out."""
    draw = random.Random(seed)
    axes = ["mk", *draw.choices(("mk", "k", "m", ""), k=draw.randint(1, 3))]
    operands = [PrologueOperand(dims, draw.choice(dtypes)) for dims in axes]
    nodes = Nodes()
    known = {f"%in{number}": operand.dims for number, operand in enumerate(operands)}
    for _ in range(draw.randint(2, 10)):
        kind = draw.random()
        if kind < 0.25:
            value = draw.choice([name for name, dims in known.items() if "k" in dims])
            known[nodes.call(draw.choice(_REDUCTIONS), value)] = known[value].replace("k", "")
        elif kind < 0.45:
            value = draw.choice(list(known))
            known[nodes.call(draw.choice(_UNARY), value)] = known[value]
        elif kind < 0.55:
            value = draw.choice(list(known))
            known[nodes.rounded(value, draw.choice(dtypes))] = known[value]
        else:
            pair = draw.choices(list(known), k=2)
            axes_of_both = known[pair[0]] + known[pair[1]]
            name = nodes.call(draw.choice(_BINARY), *pair)
            known[name] = "".join(axis for axis in "mk" if axis in axes_of_both)
    last = nodes.call("add.Tensor", "%in0", list(known)[-1])
    full = [name for name, dims in known.items() if dims == "mk" and not name.startswith("%in")]
    more = draw.sample(full, k=min(len(full), draw.randint(0, 2)))
    results = [EpilogueResult(value, draw.choice(dtypes)) for value in (last, *more)]
    return Prologue(tuple(operands), tuple(nodes), tuple(results))


def fixed(k: int, dtype: str) -> list[QuantizeSpec]:
    """The prologues of models, in all the ways to find a scale."""
    ways = (("token", False), ("token", True), ("static", False))
    made = {
        "layer_norm": layer_norm(dtype, residual=False),
        "add_layer_norm": layer_norm(dtype),
        "rms_norm": rms_norm(dtype, residual=False),
        "add_rms_norm": rms_norm(dtype),
        "gate": gate(dtype),
        "soft": soft(dtype),
    }
    return [
        QuantizeSpec(k, dtype, *ways[number % 3], name=name, prologue=prologue)
        for number, (name, prologue) in enumerate(made.items())
    ]


def operands(spec: QuantizeSpec, *leading: int, seed: int = 0) -> list[Tensor]:
    """Random operands of a prologue."""
    assert spec.prologue is not None
    generator = torch.Generator().manual_seed(seed)
    made = []
    for operand in spec.prologue.operands:
        shape = [
            *(leading if "m" in operand.dims else ()),
            *([spec.k] if "k" in operand.dims else []),
        ]
        value = torch.randn(shape, generator=generator)
        is_bool = operand.dtype == "bool"
        made.append(value > -0.5 if is_bool else value.to(getattr(torch, operand.dtype)))
    return made


def check(spec: QuantizeSpec, run: Runner, given: list[Tensor], limit: float = 1.5) -> list[Tensor]:
    """A kernel's results lie where they have to, and its codes are those of its own x.

    The kernel may sum in another order than the reference, so that a number next to a tie can
    become the other integer; as soon as x is written out, its integers are exact.
    """
    assert spec.prologue is not None
    extra = [torch.tensor([limit])] if spec.has_limit else []
    results = run(given, extra)
    want = quantize.run_rows(spec, given, extra)
    found = enclosures(spec, given, extra, results[1])
    # The reference gives its own amax, and other codes with it.
    own = enclosures(spec, given, extra, want[1])
    for got, right, interval, same in zip(results, want, found, own, strict=True):
        assert (got.shape, got.dtype) == (right.shape, right.dtype)
        assert got.is_contiguous()
        shape = interval.low.shape
        assert interval.excess(got.reshape(shape)).max().item() == 0 if got.numel() else True
        assert same.excess(right.reshape(shape)).max().item() == 0 if got.numel() else True
    for number, more in enumerate(spec.prologue.more):
        if more == EpilogueResult(spec.prologue.result, spec.x_dtype):
            plain = QuantizeSpec(spec.k, spec.x_dtype, spec.scope, spec.clipped)
            codes, amax = quantize.run(plain, results[2 + number], extra)
            assert torch.equal(results[0], codes)
            assert torch.equal(results[1].nan_to_num(-1.0), amax.nan_to_num(-1.0))
    return results
