"""The pass that observes: calls before products, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxquant.config import Config
from fxquant.formats import pack
from fxquant.passes import OBSERVATION, run_pipeline
from fxquant.passes.context import Context
from fxquant.runtime.observe import Collector, ObservedGraph, Site, observe

pytestmark = pytest.mark.usefixtures("fresh")


def observed(function: Callable[..., Any], *args: Tensor) -> list[Context]:
    contexts = []

    def backend(gm: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        before = str(gm.graph)
        ctx = Context(gm, list(inputs), Config(), lambda t, e, n: pack(t, e, name=n))
        run_pipeline(ctx, OBSERVATION)
        assert str(gm.graph) == before
        contexts.append(ctx)
        graph = ObservedGraph(
            ctx.gm, [Site(s.parameter.index, s.parameter.name) for s in ctx.sites]
        )
        return lambda *given: graph(None, given)

    with torch.no_grad():
        assert torch.equal(torch.compile(function, backend=backend)(*args), function(*args))
    return contexts


def calls(ctx: Context) -> list[tuple[str, Any]]:
    nodes = ctx.gm.graph.find_nodes(op="call_function", target=observe)
    return [(str(node.args[0]), node.args[1]) for node in nodes]


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.o(self.q(x) * self.k(x) + self.v(x))


def test_one_call_for_products_that_share_an_activation() -> None:
    (ctx,) = observed(Attention(), torch.randn(3, 8))
    assert [numbers for _, numbers in calls(ctx)] == [(0, 1, 2), (3,)]
    assert calls(ctx)[0][0] == "l_x_"
    assert [site.parameter.name for site in ctx.sites] == [f"{n}.weight" for n in "qkvo"]


def test_not_where_the_forms_differ() -> None:
    weight = nn.Parameter(torch.randn(8, 8))

    def function(x: Tensor) -> Tensor:
        # The same tensor, read by rows and by columns.
        return nn.functional.linear(x, weight) + (weight @ x).relu()

    (ctx,) = observed(function, torch.randn(8, 8))
    assert [numbers for _, numbers in calls(ctx)] == [(0,), (1,)]


def test_nothing_without_products_against_parameters() -> None:
    other = torch.randn(8, 8)
    (ctx,) = observed(lambda x: (x @ other).cos(), torch.randn(3, 8))
    assert calls(ctx) == []


def test_an_activation_that_is_written_to_between_products_is_counted_twice() -> None:
    first, second = nn.Linear(8, 8), nn.Linear(8, 8)

    def function(x: Tensor) -> Tensor:
        x = x.clone()
        y = first(x)
        x.mul_(100)
        return y + second(x)

    (ctx,) = observed(function, torch.ones(3, 8))
    collector = Collector()
    graph = ObservedGraph(ctx.gm, [Site(s.parameter.index, s.parameter.name) for s in ctx.sites])
    graph(collector, ctx.inputs)
    stats = collector.calibration()
    found = [stats.of(layer.weight, "") for layer in (first, second)]
    assert [site and site.high for site in found] == [1, 100]
