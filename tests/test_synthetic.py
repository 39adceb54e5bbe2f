"""The four systems of SmoothQuant's table on one made-up product, by the error of its output.

An activation of N(0, 1) with six channels sixty times as large, and a weight of N(0, 1): what an
int8 scale for every token, or for the tensor, loses there, and what each method gets back.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxquant
from fxquant.formats import Encoding
from fxquant.schemes import Activation, Recipe

pytestmark = pytest.mark.usefixtures("few_heights")

TENSOR = Recipe(Encoding(8, block=(1, -1)), Activation("tensor"))


class Product(nn.Module):
    """The product, with what goes into it and what should come out."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.x = torch.randn(256, 1024, generator=generator)
        self.x[:, torch.randperm(1024, generator=generator)[:6]] *= 60
        weight = torch.randn(1024, 1024, generator=generator)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.exact = self.x.double() @ weight.double().T

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight)

    def decibels(self, **options: Any) -> float:
        """Signal over error of the quantized product."""
        torch._dynamo.reset()
        compiled = torch.compile(self, backend="fxquant", options=options)
        error = compiled(self.x).double() - self.exact
        return 10 * float(torch.log10(self.exact.square().sum() / error.square().sum()))


@pytest.mark.parametrize("seed", [0, 1])
def test_the_table(seed: int) -> None:
    product = Product(seed)
    calibration = fxquant.calibrate(product, [product.x], progress=False)
    assert 17 <= product.decibels(overrides={"*": TENSOR}) <= 20
    for scheme in ("w8a8", "zeroquant"):
        assert product.decibels(scheme=scheme) == pytest.approx(26, abs=1)
    assert product.decibels(scheme="llm_int8") >= 41.5
    # Weights of known columns are kept in 16 bits, not decoded: most of the error is gone.
    assert product.decibels(scheme="llm_int8_static", calibration=calibration) >= 50
    assert product.decibels(scheme="smoothquant", calibration=calibration) >= 38.5


def test_the_curve_of_alpha_peaks_at_one_half() -> None:
    product = Product(0)
    calibration = fxquant.calibrate(product, [product.x], progress=False)

    def at(alpha: float | str) -> float:
        return product.decibels(scheme="smoothquant", alpha=alpha, calibration=calibration)

    curve = [at(alpha) for alpha in (0.0, 0.25, 0.4, 0.5, 0.6, 0.75, 1.0)]
    assert max(curve) == curve[3]
    assert curve[:4] == sorted(curve[:4])
    assert curve[3:] == sorted(curve[3:], reverse=True)
    # The ends are the two that do nothing for one of the factors.
    assert curve[0] == pytest.approx(25.5, abs=1)
    assert curve[-1] == pytest.approx(25.5, abs=1.5)
    # Half a decibel for the grid and for what is drawn in the place of the activation.
    assert at("auto") >= curve[3] - 0.5
