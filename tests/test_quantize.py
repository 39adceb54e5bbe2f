"""Packing ahead of a compile takes what a compile can use, and nothing else."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fxquant
from fxquant.formats import PackedWeight

TAKEN = {
    "linear": nn.Linear(64, 48),
    "conv1d": nn.Conv1d(64, 48, 1),
    "conv2d": nn.Conv2d(64, 48, 1),
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
INPUTS = {nn.Linear: (5, 64), nn.Conv1d: (2, 64, 5), nn.Conv2d: (2, 64, 3, 5)}


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
