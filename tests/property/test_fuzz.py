"""A short run of `fuzz`, the same one each time; and a defect that it must find."""

from __future__ import annotations

import pytest
import torch

from fxquant.runtime import toolchain
from tests.property import enclosing, fuzz
from tests.property.random_graphs import BINARY, UNARY, Op, Plan, RandomGraph, draw, given
from tests.runtime import broken

pytestmark = [
    pytest.mark.skipif(toolchain.compiler() is None, reason=toolchain.NOT_FOUND),
    pytest.mark.usefixtures("few_heights"),
]


def test_random_graphs_are_right(capsys: pytest.CaptureFixture[str]) -> None:
    assert fuzz.main(["--seed", "6", "--graphs", "1"]) == 0
    assert "seeds 6 to 6 on cpp: " in capsys.readouterr().out


def test_a_defect_is_found_and_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    broken.install(monkeypatch)
    monkeypatch.setattr(fuzz, "SHRINK_SECONDS", 0.0)
    assert fuzz.main(["--seed", "1", "--graphs", "1"]) == 1
    said = capsys.readouterr().out
    assert said.startswith("seed 1: result ")
    assert "should lie in" in said
    assert "smallest: Plan(seed=1, " in said
    assert said.splitlines()[-1].endswith(" 1 wrong")


def test_a_seed_is_a_graph() -> None:
    assert draw(11) == draw(11) != draw(12)
    first, second = RandomGraph(draw(11)), RandomGraph(draw(11))
    x = given(first.plan, 3)
    for one, other in zip(first(x), second(x), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("seed", range(20))
def test_eager_results_lie_inside(seed: int) -> None:
    """Of graphs that were not compiled: nothing is quantized, and every op is one that is known.

    In float32: eager operators round to bfloat16 inside of what they compute.
    """
    plan = draw(seed, ("float32",))
    model = RandomGraph(plan)
    state = {name: value.clone() for name, value in model.named_buffers()}
    x = given(plan, 4)
    results = model(x)
    fuzz._restore(model, state)
    found = enclosing.enclose(model, enclosing.weights_of(model), x)
    for got, enclosure in zip(results, found, strict=True):
        assert not enclosure.excess(got).any()


@pytest.mark.parametrize("kind", ["unary", "binary"])
def test_every_op_of_graphs_lies_inside(kind: str) -> None:
    for number in range(len({"unary": UNARY, "binary": BINARY}[kind])):
        which = (0, number) if kind == "unary" else (number, 1)
        products = [Op("product", source, 0, 0, 32, bias=True) for source in (-1, 0)]
        ops = (*products, Op(kind, -1, *which, 32, bias=False))
        plan = Plan(number, 32, False, ops, "float32", "nf4", (9,))
        model, x = RandomGraph(plan), given(plan, 9)
        results = model(x)
        found = enclosing.enclose(model, enclosing.weights_of(model), x)
        for got, enclosure in zip(results, found, strict=True):
            assert not enclosure.excess(got).any(), (kind, number)
            assert enclosure.excess(got + 9 + 2 * got.abs()).any(), (kind, number)
