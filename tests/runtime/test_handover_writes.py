"""Weights that are written to after kernels have made something of their codes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import fxquant
from fxquant.formats import pack
from fxquant.formats.codes import Place
from tests.helpers import compile_
from tests.runtime.handed_over import packed_model, places, shared, taken_apart, weights

pytestmark = pytest.mark.usefixtures("few_heights", "fresh")


@pytest.mark.parametrize("through", ["parameter", "alias"])
def test_a_weight_that_is_written_to_comes_back_and_leaves_again(through: str) -> None:
    model, x = packed_model(), torch.randn(3, 128)
    compiled, alias = compile_(model), model.up.weight.data
    before = compiled(x)
    assert alias.codes is model.up.weight.codes
    (model.up.weight if through == "parameter" else alias).mul_(2.0)
    assert alias.codes.place is model.up.weight.codes.place is Place.HERE
    eager = model(x)
    after = compiled(x)
    assert places(model) == {Place.AWAY}
    torch.testing.assert_close(after, eager, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(before, after, atol=1e-2)


class Three(nn.Module):
    """Products of one activation, which are one kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(64, 64) for _ in range(3))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.q(x), self.k(x), self.v(x)


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("place", [Place.FIXED, Place.AWAY])
def test_any_weight_of_a_joined_product_that_is_written_to(place: Place, inference: bool) -> None:
    with torch.inference_mode(mode=inference):
        model, x = packed_model(model=Three()), torch.randn(3, 64)
        compiled = compile_(model)
        if place is Place.FIXED:
            for weight in weights(model):
                weight.codes.place = Place.FIXED
        compiled(x)
        (row, *_) = fxquant.report(model).quantized
        assert "join" in row.kernel
        for name in ("q", "k", "v"):
            getattr(model, name).weight.mul_(2.0)
            for got, wanted in zip(compiled(x), model(x), strict=True):
                torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
            assert places(model) == {place}


@pytest.mark.parametrize("start", ["here", "fixed", "came back"])
@torch.inference_mode()
def test_a_weight_without_versions_that_is_written_to_is_repacked(start: str) -> None:
    model, x = packed_model(), torch.randn(3, 128)
    assert all(part.is_inference() for part in model.up.weight.tensors()[1:])
    compiled, place = compile_(model), Place.AWAY if start == "here" else Place.FIXED
    for weight in weights(model) if start == "fixed" else ():
        weight.codes.place = Place.FIXED
    compiled(x)
    if start == "came back":
        taken_apart(model, x)
    for _ in range(2):
        compiled(x)
        assert places(model) == {place}
        model.up.weight.mul_(2.0)
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("place", [Place.FIXED, Place.AWAY])
def test_a_weight_that_is_written_to_is_repacked(place: Place) -> None:
    model, x = packed_model(), torch.randn(3, 128, requires_grad=place is Place.FIXED)
    compiled, before = compile_(model), [part.clone() for part in model.up.weight.tensors()]
    for write in (
        lambda weight: weight.mul_(2.0),
        lambda weight: weight.copy_(torch.randn(64, 128)),
        lambda weight: weight.copy_(pack(torch.randn(64, 128), weight.encoding)),
    ):
        compiled(x)
        assert places(model) == {place}
        write(model.up.weight)
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-4)
    assert not any(map(torch.equal, model.up.weight.tensors()[:2], before))


def test_a_weight_that_processes_share_stays_where_it_is() -> None:
    model, x = packed_model(), torch.randn(3, 128)
    shared(model, x)
    where = [part.data_ptr() for weight in weights(model) for part in weight.tensors()]
    compiled = compile_(model)
    compiled(x)
    model.up.weight.mul_(2.0)
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-4)
    assert [part.data_ptr() for weight in weights(model) for part in weight.tensors()] == where
