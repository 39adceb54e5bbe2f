"""The rules of smoothing: numbers, and what they are the same for."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fxquant.calibration import Calibration, SiteStats
from fxquant.codegen.spec import WeightOperand
from fxquant.formats import Encoding, pack
from fxquant.passes.alpha import GRID, best_alpha, drawn, output_error
from fxquant.passes.scales import (
    LEAST,
    Consumer,
    Folded,
    Gamma,
    Migration,
    Part,
    ScaledWeight,
    Spread,
    migrated,
)
from fxquant.passes.sources import Tools, evaluate
from fxquant.runtime.store import WeightStore
from fxquant.schemes import Activation

PER_CHANNEL = Encoding(8, block=(1, -1))
STORE = WeightStore()
TOOLS = Tools(STORE.pack, STORE.remember)
K, N = 16, 12


def stats(amax: torch.Tensor, tokens: int = 500, moments: torch.Tensor | None = None) -> SiteStats:
    largest = float(amax.max())
    return SiteStats(amax, -largest, largest, amax.sort().values, tokens, moments)


def migration(weight: nn.Parameter, amax: torch.Tensor, **fields) -> Migration:
    operand = WeightOperand.whole(PER_CHANNEL, tuple(weight.shape), transposed=False)
    consumer = Consumer(fields.pop("index", 0), "w", operand, PER_CHANNEL)
    fields = {"alpha": 0.5, **fields}
    return Migration((consumer,), calibration=Calibration({"w": stats(amax)}), **fields)


def frozen(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape), requires_grad=False)


def test_migrated() -> None:
    x, w = torch.tensor([4.0, 0.0, 9.0, 1e-30]), torch.tensor([1.0, 2.0, 0.0, 1e10])
    assert migrated(x, w, 0.5).tolist() == [2.0, 1.0, 1.0, pytest.approx(LEAST)]
    assert migrated(x[:1], torch.tensor([8.0]), 1.0).item() == 4.0
    assert migrated(x[:1], torch.tensor([8.0]), 0.0).item() == 0.125


def test_tied_channels_have_the_largest_scale() -> None:
    weight, amax = frozen(N, 4), torch.tensor([1.0, 4.0, 9.0, 16.0])
    own = migration(weight, amax).compute([weight], TOOLS)
    tied = migration(weight, amax, label=(0, 1, 0, 1)).compute([weight], TOOLS)
    assert torch.equal(tied, own.view(2, 2).amax(0).repeat(2))


def test_equal_rules_on_the_same_parameters_are_computed_once() -> None:
    weight, amax = frozen(N, K), torch.rand(K)
    first = evaluate(migration(weight, amax), [weight], TOOLS)
    assert evaluate(migration(weight, amax, index=2), ["", "", weight], TOOLS) is first
    assert evaluate(migration(weight, amax, alpha=0.4), [weight], TOOLS) is not first
    assert evaluate(migration(weight, amax + 1), [weight], TOOLS) is not first
    assert evaluate(migration(weight, amax, label=(0,) * K), [weight], TOOLS) is not first
    weight.mul_(2)
    again = evaluate(migration(weight, amax), [weight], TOOLS)
    torch.testing.assert_close(again, first / 2**0.5)


def test_gamma_is_the_norms_weight_without_sign_and_zeros() -> None:
    gamma = nn.Parameter(torch.tensor([-2.0, 0.0, 3.0, 1e-9]), requires_grad=False)
    scale = Gamma(0, (2, 1, -1, 0, 3)).compute([gamma], TOOLS)
    assert scale.tolist() == pytest.approx([3.0, 1.0, 1.0, 2.0, LEAST])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_vectors_are_divided_in_float32_and_rounded_once(dtype: torch.dtype) -> None:
    gamma, vector = frozen(4), nn.Parameter(torch.randn(6).to(dtype), requires_grad=False)
    pattern = torch.tensor([-1, 3, 0, 0, 1, 2])
    spread = Spread(Gamma(0, (0, 1, 2, 3)), pattern)
    found = Folded(1, (spread, spread)).compute([gamma, vector], TOOLS)
    by = torch.cat([torch.ones(1), gamma.abs()])[pattern + 1]
    assert found.dtype == dtype
    assert torch.equal(found, (vector.float() / by / by).to(dtype))
    back = Spread(spread.scale, pattern, inverse=True).compute([gamma], TOOLS)
    torch.testing.assert_close(back, 1 / by)


@pytest.mark.parametrize("transposed", [False, True])
def test_columns_and_rows_of_a_part_of_a_parameter(transposed: bool) -> None:
    gamma, rows = frozen(K), frozen(N)
    weight = nn.Parameter(torch.randn(2, N, K), requires_grad=False)
    operand = WeightOperand(PER_CHANNEL, (2, N, K), None, N, K, (0, K, 1), N * K)
    if transposed:
        weight.data = weight.mT.contiguous()
        operand = WeightOperand(PER_CHANNEL, (2, K, N), None, N, K, (0, 1, N), N * K)
    spread = Spread(Gamma(2, tuple(range(N))), torch.arange(N))
    part = Part(operand, Gamma(1, tuple(range(K))), (spread,))
    rule = ScaledWeight(0, "w", PER_CHANNEL, (part,))
    inputs = [weight, gamma, rows]
    assert rule.indices == (0, 1, 2)
    dense = weight.detach().mT if transposed else weight.detach()
    expected = dense.clone()
    expected[1] = dense[1] * gamma.abs() / rows.abs()[:, None]
    expected = expected.mT.contiguous() if transposed else expected
    torch.testing.assert_close(rule.dense(inputs, TOOLS), expected)
    packed = evaluate(rule, inputs, TOOLS)
    assert torch.equal(
        packed.dequantize(), pack(rule.dense(inputs, TOOLS), PER_CHANNEL).dequantize()
    )
    assert (STORE.error_db(packed) or 0) > 40
    assert STORE.packed_from(weight) is None, "what is scaled does not stand for the parameter"


# --- alpha -----------------------------------------------------------------------------------


def outliers() -> tuple[torch.Tensor, SiteStats]:
    torch.manual_seed(0)
    x = torch.randn(256, 128)
    x[:, :2] *= 60
    return x, stats(x.abs().amax(0), len(x), x.t() @ x)


@pytest.mark.parametrize("with_moments", [False, True])
def test_what_is_drawn_has_the_channels_widths(with_moments: bool) -> None:
    x, found = outliers()
    if not with_moments:
        found = stats(found.amax, len(x))
    ratio = drawn(found, x.device).std(0) / x.std(0)
    # 64 draws give a deviation within 30 % (3.4 / sqrt(128)); without moments the largest of 256
    # stands for it, which scatters as much.
    assert bool(((ratio > 0.5) & (ratio < 1.8)).all())
    assert torch.equal(drawn(found, x.device), drawn(found, x.device))


@pytest.mark.parametrize("scope", ["token", "tensor", "static"])
def test_auto_is_the_best_of_the_grid_on_the_real_activation(scope: str) -> None:
    """Within 1 dB of it: what is drawn is no more than like the real one."""
    x, found = outliers()
    weight = torch.randn(96, 128)
    activation = Activation(scope)
    w = weight.abs().amax(0)

    def error(alpha: float) -> float:
        scale = migrated(found.amax, w, alpha)
        return output_error(x, found.amax, weight, scale, PER_CHANNEL, activation)

    chosen = best_alpha(
        lambda a: migrated(found.amax, w, a), [(weight[None], PER_CHANNEL, activation)], found
    )
    assert chosen in GRID
    assert error(chosen) < 1.26 * min(map(error, GRID))
    assert error(chosen) < 0.2 * error(0.0), "outliers make smoothing worth it"


def test_without_outliers_and_activations_auto_is_one_half_or_better() -> None:
    found = stats(torch.ones(32))
    weight = torch.ones(1, 4, 32)
    chosen = best_alpha(
        lambda a: migrated(found.amax, weight[0, 0], a), [(weight, PER_CHANNEL, None)], found
    )
    assert chosen == 0.5, "all are equal here"
