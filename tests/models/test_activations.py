"""int8 activations in random transformers with planted outliers: coverage, and smoothing.

The rewritten graphs run op by op, by the definition of every kernel: what is asked here is what
the passes make of a model, and kernels have tests of their own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxquant
from tests.passes.harness import Captured
from tests.passes.test_smooth_models import made

KINDS = ("llama", "gpt2", "opt", "bert", "t5", "mixtral", "vit")


def model_of(call: Callable[..., Any]) -> nn.Module:
    """The model that a function of `made` closes over."""
    return next(c.cell_contents for c in call.__closure__ if isinstance(c.cell_contents, nn.Module))


def plant(model: nn.Module) -> None:
    """Two channels of what every norm gives become fifty times as large."""
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if "norm" in type(module).__name__.lower() and isinstance(weight, Tensor):
            weight.data[:2] *= 50


def decibels(found: Tensor, exact: Tensor) -> float:
    """Signal over error, each channel counting the same: the last norm's are planted too."""
    scale = exact.flatten(0, -2).square().mean(0).sqrt()
    error = (found - exact) / scale
    return -10 * float(torch.log10(error.square().mean()))


def outputs(call: Callable[..., Any], data: Tensor, scheme: str, calibration: Any) -> Any:
    torch._dynamo.reset()
    captured = Captured(scheme=scheme, calibration=calibration)
    with torch.no_grad():
        found = torch.compile(call, backend=captured.backend)(data)
    return found, captured


@pytest.mark.parametrize("kind", KINDS)
def test_smoothing_is_better_than_plain_int8(kind: str) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    call, data = made(kind)
    # Enough tokens that a few which a router sends elsewhere do not decide.
    data = torch.randn(8, 3, 32, 32) if kind == "vit" else torch.randint(1, 99, (8, 24))
    model = model_of(call)
    plant(model)
    with torch.no_grad():
        exact = call(data)
    calibration = fxquant.calibrate(model, [lambda _: call(data)], progress=False)
    plain, first = outputs(call, data, "w8a8", calibration)
    smooth, second = outputs(call, data, "smoothquant", calibration)
    assert decibels(smooth, exact) > decibels(plain, exact) + 3
    apart, third = outputs(call, data, "llm_int8", calibration)
    assert decibels(apart, exact) > decibels(plain, exact)
    for captured in (first, second, third):
        # All products: what is skipped is no loss.
        assert captured.sites
        assert captured.losses == []
    for captured in (second, third):
        assert named(captured) == named(first)
    assert any("experts" in name for name in named(first)) == (kind == "mixtral")
    assert all(any("1/s" in note for note in site.notes) for site in second.sites)


def named(captured: Captured) -> set[str]:
    return {site.parameter.name for site in captured.sites}
