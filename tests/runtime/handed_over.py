"""Models whose codes kernels have, and where those codes are."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import fxquant
from fxquant.formats import PackedWeight
from fxquant.formats.codes import Place
from tests.helpers import TwoLayers, frozen


def packed_model(scheme: str = "nf4", model: nn.Module | None = None) -> nn.Module:
    model = frozen(model or TwoLayers())
    fxquant.quantize_(model, {"scheme": scheme})
    return model


def weights(model: nn.Module) -> list[PackedWeight]:
    return [value for value in model.parameters() if isinstance(value, PackedWeight)]


def places(model: nn.Module) -> set[Place]:
    return {weight.codes.place for weight in weights(model)}


def taken_apart(model: nn.Module, x: Tensor) -> None:
    for weight in weights(model):
        names, _ = weight.__tensor_flatten__()
        assert all(map(torch.equal, weight.tensors(), [getattr(weight, name) for name in names]))


def shared(model: nn.Module, x: Tensor) -> None:
    assert model.share_memory() is model
    assert all(part.is_shared() for weight in weights(model) for part in weight.tensors())
