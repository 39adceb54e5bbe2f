"""What makes an activation, written down as the prologue of its quantization."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from fxquant import errors
from fxquant.codegen.epilogue import EpilogueNode, EpilogueResult
from fxquant.codegen.prologue import Prologue, PrologueOperand, cast, references
from fxquant.codegen.quantize import QuantizeSpec
from fxquant.passes.fuse import pointwise
from fxquant.passes.fuse.ancestry import REDUCTIONS, Ancestry, inputs_of, is_alias, moments, reduces
from fxquant.passes.fuse.words import words

_HALVES = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Written:
    """A prologue and the graph's values that it stands for.

    Attributes:
        spec: The quantization, with the prologue.
        operands: What it reads.
        more: Whose values it writes out, too.
        words: What it does, for people.
    """

    spec: QuantizeSpec
    operands: list[fx.Node]
    more: list[fx.Node]
    words: str


def write(ancestry: Ancestry, spec: QuantizeSpec) -> Written | None:
    """The prologue of an activation, or None where nothing is left to do in one.

    Args:
        ancestry: What makes the activation.
        spec: How it is quantized.
    """
    writer = _Writer(ancestry)
    for node in ancestry.order:
        writer.take(node)
    result = writer.names.get(ancestry.x, "")
    if not writer.nodes or result != f"%{len(writer.nodes) - 1}":
        return None
    more = [
        EpilogueResult(writer.names[node], pointwise.name_of(node.meta["val"].dtype))
        for node in ancestry.more
    ]
    try:
        prologue = Prologue(tuple(writer.operands), tuple(writer.nodes), tuple(more))
    except errors.KernelError:
        # Of values that only look like rows because they were expanded.
        return None
    if not _has_shape(ancestry, writer.tensors):
        ancestry.ends.insert(0, "its rows are counted in another way than those it is made of")
        return None
    said = _words(prologue)
    name = f"{'_'.join(said)}_{spec.name}"[:80]
    spec = dataclasses.replace(spec, prologue=prologue, name=name)
    return Written(spec, writer.tensors, ancestry.more, " ".join(said).replace("_", " "))


def _has_shape(ancestry: Ancestry, operands: list[fx.Node]) -> bool:
    """Whether results can have their shapes: sizes that are not known come from the operands."""
    shapes = [node.meta["val"].shape for node in (ancestry.x, *ancestry.more)]
    if all(type(size) is int for shape in shapes for size in shape):
        return True
    first = next(n for n in operands if len(n.meta["val"].shape) and _is_whole(ancestry, n))
    return all(pointwise.same_shape(first.meta["val"].shape, shape) for shape in shapes)


def _is_whole(ancestry: Ancestry, node: fx.Node) -> bool:
    return pointwise.same_shape(node.meta["val"].shape, ancestry.sizes[node])


@dataclass
class _Writer:
    """Writes nodes down, equal ones once."""

    ancestry: Ancestry
    operands: list[PrologueOperand] = field(default_factory=list)
    tensors: list[fx.Node] = field(default_factory=list)
    nodes: list[EpilogueNode] = field(default_factory=list)
    names: dict[fx.Node, str] = field(default_factory=dict)
    known: dict[EpilogueNode, str] = field(default_factory=dict)

    def take(self, node: fx.Node) -> None:
        """Writes a node down."""
        dtype = node.meta["val"].dtype
        if is_alias(node):
            self.names[node] = self.name(node.args[0])  # type: ignore[arg-type]
            return
        if reduces(node):
            made = self._reduction(node)
        else:
            made = self._add(pointwise.written(node, self.name))
        if dtype in _HALVES and not pointwise.is_cast(node):
            made = self._add(cast(made, pointwise.name_of(dtype)))
        self.names[node] = made

    def name(self, node: fx.Node) -> str:
        """The reference of a value, which may be a new operand."""
        if node not in self.names:
            value, sizes = node.meta["val"], self.ancestry.sizes[node]
            axes = pointwise.axes_of(value.shape, sizes, "mk")
            assert axes is not None, "growth looked at it"
            self.names[node] = f"%in{len(self.operands)}"
            self.operands.append(PrologueOperand(axes, pointwise.name_of(value.dtype)))
            self.tensors.append(node)
        return self.names[node]

    def _add(self, node: EpilogueNode) -> str:
        if node not in self.known:
            self.known[node] = f"%{len(self.nodes)}"
            self.nodes.append(node)
        return self.known[node]

    def _call(self, op: str, *args: Any) -> str:
        return self._add(EpilogueNode(op, args))

    def _reduction(self, node: fx.Node) -> str:
        (source,) = inputs_of(node)
        value = self.name(source)
        if moments(node) is None:
            return self._call(REDUCTIONS[node.target], value)  # type: ignore[index]
        mean = self._call("aten.mean.dim", value)
        if node.args[1] == 1:
            return mean
        # In two passes: what is left of a large mean has no digits to lose.
        centred = self._call("aten.sub.Tensor", value, mean)
        return self._call("aten.mean.dim", self._call("aten.mul.Tensor", centred, centred))


def _words(prologue: Prologue) -> list[str]:
    """What a prologue does: norms by their names, else the ops."""
    ops = [(node.op.split(".")[1], len(set(references(node)))) for node in prologue.nodes]
    names = [name for name, _ in ops]
    if "rsqrt" in names and "mean" in names:
        norm = "layer_norm" if names.count("mean") > 1 else "rms_norm"
        return ["add", norm] if names[:1] == ["add"] else [norm]
    found = words(ops) or ["scaled" if set(names) - {"_to_copy"} else "cast"]
    return found if len(found) < 5 else [*found[:4], "and_more"]
