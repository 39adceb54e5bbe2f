"""Named recipes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from fxquant import errors
from fxquant.formats import Encoding, pack
from fxquant.schemes import Activation, OutlierColumns, Recipe, Smoothing, get_scheme, schemes


def test_names_and_default() -> None:
    assert next(iter(schemes())) == "nf4"
    for name, scheme in schemes().items():
        assert scheme.name == name
        assert get_scheme(name) is scheme
        assert "arXiv" in scheme.paper
        assert scheme.summary.endswith(".")


def test_the_registry_cannot_be_changed_from_outside() -> None:
    schemes().clear()
    assert "nf4" in schemes()


def test_unknown_scheme_lists_the_known_ones() -> None:
    with pytest.raises(errors.OptionError, match="'nf5': the schemes are nf4, fp4, int8, "):
        get_scheme("nf5")


@pytest.mark.parametrize(
    ("name", "bits"),
    [
        ("nf4", 4 + 8 / 64 + 32 / (64 * 256)),
        ("fp4", 4.5),
        ("int8", 8 + 32 / 1024),
        ("w8a8", 8 + 32 / 1024),
        ("llm_int8", 8 + 32 / 1024),
        ("zeroquant", 8.25),
        ("zeroquant_w4a8", 4.25),
    ],
)
def test_bits_per_weight(name: str, bits: float) -> None:
    packed = pack(torch.randn(1024, 1024), get_scheme(name).recipe.weight)
    # Double quantization stores one float32 more a tensor, the mean of the scales.
    assert packed.bits_per_weight == pytest.approx(bits, abs=32 / packed.numel())


# Root mean square error of standard normal weights, as a share of their own: for nf4 and fp4
# what blocks of 64 give (QLoRA's figure 3 has the same order), for int8 a uniform step of
# absmax / 127 with an absmax of about 3.5 deviations: 3.5 / 127 / sqrt(12) = 0.008.
@pytest.mark.parametrize(("name", "error"), [("nf4", 0.10), ("fp4", 0.13), ("int8", 0.009)])
def test_error_on_normal_weights(name: str, error: float) -> None:
    weight = torch.randn(256, 1024, generator=torch.Generator().manual_seed(0))
    decoded = pack(weight, get_scheme(name).recipe.weight).dequantize()
    found = float((decoded - weight).norm() / weight.norm())
    assert 0.5 * error < found < error


@pytest.mark.parametrize("weight", [None, "nf4", Encoding(8, "dynamic8", offset=True)])
def test_a_recipe_checks_its_fields(weight: object) -> None:
    with pytest.raises(errors.EncodingError, match="a recipe's weight must be"):
        Recipe(weight)


PER_CHANNEL = Encoding(8, block=(1, -1))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Activation("row"), "scope must be one of token, tensor, static"),
        (lambda: Smoothing(1.5), "alpha must be a number from 0 to 1, or 'auto'"),
        (lambda: Smoothing(True), "alpha must be"),
        (lambda: OutlierColumns(0.0), "threshold must be a number above 0"),
        (lambda: OutlierColumns(float("inf")), "threshold must be"),
        (lambda: Recipe(PER_CHANNEL, "token"), "activation must be None or of type Activation"),
        (lambda: Recipe(PER_CHANNEL, outliers=OutlierColumns()), "outliers must be None unless"),
        (
            lambda: Recipe(PER_CHANNEL, Activation(clipped=True), outliers=OutlierColumns()),
            "outliers must be None unless",
        ),
    ],
)
def test_what_a_recipe_cannot_say(make: Callable[[], object], message: str) -> None:
    with pytest.raises(errors.EncodingError, match=message):
        make()


def test_which_recipes_need_calibration() -> None:
    static = OutlierColumns(static=True)
    needs = [
        Recipe(PER_CHANNEL, Activation(), Smoothing()),
        Recipe(PER_CHANNEL, Activation("static")),
        Recipe(PER_CHANNEL, Activation(clipped=True)),
        Recipe(PER_CHANNEL, Activation(), outliers=static),
    ]
    assert all(recipe.needs_calibration for recipe in needs)
    free = [
        Recipe(PER_CHANNEL),
        Recipe(PER_CHANNEL, Activation("tensor")),
        Recipe(PER_CHANNEL, Activation(), Smoothing(gamma=True)),
        Recipe(PER_CHANNEL, Activation(), outliers=OutlierColumns()),
    ]
    assert not any(recipe.needs_calibration for recipe in free)
