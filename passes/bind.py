"""Bind: placeholders to the real parameters behind them, with their names."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, fx, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from fxquant.formats import PackedWeight
from fxquant.passes.context import BoundParameter, Context, PassReport
from fxquant.passes.regions import Region

_STEP = re.compile(r"\.([^.\[]+)|\[(?:'([^']*)'|\"([^\"]*)\"|(\d+))\]")
_PLUMBING = ("_modules", "_parameters", "_buffers", "_orig_mod")


def bind(ctx: Context) -> PassReport:
    """Fills `Context.parameters`."""
    for index, (node, value) in _numbered(ctx.regions[0], ctx.inputs):
        ctx.parameters[node] = BoundParameter(node, value, name_of(node), index)
    return PassReport("bind", f"{len(ctx.parameters)} parameters bound")


def candidates(region: Region, inputs: Sequence[Any]) -> Iterator[tuple[fx.Node, Tensor]]:
    """The placeholders of parameters that a product may read: 2-D or more.

    Buffers do not count: they may change between calls, and what was packed would not. Nor do
    tensor subclasses of others, whose operations are theirs to define.
    """
    for _, found in _numbered(region, inputs):
        if not is_foreign(found[1]):
            yield found


def is_foreign(value: Tensor) -> bool:
    """Whether a tensor is a wrapper of somebody else's, quantized or distributed by them."""
    return is_traceable_wrapper_subclass(value) and not isinstance(value, PackedWeight)


def _numbered(
    region: Region, inputs: Sequence[Any]
) -> Iterator[tuple[int, tuple[fx.Node, Tensor]]]:
    for index, (node, value) in enumerate(zip(region.placeholders, inputs, strict=True)):
        if isinstance(value, (nn.Parameter, PackedWeight)) and value.ndim >= 2:
            yield index, (node, value)


def name_of(placeholder: fx.Node) -> str:
    """A parameter's path in the model, as in ``"layers.0.weight"``, from Dynamo's source for it."""
    source = getattr(placeholder, "_dynamo_source", None)
    name = getattr(source, "name", None)
    text = name() if callable(name) else name
    return path_of(text) if isinstance(text, str) else placeholder.name


def path_of(text: str) -> str:
    """A dotted path from Dynamo's spelling.

    >>> path_of("L['self']._modules['layers']._modules['0']._parameters['weight']")
    'layers.0.weight'
    >>> path_of("L['self'].layers[0].attention")
    'layers.0.attention'
    >>> path_of("L['self'].blocks.down-1")
    'blocks.down-1'
    >>> path_of("L['weight']")
    'weight'
    """
    steps = [next(group for group in found if group) for found in _STEP.findall(text)]
    if len(steps) > 1 and text.startswith(("L[", "G[")):
        steps = steps[1:]
    return ".".join(step for step in steps if step not in _PLUMBING)
