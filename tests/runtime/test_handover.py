"""Codes that only kernels have: gone from memory, and the same bits for everybody who asks."""

from __future__ import annotations

import copy
import gc
import threading
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxquant
from fxquant.formats import PackedWeight, codes
from fxquant.formats.codes import Codes, Place
from fxquant.runtime import handover
from tests.helpers import TwoLayers, compile_, frozen
from tests.runtime.handed_over import packed_model, places, weights

pytestmark = pytest.mark.usefixtures("few_heights", "fresh")


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """All codes that were made again."""
    found: list[Tensor] = []
    inner = handover._made

    def counted(*args: Any) -> Tensor:
        found.append(inner(*args))
        return found[-1]

    monkeypatch.setattr(handover, "_made", counted)
    return found


@pytest.mark.parametrize("scheme", ["nf4", "int8", "llm_int8", "w8a8"])
@pytest.mark.parametrize("inference", [False, True])
def test_codes_are_let_go_of_and_made_again_bit_for_bit(scheme: str, inference: bool) -> None:
    model = packed_model(scheme)
    before = [[part.clone() for part in weight.tensors()] for weight in weights(model)]
    gone = [weakref.ref(weight.tensors()[0]) for weight in weights(model)]
    eager, x = copy.deepcopy(model), torch.randn(3, 128)
    with torch.inference_mode(mode=inference):
        first = compile_(model, scheme=scheme)(x)
        again = compile_(model, scheme=scheme)(x)
        assert torch.equal(first, again)
    assert places(model) == {Place.AWAY}
    assert [ref() for ref in gone] == [None, None]
    for weight, parts in zip(weights(model), before, strict=True):
        held = weight.held()[0]
        assert held.shape == parts[0].shape
        assert held.untyped_storage().nbytes() == 0
        assert weight.bits_per_weight == 8 * sum(p.nbytes for p in parts) / weight.numel()
        for mine, stored in zip(weight.tensors(), parts, strict=True):
            assert torch.equal(mine, stored)
            assert not mine.is_inference()
    assert torch.equal(model(x), eager(x))
    assert places(model) == {Place.AWAY}


def test_calls_and_recompiles_make_nothing_again(made: list[Tensor]) -> None:
    model = packed_model()
    compiled = compile_(model)
    for rows in (1, 3, 3, 9, 40):
        compiled(torch.randn(rows, 128))
    torch._dynamo.reset()
    compile_(model)(torch.randn(2, 128))
    assert places(model) == {Place.AWAY}
    assert made == []
    assert len(weights(model)[0].tensors()) == 4
    assert len(made) == 1


def test_moves_copies_and_files_have_the_codes(tmp_path: Path) -> None:
    model, x = packed_model(), torch.randn(3, 128)
    eager = copy.deepcopy(model)
    out = compile_(model)(x)
    assert places(model) == {Place.AWAY}
    fxquant.save(model, tmp_path / "model.safetensors")
    loaded = frozen(TwoLayers())
    fxquant.load(loaded, tmp_path / "model.safetensors")
    torch.save(model.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    copied, cast = copy.deepcopy(model), copy.deepcopy(model).to(torch.float64)
    for other in (loaded, copied, cast):
        for mine, theirs in zip(weights(other), weights(eager), strict=True):
            assert mine.codes.place is Place.HERE
            assert all(map(torch.equal, mine.tensors(), theirs.tensors()))
    for name, value in eager.state_dict().items():
        if isinstance(value, PackedWeight):
            assert all(map(torch.equal, state[name].tensors(), value.tensors()))
    torch._dynamo.reset()
    assert torch.equal(compile_(loaded)(x), out)
    assert places(model) == places(loaded) == {Place.AWAY}


def test_tied_weights_are_still_one_in_a_file(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    model[1].weight = model[0].weight
    packed_model(model=model)
    compile_(model)(torch.randn(3, 64))
    assert places(model) == {Place.AWAY}
    fxquant.save(model, tmp_path / "tied.safetensors")
    loaded = frozen(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)))
    loaded[1].weight = loaded[0].weight
    fxquant.load(loaded, tmp_path / "tied.safetensors")
    assert loaded[1].weight is loaded[0].weight
    assert torch.equal(loaded[0].weight.tensors()[0], model[0].weight.tensors()[0])


def test_what_was_repacked_goes_with_the_weight() -> None:
    model = packed_model()
    compile_(model)(torch.randn(3, 128))
    maker = codes._makers[model.up.weight.held()[0]]
    block = weakref.ref(maker.args[1]._map)
    del maker
    gc.collect()
    assert block() is not None
    model.up.weight = nn.Parameter(torch.zeros(64, 128), requires_grad=False)
    gc.collect()
    assert block() is None


class Embedded(nn.Module):
    """A weight that is looked up in, too."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(96, 64)
        self.head = nn.Linear(64, 96, bias=False)
        self.inner = nn.Linear(64, 64)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.inner(nn.functional.embedding(ids, self.head.weight)))


def test_codes_that_are_read_otherwise_stay() -> None:
    model = packed_model(model=Embedded())
    ids = torch.tensor([1, 5, 7])
    expected = model(ids)
    torch.testing.assert_close(compile_(model)(ids), expected, rtol=1e-4, atol=1e-4)
    assert model.head.weight.codes.place is Place.FIXED
    assert model.inner.weight.codes.place is Place.AWAY


@pytest.mark.parametrize("away", [False, True])
def test_a_gradient_and_the_torch_target_have_the_stored_codes(away: bool) -> None:
    model, x = packed_model(), torch.randn(3, 128)
    eager = model(x)
    if away:
        compile_(model)(x)
        assert places(model) == {Place.AWAY}
    wide = x.clone().requires_grad_()
    (wanted,) = torch.autograd.grad(model(wide).square().sum(), wide)
    (grad,) = torch.autograd.grad(compile_(model)(wide).square().sum(), wide)
    torch.testing.assert_close(grad, wanted, rtol=1e-3, atol=1e-3)
    assert places(model) == {Place.FIXED}
    for options in ({"target": "torch"}, {"verify": True}, {}):
        torch._dynamo.reset()
        out = compile_(model, **options)(x)
        torch.testing.assert_close(out, eager, rtol=1e-4, atol=1e-4)
        assert places(model) == {Place.FIXED}


def test_the_report_names_weights_that_are_in_memory_twice() -> None:
    model, x = packed_model(), torch.randn(3, 128)
    compiled = compile_(model)
    compiled(x)
    assert not [row for row in fxquant.report(model).rows if "stored form" in str(row.notes)]
    twice, _ = weights(model)
    size = twice.packed_codes.nbytes  # whoever takes it apart has it come back
    compiled(x)
    first, second = fxquant.report(model).rows
    assert first.notes == (f"codes are kept in their stored form, too: {size / 1e6:.2f} MB",)
    assert second.notes == ()


def test_gradients_inside_a_graph_that_has_none_around_it() -> None:
    model, x = packed_model(), torch.randn(3, 128, requires_grad=True)

    def inside(x: Tensor) -> Tensor:
        with torch.enable_grad():
            return model(x)

    with torch.no_grad():
        out = torch.compile(inside, backend="fxquant")(x)
    (grad,) = torch.autograd.grad(out.square().sum(), x)
    (wanted,) = torch.autograd.grad(model(x).square().sum(), x)
    torch.testing.assert_close(grad, wanted, rtol=1e-3, atol=1e-3)
    assert places(model) == {Place.FIXED}


def test_kernels_of_another_form_get_what_they_need() -> None:
    model, x = packed_model("int8"), torch.randn(3, 128)
    floats = compile_(model, scheme="int8")(x)
    assert places(model) == {Place.AWAY}
    torch._dynamo.reset()
    options = {"scheme": "int8", "compute_dtype": "int8"}
    integers = compile_(model, **options)(x)
    fresh = copy.deepcopy(model)
    torch._dynamo.reset()
    assert torch.equal(compile_(fresh, **options)(x), integers)
    assert not torch.equal(floats, integers)
    assert places(model) == places(fresh) == {Place.AWAY}
    assert all(map(torch.equal, fresh.up.weight.tensors(), model.up.weight.tensors()))


class Sliced(nn.Module):
    """Two products, each with half of a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.whole = nn.Linear(64, 128, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.whole.weight.chunk(2)
        return nn.functional.linear(x, first) - nn.functional.linear(x, second).sin()


def test_parts_of_a_weight_leave_it_where_it_is(caplog: pytest.LogCaptureFixture) -> None:
    model, x = packed_model(model=Sliced()), torch.randn(3, 64)
    eager = model(x)
    with caplog.at_level("INFO", "fxquant.handover"):
        torch.testing.assert_close(compile_(model)(x), eager, rtol=1e-4, atol=1e-4)
    assert places(model) == {Place.FIXED}
    assert "shape [128, 64]" in caplog.text
    assert "stays in its stored form" in caplog.text


@pytest.mark.parametrize("scheme", ["nf4", "smoothquant"])
def test_originals_that_are_kept_and_released(scheme: str) -> None:
    model, x = frozen(TwoLayers()), torch.randn(64, 128)
    statistics = fxquant.calibrate(model, [x]) if scheme == "smoothquant" else None
    compiled = compile_(model, scheme=scheme, calibration=statistics)
    out = compiled(x)
    assert torch.equal(compiled(x), out)
    freed = fxquant.release_weights(model)
    assert bool(freed) == (scheme == "nf4")
    assert torch.equal(compiled(x), out)
    if freed:
        assert places(model) == {Place.AWAY}
        assert not any(weight.held()[0].untyped_storage().nbytes() for weight in weights(model))


def test_threads_that_come_first_together() -> None:
    model, x = packed_model(), torch.randn(3, 128)
    compiled = compile_(model)
    expected = compiled(x)
    new = [packed_model() for _ in range(8)]
    for one in new:
        one.load_state_dict(model.state_dict())
    outs: list[Tensor] = []
    barrier = threading.Barrier(4)

    def call() -> None:
        barrier.wait()
        values = (dict(one.named_parameters()) for one in new)
        outs.extend(torch.func.functional_call(compiled, each, (x,)) for each in values)

    threads = [threading.Thread(target=call) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(outs) == 4 * len(new)
    assert all(torch.equal(out, expected) for out in outs)


def test_codes_tell_where_they_are() -> None:
    stored = torch.arange(4, dtype=torch.uint8)
    one, stand_in = Codes(stored), torch.empty(4, dtype=torch.uint8)
    assert one.stored() is one.held is stored
    told: list[Tensor] = []
    one.leave(stand_in, lambda: torch.arange(4, dtype=torch.uint8), told.append)
    assert one.place is Place.AWAY
    assert told == []
    assert one.held is stand_in
    assert torch.equal(one.stored(), stored)
    assert codes.stored([stored, stand_in])[0] is stored
    assert torch.equal(codes.stored([stored, stand_in])[1], stored)
    one.come_back()
    assert one.place is Place.FIXED
    assert torch.equal(one.held, stored)
    assert len(told) == 1
    assert told[0] is one.held
    one.leave(stand_in, lambda: torch.arange(4, dtype=torch.uint8), told.append)
    one.renew()
    assert one.place is Place.HERE
    assert one.held is not stand_in
    assert (one.held.shape, one.held.dtype) == (stored.shape, stored.dtype)
    assert len(told) == 1
