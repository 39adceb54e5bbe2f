"""Products take in the work on their results and each other, once and in order, or say why not."""

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

from fxquant.codegen.epilogue import Epilogue
from fxquant.codegen.spec import KernelSpec, Outliers, WeightOperand
from fxquant.formats import Encoding, pack
from fxquant.passes.fuse import Decision
from fxquant.passes.fuse.epilogue import epilogues, join
from fxquant.passes.fuse.lower import begin, launches
from fxquant.runtime import ops

pytestmark = pytest.mark.usefixtures("few_heights")

assert ops  # imported for its registrations
K, N = 8, 12
INT8 = Encoding(8, block=(1, -1))
Function = Callable[..., Any]


class Product:
    """A packed weight to multiply with.

    Args:
        n: Outputs.
        site: Its position among the graph's products.
        batch: Matrices, or None.
    """

    def __init__(
        self, n: int = N, site: int = 0, batch: int | None = None, *, outliers: bool = False
    ) -> None:
        generator = torch.Generator().manual_seed(site)
        shape = (n, K) if batch is None else (batch, n, K)
        weight = torch.randn(shape, generator=generator)
        encoding = INT8 if batch is None else Encoding(8, block=(1, 1, -1))
        operand = WeightOperand.whole(encoding, shape, transposed=False)
        more = (
            {"compute_dtype": "int8", "outliers": Outliers("float32", threshold=6.0)}
            if outliers
            else {}
        )
        dtypes = {"x_dtype": "float32", "compute_dtype": "float32", "out_dtype": "float32", **more}
        self.text = KernelSpec(operand, **dtypes).to_json()  # type: ignore[arg-type]
        self.parts: Sequence[Tensor] = pack(weight, encoding).tensors()
        self.site = site

    def __call__(self, x: Tensor) -> Tensor:
        found: Tensor = torch.ops.fxquant.linear(x, list(self.parts), [], self.text, self.site)
        return found


def traced(products: Sequence[Product], fn: Function, *args: Tensor) -> fx.GraphModule:
    """The graph of a function of some tensors, and of the weights of its products."""

    def call(stored: list[Sequence[Tensor]], *given: Tensor) -> Any:
        kept = [product.parts for product in products]
        for product, product.parts in zip(products, stored, strict=True):
            assert product.parts
        found = fn(*given)
        for product, product.parts in zip(products, kept, strict=True):
            assert product.parts
        return found

    stored = [product.parts for product in products]
    with torch.no_grad():
        make = make_fx(call, decomposition_table=select_decomp_table(), tracing_mode="fake")
        gm = make(stored, *args)
    gm.graph.eliminate_dead_code()
    begin(gm.graph)
    return gm


def check(
    products: Sequence[Product],
    fn: Function,
    *args: Tensor,
    rounds_to: torch.dtype = torch.float32,
) -> tuple[list[KernelSpec], list[Decision], set[str]]:
    """The function gives what it gave; the products' specs, the decisions, and what ATen does."""
    gm = traced(products, fn, *args)
    decisions = [decision for step in (join, epilogues) for decision in step(gm.graph)]
    specs = [KernelSpec.from_json(str(node.args[3])) for node in launches(gm.graph)]
    for node in launches(gm.graph):
        node.args = (*node.args[:-1], "torch")
    gm.graph.lint()
    gm.graph.eliminate_dead_code()
    gm.recompile()
    got, want = gm([product.parts for product in products], *args), fn(*args)
    if isinstance(want, Tensor):
        got, want = [got], [want]
    for found, right in zip(got, want, strict=True):
        assert (found.shape, found.dtype) == (right.shape, right.dtype)
        dtypes = [dtype for dtype in (right.dtype, rounds_to) if dtype.is_floating_point]
        eps = max(torch.finfo(dtype).eps for dtype in (torch.float32, *dtypes))
        # One sum of K products is in another order, and a handful of roundings follow.
        torch.testing.assert_close(found, right, rtol=16 * eps, atol=64 * eps, equal_nan=True)
    names = {str(n.target).split(".")[1] for n in gm.graph.nodes if "aten." in str(n.target)}
    return specs, decisions, names


def tensors(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def dims_of(spec: KernelSpec) -> list[str]:
    return [operand.dims for operand in spec.epilogue.operands]


def ops_of(epilogue: Epilogue) -> list[str]:
    return [node.op.split(".")[1] for node in epilogue.nodes]


def test_a_chain_with_operands_of_every_shape() -> None:
    product = Product()

    def fn(x, bias, column, residual, mask):
        out = F.gelu(product(x) + bias) * column + residual
        return torch.where(mask, out, -1.0)

    args = (*tensors((5, K), (N,), (5, 1), (5, N)), torch.rand(5, N) > 0.5)
    (spec,), (decision,), left = check([product], fn, *args)
    assert left == set()
    assert sorted(dims_of(spec)) == ["m", "mn", "mn", "n"]
    assert decision.done
    assert decision.sites == (0,)
    assert decision.reason == "add, gelu, mul, where"


def test_tensors_of_one_number_are_numbers() -> None:
    product = Product()

    def fn(x):
        out = torch.maximum(product(x), torch.full((1,), -0.3))
        return torch.where(out > 0.5, torch.atan2(out, torch.full((), 0.7)), torch.full((), -1.0))

    (spec,), _, left = check([product], fn, *tensors((5, K)))
    assert left == set()
    assert not spec.epilogue.operands


def test_casts_and_dropout_at_inference() -> None:
    product = Product()

    def fn(x, residual):
        out = F.dropout(torch.tanh(product(x)), 0.5, training=False).half()
        return out.float() + residual

    args = tensors((5, K), (5, N))
    (spec,), _, left = check([product], fn, *args, rounds_to=torch.float16)
    assert left == set()
    assert "_to_copy" in ops_of(spec.epilogue)  # half rounds, float goes on
    assert spec.out_dtype == "float32"


def test_what_is_used_elsewhere_is_a_further_result() -> None:
    product = Product()

    def fn(x, residual):
        added = product(x) + residual
        return added, torch.cumsum(torch.relu(added), 0)

    (spec,), (decision,), left = check([product], fn, *tensors((5, K), (5, N)))
    assert left == {"cumsum"}
    assert len(spec.epilogue.more) == 1
    assert decision.reason.endswith("then aten.cumsum is no pointwise op")


def test_no_more_results_than_a_kernel_gives() -> None:
    product = Product()

    def fn(x):
        out = product(x)
        # Added, not multiplied: the bound of `check` is for results that repeat the sum's error.
        return [torch.sin(out + number).flip(0) for number in range(1, 7)]

    (spec,), (decision,), left = check([product], fn, *tensors((5, K)))
    assert len(spec.epilogue.more) <= 3
    assert "sin" in left
    assert "values would be results" in decision.reason


def test_comparisons_stay_outside() -> None:
    product = Product()
    (spec,), _, left = check([product], lambda x: product(x) > 0, *tensors((5, K)))
    assert left == {"gt"}
    assert not spec.epilogue.nodes


def test_gate_and_up_are_one_kernel() -> None:
    gate, up = Product(site=0), Product(site=1)
    (spec,), (decision,), left = check(
        [gate, up], lambda x: F.silu(gate(x)) * up(x), *tensors((5, K))
    )
    assert left == set()
    assert spec.weights == 2
    assert (decision.kind, decision.sites, decision.reason) == ("join", (0, 1), "silu, mul")


def test_query_key_and_value_are_one_kernel() -> None:
    products = [Product(site=number) for number in range(3)]

    def fn(x):
        return [product(x) * 2 for product in products]

    (spec,), decisions, left = check(products, fn, *tensors((5, K)))
    assert left == set()
    assert (spec.weights, len(spec.epilogue.more)) == (3, 2)
    assert [decision.kind for decision in decisions if decision.done] == ["join"]


def test_weights_of_two_forms_are_not_joined() -> None:
    products = [Product(N, 0), Product(N + 4, 1)]

    def fn(x):
        return [product(x) for product in products]

    specs, decisions, _ = check(products, fn, *tensors((5, K)))
    assert [spec.weights for spec in specs] == [1, 1]
    (decision,) = [decision for decision in decisions if decision.kind == "join"]
    assert not decision.done
    assert decision.sites == (0, 1)
    assert "these are 12x8, 16x8" in decision.reason


def test_outliers_are_looked_for_once() -> None:
    products = [Product(site=number, outliers=True) for number in range(2)]

    def fn(x):
        return [product(x) for product in products]

    (spec,), _, _ = check(products, fn, *tensors((5, K)))
    assert spec.weights == 2


def test_a_product_of_another_ones_result_is_not_joined() -> None:
    first, second = Product(K, 0), Product(K, 1)

    def fn(x):
        return second(x) + first(torch.relu(second(x)))

    specs, _, _ = check([first, second], fn, *tensors((5, K)))
    assert [spec.weights for spec in specs] in ([1, 1, 1], [2, 1], [1, 2])


def test_a_batch_and_its_operands() -> None:
    product = Product(batch=3)

    def fn(x, bias, residual):
        return torch.relu(product(x) + bias) + residual

    (spec,), _, left = check([product], fn, *tensors((3, 5, K), (3, 1, N), (3, 5, N)))
    assert left == set()
    assert dims_of(spec) == ["en", "emn"]


def test_views_that_keep_the_order_are_looked_through() -> None:
    product = Product()

    def fn(x, residual):
        return (product(x).reshape(2, 5, N) + residual).reshape(10, N) * 0.5

    (_,), (decision,), left = check([product], fn, *tensors((10, K), (2, 5, N)))
    assert left <= {"view", "reshape"}
    assert decision.done


@pytest.mark.parametrize(
    ("work", "said"),
    [
        (lambda y: torch.cumsum(y, -1), "aten.cumsum is no pointwise op"),
        (lambda y: y.sum(-1), "aten.sum.dim_IntList is no pointwise op"),
        (torch.i0, "aten.i0 has no entry in the table of pointwise ops"),
        (lambda y: y.double(), "gives float64"),
        (lambda y: y.reshape(-1, 4), "into another shape"),
        (lambda y: y[:1] + torch.ones(7, 5, N), "is no pointwise op"),
        (lambda y: y + torch.ones(7, 5, N), "broadcasts the product"),
        (lambda y: y * torch.arange(N), "takes a tensor that is no operand"),
        (lambda y: y + torch.cumsum(y, 0), "aten.cumsum is no pointwise op"),
    ],
)
def test_what_ends_a_chain(work: Function, said: str) -> None:
    product = Product()
    (x,) = tensors((5, K))
    (spec,), (decision,), _ = check([product], lambda x: work(product(x)), x)
    assert not spec.epilogue.nodes
    assert not decision.done
    assert said in decision.reason
    # And after something that is fused.
    (spec,), (decision,), _ = check(
        [product], lambda x: work(torch.tanh(product(x))), *tensors((5, K))
    )
    assert decision.done
    assert decision.reason.startswith("tanh; then ")
    assert said in decision.reason


def test_a_write_in_between_is_a_border() -> None:
    product = Product()

    def fn(x, state):
        out = product(x) * 2
        state.add_(out)
        return out + state

    x, state = tensors((5, K), (5, N))
    gm = traced([product], fn, x, state)
    (decision,) = epilogues(gm.graph)
    assert decision.reason == "arithmetic with numbers"
    calls = [str(n.target).split(".") for n in gm.graph.nodes if n.op == "call_function"]
    order = [name for _, name, *_ in calls]
    assert order.index("launch") < order.index("add_") < order.index("add")


def test_nodes_that_wait_for_each_other_stay_in_order() -> None:
    """What stands behind the kernel may read what is moved there."""
    first, second = Product(site=0), Product(site=1)

    def fn(x):
        left = torch.cumsum(first(x), 0) / 4
        right = second(x)
        return left - right.amax(-1, keepdim=True), F.gelu(right)

    check([first, second], fn, *tensors((5, K)))


_STEPS: dict[str, Callable[[random.Random, list[Tensor]], Tensor]] = {
    "add": lambda draw, known: draw.choice(known) + draw.choice(known),
    "gate": lambda draw, known: draw.choice(known) * torch.sigmoid(draw.choice(known)),
    "gelu": lambda draw, known: F.gelu(draw.choice(known)),
    "softplus": lambda draw, known: F.softplus(draw.choice(known)),
    "elu": lambda draw, known: F.elu(draw.choice(known)),
    "where": lambda draw, known: torch.where(draw.choice(known) > 0, draw.choice(known), 0.5),
    "view": lambda draw, known: (draw.choice(known).reshape(2, 3, N) * 1.5).reshape(6, N),
    "outside": lambda draw, known: torch.cumsum(draw.choice(known), 0) / 4,
    "column": lambda draw, known: draw.choice(known) - draw.choice(known).amax(-1, keepdim=True),
}


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**20))
def test_random_graphs(seed: int) -> None:
    products = [Product(site=number) for number in range(3)]

    def fn(x, y):
        draw = random.Random(seed)
        known, results = [y, *(p(x) for p in products[: draw.randint(1, 3)])], []
        for _ in range(draw.randint(1, 9)):
            known.append(_STEPS[draw.choice(list(_STEPS))](draw, known))
            if draw.random() < 0.3:
                results.append(draw.choice(known[1:]) * 1.0)
        return [known[-1] * 1.0, *results]

    specs, decisions, _ = check(products, fn, *tensors((6, K), (6, N)))
    told = {site for decision in decisions for site in decision.sites}
    assert len(told) == sum(spec.weights for spec in specs)
