"""New inputs of a graph that is being rewritten: packed tensors, and what is made of parameters."""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor, fx
from torch._dynamo.source import ConstantSource
from torch._guards import TracingContext
from torch.fx.experimental.symbolic_shapes import DimDynamic, StatefulSymbolicContext

from fxquant.passes import values
from fxquant.passes.context import Context
from fxquant.passes.sources import DerivedPart, Rule, evaluate


def add(ctx: Context, name: str, tensor: Tensor) -> fx.Node:
    """Adds a placeholder to the outermost graph, with an example for AOTAutograd.

    The caller sees to `Context.inputs` and `Context.sources`.
    """
    root = ctx.regions[0]
    mode = values.fake_mode_of(root.placeholders)
    assert mode is not None, "a graph with a product has a fake input"
    fake = mode.from_tensor(tensor, static_shapes=True)
    node = root.append_placeholder(re.sub(r"\W", "_", name), fake)
    # AOTAutograd reads both of an input that Dynamo did not make: no source, and static.
    node._dynamo_source = None
    node.meta["tensor_dict"] = {"_dynamo_static_input_type": "unguarded"}
    context = TracingContext.try_get()
    if context is not None:
        # With dynamic=True AOTAutograd would make the sizes of an unknown input symbolic.
        dims: Any = [DimDynamic.STATIC] * tensor.ndim
        context.tensor_to_context[tensor] = StatefulSymbolicContext(
            dynamic_sizes=dims, tensor_source=ConstantSource(node.name)
        )
    return node


def derive(ctx: Context, name: str, rule: Rule) -> fx.Node:
    """Adds an input that a rule makes of parameters, at compile time and for each call.

    Args:
        ctx: Before `pack`.
        name: What to call it.
        rule: Gives a tensor.
    """
    tensor = evaluate(rule, ctx.inputs, ctx.tools)
    node = add(ctx, name, tensor)
    ctx.derived[node] = DerivedPart(rule, 0, tensor)
    ctx.inputs.append(tensor)
    return node
