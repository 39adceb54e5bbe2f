"""Where the scale of an activation can go: back along the data, to what makes it.

`Walk.back` follows an activation to its makers through everything that commutes with a scale. It
ends at vectors with an element a channel (the weight and bias of a norm, however it is written) and
at quantized products, whose rows and biases can be divided beforehand. On the way every value is
divided, so every reader of every such value has to be accounted for.

Calls that Dynamo wrote are read through their own expansion into ATen; the graph is not changed.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from fxquant.passes import channels, products
from fxquant.passes.context import LinearSite
from fxquant.passes.normalize import TRANSFORMED
from fxquant.passes.patterns import Need, Pattern, Ties, Ways
from fxquant.passes.traces import Traces

Edge = tuple[fx.Node, fx.Node]


@dataclass
class Found:
    """What becomes of the values that an activation is made of.

    Attributes:
        ties: Channels that share a scale.
        changed: The values that are divided, each with its pattern.
        steps: For each call among them, its operands that are.
        vectors: Operands to divide at a call, as (call, operand): role and pattern.
        rows: Products whose results are divided: the pattern ``[n]`` of their rows.
    """

    ties: Ties
    changed: dict[fx.Node, Pattern] = field(default_factory=dict)
    steps: dict[fx.Node, dict[fx.Node, Pattern]] = field(default_factory=dict)
    vectors: dict[Edge, tuple[str, Pattern]] = field(default_factory=dict)
    rows: dict[fx.Node, Pattern] = field(default_factory=dict)

    def copy(self) -> Found:
        """Independent of this one."""
        mine = (dict(self.changed), dict(self.steps), dict(self.vectors), dict(self.rows))
        return Found(self.ties.copy(), *mine)

    def take(self, other: Found) -> None:
        """Becomes another."""
        self.__dict__.update(other.__dict__)


class Walk:
    """Follows activations of one graph.

    Args:
        makers: The quantized products whose rows can be divided, by their node.
    """

    def __init__(self, makers: Mapping[fx.Node, LinearSite]) -> None:
        self.makers = makers
        self._expanded: dict[fx.Node, tuple[fx.GraphModule, list[fx.Node]] | None] = {}

    def root(self, node: fx.Node, pattern: Pattern) -> tuple[fx.Node, Pattern]:
        """The value that an activation is a view, copy or cast of, and the pattern there."""
        while node not in self.makers:
            found = self._ways(node, pattern, Ties.none(1), exact=True)
            if len(found) != 1:
                break
            node, pattern = found[0][0].operand, found[0][0].pattern
        return node, pattern

    def back(self, node: fx.Node, pattern: Pattern, found: Found) -> str | None:
        """Divides a value by dividing what makes it.

        Args:
            node: The value.
            pattern: What it is to be divided by.
            found: Is filled, and left as it was where it cannot be done.

        Returns:
            None, or why it cannot be done.
        """
        pattern = found.ties.of(pattern)
        known = found.changed.get(node)
        if known is not None:
            same = torch.equal(found.ties.of(known), pattern)
            return None if same else f"{_said(node)} would need two scales"
        if node.meta.get(TRANSFORMED):
            return f"{_said(node)} is inside a functorch transform"
        trial = found.copy()
        trial.changed[node] = pattern
        if node in self.makers:
            reason = self._rows(self.makers[node], pattern, trial)
        else:
            reason = self._operands(node, pattern, trial)
        if reason is None:
            found.take(trial)
        return reason

    def _operands(self, node: fx.Node, pattern: Pattern, trial: Found) -> str | None:
        options = self._ways(node, pattern, trial.ties)
        reason = f"{_said(node)} does not commute with a scale"
        if node.op in ("placeholder", "get_attr"):
            reason = "it is an input of the graph"
        elif products.is_product(node):
            reason = f"{_said(node)} is not quantized"
        for way in options:
            attempt = trial.copy()
            attempt.steps[node] = {n.operand: n.pattern for n in way if not n.vector}
            for need in way:
                if need.vector:
                    attempt.vectors[node, need.operand] = (need.vector, need.pattern)
            failed = (
                self.back(need.operand, need.pattern, attempt) for need in way if not need.vector
            )
            why = next((text for text in failed if text is not None), None)
            if why is None:
                trial.take(attempt)
                return None
            reason = why
        return reason

    @staticmethod
    def _rows(site: LinearSite, pattern: Pattern, trial: Found) -> str | None:
        rows = rows_of(site, pattern, trial.ties)
        if rows is None:
            return f"its channels are no rows of {site.parameter.name}"
        trial.rows[site.node] = rows
        return None

    # --- who else reads ----------------------------------------------------------------------

    def others(
        self, found: Found, readers: Mapping[fx.Node, fx.Node]
    ) -> Iterator[tuple[fx.Node, fx.Node]]:
        """Divided values with a reader that the division is not made up for in.

        Args:
            found: What `back` filled.
            readers: The products that expect the activation to be divided, and the operand that
                it is.

        Yields:
            The value and the reader.
        """
        for node in list(found.changed):
            for user in node.users:
                if not self._expects(found, user, node, readers):
                    yield node, user

    def _expects(
        self, found: Found, user: fx.Node, node: fx.Node, readers: Mapping[fx.Node, fx.Node]
    ) -> bool:
        if user in readers:
            return readers[user] is node and occurrences(user, node) == 1
        pattern = found.ties.of(found.changed[node])
        pieces = [user]
        if _gives_pieces(user):
            pieces = [piece for piece in user.users if piece.target is operator.getitem]
            if len(pieces) != len(user.users):
                return False
        for piece in pieces:
            wanted = found.steps.get(piece, {}).get(node)
            matches = (
                wanted is not None
                and piece in found.changed
                and torch.equal(found.ties.of(wanted), pattern)
            )
            if not matches and (piece in found.steps or not self._is_free(piece, node, pattern)):
                return False
        return True

    def _is_free(self, node: fx.Node, operand: fx.Node, pattern: Pattern) -> bool:
        """Whether a value holds only elements of an operand that stay as they are."""
        if not bool((pattern < 0).any()):
            return False
        call, number = _call_of(node)
        if channels.is_known(call):
            return channels.is_free(node, call, pattern)
        expanded = self._expansion(call)
        if expanded is None:
            return False
        gm, given = expanded
        stand_in = gm.graph.find_nodes(op="placeholder")[given.index(operand)]
        result = gm.graph.output_node().args[0]
        piece = result[number] if number is not None else None  # type: ignore[index]
        if isinstance(piece, fx.Node) and piece.target is operator.getitem:
            source = piece.args[0]
            reads = isinstance(source, fx.Node) and source.args[0] is stand_in
            return reads and channels.is_free(piece, source, pattern)  # type: ignore[arg-type]
        return all(channels.is_free(inner, inner, pattern) for inner in stand_in.users)

    # --- calls as ATen -----------------------------------------------------------------------

    def _ways(self, node: fx.Node, pattern: Pattern, ties: Ties, *, exact: bool = False) -> Ways:
        """`channels.ways` of any call, in terms of its operands in the graph."""
        if node.op not in ("call_function", "call_method"):
            return []
        call, number = _call_of(node)
        if channels.is_known(call):
            if exact and not channels.is_exact(node):
                return []
            found = channels.ways(node, pattern, ties)
        else:
            found = self._inner_ways(call, number, pattern, ties, exact=exact)
        return [way for way in found if all(occurrences(call, need.operand) == 1 for need in way)]

    def _inner_ways(
        self, call: fx.Node, number: int | None, pattern: Pattern, ties: Ties, *, exact: bool
    ) -> Ways:
        expanded = self._expansion(call)
        if expanded is None:
            return []
        gm, given = expanded
        result = gm.graph.output_node().args[0]
        if number is not None and isinstance(result, (tuple, list)):
            result = result[number]
        if not isinstance(result, fx.Node):
            return []
        outer = dict(zip(gm.graph.find_nodes(op="placeholder"), given, strict=True))
        return [
            [Need(outer[need.operand], need.pattern, need.vector) for need in way]
            for way in _inside(result, pattern, ties, exact=exact)
        ]

    def _expansion(self, call: fx.Node) -> tuple[fx.GraphModule, list[fx.Node]] | None:
        if call not in self._expanded:
            given = call.all_input_nodes
            is_op = isinstance(call.target, torch._ops.HigherOrderOperator)
            usable = not is_op and all(isinstance(n.meta.get("val"), _TRACED) for n in given)
            trace = Traces().of(call) if usable else None
            self._expanded[call] = None if trace is None else (trace.gm, given)
        return self._expanded[call]


_TRACED = (Tensor, torch.SymInt, torch.SymFloat, torch.SymBool, int, float)


def rows_of(site: LinearSite, pattern: Pattern, ties: Ties) -> Pattern | None:
    """A pattern of a product's result on the rows of its weight, ``[n]``, or None."""
    with scratch() as graph:
        inner = _stand_in(graph, site.node.meta["val"] if site.from_out is None else _out_of(site))
        result = inner if site.from_out is None else site.from_out(inner)
        moved = _straight(result, inner, pattern, ties)
    if moved is None or any(size != 1 for size in moved.shape[:-1]):
        return None
    return ties.of(moved).expand(*moved.shape[:-1], site.operand.n).reshape(-1).clone()


def channels_of(site: LinearSite) -> Pattern | None:
    """The pattern of a product's activation: where each of its k channels is."""
    k = site.operand.k
    with scratch() as graph:
        x = _stand_in(graph, site.x.meta["val"])
        result = x if site.to_x is None else site.to_x(x)
        pattern = torch.arange(k).view([1] * (result.meta["val"].ndim - 1) + [k])
        return _straight(result, x, pattern, Ties.none(k))


class scratch:  # noqa: N801 - used as a context manager only
    """A graph to run adapters in, whose nodes are gone afterwards from those of other graphs."""

    def __enter__(self) -> fx.Graph:
        self.graph = fx.Graph()
        return self.graph

    def __exit__(self, *_: object) -> None:
        for node in reversed(list(self.graph.nodes)):
            self.graph.erase_node(node)


def _stand_in(graph: fx.Graph, value: Tensor) -> fx.Node:
    node = graph.placeholder("value")
    node.meta["val"] = value
    return node


def _out_of(site: LinearSite) -> Tensor:
    """What the kernel of a site gives, before its `from_out`."""
    with scratch() as graph:
        x = _stand_in(graph, site.x.meta["val"])
        value = (x if site.to_x is None else site.to_x(x)).meta["val"]
        return value.new_empty((*value.shape[:-1], site.operand.n))


def _straight(node: fx.Node, end: fx.Node, pattern: Pattern, ties: Ties) -> Pattern | None:
    """A pattern taken back along a chain of calls with one operand each."""
    while node is not end:
        if node.op != "call_function":
            return None
        found = channels.ways(node, pattern, ties)
        if len(found) != 1 or len(found[0]) != 1 or found[0][0].vector:
            return None
        node, pattern = found[0][0].operand, found[0][0].pattern
    return pattern


def _inside(node: fx.Node, pattern: Pattern, ties: Ties, *, exact: bool) -> Ways:
    """The ways of a value inside an expansion, in terms of the expansion's placeholders."""
    if node.op == "placeholder":
        return [[Need(node, pattern)]]
    if node.op != "call_function" or len(node.users) != 1:
        return []
    if exact and not channels.is_exact(node):
        return []
    out: Ways = []
    for way in channels.ways(node, pattern, ties):
        options: Ways = [[]]
        for need in way:
            if not need.vector:
                inner = _inside(need.operand, need.pattern, ties, exact=exact)
            else:
                inner = [[need]] if need.operand.op == "placeholder" else []
            options = [[*done, *more] for done in options for more in inner]
        out += options
    return out


def _call_of(node: fx.Node) -> tuple[fx.Node, int | None]:
    """The call behind a value, and which of its results the value is."""
    if node.target is operator.getitem and isinstance(node.args[0], fx.Node):
        source, number = node.args[0], node.args[1]
        if _gives_pieces(source) and isinstance(number, int):
            return source, number
    return node, None


def _gives_pieces(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), (tuple, list))


def occurrences(call: fx.Node, operand: fx.Node) -> int:
    """How often a call reads an operand."""
    count = 0

    def look(node: fx.Node) -> fx.Node:
        nonlocal count
        count += node is operand
        return node

    fx.node.map_arg((call.args, call.kwargs), look)
    return count


def _said(node: fx.Node) -> str:
    return products.name(_call_of(node)[0])
