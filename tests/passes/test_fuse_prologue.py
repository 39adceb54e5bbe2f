"""Quantizing takes in what makes an activation, once and in the right order, or says why not."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx
from torch._inductor.decomposition import select_decomp_table
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

from fxquant.codegen.quantize import QuantizeSpec
from fxquant.codegen.spec import Epilogue, KernelSpec, WeightOperand
from fxquant.formats import Encoding, pack
from fxquant.passes.fuse import Decision, Step
from fxquant.passes.fuse.epilogue import epilogues
from fxquant.passes.fuse.lower import begin, launches
from fxquant.passes.fuse.prologue import prologues
from fxquant.runtime import ops

pytestmark = pytest.mark.usefixtures("few_heights")

assert ops  # imported for its registrations
K = 24
INT8 = Encoding(8, block=(1, -1))
Function = Callable[..., Any]


def quantized(
    x: Tensor, scope: str = "token", limit: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    spec = QuantizeSpec(int(x.shape[-1]), str(x.dtype).removeprefix("torch."), scope)
    return torch.ops.fxquant.quantize(x, [] if limit is None else [limit], spec.to_json())


def fused(
    fn: Function, *args: Tensor, mode: str = "fake", steps: Sequence[Step] = (prologues,)
) -> tuple[fx.GraphModule, list[Decision]]:
    """A function's graph after the pass; its launches run torch code."""
    with torch.no_grad():
        gm = make_fx(fn, decomposition_table=select_decomp_table(), tracing_mode=mode)(*args)
    gm.graph.eliminate_dead_code()
    begin(gm.graph)
    decisions = [decision for step in steps for decision in step(gm.graph)]
    decisions = [decision for decision in decisions if decision.kind == "prologue"]
    for node in launches(gm.graph):
        node.args = (*node.args[:-1], "torch")
    gm.graph.lint()
    gm.recompile()
    return gm, decisions


def rows_of(gm: fx.GraphModule) -> list[fx.Node]:
    found = gm.graph.find_nodes(op="call_function", target=torch.ops.fxquant.launch_rows.default)
    return list(found)


def spec_of(node: fx.Node) -> QuantizeSpec:
    return QuantizeSpec.from_json(str(node.args[2]))


def left(gm: fx.GraphModule) -> set[str]:
    """The ATen ops outside of launches."""
    return {
        str(node.target).split(".")[1] for node in gm.graph.nodes if "aten." in str(node.target)
    }


def check(
    fn: Function,
    *args: Tensor,
    mode: str = "fake",
    steps: Sequence[Step] = (prologues,),
    rounds_to: Sequence[torch.dtype] = (),
) -> tuple[fx.GraphModule, list[Decision]]:
    """The function gives what it gave, within a rounding or some.

    With x and amax off by a unit in the last place of the coarsest dtype, up to 127 steps are off
    by two such units, and one more step next to a tie.
    """
    gm, decisions = fused(fn, *args, mode=mode, steps=steps)
    got, want = gm(*args), fn(*args)
    dtypes = [*rounds_to, *(value.dtype for value in args if value.is_floating_point())]
    eps = max(torch.finfo(dtype).eps for dtype in dtypes)
    for found, right in zip(got, want, strict=True):
        assert (found.shape, found.dtype) == (right.shape, right.dtype)
        if right.dtype == torch.int8:
            assert (found.int() - right.int()).abs().max() <= int(1 + 254 * eps)
        else:
            torch.testing.assert_close(found, right, rtol=16 * eps, atol=64 * eps, equal_nan=True)
    return gm, decisions


def tensors(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.float()
    scaled = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
    return weight * scaled.to(x.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", ["fake", "symbolic"])
def test_norms_with_their_residuals(dtype: torch.dtype, mode: str) -> None:
    def layer(x, y, weight, bias):
        normed = F.layer_norm(x + y, (K,), weight, bias)
        return (*quantized(normed), normed)

    def rms(x, y, weight, bias):
        added = x + y
        return (*quantized(rms_norm(added, weight)), added)

    args = tensors((2, 5, K), (2, 5, K), (K,), (K,), dtype=dtype)
    for fn, means in ((layer, 2), (rms, 1)):
        gm, (decision,) = check(fn, *args, mode=mode)
        (node,) = rows_of(gm)
        assert left(gm) <= {"sym_size"}
        assert decision.done
        prologue = spec_of(node).prologue
        assert prologue is not None
        assert [n.op for n in prologue.nodes].count("aten.mean.dim") == means
        assert len(prologue.more) == 1
        # Rounded where the graph rounds: a sum in bfloat16 is one.
        casts = [n for n in prologue.nodes if n.op == "aten._to_copy.default"]
        assert bool(casts) == (dtype == torch.bfloat16)


def test_smoothing_gates_and_limits() -> None:
    def fn(gate, up, scale, limit):
        x = F.silu(gate) * up * scale
        return quantized(x, "static", limit)

    gm, (decision,) = check(fn, *tensors((4, K), (4, K), (K,)), torch.tensor(0.5))
    assert left(gm) == set()
    assert decision.done
    assert decision.reason.startswith("silu mul and int8")
    (node,) = rows_of(gm)
    assert len(node.args[1]) == 1  # type: ignore[arg-type]
    assert not spec_of(node).prologue.more  # type: ignore[union-attr]


def test_products_that_round_their_activation_take_integers() -> None:
    weight = pack(torch.randn(9, K, generator=torch.Generator().manual_seed(1)), INT8)
    operand = WeightOperand.whole(INT8, (9, K), transposed=False)
    text = KernelSpec(operand, "float32", "int8", "float32", Epilogue.bias("float32")).to_json()

    def fn(x, gamma, bias, *packed):
        normed = rms_norm(x, gamma)
        products = [
            torch.ops.fxquant.linear(normed, list(packed), [bias], text, site) for site in (3, 5)
        ]
        return (normed, *products)

    gm, (decision,) = check(fn, *tensors((6, K), (K,), (9,)), *weight.tensors())
    assert decision.done
    assert decision.sites == (3, 5)
    (node,) = rows_of(gm)
    specs = [KernelSpec.from_json(str(n.args[3])) for n in launches(gm.graph) if n is not node]
    assert [spec.x_dtype for spec in specs] == ["int8", "int8"]
    # Nothing to take in: the product goes on rounding what it gets.
    gm, (decision,) = check(
        lambda x, *rest: fn(x, torch.ones(()), *rest)[1:], *tensors((6, K), (9,)), *weight.tensors()
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_norm_makes_its_squares_itself(dtype: torch.dtype) -> None:
    """The product before it gives the sum that the residual reads, and nothing made of it."""
    weight = pack(torch.randn(K, 9, generator=torch.Generator().manual_seed(1)), INT8)
    operand = WeightOperand.whole(INT8, (K, 9), transposed=False)
    name = str(dtype).removeprefix("torch.")
    text = KernelSpec(operand, name, name, name).to_json()

    def fn(x, residual, gamma, *packed):
        added = torch.ops.fxquant.linear(x, list(packed), [], text, 0) + residual
        return (*quantized(rms_norm(added, gamma)), added)

    args = (*tensors((6, 9), (6, K), (K,), dtype=dtype), *weight.tensors())
    gm, (decision,) = check(fn, *args, steps=(epilogues, prologues))
    assert decision.done
    (rows,) = rows_of(gm)
    products = [node for node in launches(gm.graph) if node is not rows]
    assert [node.target for node in products] == [torch.ops.fxquant.launch.default]
    assert rows.args[0][0] is products[0]  # type: ignore[index]
    assert left(gm) == set()


def test_views_between() -> None:
    def fn(x, weight):
        added = (x + 1.0).reshape(10, K)
        normed = rms_norm(added, weight).reshape(2, 5, K)
        return (*quantized(normed), added)

    gm, _ = check(fn, *tensors((2, 5, K), (K,)))
    assert len(rows_of(gm)) == 1
    assert left(gm) <= {"reshape", "view"}


def test_what_is_read_elsewhere_is_written_once_or_left() -> None:
    def wide_cast(x, weight):
        wide = x.float()
        return (*quantized((wide * weight).bfloat16()), wide * 2)

    x, weight = tensors((3, K), (K,), dtype=torch.bfloat16)
    gm, _ = check(wide_cast, x, weight.float())
    (node,) = rows_of(gm)
    # The cast is done twice rather than written out.
    assert not spec_of(node).prologue.more  # type: ignore[union-attr]

    def statistic(x, weight):
        scale = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        return (*quantized(x * scale * weight), scale)

    gm, (decision,) = check(statistic, *tensors((3, K), (K,)))
    (node,) = rows_of(gm)
    assert {"mean", "rsqrt"} <= left(gm)
    assert "aten.rsqrt gives for every row is read elsewhere" in decision.reason
    assert [o.dims for o in spec_of(node).prologue.operands] == ["mk", "m", "k"]  # type: ignore[union-attr]

    def flags(x):
        positive = x > 0
        return (*quantized(torch.where(positive, x, -x) * 2), positive.float())

    gm, (decision,) = check(flags, *tensors((3, K)))
    assert "gt" in left(gm)
    assert "no float" in decision.reason


def test_nothing_leads_out_of_a_kernel_and_back() -> None:
    def fn(x):
        first = x * 2
        return quantized(first + torch.cumsum(first, -1))

    gm, (decision,) = check(fn, *tensors((3, K)))
    (node,) = rows_of(gm)
    assert left(gm) == {"mul", "cumsum"}
    assert decision.done
    assert "comes back" in decision.reason
    assert len(spec_of(node).prologue.nodes) == 1  # type: ignore[union-attr]


def test_a_value_is_there_before_it_is_read() -> None:
    def fn(x, y):
        first = x * 2
        early = torch.cumsum(first, 0)  # reads it before y is sorted
        late = torch.sort(y, -1).values
        return (*quantized(first + late), early)

    gm, (decision,) = check(fn, *tensors((3, K), (3, K)))
    assert len(rows_of(gm)) == 1
    assert "before all that the kernel reads is there" in decision.reason
    assert "mul" in left(gm)


def test_two_ways_to_quantize_one_activation() -> None:
    def fn(x, weight, limit):
        normed = rms_norm(x, weight)
        return (*quantized(normed), *quantized(normed, "static", limit))

    gm, decisions = check(fn, *tensors((3, K), (K,)), torch.tensor(0.7))
    assert [decision.done for decision in decisions] == [True, False]
    (node,) = rows_of(gm)
    assert len(spec_of(node).prologue.more) == 1  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("fn", "shapes", "said"),
    [
        (lambda x: quantized(x * 2, "tensor"), [(3, K)], "share one scale"),
        (lambda x: quantized(x * 2), [(3, 1)], "single numbers"),
        (lambda x: quantized(x * 2), [(2, 20000)], "longer than"),
        (lambda x: quantized(torch.cumsum(x, -1)), [(3, K)], "aten.cumsum is neither"),
        (lambda x: quantized(x, "token"), [(3, K)], "a product makes it"),
        (lambda x, y: quantized(x + y), [(2, 3, K), (1, 3, K)], "no operand of a kernel"),
        (lambda x: quantized(x.reshape(-1, 2 * K)), [(4, K)], "cuts rows in another way"),
        (lambda x: quantized(x.mean(0, keepdim=True).expand(3, K)), [(3, K)], "aten.mean.dim"),
    ],
)
def test_what_is_not_fused(fn: Function, shapes: list[tuple[int, ...]], said: str) -> None:
    gm, (decision,) = check(fn, *tensors(*shapes))
    assert not rows_of(gm)
    assert not decision.done
    assert said in decision.reason


def test_a_write_in_between_is_a_border() -> None:
    def fn(x, y):
        first = y * x
        x.add_(1.0)
        return quantized(first * 3)

    x, y = tensors((3, K), (3, K))
    with torch.no_grad():
        gm = make_fx(fn, tracing_mode="fake")(x, y)
    begin(gm.graph)
    (decision,) = prologues(gm.graph)
    assert "a write to a tensor" in decision.reason
    order = [
        str(node.target).split(".")[1]
        for node in gm.graph.nodes
        if isinstance(node.target, torch._ops.OpOverload)
    ]
    assert order[:3] == ["mul", "add_", "launch_rows"]


_STEPS: dict[str, Callable[[random.Random, list[Tensor]], Tensor]] = {
    "add": lambda draw, known: draw.choice(known) + draw.choice(known),
    "mul": lambda draw, known: draw.choice(known) * torch.sigmoid(draw.choice(known)),
    "gelu": lambda draw, known: F.gelu(draw.choice(known)),
    "shift": lambda draw, known: draw.choice(known) - draw.choice(known).amax(-1, keepdim=True),
    "norm": lambda draw, known: F.layer_norm(draw.choice(known), (K,)),
    "rms": lambda draw, known: rms_norm(draw.choice(known), torch.ones(())),
    "soft": lambda draw, known: F.softmax(draw.choice(known), -1),
    "view": lambda draw, known: (draw.choice(known).reshape(6, K) * 1.5).reshape(2, 3, K),
    "outside": lambda draw, known: torch.cumsum(draw.choice(known), 1) / 4,
    "half": lambda draw, known: draw.choice(known).half().float(),
}


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**20))
def test_random_graphs(seed: int) -> None:
    def fn(x, y, weight):
        draw = random.Random(seed)
        known, results = [x, y, x * weight], []
        for _ in range(draw.randint(2, 9)):
            known.append(_STEPS[draw.choice(list(_STEPS))](draw, known))
            if draw.random() < 0.3:
                results.append(draw.choice(known[3:]) * 1.0)
            if draw.random() < 0.15:
                results += quantized(known[-1])
        return (*quantized(known[-1]), *results)

    args = tensors((2, 3, K), (2, 3, K), (K,))
    gm, decisions = check(fn, *args, rounds_to=[torch.float16])
    assert len(rows_of(gm)) == sum(decision.done for decision in decisions)
