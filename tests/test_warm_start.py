"""A compile whose graph torch's caches know: it is not traced again, and computes the same."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch._inductor.utils import fresh_cache

import fxquant
from tests.helpers import compile_, decoded, frozen

pytestmark = pytest.mark.usefixtures("few_heights", "fresh")


class Heads(nn.Module):
    """Methods of what a product gives, as attention calls them."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key = nn.Linear(64, 96), nn.Linear(64, 96)
        self.scale = nn.Parameter(torch.ones(64))

    def forward(self, x: Tensor) -> Tensor:
        x = x * self.scale
        query, key = (
            layer(x).view(*x.shape[:-1], 3, 32).transpose(1, 2) for layer in (self.query, self.key)
        )
        return (query @ key.mT).softmax(-1)


@pytest.fixture(autouse=True)
def own() -> Iterator[None]:
    with fresh_cache():
        yield


def counted(name: str) -> int:
    found: int = torch._dynamo.utils.counters["aot_autograd"][f"autograd_cache_{name}"]
    return found


def made(seed: int, *, packed: bool = False, trains: bool = False) -> Heads:
    torch.manual_seed(seed)
    model = frozen(Heads())
    model.scale.requires_grad_(trains)
    if packed:
        fxquant.quantize_(model)
    torch._dynamo.reset()
    return model


@pytest.mark.parametrize(("packed", "dynamic"), [(False, None), (True, None), (False, True)])
def test_a_second_compile_is_answered_for_its_own_weights(
    packed: bool, dynamic: bool | None
) -> None:
    x = torch.randn(2, 5, 64)
    results, reports = [], []
    for seed in (0, 0, 1):
        model = made(seed, packed=packed)
        twin = decoded(made(seed))
        compiled = torch.compile(model, backend="fxquant", dynamic=dynamic)
        results.append(compiled(x))
        torch.testing.assert_close(results[-1], twin(x), rtol=1e-4, atol=1e-5)
        more = torch.randn(3, 7, 64)
        if dynamic:
            torch.testing.assert_close(compiled(more), twin(more), rtol=1e-4, atol=1e-5)
        reports.append(fxquant.report(model).to_json())
    assert (counted("miss"), counted("hit"), counted("bypass")) == (1, 2, 0)
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])
    assert reports[0] == reports[1]


def test_gradients_are_answered_too() -> None:
    x = torch.randn(2, 5, 64)
    found = []
    for _ in range(2):
        model = made(0, trains=True)
        torch.compile(model, backend="fxquant")(x).square().sum().backward()
        twin = decoded(made(0, trains=True))
        twin(x).square().sum().backward()
        torch.testing.assert_close(model.scale.grad, twin.scale.grad, rtol=1e-4, atol=1e-5)
        found.append((model.scale.grad, fxquant.report(model).to_json()))
    assert (counted("miss"), counted("hit"), counted("bypass")) == (1, 1, 0)
    assert torch.equal(found[0][0], found[1][0])
    assert found[0][1] == found[1][1]


def test_other_options_are_not_answered() -> None:
    x = torch.randn(2, 5, 64)
    options = [
        {"scheme": "nf4"},
        {"scheme": "fp4"},
        {"scheme": "nf4", "skip": ["key"]},
        {"scheme": "nf4", "fuse": False},
    ]
    results = [compile_(made(0), **found)(x) for found in options]
    assert (counted("miss"), counted("hit")) == (len(options), 0)
    assert not any(torch.equal(results[0], other) for other in results[1:3])
