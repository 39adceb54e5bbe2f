"""After autograd: Inductor's graph, on its way to kernels of ours.

`STEPS` is the order. What is left of `fxquant::linear` and `fxquant::quantize` is then built and
launched, or its reference is inlined.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import fx
from torch._inductor.custom_graph_pass import CustomGraphPass

from fxquant.passes.fuse.decisions import SITES, Decision
from fxquant.passes.fuse.epilogue import epilogues, join
from fxquant.passes.fuse.lower import begin, launches, lower, text_of
from fxquant.passes.fuse.prologue import prologues

__all__ = ["STEPS", "Build", "Decision", "Fuse", "settle"]

Step = Callable[[fx.Graph], list[Decision]]
STEPS: tuple[Step, ...] = (join, epilogues, prologues)

Build = Callable[[Mapping[str, tuple[int, ...]], list[Decision]], Mapping[str, str]]
"""Takes every spec that is left, as JSON, with the products that it serves, and what was decided;
gives what computes each: a target."""


def settle(graph: fx.Graph, steps: tuple[Step, ...], build: Build, *, inline: bool = True) -> None:
    """Makes launches of what is ours in a graph.

    Args:
        graph: After autograd; rewritten in place.
        steps: What is fused.
        build: Told of all kernels before they are launched.
        inline: Whether the ops of the reference stand in for launches on the ``torch`` target.
    """
    begin(graph)
    decisions = [decision for step in steps for decision in step(graph)]
    serves: dict[str, tuple[int, ...]] = {}
    for node in launches(graph):
        serves[text_of(node)] = (*serves.get(text_of(node), ()), *node.meta[SITES])
    lower(graph, build(serves, decisions), inline=inline)


class Fuse(CustomGraphPass):
    """Inductor's last graph pass, as fxquant sets it.

    Args:
        version: Goes into Inductor's cache key, as do the names of the products.
        build: Told of all kernels before they are launched.
        steps: What is fused; none with ``options={"fuse": False}``.
        before: A pass of the user's own, run first.

    Attributes:
        edition: Goes into the cache key, too: what the graph becomes depends on which kernels can
            be built, and that is known only after it.
    """

    def __init__(
        self,
        version: tuple[str, ...],
        build: Build,
        steps: tuple[Step, ...] = STEPS,
        before: Callable[[fx.Graph], None] | None = None,
    ) -> None:
        self.version = version
        self.build = build
        self.steps = steps
        self.before = before
        self.edition = ""

    def __call__(self, graph: fx.Graph) -> None:
        """Rewrites the graph in place."""
        if self.before is not None:
            self.before(graph)
        settle(graph, self.steps, self.build)

    def uuid(self) -> Any | None:
        """What Inductor's cache tells this pass from another by; None if the user's has none."""
        inner = None
        if self.before is not None:
            inner = self.before.uuid() if isinstance(self.before, CustomGraphPass) else None
            if inner is None:
                return None
        steps = tuple(step.__name__ for step in self.steps)
        return ("fxquant", self.version, self.edition, steps, inner)
