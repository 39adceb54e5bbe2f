"""Models, and what they decode to: shared by the tests of the backend."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fxquant.formats import PackedWeight, pack
from fxquant.schemes import get_scheme


def frozen(module: nn.Module) -> nn.Module:
    return module.eval().requires_grad_(requires_grad=False)


def compile_(model: nn.Module | Callable[..., Any], **options: Any) -> Any:
    return torch.compile(model, backend="fxquant", options=options or None)


def packed_of(weight: Tensor, scheme: str = "nf4") -> PackedWeight:
    encoding = get_scheme(scheme).recipe.weight.oriented(weight.dim(), (0,), (1,))
    return pack(weight.detach(), encoding)


def decoded(model: nn.Module, scheme: str = "nf4") -> nn.Module:
    """The same model with every Linear's weight replaced by its packed and decoded self."""
    twin = copy.deepcopy(model)
    for module in twin.modules():
        if isinstance(module, nn.Linear):
            module.weight.data = packed_of(module.weight, scheme).dequantize()
    return twin


class TwoLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(128, 64)
        self.down = nn.Linear(64, 128)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(nn.functional.gelu(self.up(x)))
