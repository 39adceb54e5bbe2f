"""Random graphs: smoothing alone changes the result by rounding only, within a derived bound.

A `Tracked` value runs along in float64 with a bound on the error of each element of the same value
in float32, whichever way scales are folded. Dividing a channel by s and multiplying its weights by
s leaves ``|x| @ |W|.T`` as it is, so that a product's bound does not know of s, but for some more
roundings of each factor.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from tests.passes.smooth_harness import Drawn, Smoothed

UNIT = 2.0**-24
# Of each factor of a product and of each element in between: the division by s and the
# multiplication (up to two of either, and the rounding of s itself on both sides), the operation.
STEPS = 8
EPS = 0.5


@dataclass(frozen=True)
class Tracked:
    """A value, and how far off its float32 twin may be."""

    value: Tensor
    error: Tensor

    def rounded(self, times: int = STEPS) -> Tracked:
        return Tracked(self.value, self.error + times * UNIT * (self.value.abs() + self.error))


def dense(x: Tracked, w: Tensor, b: Tensor) -> Tracked:
    w, b = w.double(), b.double()
    gamma = (x.value.shape[-1] + STEPS + 2) * UNIT
    magnitude = (x.value.abs() + x.error) @ w.abs().t() + b.abs()
    out = Tracked(x.value @ w.t() + b, x.error @ w.abs().t() + gamma * magnitude)
    return out.rounded()


def times(a: Tracked, b: Tracked) -> Tracked:
    error = a.error * b.value.abs() + a.value.abs() * b.error + a.error * b.error
    return Tracked(a.value * b.value, error).rounded()


def normed(x: Tracked, weight: Tensor, bias: Tensor | None) -> Tracked:
    """Its derivative has a norm of at most 1 / sqrt(EPS); the sums inside add k roundings."""
    weight = weight.double()
    k = x.value.shape[-1]
    mean = x.value.mean(-1, keepdim=True) if bias is not None else 0.0
    hat = (x.value - mean) / ((x.value - mean).square().mean(-1, keepdim=True) + EPS).sqrt()
    moved = x.error.norm(dim=-1, keepdim=True) / EPS**0.5
    inner = (2 * k + 8) * UNIT * (x.value.abs().amax(-1, keepdim=True) / EPS**0.5 + 1)
    error = (moved + inner) * weight.abs()
    shift = 0.0 if bias is None else bias.double()
    magnitude = (hat * weight).abs() + (0.0 if bias is None else shift.abs())
    return Tracked(hat * weight + shift, error + STEPS * UNIT * magnitude).rounded()


def mixed(mix: Tensor, x: Tensor) -> Tensor:
    return (mix @ x.unflatten(-1, (4, -1)).transpose(1, 2)).transpose(1, 2).flatten(2)


FORWARD = {
    "linear": lambda m, x, _: m.a(x),
    "relu": lambda _m, x, _: F.relu(x),
    "leaky": lambda _m, x, _: F.leaky_relu(x, 0.25).contiguous(),
    "gelu": lambda _m, x, _: F.gelu(x),
    "layer norm": lambda m, x, _: F.layer_norm(x, x.shape[-1:], m.weight, m.bias, EPS),
    "rms": lambda m, x, _: m.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS)),
    "gate": lambda m, x, _: m.b(x) * torch.sigmoid(m.a(x)),
    "heads": lambda m, x, _: mixed(m.mix, x),
    "gain": lambda m, x, _: x * m.bias,
    "half": lambda _m, x, _: -x / 2,
    "residual": lambda _m, x, before: x + before if x.shape == before.shape else x,
    "two": lambda m, x, _: m.a(x) + m.b(x),
    "turned": lambda _m, x, _: x.mT.contiguous().permute(0, 2, 1),
    "chunk": lambda _m, x, _: x.chunk(2, -1)[1],
    "seen": lambda _m, x, _: x,
}
KINDS = (*FORWARD, "written")


class Model(nn.Module):
    """Steps over ``[2, 4, width]``, each in float32 and tracked."""

    def __init__(self, kinds: list[str], sizes: list[int]) -> None:
        super().__init__()
        self.kinds, self.parts = kinds, nn.ModuleList()
        width = sizes[0]
        for kind, size in zip(kinds, sizes, strict=True):
            part = nn.Module()
            wide = {"linear": size, "gate": size, "two": size, "chunk": width // 2}.get(kind, width)
            part.a = nn.Linear(width, wide)
            part.b = nn.Linear(width, wide)
            part.weight = nn.Parameter(torch.randn(width))
            part.bias = nn.Parameter(torch.randn(width))
            part.register_buffer("mix", torch.rand(4, 4).softmax(-1))
            self.parts.append(part)
            width = wide
        self.last = nn.Linear(width, 16)
        self.requires_grad_(requires_grad=False)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        seen, before = [], x
        for kind, part in zip(self.kinds, self.parts, strict=True):
            y = self.step(kind, part, x, before)
            if kind == "seen":
                seen.append(y)
            before, x = x, y
        return (self.last(x), *seen)

    @staticmethod
    def step(kind: str, m: nn.Module, x: Tensor, before: Tensor) -> Tensor:
        if kind == "written":
            out = x * 1.0
            out += 1
            return out
        return FORWARD[kind](m, x, before)

    def tracked(self, x: Tensor) -> list[Tracked]:
        now = before = Tracked(x.double(), torch.zeros(x.shape, dtype=torch.float64))
        seen = []
        for kind, part in zip(self.kinds, self.parts, strict=True):
            out = self.follow(kind, part, now, before)
            if kind == "seen":
                seen.append(out)
            before, now = now, out
        return [dense(now, self.last.weight, self.last.bias), *seen]

    @staticmethod
    def follow(kind: str, m: nn.Module, x: Tracked, before: Tracked) -> Tracked:
        def each(f, slope: float = 1.0) -> Tracked:
            # gelu: its error function is off by some units however small the product with x is.
            own = 4 * UNIT * x.value.abs() if kind == "gelu" else 0.0
            return Tracked(f(x.value), slope * x.error + own).rounded()

        if kind in ("linear", "gate", "two"):
            a, b = dense(x, m.a.weight, m.a.bias), dense(x, m.b.weight, m.b.bias)
            if kind == "two":
                return Tracked(a.value + b.value, a.error + b.error).rounded()
            gate = Tracked(a.value.sigmoid(), a.error / 4 + 4 * UNIT)
            return a if kind == "linear" else times(b, gate)
        if kind in ("layer norm", "rms"):
            return normed(x, m.weight, m.bias if kind == "layer norm" else None)
        if kind == "heads":
            mix = m.mix.double()
            error = mixed(mix, x.error) + 8 * UNIT * mixed(mix, x.value.abs() + x.error)
            return Tracked(mixed(mix, x.value), error).rounded()
        if kind == "gain":
            return times(x, Tracked(m.bias.double(), torch.zeros_like(m.bias).double()))
        if kind == "residual" and x.value.shape == before.value.shape:
            return Tracked(x.value + before.value, x.error + before.error).rounded()
        if kind == "chunk":
            return Tracked(x.value.chunk(2, -1)[1], x.error.chunk(2, -1)[1]).rounded()
        functions = {
            "relu": F.relu,
            "leaky": lambda v: F.leaky_relu(v, 0.25),
            "gelu": F.gelu,
            "half": lambda v: -v / 2,
            "written": lambda v: v + 1,
        }
        # The slope of gelu is at most 1.13.
        slope = 1.13 if kind == "gelu" else 1.0
        return each(functions.get(kind, lambda v: v), slope)


@settings(max_examples=20, suppress_health_check=[HealthCheck.too_slow])
@given(
    kinds=st.lists(st.sampled_from(KINDS), min_size=1, max_size=6),
    sizes=st.lists(st.sampled_from([16, 32, 48]), min_size=6, max_size=6),
    seed=st.integers(0, 2**31),
    alpha=st.sampled_from([0.0, 0.3, 0.5, 1.0]),
    gamma=st.booleans(),
)
def test_smoothing_alone_changes_the_result_by_rounding_only(
    kinds: list[str], sizes: list[int], seed: int, alpha: float, gamma: bool
) -> None:
    torch._dynamo.reset()
    torch.manual_seed(seed)
    model = Model(kinds, sizes[: len(kinds)])
    x = torch.randn(2, 4, sizes[0])
    smoothed = Smoothed(Drawn(spread=2.0, zeros=0.05), alpha=alpha, gamma=gamma)
    results = torch.compile(model, backend=smoothed.backend)(x)
    for got, expected in zip(results, model.tracked(x), strict=True):
        assert got.dtype == torch.float32
        assert bool(((got.double() - expected.value).abs() <= expected.error).all())
    assert all(site.notes for site in smoothed.sites)
    if not gamma:
        assert all(site.in_scale is not None for site in smoothed.sites)
