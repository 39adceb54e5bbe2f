"""Smoothing alone: the graph after `smooth`, with products in full precision."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._dispatch.python import enable_python_dispatcher

from fxquant.calibration import SiteStats
from fxquant.codegen.groups import grouped_product
from fxquant.config import Config
from fxquant.formats import Encoding, pack
from fxquant.passes import adapt, run_pipeline, values
from fxquant.passes.bind import bind
from fxquant.passes.context import Context, PassReport
from fxquant.passes.inputs import derive
from fxquant.passes.match import match
from fxquant.passes.normalize import normalize
from fxquant.passes.plan import plan
from fxquant.passes.scales import ScaledWeight
from fxquant.passes.smooth import smooth
from fxquant.passes.sources import evaluate
from fxquant.schemes import Activation, Recipe, Smoothing

PER_CHANNEL = Encoding(8, block=(1, -1))


class Drawn:
    """Stands in for a calibration: channels of random width, the same for the same parameter."""

    digest = "drawn"

    def __init__(self, spread: float = 1.5, zeros: float = 0.0) -> None:
        self.spread, self.zeros = spread, zeros
        self.asked: list[str] = []

    def require(self, parameter: Tensor, name: str, k: int) -> SiteStats:
        self.asked.append(name)
        generator = torch.Generator().manual_seed(
            int(parameter.detach().double().sum() * 1e6) % 997
        )
        amax = torch.exp(self.spread * torch.randn(k, generator=generator))
        amax[torch.rand(k, generator=generator) < self.zeros] = 0
        return SiteStats(amax, -float(amax.max()), float(amax.max()), amax.sort().values, k)


@dataclass(frozen=True, eq=False)
class Dense:
    """What `ScaledWeight` would pack, as one product reads it: ``[e, n, k]``."""

    index: int
    scaled: ScaledWeight | None
    operand: Any

    @property
    def indices(self) -> tuple[int, ...]:
        return (self.index,) if self.scaled is None else self.scaled.indices

    def compute(self, inputs: Sequence[Any], tools: Any) -> Tensor:
        value = inputs[self.index].detach()
        dense = value if self.scaled is None else self.scaled.dense(inputs, tools).to(value.dtype)
        where = self.operand
        return dense.contiguous().as_strided(where.sizes, where.strides, where.offset).clone()

    def key(self, number: Mapping[int, int]) -> Any:
        return (id(self), tuple(number.items()))


def exact(ctx: Context) -> PassReport:
    """In the place of `pack`: products in full precision."""
    for site in ctx.sites:
        node, graph = site.node, site.region.graph
        rule = Dense(site.parameter.index, site.scaled, site.operand)
        weight = site.region.bring_in(derive(ctx, "dense", rule))
        with graph.inserting_before(node):
            dtype = node.meta["val"].dtype
            x = adapt.cast(site.x, dtype, node)
            x = x if site.to_x is None else site.to_x(x)
            batched = site.operand.batch is not None
            ends = None if site.ends is None else site.ends(node)
            with enable_python_dispatcher():  # torch 2.11 has no other matmul of symbolic sizes
                out = values.emit(graph, node, _product, x, weight, batched, ends)
            if site.bias is not None:
                bias = adapt.cast(site.bias, dtype, node)
                out = values.emit(graph, node, torch.ops.aten.add.Tensor, out, bias)
            out = out if site.from_out is None else site.from_out(out)
        values.replace(node, out)
    for number, node in enumerate(ctx.regions[0].placeholders):
        ctx.sources.append(ctx.derived.get(node, number))
    for region in reversed(ctx.regions):
        region.gm.recompile()
    return PassReport("exact", "")


def _product(x: Tensor, weight: Tensor, batched: bool, ends: Tensor | None) -> Tensor:
    weight = weight.to(x.dtype)
    if ends is not None:
        return grouped_product(x, weight.transpose(-1, -2), ends)
    return torch.matmul(x, (weight if batched else weight[0]).transpose(-1, -2))


STEPS = (normalize, bind, match, plan, smooth, exact)


class Smoothed:
    """A backend that smooths and does not quantize, and what it did."""

    def __init__(
        self, calibration: Any = None, alpha: Any = 0.5, gamma: bool = False, **options: Any
    ) -> None:
        recipe = Recipe(PER_CHANNEL, Activation(), Smoothing(alpha, gamma))
        self.config = Config.from_options({"overrides": {"*": recipe}, **options})
        object.__setattr__(self.config, "calibration", calibration or Drawn())
        self.contexts: list[Context] = []

    def backend(self, gm: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        ctx = Context(gm, list(inputs), self.config, lambda t, e, n: pack(t, e, name=n))
        run_pipeline(ctx, STEPS)
        self.contexts.append(ctx)

        def run(*args: Any) -> Any:
            return ctx.gm(
                *[
                    args[s] if isinstance(s, int) else evaluate(s.rule, args, ctx.tools)
                    for s in ctx.sources
                ]
            )

        return run

    @property
    def sites(self) -> list[Any]:
        return [site for ctx in self.contexts for site in ctx.sites]

    @property
    def notes(self) -> dict[str, str]:
        return {site.parameter.name: " ".join(site.notes) for site in self.sites}

    def folded(self) -> list[str]:
        """Weights whose activation is divided by what makes it."""
        return [name for name, note in self.notes.items() if "1/s folded" in note]

    def multiplied(self) -> list[str]:
        """Weights whose activation is divided in the graph."""
        return [name for name, note in self.notes.items() if "1/s multiplied" in note]


def run(
    model: nn.Module | Callable[..., Any],
    *args: Any,
    smoothed: Smoothed | None = None,
    tol: float = 1e-4,
    dynamic: bool | None = None,
    grad: bool = False,
    **options: Any,
) -> Smoothed:
    """Smooths, runs, and compares with eager: smoothing changes results by rounding only."""
    torch._dynamo.reset()
    smoothed = smoothed or Smoothed(**options)
    compiled = torch.compile(model, backend=smoothed.backend, dynamic=dynamic)
    with torch.set_grad_enabled(grad):
        got, wanted = compiled(*copy.deepcopy(args)), model(*copy.deepcopy(args))
    compare(got, wanted, tol)
    return smoothed


def compare(got: Any, wanted: Any, tol: float) -> None:
    """Within `tol` of the largest magnitude."""
    if isinstance(wanted, (tuple, list)):
        for a, b in zip(got, wanted, strict=True):
            compare(a, b, tol)
        return
    assert (got.shape, got.dtype) == (wanted.shape, wanted.dtype)
    scale = float(wanted.detach().abs().max())
    assert float((got - wanted).detach().abs().max()) <= tol * scale
