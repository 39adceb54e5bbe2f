"""Outlier Suppression's migration: the weight of a norm moves, and comes back for other readers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxquant.formats import pack
from fxquant.schemes import get_scheme
from tests.passes.smooth_harness import Smoothed, run
from tests.passes.test_smooth import Block, D, X, normed, then


def gammas(forward) -> Smoothed:
    model = Block()
    return run(lambda x: forward(model, x), X, smoothed=Smoothed(gamma=True))


def test_gamma_leaves_the_norm_and_comes_back_for_other_readers() -> None:
    def forward(m: Block, x: Tensor) -> tuple[Tensor, Tensor]:
        y = m.norm(x)
        return m.a(y) + m.b(y), y.mul(2) + x

    found = gammas(forward)
    assert len(found.folded()) == 2
    assert all("multiplied back for mul" in note for note in found.notes.values())
    ctx = found.contexts[0]
    model = Block()
    folded = [part for part in ctx.derived.values() if "Folded" in type(part.rule).__name__]
    assert torch.equal(folded[0].tensor, model.norm.weight.sign())
    torch.testing.assert_close(folded[1].tensor, model.norm.bias / model.norm.weight.abs())


def test_gamma_comes_back_for_products_that_are_not_smoothed() -> None:
    model = Block()
    model.a.weight = nn.Parameter(
        pack(model.a.weight, get_scheme("int8").recipe.weight), requires_grad=False
    )
    exact = Block()
    exact.a.weight = nn.Parameter(model.a.weight.dequantize(), requires_grad=False)
    smoothed = Smoothed(gamma=True)

    def forward(m: Block, x: Tensor) -> Tensor:
        y = m.norm(x)
        return m.a(y) + m.b(y)

    torch._dynamo.reset()
    got = torch.compile(forward, backend=smoothed.backend)(model, X)
    torch.testing.assert_close(got, forward(exact, X), rtol=1e-4, atol=1e-4)
    assert len(smoothed.folded()) == 1


KEPT = {
    "no norm": (lambda m, x: m.a(torch.tanh(x)), "tanh does not commute"),
    "rows": (lambda m, x: m.down(F.relu(m.a(x))), "no norm makes its activation"),
    "two factors": (lambda m, x: m.a(m.norm(x) * m.gamma), ""),
    "a buffer": (lambda m, x: m.a(F.rms_norm(x, (D,)) * m.gain), "no plain parameter"),
    "written": (then(normed, lambda m, y: (m.a(y), y.add_(1))), "written to in place"),
    "added to the product": (
        then(lambda m, x: m.norm(x[0]), lambda m, y: torch.addmm(y, y, m.square)),
        "adds it to its product",
    ),
}


@pytest.mark.parametrize("form", KEPT)
def test_where_gamma_stays(form) -> None:
    forward, reason = KEPT[form]
    found = gammas(forward)
    note = " ".join(found.sites[-1].notes)
    if reason:
        assert "not smoothed: " in note
        assert reason in note
    else:
        assert "folded into" in note, "the nearest factor moves"


def test_a_trained_gamma_stays() -> None:
    model = Block()
    model.norm.weight.requires_grad_()
    found = run(lambda x: model.a(model.norm(x)), X, smoothed=Smoothed(gamma=True), grad=True)
    assert "is trained" in " ".join(found.sites[0].notes)
