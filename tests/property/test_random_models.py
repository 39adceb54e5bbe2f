"""Whole random models: compiled equals the decoded model within a bound that runs along with it."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import fxquant
from fxquant.formats import pack
from fxquant.runtime import toolchain
from fxquant.schemes import get_scheme

pytestmark = pytest.mark.usefixtures("few_heights")

UNIT = 2.0**-24
SIZES = st.sampled_from([1, 2, 17, 32, 48, 65, 96])


@dataclass(frozen=True)
class Step:
    """One layer of a random model: how its product is spelled, its size and what follows."""

    spelling: str
    size: int
    bias: bool
    after: str


STEPS = st.builds(
    Step,
    st.sampled_from(["linear", "matmul", "transposed", "einsum", "addmm", "conv", "batched"]),
    SIZES,
    st.booleans(),
    st.sampled_from(["none", "relu", "tanh", "residual", "scale"]),
)


class RandomModel(nn.Module):
    """A chain of products with Lipschitz-1 work between them, so that errors can be bounded."""

    def __init__(self, width: int, steps: list[Step]) -> None:
        super().__init__()
        self.steps = steps
        self.weights = nn.ParameterList()
        self.biases = nn.ParameterList()
        for step in steps:
            shape = {
                "matmul": (width, step.size),
                "addmm": (width, step.size),
                "conv": (step.size, width, 1),
                "batched": (2, width, step.size),
            }.get(step.spelling, (step.size, width))
            self.weights.append(nn.Parameter(torch.randn(shape) / width**0.5))
            self.biases.append(nn.Parameter(torch.randn(step.size)))
            width = step.size
        self.requires_grad_(requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        for step, w, b in zip(self.steps, self.weights, self.biases, strict=True):
            y = product(step, x, w, b if step.bias else None)
            x = follow(step, x, y)
        return x


def product(step: Step, x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
    """The same sums, in one of the ways in which people write them."""
    if step.spelling == "linear":
        return F.linear(x, w, b)
    if step.spelling == "addmm" and b is not None:
        return torch.addmm(b, x, w)
    if step.spelling == "conv":
        return F.conv1d(x.t()[None], w, b)[0].t()
    if step.spelling in ("matmul", "addmm"):
        y = x @ w
    elif step.spelling == "transposed":
        y = (w @ x.t()).t()
    elif step.spelling == "einsum" and min(w.shape) > 1:
        y = torch.einsum("mk,nk->mn", x, w)
    elif step.spelling == "batched":
        y = torch.bmm(torch.stack([x, x]), w).select(0, 1)
    else:  # einsum takes sizes of 1 to a pointwise product
        y = x @ w.t()
    return y if b is None else y + b


def follow(step: Step, x: Tensor, y: Tensor) -> Tensor:
    if step.after == "relu":
        return torch.relu(y)
    if step.after == "tanh":
        return torch.tanh(y)
    if step.after == "residual" and x.shape == y.shape:
        return x + y
    return y * 0.5 if step.after == "scale" else y


def decoded_weight(step: Step, w: Tensor, scheme: str) -> Tensor:
    """What the backend multiplies by, as ``[n, k]``; the weight itself where it is left alone."""
    dims = {"matmul": (1, 0), "addmm": (1, 0), "batched": (2, 1)}.get(step.spelling, (0, 1))
    encoding = get_scheme(scheme).recipe.weight.oriented(w.ndim, (dims[0],), (dims[1],))
    packed = pack(w, encoding)
    small = sum(part.nbytes for part in packed.tensors()) >= w.nbytes
    dense = w if small else packed.dequantize()
    if step.spelling == "conv":
        return dense[:, :, 0]
    if step.spelling == "batched":
        return dense[1].t()
    return dense.t() if step.spelling in ("matmul", "addmm") else dense


def expected_and_bound(model: RandomModel, x: Tensor, scheme: str) -> tuple[Tensor, Tensor]:
    """The decoded model in float64, and how far a float32 run of it may be off.

    A sum of k products errs by gamma_{k+2} sum |x||w| (Higham 3.1) over its exact value for the
    inputs that it got, whose own error e grows to at most ``e |w|.T``; ReLU, tanh and a product
    with 0.5 pass errors on, at most as large as they came, and tanh errs itself by 4 ulp.
    """
    value = x.double()
    error = torch.zeros_like(value)
    for step, w, b in zip(model.steps, model.weights, model.biases, strict=True):
        weight = decoded_weight(step, w, scheme).double()
        k = weight.shape[1]
        gamma = (k + 2) * UNIT / (1 - (k + 2) * UNIT)
        y = value @ weight.t()
        magnitude = (value.abs() + error) @ weight.abs().t()
        if step.bias:
            y = y + b.double()
            magnitude = magnitude + b.double().abs()
        grown = error @ weight.abs().t() + gamma * magnitude
        after = follow(step, value, y)
        if step.after == "residual" and value.shape == y.shape:
            grown = grown + error + UNIT * (value.abs() + y.abs() + error + grown)
        if step.after == "tanh":
            grown = grown + 8 * UNIT
        value, error = after, grown
    return value, error


@pytest.mark.parametrize("scheme", ["nf4", "int8", "fp4"])
@settings(max_examples=5, deadline=None)
@given(
    width=SIZES,
    rows=st.integers(1, 7),
    steps=st.lists(STEPS, min_size=1, max_size=3),
    seed=st.integers(0, 2**31),
)
def test_compiled_equals_the_decoded_model(
    scheme: str, width: int, rows: int, steps: list[Step], seed: int
) -> None:
    torch._dynamo.reset()
    torch.manual_seed(seed)
    model = RandomModel(width, steps)
    x = torch.randn(rows, width)
    out = torch.compile(model, backend="fxquant", options={"scheme": scheme})(x)
    expected, bound = expected_and_bound(model, x, scheme)
    assert out.dtype == torch.float32
    assert bool(((out.double() - expected).abs() <= bound + 1e-30).all())
    report = fxquant.report(model)
    assert len(report.rows) == len(steps)
    assert all("too small" in row.reason for row in report.left_alone)


@pytest.mark.skipif(toolchain.compiler() is None, reason=toolchain.NOT_FOUND)
@settings(max_examples=3, deadline=None)
@given(
    width=SIZES,
    rows=st.integers(1, 40),
    steps=st.lists(STEPS, min_size=1, max_size=2),
    seed=st.integers(0, 2**31),
)
def test_targets_agree(width: int, rows: int, steps: list[Step], seed: int) -> None:
    """What C++ kernels compute and what torch does are each within the bound of the model."""
    torch.manual_seed(seed)
    model = RandomModel(width, steps)
    x = torch.randn(rows, width)
    _, bound = expected_and_bound(model, x, "nf4")
    results = []
    for target in ("cpp", "torch"):
        torch._dynamo.reset()
        options = {"scheme": "nf4", "target": target}
        results.append(torch.compile(model, backend="fxquant", options=options)(x))
        kernels = [row.kernel for row in fxquant.report(model).quantized]
        assert all(kernel.startswith(f"{target}:") for kernel in kernels)
    assert bool(((results[0] - results[1]).abs() <= 2 * bound + 1e-30).all())
