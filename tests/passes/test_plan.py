"""Patterns, overrides, strictness, and one encoding for a parameter."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fxquant.codegen.spec import KernelSpec, Outliers
from fxquant.config import Config
from fxquant.errors import CoverageError, WeightError
from fxquant.formats import Encoding, pack
from fxquant.passes.plan import decide, packed_bytes
from fxquant.schemes import Activation, Recipe, Smoothing, get_scheme
from tests.passes.harness import Captured, run

D = 64


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([nn.Linear(D, D), nn.Linear(D, D)])
        self.gate = nn.Linear(D, D)
        self.lm_head = nn.Linear(D, 96, bias=False)

    def forward(self, x):
        for layer in self.layers:
            x = torch.relu(layer(x))
        return self.lm_head(x * torch.sigmoid(self.gate(x)))


X = torch.randn(3, D)


def schemes_of(captured):
    return {site.module: site.scheme for site in captured.sites}


def test_default_skips():
    captured = run(Model(), X)
    assert schemes_of(captured) == {"layers.0": "nf4", "layers.1": "nf4"}
    reasons = {refusal.module: refusal.reason for refusal in captured.refusals}
    assert reasons == {
        "gate": "the skip pattern 'gate' matches",
        "lm_head": "the skip pattern 'lm_head' matches",
    }
    assert captured.losses == []


@pytest.mark.parametrize("pattern", ["layers.0", "layers.0.weight", "*.0", "*[0].weight"])
def test_skip_by_module_or_parameter(pattern):
    captured = run(Model(), X, skip=[pattern])
    assert schemes_of(captured) == {"layers.1": "nf4"}


def test_first_override_wins_and_beats_default_skips_only():
    overrides = {"lm_head": "int8", "layers.*": "fp4", "layers.1": "int8", "gate": "int8"}
    captured = run(Model(), X, overrides=overrides, skip=["gate"])
    assert schemes_of(captured) == {"layers.0": "fp4", "layers.1": "fp4", "lm_head": "int8"}


def test_override_by_recipe():
    recipe = Recipe(Encoding(bits=8, block=(1, 16)))
    captured = run(Model(), X, overrides={"layers.0": recipe})
    assert schemes_of(captured) == {"layers.0": "custom", "layers.1": "nf4"}
    assert captured.sites[0].operand.encoding.block == (1, 16)


def test_strict_counts_no_skips():
    run(Model(), X, strict=True, min_coverage=1.0)


def fails(model, *args, **options):
    torch._dynamo.reset()
    captured = Captured(**options)
    with torch.no_grad(), pytest.raises(Exception) as raised:  # noqa: PT011
        torch.compile(model, backend=captured.backend)(*args)
    return raised.value


class WithConv(Model):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(D, D, 3, padding=1)

    def forward(self, x):
        return super().forward(self.conv(x.T[None])[0].T)


@pytest.mark.parametrize("options", [{"strict": True}, {"min_coverage": 0.9}])
def test_lost_products_are_listed_with_file_and_line(options):
    error = fails(WithConv(), X, **options)
    assert CoverageError.__name__ in type(error).__name__ + str(error) + repr(error.__cause__)
    assert "conv (" in str(error)
    assert "a convolution with a kernel of 3" in str(error)
    assert f"{__file__}:" in str(error)
    assert "lm_head" not in str(error)


def test_coverage_that_is_met():
    captured = run(WithConv(), X, min_coverage=0.3)
    assert len(captured.losses) == 1


def test_not_finite_weight_is_an_error_that_names_it():
    model = Model()
    model.layers[1].weight.data[3, 5] = float("nan")
    error = fails(model, X)
    assert WeightError.__name__ in type(error).__name__ + str(error) + repr(error.__cause__)
    assert "layers.1.weight" in str(error)


def test_per_channel_blocks_follow_the_outputs():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.nk = nn.Parameter(torch.randn(48, D))
            self.kn = nn.Parameter(torch.randn(D, 48))
            self.ekn = nn.Parameter(torch.randn(2, D, 48))

        def forward(self, x):
            return F.linear(x, self.nk) + x @ self.kn + (x @ self.ekn).sum(0)

    captured = run(Both(), X, scheme="int8")
    blocks = {site.parameter.name: site.operand.encoding.block for site in captured.sites}
    assert blocks == {"nk": (1, -1), "kn": (-1, 1), "ekn": (-1, 1)}


def test_one_encoding_for_a_parameter_used_both_ways():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn(48, D))

        def forward(self, x):
            return F.linear(x, self.w) @ self.w

    captured = run(Both(), X, scheme="int8")
    assert len(captured.sites) == 2
    assert len(captured.packed) == 1
    placeholders = captured.contexts[0].regions[0].placeholders
    assert len(placeholders) == 1 + len(captured.sites[0].packed.tensors())


def test_equal_specs_share_a_kernel_named_after_what_it_does():
    captured = run(Model(), X)
    assert len({site.spec_json for site in captured.sites}) == 1
    assert '"name":"nf4_linear_64x64_bias"' in captured.sites[0].spec_json


@pytest.mark.parametrize("compute", ["float16", "bfloat16"])
def test_compute_dtype(compute):
    captured = run(Model(), X, compute_dtype=compute, tol=0.05)
    assert all(f'"compute_dtype":"{compute}"' in site.spec_json for site in captured.sites)


def test_int8_activations_are_in_the_spec_and_in_the_name():
    # Half a step of every input, amax / 254 * sum |w|, is at most 4 % of the largest output of each
    # of the three products.
    captured = run(Model(), X, compute_dtype="int8", scheme="int8", tol=3 * 0.042)
    for site in captured.sites:
        assert '"compute_dtype":"int8"' in site.spec_json
        assert '"name":"int8xint8_linear_64x64_bias"' in site.spec_json


@pytest.mark.parametrize("scheme", ["w8a8", "zeroquant"])
def test_schemes_with_activations_in_int8(scheme):
    captured = run(Model(), X, scheme=scheme, tol=3 * 0.042)
    for site in captured.sites:
        assert site.recipe.activation == Activation("token")
        assert '"compute_dtype":"int8"' in site.spec_json


@pytest.mark.parametrize(("options", "threshold"), [({}, 6.0), ({"threshold": 2.5}, 2.5)])
def test_outliers_are_in_the_spec_with_the_threshold_of_the_options(options, threshold):
    captured = run(Model(), X, scheme="llm_int8", tol=3 * 0.042, **options)
    for site in captured.sites:
        spec = KernelSpec.from_json(site.spec_json)
        assert spec.outliers == Outliers("float16", threshold=threshold)
        assert spec.name == "int8xint8_linear_64x64_outliers_bias"


def test_alpha_of_the_options_by_pattern():
    recipe = Recipe(Encoding(bits=8, block=(1, -1)), smoothing=Smoothing(0.5))
    config = Config(overrides={"*": recipe}, alpha={"layers.0": 0.25, "layers.*": "auto"})
    weight = nn.Parameter(torch.randn(D, D), requires_grad=False)
    found = [
        decide(config, weight, (name,), (0,), (1,)).recipe.smoothing.alpha
        for name in ("layers.0", "layers.1", "other")
    ]
    assert found == [0.25, "auto", 0.5]


def test_a_packed_weight_gets_the_activation_of_the_scheme():
    packed = pack(torch.randn(D, D), get_scheme("w8a8").recipe.weight)
    for scheme, activation in (("w8a8", Activation("token")), ("nf4", None)):
        decision = decide(Config(scheme=scheme), packed, ("a",), (0,), (1,))
        assert decision.encoding == packed.encoding
        assert decision.recipe.activation == activation


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (48, 64), (2, 33, 65), (7, 300)])
@pytest.mark.parametrize("name", ["nf4", "fp4", "int8"])
def test_packed_bytes_is_what_packing_takes(name, shape):
    encoding = get_scheme(name).recipe.weight
    packed = pack(torch.randn(shape), encoding)
    assert packed_bytes(encoding, shape) == sum(part.nbytes for part in packed.tensors())
