"""Named recipes."""

from __future__ import annotations

import pytest
import torch

from fxquant import errors
from fxquant.formats import Encoding, pack
from fxquant.schemes import Recipe, get_scheme, schemes


def test_names_and_default() -> None:
    assert list(schemes()) == ["nf4", "fp4", "int8"]
    for name, scheme in schemes().items():
        assert scheme.name == name
        assert get_scheme(name) is scheme
        assert "arXiv" in scheme.paper
        assert scheme.summary.endswith(".")


def test_the_registry_cannot_be_changed_from_outside() -> None:
    schemes().clear()
    assert "nf4" in schemes()


def test_unknown_scheme_lists_the_known_ones() -> None:
    with pytest.raises(errors.OptionError, match="'nf5': the schemes are nf4, fp4, int8"):
        get_scheme("nf5")


@pytest.mark.parametrize(
    ("name", "bits"), [("nf4", 4 + 8 / 64 + 32 / (64 * 256)), ("fp4", 4.5), ("int8", 8 + 32 / 1024)]
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
