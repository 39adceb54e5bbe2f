"""Patterns through views: what moves the elements of a value and leaves them as they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from fxquant.passes.patterns import FREE, Need, Pattern, Ties, Ways, shape_of, thin

_aten = torch.ops.aten
Handler = Callable[[fx.Node, Pattern, Ties], Ways]


def _reshape(node: fx.Node, pattern: Pattern, _: Ties) -> Ways:
    operand = node.args[0]
    if node.meta["val"].dtype != operand.meta["val"].dtype:  # type: ignore[union-attr]
        return []
    moved = reshaped(pattern, shape_of(node), shape_of(operand))
    return [] if moved is None else [[Need(operand, moved)]]  # type: ignore[arg-type]


def reshaped(pattern: Pattern, old: tuple[Any, ...], new: tuple[Any, ...]) -> Pattern | None:
    """A pattern of a value of shape `old` on the same elements in shape `new`, or None."""
    pieces = _matched(old, new)
    if pieces is None:
        return None
    out: list[int] = []
    wide = pattern
    for (first, last), (begin, end) in pieces:
        if all(pattern.shape[dim] == 1 for dim in range(first, last)):
            out += [1] * (end - begin)
            continue
        sizes = [*old[first:last], *new[begin:end]]
        if not all(isinstance(size, int) for size in sizes):
            return None
        full = [old[d] if first <= d < last else -1 for d in range(len(old))]
        wide = wide.expand(full)
        out += new[begin:end]
    return thin(wide.reshape(out))


_Runs = tuple[tuple[int, int], tuple[int, int]]


def _matched(old: tuple[Any, ...], new: tuple[Any, ...]) -> list[_Runs] | None:
    """Runs of dimensions of two shapes that hold the same elements, in order."""
    runs: list[_Runs] = []
    first = 0
    while first < min(len(old), len(new)) and statically_known_true(old[first] == new[first]):
        runs.append(((first, first + 1), (first, first + 1)))
        first += 1
    i, j = len(old), len(new)
    last: list[_Runs] = []
    while i > first and j > first:
        a, b = i - 1, j - 1
        left, right = old[a], new[b]
        while not statically_known_true(left == right):
            if not isinstance(left, int) or not isinstance(right, int):
                # What is symbolic goes together with all that stands before it.
                return [*runs, ((first, i), (first, j)), *reversed(last)]
            if left < right and a > first:
                a -= 1
                left *= old[a]
            elif right < left and b > first:
                b -= 1
                right *= new[b]
            else:
                return None
        last.append(((a, i), (b, j)))
        i, j = a, b
    if any(size != 1 for size in (*old[first:i], *new[first:j]) if isinstance(size, int)):
        return None
    return [*runs, ((first, i), (first, j)), *reversed(last)]


def _permute(node: fx.Node, pattern: Pattern, _: Ties) -> Ways:
    operand = node.args[0]
    rank = len(shape_of(operand))
    # Unlike sizes: the strides of the result name the dimensions of the operand.
    stand_in = torch.empty(tuple(range(2, rank + 2)), device="meta")
    call: Any = node.target
    if node.op == "call_method":
        call = getattr(torch.Tensor, str(node.target))
    moved = call(stand_in, *node.args[1:], **node.kwargs)
    order = [stand_in.stride().index(stride) for stride in moved.stride()]
    back = [order.index(dim) for dim in range(rank)]
    return [[Need(operand, pattern.permute(back))]]  # type: ignore[arg-type]


def _expand(node: fx.Node, pattern: Pattern, ties: Ties) -> Ways:
    operand = node.args[0]
    pulled = broadcast_back(pattern, shape_of(node), shape_of(operand), ties)
    return [] if pulled is None else [[Need(operand, pulled)]]  # type: ignore[arg-type]


def broadcast_back(
    pattern: Pattern, shape: tuple[Any, ...], operand: tuple[Any, ...], ties: Ties | None
) -> Pattern | None:
    """A pattern of a broadcast result on an operand; without `ties` only where none are needed."""
    lead = len(shape) - len(operand)
    for dim in range(pattern.ndim):
        narrow = dim < lead or (isinstance(operand[dim - lead], int) and operand[dim - lead] == 1)
        if narrow and pattern.shape[dim] > 1:
            joined = None if ties is None else ties.join(pattern, dim)
            if joined is None:
                return None
            pattern = joined
    return pattern.reshape(pattern.shape[lead:])


def _repeat_interleave(node: fx.Node, pattern: Pattern, ties: Ties) -> Ways:
    operand, times = node.args[:2]
    dim = node.args[2] if len(node.args) > 2 else node.kwargs.get("dim")
    if not isinstance(times, int) or not isinstance(dim, int):
        return []
    dim %= pattern.ndim
    if pattern.shape[dim] > 1:
        joined = ties.join(pattern.unflatten(dim, (-1, times)), dim + 1)
        if joined is None:
            return []
        pattern = joined.squeeze(dim + 1)
    return [[Need(operand, pattern)]]  # type: ignore[arg-type]


def _slice(node: fx.Node, pattern: Pattern, _: Ties) -> Ways:
    return _embedded(node, node, pattern)


def piece(node: fx.Node, pattern: Pattern) -> Ways:
    """The ways of one of the pieces that a split gives.

    Args:
        node: The ``operator.getitem``.
        pattern: Of the piece.
    """
    return _embedded(node, node.args[0], pattern)  # type: ignore[arg-type]


def picked(node: fx.Node, call: fx.Node) -> tuple[int, Tensor | None]:
    """Along which dimension of its operand a call picks elements, and which; None if symbolic.

    Args:
        node: The value: `call` itself, or the ``getitem`` of one of its pieces.
        call: The slice, selection or split.
    """
    operand, *rest = call.args
    shape = shape_of(operand)
    names = [argument.name for argument in call.target._schema.arguments]  # type: ignore[union-attr]
    given = {**dict(zip(names, call.args, strict=False)), **call.kwargs}
    dim = int(given.get("dim", 0)) % len(shape)
    if any(isinstance(value, fx.Node) for value in rest) or not isinstance(shape[dim], int):
        return dim, None
    sizes = [1] * len(shape)
    sizes[dim] = shape[dim]
    found = call.target(torch.arange(shape[dim]).view(sizes), *rest, **call.kwargs)  # type: ignore[operator]
    if node is not call:
        found = found[node.args[1]]
    return dim, found.reshape(-1)


def _embedded(node: fx.Node, call: fx.Node, pattern: Pattern) -> Ways:
    """A part of a value: scaled on its own, or together with the rest."""
    operand = call.args[0]
    shape = shape_of(operand)
    dim, rows = picked(node, call)
    if pattern.ndim < len(shape):
        pattern = pattern.unsqueeze(dim)
    whole = [Need(operand, pattern)]  # type: ignore[arg-type]
    if rows is None:
        return [whole] if pattern.shape[dim] == 1 else []
    full = [*pattern.shape]
    full[dim] = int(shape[dim])
    alone = torch.full(full, FREE)
    alone.index_copy_(dim, rows, pattern.expand([*full[:dim], len(rows), *full[dim + 1 :]]))
    found = [[Need(operand, thin(alone))]]  # type: ignore[arg-type]
    return [*found, whole] if pattern.shape[dim] == 1 and len(rows) < full[dim] else found


def _gather(node: fx.Node, pattern: Pattern, _: Ties) -> Ways:
    """Rows picked by number: whatever is the same for all of them."""
    operand, dim = node.args[:2]
    dim = int(dim) % pattern.ndim  # type: ignore[arg-type]
    return [[Need(operand, pattern)]] if pattern.shape[dim] == 1 else []  # type: ignore[arg-type]


def _index(node: fx.Node, pattern: Pattern, _: Ties) -> Ways:
    operand, numbers = node.args[:2]
    first = numbers[0]  # type: ignore[index]
    if len(numbers) != 1 or first.meta["val"].dtype not in (torch.int32, torch.int64):  # type: ignore[arg-type, union-attr]
        return []
    rank = first.meta["val"].ndim  # type: ignore[union-attr]
    if any(size != 1 for size in pattern.shape[:rank]):
        return []
    return [[Need(operand, pattern.reshape(1, *pattern.shape[rank:]))]]  # type: ignore[arg-type]


RESHAPES = frozenset(
    (
        _aten._unsafe_view, _aten.flatten, _aten.reshape, _aten.reshape_as, _aten.squeeze,
        _aten.unflatten, _aten.unsqueeze, _aten.view, _aten.view_as, _aten._reshape_alias,
    )
)  # fmt: skip
PERMUTES = frozenset(
    (
        _aten.mT, _aten.moveaxis, _aten.movedim, _aten.numpy_T, _aten.permute, _aten.swapaxes,
        _aten.swapdims, _aten.t, _aten.transpose,
    )
)  # fmt: skip
SLICES = frozenset((_aten.narrow, _aten.select, _aten.slice))
SPLITS = frozenset(
    (
        _aten.chunk, _aten.split, _aten.split_with_sizes, _aten.tensor_split, _aten.unbind,
        _aten.unsafe_chunk, _aten.unsafe_split,
    )
)  # fmt: skip
EXPANDS = (_aten.expand, _aten.expand_as, _aten.broadcast_to)
HANDLERS: dict[Any, Handler] = {
    **dict.fromkeys(RESHAPES, _reshape),
    **dict.fromkeys(PERMUTES, _permute),
    **dict.fromkeys(SLICES, _slice),
    **dict.fromkeys(EXPANDS, _expand),
    _aten.repeat_interleave: _repeat_interleave,
    _aten.index_select: _gather,
    _aten.index: _index,
}
