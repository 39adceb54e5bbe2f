"""Graphs inside graphs: the outermost one and the bodies of higher-order ops.

A `Region` is one graph module. The bodies of activation checkpointing and of `cond` receive every
tensor as an operand of the call in the enclosing region; `Region.operand` leads from a body's
placeholder out to it, and `bring_in` leads a tensor of the outermost graph into a body.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

# Bodies whose calls have the form (body, *operands).
_WRAPPERS = ("tag_activation_checkpoint", "wrap", "wrap_activation_checkpoint")


@dataclass(eq=False)
class Region:
    """One graph module, and where it is called.

    Attributes:
        gm: The graph module.
        parent: The enclosing region; None for the outermost.
        call: The higher-order op's node in the parent.
        siblings: The regions of the same call (the branches of a `cond`), itself among them.
    """

    gm: fx.GraphModule
    parent: Region | None = None
    call: fx.Node | None = None
    siblings: list[Region] = field(default_factory=list)

    @property
    def graph(self) -> fx.Graph:
        """The graph."""
        return self.gm.graph

    @property
    def placeholders(self) -> list[fx.Node]:
        """The graph's inputs, in order."""
        return list(self.graph.find_nodes(op="placeholder"))

    def operand(self, placeholder: fx.Node) -> Any:
        """What the call in the parent passes for a placeholder."""
        assert self.call is not None
        return operands(self.call)[self.placeholders.index(placeholder)]

    def bring_in(self, node: fx.Node) -> fx.Node:
        """This region's name for a placeholder of the outermost graph, threaded in if needed."""
        if self.parent is None:
            return node
        outer = self.parent.bring_in(node)
        assert self.call is not None
        passed = operands(self.call)
        for operand, placeholder in zip(passed, self.placeholders, strict=True):
            if operand is outer:
                return placeholder
        set_operands(self.call, [*passed, outer])
        for region in self.siblings:
            region.append_placeholder(node.name, outer.meta["val"])
        return self.placeholders[-1]

    def append_placeholder(self, name: str, value: Any) -> fx.Node:
        """Adds an input after the others."""
        last = self.placeholders[-1:]
        point = self.graph.inserting_after(last[0]) if last else self.graph.inserting_before(None)
        with point:
            node = self.graph.placeholder(name)
        # The target is what the signature spells: only the node's name is a unique identifier.
        node.target = node.name
        node.meta["val"] = value
        return node


def body_names(call: fx.Node) -> list[fx.Node]:
    """The `get_attr` nodes of a call's bodies, or none if its bodies are left as they are."""
    if call.op != "call_function" or not isinstance(call.target, torch._ops.HigherOrderOperator):
        return []
    name = call.target.name()
    if name in _WRAPPERS:
        return [call.args[0]] if isinstance(call.args[0], fx.Node) else []
    if name == "cond" and len(call.args) == 4:
        return [branch for branch in call.args[1:3] if isinstance(branch, fx.Node)]
    return []


def operands(call: fx.Node) -> list[Any]:
    """What a call passes to its bodies."""
    if call.target.name() == "cond":  # type: ignore[union-attr]
        return list(call.args[3])  # type: ignore[arg-type]
    return list(call.args[1:])


def set_operands(call: fx.Node, values: list[Any]) -> None:
    """Changes what a call passes to its bodies."""
    if call.target.name() == "cond":  # type: ignore[union-attr]
        call.args = (*call.args[:3], tuple(values))
    else:
        call.args = (call.args[0], *values)


def copied(gm: fx.GraphModule) -> list[Region]:
    """A copy of a graph module and, recursively, of the bodies that passes rewrite.

    Attributes that are not bodies are shared. A body that several calls use is copied for each,
    since their weights differ. Nodes get ``meta["val"]`` from Dynamo's ``example_value``.

    Returns:
        The outermost region, then those inside it.
    """
    root = Region(_copied_module(gm))
    root.siblings = [root]
    return [root, *_copied_bodies(root)]


def _copied_bodies(region: Region) -> Iterator[Region]:
    taken: set[str] = set()
    for call in list(region.graph.nodes):
        regions = []
        for attribute in body_names(call):
            name = str(attribute.target)
            body = Region(_copied_module(getattr(region.gm, name)), region, call)
            if name in taken:
                name = _free_name(region.gm, name)
                with region.graph.inserting_before(call):
                    own = region.graph.get_attr(name)
                own.meta.update(attribute.meta)
                call.replace_input_with(attribute, own)
            taken.add(name)
            setattr(region.gm, name, body.gm)
            regions.append(body)
        for body in regions:
            body.siblings = regions
            yield body
            yield from _copied_bodies(body)


def _free_name(gm: fx.GraphModule, name: str) -> str:
    number = 0
    while hasattr(gm, f"{name}_{number}"):
        number += 1
    return f"{name}_{number}"


def _copied_module(gm: fx.GraphModule) -> fx.GraphModule:
    graph = fx.Graph()
    mapped: dict[fx.Node, fx.Node] = {}
    graph.output(graph.graph_copy(gm.graph, mapped))
    old_output = gm.graph.output_node()
    graph.output_node().meta.update(old_output.meta)
    for old, new in mapped.items():
        if hasattr(old, "_dynamo_source"):
            new._dynamo_source = old._dynamo_source
        # Dynamo's weak reference to the argument: one is enough to keep a parameter from moving.
        new.meta.pop("grapharg", None)
        if "val" not in new.meta:
            new.meta["val"] = new.meta.get("example_value")
    out = fx.GraphModule(gm, graph, type(gm).__name__)
    out.meta.update(gm.meta)
    out.train(gm.training)
    return out
