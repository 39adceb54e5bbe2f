"""What calibration decides: limits, columns that stay in 16 bits, and for whom."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import fxquant
from fxquant import errors
from fxquant.calibration import Calibration
from fxquant.codegen.spec import KernelSpec, Outliers
from fxquant.formats import Encoding
from fxquant.passes.statistics import clipping_limit
from fxquant.schemes import Activation, OutlierColumns, Recipe, Smoothing
from tests.passes.harness import run

pytestmark = pytest.mark.usefixtures("few_heights")

K = 64
PER_CHANNEL = Encoding(8, block=(1, -1))


class Two(nn.Module):
    """Two products one after the other."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.a, self.b = nn.Linear(K, K, bias=False), nn.Linear(K, K, bias=False)
        self.requires_grad_(requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(torch.tanh(self.a(x)))


def activation(rows: int = 32, outliers: int = 3) -> torch.Tensor:
    x = torch.randn(rows, K, generator=torch.Generator().manual_seed(5))
    x[:, :outliers] *= 30
    return x


def captured(recipe: Recipe, model: nn.Module | None = None, **more: Any) -> Any:
    model = (model or Two()).eval()
    x = more.pop("x", activation())
    calibration = more.pop("calibration", None) or fxquant.calibrate(
        model, [activation()], progress=False
    )
    more.setdefault("tol", 1.0)
    return run(model, x, overrides={"*": recipe}, calibration=calibration, **more)


def derived(found: Any, word: str) -> dict[str, torch.Tensor]:
    """Inputs that rules made, by their placeholders' names."""
    (ctx,) = found.contexts
    nodes = [node for node in ctx.gm.graph.nodes if node.op == "placeholder"]
    pairs = zip(nodes, ctx.inputs, strict=True)
    return {node.name: value for node, value in pairs if node.name.endswith(word)}


def test_a_static_limit_is_the_largest_that_was_seen() -> None:
    model, x = Two(), activation()
    limits = derived(captured(Recipe(PER_CHANNEL, Activation("static")), model), "limit")
    first, second = limits.values()
    assert first.item() == x.abs().max()
    torch.testing.assert_close(second.item(), float(torch.tanh(model.a(x)).abs().max()))


def test_a_static_limit_counts_the_migration() -> None:
    model, x = Two(), activation()
    found = captured(Recipe(PER_CHANNEL, Activation("static"), Smoothing(0.5)), model)
    scale = x.abs().amax(0).sqrt() / model.a.weight.abs().amax(0).sqrt()
    limit = next(iter(derived(found, "limit").values()))
    torch.testing.assert_close(limit.item(), float((x / scale).abs().max()))
    assert limit < x.abs().max() / 5


def test_known_columns_are_those_of_the_largest_magnitudes() -> None:
    model, x = Two(), activation()
    found = captured(Recipe(PER_CHANNEL, Activation(), outliers=OutlierColumns(6.0, True)), model)
    specs = {s.module: KernelSpec.from_json(s.spec_json) for s in found.sites}
    # Three, in whole groups of eight; tanh leaves none.
    assert specs["a"].outliers == Outliers("float16", columns=8)
    assert specs["b"].outliers is None
    (numbers,) = derived(found, "columns").values()
    assert numbers.dtype == torch.int32
    assert set(numbers.tolist()) == set(x.abs().amax(0).topk(8).indices.tolist())
    assert {0, 1, 2} <= set(numbers.tolist())
    (apart,) = derived(found, "apart").values()
    assert torch.equal(apart, model.a.weight[:, numbers.long()].half())
    assert found.sites[0].notes == ["3 of 64 columns in float16"]
    assert found.sites[1].notes == ["0 of 64 columns in float16"]


def test_columns_in_16_bits_are_multiplied_by_what_the_weight_is() -> None:
    both = Recipe(PER_CHANNEL, Activation(), Smoothing(0.5), OutlierColumns(0.5, True))
    exact = Two()(activation())
    found = captured(both, tol=0.02)
    assert next(iter(derived(found, "apart").values())).shape[0] == K
    assert exact.isfinite().all()


def test_all_columns_can_be_outliers() -> None:
    recipe = Recipe(PER_CHANNEL, Activation(), outliers=OutlierColumns(1e-6, True))
    # It is compared with the decoded weight, from which the exact one is half a step away.
    found = captured(recipe, tol=0.02)
    assert KernelSpec.from_json(found.sites[0].spec_json).outliers.columns == K


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(PER_CHANNEL, Activation("static")),
        Recipe(PER_CHANNEL, Activation(clipped=True)),
        Recipe(PER_CHANNEL, Activation(), Smoothing()),
        Recipe(PER_CHANNEL, Activation(), outliers=OutlierColumns(static=True)),
    ],
)
def test_without_calibration_one_sentence_names_the_product(recipe: Recipe) -> None:
    with pytest.raises(Exception, match=r"'custom' needs statistics .* 'a\.weight'") as caught:
        run(Two(), activation(), overrides={"*": recipe})
    assert "CalibrationError" in repr(caught.value) + repr(caught.value.__cause__)


def test_the_calibration_of_another_model_names_the_first_missing_site() -> None:
    class Other(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.c = nn.Linear(K, K)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.c(x)

    other = fxquant.calibrate(Other(), [activation()], progress=False)
    recipe = Recipe(PER_CHANNEL, Activation("static"))
    with pytest.raises(Exception, match=r"no statistics for 'a\.weight'"):
        captured(recipe, calibration=Calibration(other.stats))


def test_gradients_need_a_scale_per_token() -> None:
    model, x = Two(), activation().requires_grad_()
    calibration = fxquant.calibrate(model, [activation()], progress=False)
    options = {"scheme": "smoothquant_o3", "calibration": calibration}
    compiled = torch.compile(model, backend="fxquant", options=options)
    with pytest.raises(Exception, match="has no gradient: train with a scheme whose scale is per"):
        compiled(x).sum().backward()
    assert issubclass(errors.KernelError, RuntimeError)


def test_clipping_gives_up_a_rare_token_for_all_others() -> None:
    many = torch.full((1000,), 1.0)
    # A million elements a token: rounding them finer is worth what one element loses.
    lone = torch.cat([many, torch.tensor([1.05])])
    assert clipping_limit(lone, 1_000_000) == 1.0
    # Two elements: nothing is won by clipping.
    assert clipping_limit(lone, 2) == torch.tensor(1.05)
    assert clipping_limit(torch.tensor([3.0]), 64) == 3.0
    assert clipping_limit(torch.zeros(5), 64) == 0.0


def test_a_clipping_limit_has_the_least_error_of_all_quantiles() -> None:
    tokens = torch.rand(64, generator=torch.Generator().manual_seed(1)) + 0.5
    k = 100_000

    def error(limit: float) -> float:
        kept = tokens.clamp(max=limit)
        return float(((tokens - kept) ** 2 + k / 12 * (kept / 127) ** 2).sum())

    found = float(clipping_limit(tokens, k))
    assert error(found) <= min(map(error, tokens.tolist())) * (1 + 1e-6)
    assert found < tokens.max()


def test_known_columns_of_a_weight_whose_rows_were_divided() -> None:
    """smoothquant behind llm_int8_static: the scales of the second are in the rows of the first."""

    class Chain(Two):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(torch.relu(self.a(x)))

    model, x = Chain().eval(), activation()
    calibration = fxquant.calibrate(model, [x], progress=False)
    recipes = {
        "a": Recipe(PER_CHANNEL, Activation(), outliers=OutlierColumns(6.0, True)),
        "b": Recipe(PER_CHANNEL, Activation(), Smoothing(0.9)),
    }
    torch._dynamo.reset()
    found = run(model, x, overrides=recipes, calibration=calibration, tol=1.0)
    (apart,) = derived(found, "apart").values()
    (numbers,) = derived(found, "columns").values()
    whole = model.a.weight[:, numbers.long()]
    largest = whole.abs().argmax(1, keepdim=True)
    scale = whole.gather(1, largest) / apart.float().gather(1, largest)
    assert (scale - 1).abs().max() > 0.1
    # One scale a row: it and each element are rounded to float16, some below its normal numbers.
    wanted = whole / scale
    assert ((apart.float() - wanted).abs() <= 2.01 * 2**-11 * wanted.abs() + 2**-25).all()
    exact = model(x)
    got = compiled_result(model, x, recipes, calibration)
    assert (got - exact).norm() < 0.05 * exact.norm()


def compiled_result(
    model: nn.Module, x: torch.Tensor, recipes: Any, calibration: Calibration
) -> torch.Tensor:
    torch._dynamo.reset()
    options = {"overrides": recipes, "calibration": calibration, "target": "torch"}
    with torch.no_grad():
        return torch.compile(model, backend="fxquant", options=options)(x)
