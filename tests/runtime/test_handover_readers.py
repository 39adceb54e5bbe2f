"""Whoever else reads a weight whose codes only kernels have: other backends, exports, processes."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from fxquant.formats import PackedWeight
from fxquant.formats.codes import Place
from fxquant.runtime.cpp import CppKernel
from tests.helpers import compile_
from tests.runtime.handed_over import packed_model, places, shared, taken_apart

pytestmark = pytest.mark.usefixtures("few_heights", "fresh")


@pytest.mark.parametrize("backend", ["inductor", "aot_eager"])
@pytest.mark.parametrize("warm", [False, True])
def test_other_backends_get_the_codes(backend: str, warm: bool) -> None:
    model, x = packed_model(), torch.randn(3, 128)
    eager = model(x)
    if warm:  # AOTAutograd's cache answers the second time
        torch.compile(copy.deepcopy(model), backend=backend)(x)
        torch._dynamo.reset()
    ours = compile_(model)
    out = ours(x)
    assert places(model) == {Place.AWAY}
    other = torch.compile(model, backend=backend)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CppKernel, "_repack", None)  # what kernels made of the codes still holds
        for _ in range(2):
            torch.testing.assert_close(other(x), eager, rtol=1e-5, atol=1e-5)
            assert torch.equal(ours(x), out)
    assert places(model) == {Place.FIXED}
    new = packed_model()
    assert torch.isfinite(compile_(new)(x)).all()
    assert places(new) == {Place.AWAY}


@torch.no_grad()
def test_constants_of_another_backend_are_the_codes() -> None:
    model, x = packed_model(), torch.randn(3, 128)
    eager = model(x)
    compile_(model)(x)
    frozen_graph = torch.compile(model, options={"freezing": True})
    torch.testing.assert_close(frozen_graph(x), eager, rtol=1e-5, atol=1e-5)
    assert places(model) == {Place.FIXED}


def exported(model: nn.Module, x: Tensor) -> None:
    program = torch.export.export(model, (x,)).module()
    torch.testing.assert_close(program(x), model(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("read", "place"), [(taken_apart, Place.FIXED), (exported, Place.AWAY), (shared, Place.FIXED)]
)
def test_whoever_takes_a_weight_apart_gets_codes(
    read: Callable[[nn.Module, Tensor], None], place: Place
) -> None:
    model, x = packed_model(), torch.randn(3, 128)
    compiled = compile_(model)
    out = compiled(x)
    assert places(model) == {Place.AWAY}
    read(model, x)
    assert places(model) == {place}
    assert torch.equal(compiled(x), out)


def test_calls_do_not_take_weights_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = packed_model(), torch.randn(3, 128)
    compiled = compile_(model)
    out = compiled(x)
    asked: list[PackedWeight] = []
    monkeypatch.setattr(PackedWeight, "packed_codes", property(asked.append))
    assert torch.equal(compiled(x), out)
    assert asked == []
