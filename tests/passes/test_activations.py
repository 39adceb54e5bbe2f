"""Which activations are quantized apart from their products, and how often."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from fxquant.codegen.spec import KernelSpec
from fxquant.formats import Encoding
from fxquant.schemes import Activation, OutlierColumns, Recipe
from tests.passes.harness import run

K = 64
PER_CHANNEL = Encoding(8, block=(1, -1))
# Half a step of every input, amax / 254 * sum |w|, is at most 4 % of the largest output of a
# product; these chain two.
TOLERANCE = 2 * 0.042


class Attention(nn.Module):
    """q, k and v of one activation, and a product of their result."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v = (nn.Linear(K, K) for _ in range(3))
        self.o = nn.Linear(K, K)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.o(torch.tanh(self.q(x) + self.k(x)) + self.v(x))


def quantized(captured: Any) -> list[str]:
    """The names of the calls that quantize."""
    found = []
    for ctx in captured.contexts:
        op = torch.ops.fxquant.quantize.default
        nodes = ctx.gm.graph.find_nodes(op="call_function", target=op)
        found += [str(node.args[2]).partition('"name":"')[2].partition('"')[0] for node in nodes]
    return found


def compiled(activation: Activation | None, x: torch.Tensor, **more: Any) -> Any:
    recipe = Recipe(PER_CHANNEL, activation, outliers=more.pop("outliers", None))
    more = {"tol": TOLERANCE, **more}
    return run(more.pop("model", None) or Attention(), x, overrides={"*": recipe}, **more)


def dtypes_of(captured: Any) -> dict[str, str]:
    return {s.module: KernelSpec.from_json(s.spec_json).x_dtype for s in captured.sites}


@pytest.mark.parametrize("dynamic", [None, True])
def test_one_activation_of_three_products_is_quantized_once(dynamic: bool | None) -> None:
    captured = compiled(Activation("token"), torch.randn(2, 5, K), dynamic=dynamic)
    assert quantized(captured) == ["quantize_64_per_token"]
    assert dtypes_of(captured) == {"q": "int8", "k": "int8", "v": "int8", "o": "float32"}
    assert [bool(site.quantize_json) for site in captured.sites] == [True, True, True, False]


def test_a_scale_of_the_whole_tensor_is_always_apart() -> None:
    captured = compiled(Activation("tensor"), torch.randn(2, 5, K))
    assert quantized(captured) == ["quantize_64_per_tensor"] * 2
    assert set(dtypes_of(captured).values()) == {"int8"}


def test_weights_only_and_outliers_leave_activations_to_the_products() -> None:
    for activation, outliers in ((None, None), (Activation(), OutlierColumns())):
        captured = compiled(activation, torch.randn(2, 5, K), outliers=outliers)
        assert quantized(captured) == []
        assert set(dtypes_of(captured).values()) == {"float32"}


def test_products_of_other_recipes_do_not_share() -> None:
    others = {
        "q": Recipe(PER_CHANNEL, Activation("tensor")),
        "v": Recipe(PER_CHANNEL),
        "*": Recipe(PER_CHANNEL, Activation("token")),
    }
    captured = run(Attention(), torch.randn(5, K), overrides=others, tol=TOLERANCE)
    assert quantized(captured) == ["quantize_64_per_tensor"]
    expected = {"q": "int8", "k": "float32", "v": "float32", "o": "float32"}
    assert dtypes_of(captured) == expected


def test_gradients_go_through_products_that_round_for_themselves() -> None:
    model = Attention().requires_grad_(requires_grad=False)
    x = torch.randn(5, K, requires_grad=True)
    captured = compiled(Activation("token"), x, model=model, grad=True)
    assert quantized(captured) == []
    assert set(dtypes_of(captured).values()) == {"float32"}


def test_another_product_s_result_is_an_activation_like_others() -> None:
    class Chained(Attention):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.o(x)
            return self.q(y) + self.k(y)

    captured = compiled(Activation("token"), torch.randn(5, K), model=Chained())
    assert quantized(captured) == ["quantize_64_per_token"]
    assert dtypes_of(captured) == {"o": "float32", "q": "int8", "k": "int8"}


def test_another_product_s_result_that_was_written_to_is_two_activations() -> None:
    class Written(Attention):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.o(x)
            first = self.q(y)
            y.add_(1)
            return first + self.k(y)

    captured = compiled(Activation("tensor"), torch.randn(5, K), model=Written())
    assert quantized(captured) == ["quantize_64_per_tensor"] * 3


def test_an_activation_that_was_written_to_between_is_another() -> None:
    class Written(Attention):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = x * 2
            first = self.q(y)
            y.add_(first)
            return self.k(y)

    captured = compiled(Activation("token"), torch.randn(5, K), model=Written())
    assert len(captured.sites) == 2
