"""Inputs that are made of several parameters: right for whatever arrives, and made once."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxquant
from fxquant.formats import PackedWeight, pack
from fxquant.runtime.graph import CompiledGraph, Derived, Slot
from fxquant.runtime.store import STORE, WeightStore
from fxquant.schemes import Recipe, Smoothing, get_scheme
from tests.helpers import frozen

pytestmark = pytest.mark.usefixtures("few_heights")

ENCODING = get_scheme("int8").recipe.weight


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape), requires_grad=False)


def test_a_result_is_made_once_for_parameters_as_they_are() -> None:
    store, a, b = WeightStore(), parameter(3), parameter(3)
    calls = []

    def make() -> Tensor:
        calls.append(1)
        return a + b

    first = store.remember("sum", [a, b], make)
    assert store.remember("sum", [a, b], make) is first
    assert store.remember("other", [a, b], make) is not first
    a.mul_(2)
    assert torch.equal(store.remember("sum", [a, b], make), a + b)
    b.data = torch.ones(3)
    assert torch.equal(store.remember("sum", [a, b], make), a + 1)
    c = parameter(3)
    store.remember("sum", [a, c], make)
    assert len(calls) == 5


def test_results_go_with_their_parameters() -> None:
    store, a = WeightStore(), parameter(3)
    for _ in range(3):
        store.remember("sum", [a, parameter(3)], object)
    assert len(store._made[a]) == 1, "those of dead parameters are dropped"
    result = weakref.ref(store.remember("own", [a], lambda: parameter(2)))
    del a
    gc.collect()
    assert result() is None


def graph_of(seen: list[Any]) -> CompiledGraph:
    """Takes (x, w, v): a plain slot, a packed function of w and v, and a tensor of both."""

    def scaled(inputs: Any) -> PackedWeight:
        return pack(inputs[1] * inputs[2], ENCODING)

    derived = Derived((1, 2), scaled, Slot(1, ENCODING, "w"))
    total = Derived((2, 1), lambda inputs: inputs[1] + inputs[2])
    slots = [derived, Slot(1, ENCODING, "w"), total]
    sources = [0, (0, 0), (1, 1), (2, 0)]
    return CompiledGraph(
        lambda *given: given, sources, slots, (), lambda slot, w, packed: seen.append(id(w))
    )


def test_slots_of_both_kinds_in_any_order() -> None:
    seen: list[Any] = []
    graph, w, v = graph_of(seen), parameter(8, 16), parameter(8, 16)
    x, codes, scales, total = graph("x", w, v)
    assert x == "x"
    assert torch.equal(codes, pack(w * v, ENCODING).tensors()[0])
    assert torch.equal(scales, pack(w, ENCODING).tensors()[1])
    assert torch.equal(total, w + v)
    again = graph("x", w, v)
    assert again[1] is codes
    assert again[3] is total
    assert seen == [id(w), id(w)]


def test_what_changes_is_made_again_and_other_parameters_get_their_own() -> None:
    graph = graph_of([])
    w, v, other = parameter(8, 16), parameter(8, 16), parameter(8, 16)
    first = graph("x", w, v)
    assert torch.equal(graph("x", other, v)[3], other + v)
    assert graph("x", w, v)[3] is first[3], "two sets of parameters take turns"
    v.add_(1)
    assert torch.equal(graph("x", w, v)[3], w + v)
    assert graph.derived is not None
    assert len(graph.derived.known) == 2
    del w, other
    gc.collect()
    assert len(graph.derived.known) == 0


class Gated(nn.Module):
    """A block in which every kind of fold is found."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(64)
        self.gate, self.up = nn.Linear(64, 96), nn.Linear(64, 96)
        self.down = nn.Linear(96, 64)
        nn.init.normal_(self.norm.weight, 1, 0.3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return x + self.down(self.up(y) * F.silu(self.gate(y)))


def compiled(model: nn.Module, x: Tensor) -> Any:
    calibration = fxquant.calibrate(model, [x])
    recipe = Recipe(ENCODING, smoothing=Smoothing(0.5))
    options = {"calibration": calibration, "overrides": {"*": recipe}}
    return lambda m: torch.compile(m, backend="fxquant", options=options)


def is_near(got: Tensor, wanted: Tensor) -> bool:
    """8 bits a weight leave about 40 dB; a wrong or missing scale leaves none."""
    return bool((got - wanted).square().sum() < 1e-3 * wanted.square().sum())


@pytest.mark.usefixtures("fresh")
def test_one_graph_serves_other_blocks_with_their_own_scales() -> None:
    model = frozen(nn.Sequential(*[Gated() for _ in range(3)]))
    x = torch.randn(2, 5, 64) * torch.logspace(-1, 1, 64)
    expected = model(x)
    compile_block = compiled(model, x)
    for number in range(3):
        model[number] = compile_block(model[number])
    before = STORE.packed_count
    for _ in range(2):
        assert is_near(model(x), expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2
    assert STORE.packed_count == before + 9, "each weight is packed once"


@pytest.mark.usefixtures("fresh")
def test_a_change_of_any_parameter_reaches_all_that_is_made_of_it() -> None:
    model, x = frozen(Gated()), torch.randn(2, 5, 64)
    run = compiled(model, x)(model)
    assert is_near(run(x), model(x))
    for changed in (model.norm.weight, model.norm.bias, model.up.bias, model.up.weight):
        changed.mul_(1.5)
        assert is_near(run(x), model(x)), "the scale of a weight that grew is another one"
    model.down.weight.data = torch.randn(64, 96)
    assert is_near(run(x), model(x))
    assert fxquant.release_weights(model) == 0, "the originals are not what was packed"
    assert is_near(run(x), model(x))
