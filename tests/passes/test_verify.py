"""What a pass may not leave behind: each way to break a graph is found and names the pass."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from fxquant import errors, passes
from fxquant.passes.context import Context, PassReport
from tests.passes.harness import Captured


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 48)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return checkpoint(self.linear, x, use_reentrant=False).relu()


def compile_with(last: Callable[[Context], PassReport], monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    monkeypatch.setattr(passes, "PIPELINE", (*passes.PIPELINE, last))
    with torch.no_grad():
        torch.compile(Model(), backend=Captured().backend)(torch.randn(5, 64))


def relu_of(ctx: Context) -> torch.fx.Node:
    return next(node for node in ctx.gm.graph.nodes if "relu" in str(node.target))


def lose_a_value(ctx: Context) -> None:
    del relu_of(ctx).meta["val"]


def use_before_definition(ctx: Context) -> None:
    relu = relu_of(ctx)
    relu.args[0].append(relu)
    relu.prepend(ctx.gm.graph.output_node())


def drop_an_input(ctx: Context) -> None:
    ctx.inputs.pop()


def swap_inputs(ctx: Context) -> None:
    ctx.inputs.reverse()


def return_an_input(ctx: Context) -> None:
    x = next(node for node in ctx.gm.graph.find_nodes(op="placeholder") if node.users)
    ctx.gm.graph.output_node().args = ((x,),)


def pass_too_much(ctx: Context) -> None:
    call = ctx.regions[1].call
    call.args = (*call.args, call.args[-1])


BROKEN = {
    lose_a_value: "has no value",
    use_before_definition: "before it has been defined",
    drop_an_input: "placeholders, .* inputs",
    swap_inputs: "its input",
    return_an_input: "outputs share memory with inputs",
    pass_too_much: "operands to a body that takes",
}


@pytest.mark.parametrize("damage", BROKEN, ids=lambda damage: damage.__name__)
def test_a_broken_graph_is_found_and_names_the_pass(
    damage: Callable[[Context], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def careless(ctx: Context) -> PassReport:
        damage(ctx)
        return PassReport("careless", "broke the graph")

    with pytest.raises(Exception, match=BROKEN[damage]) as caught:
        compile_with(careless, monkeypatch)
    found = caught.value
    found = getattr(found, "inner_exception", found)
    assert isinstance(found, errors.PassError)
    assert str(found).startswith("the pass 'careless' left a broken graph: ")


def test_a_pass_that_does_nothing_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    compile_with(lambda ctx: PassReport("idle", "nothing"), monkeypatch)
