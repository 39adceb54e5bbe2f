"""After autograd: Inductor's graph, on its way to kernels of ours."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import fx
from torch._inductor.custom_graph_pass import CustomGraphPass

from fxquant.passes.fuse.lower import launch_as, lower, products_and_rows

__all__ = ["Fuse", "launch_as", "products_and_rows"]


class Fuse(CustomGraphPass):
    """Inductor's last graph pass, as fxquant sets it.

    Args:
        version: Goes into Inductor's cache key.
        targets: What computes each spec.
        before: A pass of the user's own, run first.
    """

    def __init__(
        self,
        version: str,
        targets: Mapping[str, str],
        before: Callable[[fx.Graph], None] | None = None,
    ) -> None:
        self.version = version
        self.targets = dict(targets)
        self.before = before

    def __call__(self, graph: fx.Graph) -> None:
        """Rewrites the graph in place."""
        if self.before is not None:
            self.before(graph)
        lower(graph, self.targets)

    def uuid(self) -> Any | None:
        """What Inductor's cache tells this pass from another by; None if the user's has none."""
        inner = None
        if self.before is not None:
            inner = self.before.uuid() if isinstance(self.before, CustomGraphPass) else None
            if inner is None:
                return None
        return ("fxquant", self.version, tuple(sorted(self.targets.items())), inner)
