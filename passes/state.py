"""The modes that a graph switches as it runs: grad mode, autocast, functorch's transforms."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.amp.autocast_mode import _enter_autocast, _exit_autocast
from typing_extensions import Self


class State:
    """Follows a graph node by node and switches the modes as it does.

    A context manager: what the graph leaves switched is put back.

    Attributes:
        transforms: Depth of functorch transforms (`vmap`, `grad`) around the current node.
    """

    def __init__(self) -> None:
        self.transforms = 0
        self._autocasts: dict[fx.Node, Any] = {}
        self._grad_enabled = torch.is_grad_enabled()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for mode in reversed(list(self._autocasts.values())):
            _exit_autocast(mode)
        torch.set_grad_enabled(self._grad_enabled)

    def step(self, node: fx.Node) -> None:
        """Does what a node does to the modes."""
        if node.op != "call_function":
            return
        name = getattr(node.target, "__name__", "")
        if node.target is _enter_autocast:
            self._autocasts[node] = _enter_autocast(*node.args)
        elif node.target is _exit_autocast:
            _exit_autocast(self._autocasts.pop(node.args[0]))  # type: ignore[arg-type]
        elif node.target is torch._C._set_grad_enabled:
            torch.set_grad_enabled(bool(node.args[0]))
        elif name.endswith("increment_nesting"):
            self.transforms += 1
        elif name.endswith("decrement_nesting"):
            self.transforms -= 1
