"""Prologues: quantizing takes in what makes the activation, norms above all.

Growth starts at an activation that becomes int8 and goes backwards, over pointwise ops and
reductions of its rows, as long as nothing has to be computed twice: what others read of the values
inside is written out, too. `fxquant::launch_rows` then stands for all of it.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import fx

from fxquant.codegen.prologue import MOST_INPUTS
from fxquant.codegen.quantize import QuantizeSpec
from fxquant.codegen.spec import KernelSpec
from fxquant.passes import values
from fxquant.passes.fuse import pointwise
from fxquant.passes.fuse.ancestry import Ancestry, grow
from fxquant.passes.fuse.decisions import SITES, Decision
from fxquant.passes.fuse.rows import Written, write

_fxquant = torch.ops.fxquant
_KIND = "prologue"
_MOST_ENDS = 3
"""Reasons that a report names."""


@dataclasses.dataclass(frozen=True)
class _Seed:
    """An activation and what makes int8 of it.

    Attributes:
        readers: One launch that quantizes it, or the products that do so themselves.
        spec: How it is quantized.
        limit: The limit, where there is one.
    """

    readers: tuple[fx.Node, ...]
    spec: QuantizeSpec
    limit: list[fx.Node]

    @property
    def x(self) -> fx.Node:
        """The activation, which may be another than when the seed was found."""
        (found, *_) = self.readers[0].args
        assert isinstance(found, fx.Node), "an activation is made by a node"
        return found

    @property
    def sites(self) -> tuple[int, ...]:
        return tuple(dict.fromkeys(site for node in self.readers for site in node.meta[SITES]))


def prologues(graph: fx.Graph) -> list[Decision]:
    """Lets what quantizes an activation make it as well."""
    made: list[Decision] = []
    for seed in list(_seeds(graph)):
        found = _obstacle(seed)
        if found:
            made.append(Decision(_KIND, seed.sites, done=False, reason=found))
            continue
        ancestry = grow(graph, seed.x, seed.readers)
        written = write(ancestry, seed.spec)
        if written is None:
            reason = _ends(ancestry) or "a product makes it, or the caller"
            made.append(Decision(_KIND, seed.sites, done=False, reason=reason))
            continue
        _rewrite(graph, seed, ancestry, written)
        end = f"; before it, {_ends(ancestry)}" if ancestry.ends else ""
        reason = f"{written.words} and int8 in one kernel{end}"
        made.append(Decision(_KIND, seed.sites, done=True, reason=reason))
    return made


def _ends(ancestry: Ancestry) -> str:
    return "; ".join(list(dict.fromkeys(ancestry.ends))[:_MOST_ENDS])


def _seeds(graph: fx.Graph) -> Iterator[_Seed]:
    """Every activation that becomes int8, in the order of the graph."""
    own: dict[fx.Node, list[fx.Node]] = {}
    for node in graph.nodes:
        if node.target is _fxquant.launch_quantize.default:
            _, limit, text, _ = node.args
            yield _Seed((node,), QuantizeSpec.from_json(str(text)), list(limit))
        elif _rounds_itself(node):
            own.setdefault(node.args[0], []).append(node)
    for products in own.values():
        spec = _spec(products[0])
        name = f"quantize_{spec.weight.k}_per_token"
        rows = QuantizeSpec(spec.weight.k, spec.x_dtype, name=name)
        yield _Seed(tuple(products), rows, [])


def _rounds_itself(node: fx.Node) -> bool:
    """Whether a product takes floats and rounds them to int8, all of them."""
    if node.target not in (_fxquant.launch.default, _fxquant.launch_several.default):
        return False
    spec = _spec(node)
    return spec.compute_dtype == "int8" and not spec.is_quantized and spec.outliers is None


def _spec(node: fx.Node) -> KernelSpec:
    return KernelSpec.from_json(str(node.args[3]))


def _obstacle(seed: _Seed) -> str:
    """Why an activation has no prologue whatever makes it, in a clause, or ``""``."""
    if seed.spec.scope == "tensor":
        return "all its rows share one scale, which is known after the last of them"
    if seed.spec.k == 1:
        return "its rows are single numbers"
    if seed.spec.k > MOST_INPUTS:
        return f"its rows are longer than the {MOST_INPUTS} inputs that a kernel holds"
    return ""


def _rewrite(graph: fx.Graph, seed: _Seed, ancestry: Ancestry, written: Written) -> None:
    """Puts one launch in the place of an activation and of what reads it as int8."""
    with graph.inserting_before(ancestry.place):
        op, text = _fxquant.launch_rows.default, written.spec.to_json()
        fused = values.emit(graph, seed.readers[0], op, written.operands, seed.limit, text, "auto")
        fused.meta[SITES] = seed.sites
        pieces = values.pieces(fused, 2 + len(written.more))
        shape = seed.x.meta["val"].shape
        shapes = [shape, shape[:-1], *(node.meta["val"].shape for node in written.more)]
        results = [_shaped(given, like) for given, like in zip(pieces, shapes, strict=True)]
    codes, amax, *more = results
    inside = set(ancestry.order) - ancestry.kept
    for old, new in zip(written.more, more, strict=True):
        old.replace_all_uses_with(new, delete_user_cb=lambda user: user not in inside)
    for reader in seed.readers:
        if reader.target is _fxquant.launch_quantize.default:
            for piece in list(reader.users):
                piece.replace_all_uses_with((codes, amax)[piece.args[1]])  # type: ignore[index]
                graph.erase_node(piece)
            graph.erase_node(reader)
        else:
            _take_codes(reader, codes, amax)
    for node in reversed(ancestry.order):
        _erase(graph, node)


def _erase(graph: fx.Graph, node: fx.Node) -> None:
    """Erases what nothing reads, with the pair of moments that it is a piece of."""
    if node.users:
        return
    source = node.args[0] if node.target is operator.getitem else None
    graph.erase_node(node)
    if isinstance(source, fx.Node) and not source.users:
        graph.erase_node(source)


def _shaped(given: fx.Node, shape: Sequence[Any]) -> fx.Node:
    """A result in the shape of the value that it stands for."""
    if pointwise.same_shape(given.meta["val"].shape, shape):
        return given
    return values.emit(given.graph, given, torch.ops.aten.reshape.default, given, list(shape))


def _take_codes(node: fx.Node, codes: fx.Node, amax: fx.Node) -> None:
    """Lets a product that rounds its activation take integers."""
    _, weight, extra, _, target = node.args
    spec = _spec(node)
    own = len(spec.epilogue.operands)
    beside: list[Any] = list(extra)  # type: ignore[arg-type]
    text = dataclasses.replace(spec, x_dtype="int8").to_json()
    node.args = (codes, weight, [*beside[:own], amax, *beside[own:]], text, target)
    node.meta.pop("eager_input_vals", None)
