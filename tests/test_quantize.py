"""Packing ahead of a compile takes what a compile can use, and nothing else."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch import nn

import fxquant
from fxquant.formats import PackedWeight
from fxquant.runtime.store import STORE
from tests.helpers import compile_, decoded, frozen

pytestmark = pytest.mark.usefixtures("few_heights", "fresh")

TAKEN = {
    "linear": nn.Linear(64, 48),
    "conv1d": nn.Conv1d(64, 48, 1),
    "conv2d": nn.Conv2d(64, 48, 1),
    "conv3d": nn.Conv3d(64, 48, 1),
    "same": nn.Conv2d(64, 48, 1, padding="same"),
    "valid": nn.Conv2d(64, 48, 1, padding="valid"),
}
LEFT = {
    "padding": nn.Conv2d(64, 48, 1, padding=1),
    "stride": nn.Conv1d(64, 48, 1, stride=2),
    "groups": nn.Conv1d(64, 48, 1, groups=2),
    "kernel": nn.Conv2d(64, 48, 3),
    "transposed": nn.ConvTranspose1d(64, 48, 1),
    "embedding": nn.Embedding(64, 48),
}
INPUTS = {
    nn.Linear: (5, 64),
    nn.Conv1d: (2, 64, 5),
    nn.Conv2d: (2, 64, 3, 5),
    nn.Conv3d: (2, 64, 2, 3, 5),
}


@pytest.mark.parametrize("name", TAKEN)
def test_what_is_packed_is_quantized_in_the_compile(name: str) -> None:
    torch._dynamo.reset()
    model = nn.Sequential(TAKEN[name]).eval()
    assert len(fxquant.quantize_(model).quantized) == 1
    assert isinstance(model[0].weight, PackedWeight)
    with torch.no_grad():
        torch.compile(model, backend="fxquant", options={"strict": True})(
            torch.randn(INPUTS[type(TAKEN[name])])
        )


@pytest.mark.parametrize("name", LEFT)
def test_what_no_kernel_could_take_stays_dense(name: str) -> None:
    model = nn.Sequential(LEFT[name])
    assert fxquant.quantize_(model).quantized == []
    assert type(model[0].weight) is nn.Parameter


def test_release_weights_frees_and_does_not_repack() -> None:
    model = frozen(nn.Sequential(nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 128)))
    compiled = compile_(model)
    x = torch.randn(3, 128)
    out = compiled(x)
    before = STORE.packed_count
    freed = fxquant.release_weights(compiled)
    assert freed == 2 * 128 * 128 * 4
    assert isinstance(model[0].weight, PackedWeight)
    assert torch.equal(compiled(x), out)
    assert STORE.packed_count == before
    torch.testing.assert_close(model(x), out, rtol=1e-4, atol=1e-4)
    state = compiled.state_dict()
    assert {key.removeprefix("_orig_mod.") for key in state} == set(model.state_dict())
    model.load_state_dict(model.state_dict())
    assert len(fxquant.report(model).quantized) == 2


def test_quantize_then_compile() -> None:
    model = frozen(nn.Sequential(nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 96)))
    x = torch.randn(4, 128)
    expected = decoded(model)(x)
    report = fxquant.quantize_(model, {"scheme": "nf4"})
    assert len(report.quantized) == 2
    assert all(isinstance(m.weight, PackedWeight) for m in (model[0], model[2]))
    before = STORE.packed_count
    torch.testing.assert_close(model(x), expected)
    torch.testing.assert_close(compile_(model)(x), expected, rtol=1e-4, atol=1e-4)
    assert STORE.packed_count == before


def test_quantize_frees_each_original_before_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    model = frozen(nn.Sequential(*[nn.Linear(64, 64) for _ in range(5)]))
    model[4].weight = model[3].weight
    originals = [weakref.ref(module.weight) for module in model]
    pack_weight, alive = STORE.pack, []

    def watched(*args: Any) -> PackedWeight:
        alive.append(len({id(ref()) for ref in originals if ref() is not None}))
        return pack_weight(*args)

    monkeypatch.setattr(STORE, "pack", watched)
    report = fxquant.quantize_(model)
    assert alive == [4, 3, 2, 1], "two of the five are one"
    assert len(report.quantized) == 5
    assert model[3].weight is model[4].weight


def test_quantize_leaves_tied_embeddings_and_heads_alone() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(64, 128)
            self.body = nn.Linear(128, 128)
            self.out = nn.Linear(128, 64, bias=False)
            self.out.weight = self.embed.weight
            self.lm_head = nn.Linear(128, 64)

    model = frozen(Tied())
    report = fxquant.quantize_(model)
    assert [row.module for row in report.quantized] == ["body"]
    reasons = {row.module: row.reason for row in report.left_alone}
    assert "embed" in reasons["out"]
    assert "skip" in reasons["lm_head"]
    assert model.out.weight is model.embed.weight


def test_smoothing_needs_a_compile() -> None:
    model = nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 64))
    with pytest.raises(fxquant.errors.OptionError, match=r"'smoothquant' for '1\.weight'.*compile"):
        fxquant.quantize_(model, {"scheme": "smoothquant"})
    assert type(model[1].weight) is nn.Parameter


def test_int8_activations_of_weights_that_were_packed_ahead() -> None:
    x = torch.randn(5, 64)
    model = frozen(nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 48)))
    once = compile_(model, scheme="w8a8")(x)
    torch._dynamo.reset()
    fxquant.quantize_(model, {"scheme": "w8a8"})
    assert torch.equal(compile_(model, scheme="w8a8")(x), once)
    torch._dynamo.reset()
    weights_only = compile_(model)(x)
    assert not torch.equal(weights_only, once)
    torch.testing.assert_close(weights_only, model(x), rtol=1e-4, atol=1e-5)


def test_release_keeps_what_known_columns_come_from() -> None:
    x = torch.randn(16, 64)
    x[:, :2] *= 30
    model = frozen(nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 48)))
    calibration = fxquant.calibrate(model, [x], progress=False)
    compiled = compile_(model, scheme="llm_int8_static", calibration=calibration)
    once = compiled(x)
    assert fxquant.release_weights(compiled) == model[2].bias.numel() * 64 * 4
    assert type(model[0].weight) is nn.Parameter
    assert torch.equal(compiled(x), once)
