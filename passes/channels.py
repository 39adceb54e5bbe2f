"""Which operations commute with a scale of an activation's channels.

`ways` takes a pattern (`patterns.Pattern`) from a call's result to its operands: an operation that
commutes with a positive scale gives one way, or several, and any other none.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx

from fxquant.passes import moves
from fxquant.passes.moves import (
    EXPANDS,
    PERMUTES,
    RESHAPES,
    SLICES,
    SPLITS,
    Handler,
    broadcast_back,
)
from fxquant.passes.patterns import Need, Pattern, Ties, Ways, shape_of

_aten = torch.ops.aten


def is_known(node: fx.Node) -> bool:
    """Whether a call is read as it stands: one of ATen, or a method that is like one."""
    return isinstance(node.target, torch._ops.OpOverload) or _packet(node) is not None


def ways(node: fx.Node, pattern: Pattern, ties: Ties) -> Ways:
    """The ways in which an ATen call's result can be divided by a pattern, the best first.

    Args:
        node: The call, one that `is_known`.
        pattern: Of its result; of a call that gives several (a split), that of the
            ``operator.getitem`` which takes one of them, and then `node` is the latter.
        ties: May gain channels that share a scale.
    """
    if node.target is operator.getitem:
        source = node.args[0]
        return (
            moves.piece(node, pattern) if isinstance(source, fx.Node) and is_split(source) else []
        )
    packet = _packet(node)
    handler = _HANDLERS.get(packet)
    return [] if handler is None else handler(node, pattern, ties)


def is_exact(node: fx.Node) -> bool:
    """Whether an ATen call moves, copies or casts the elements of its operand and no more."""
    packet = _packet(node)
    return packet in _COPIES or packet in RESHAPES or packet in PERMUTES


def is_split(node: fx.Node) -> bool:
    """Whether an ATen call gives several pieces of its operand."""
    return getattr(node.target, "overloadpacket", None) in SPLITS


def is_free(node: fx.Node, call: fx.Node, pattern: Pattern) -> bool:
    """Whether a value holds only elements of an operand that a pattern leaves unscaled.

    Args:
        node: The value.
        call: What gives it, in ATen: itself, or the split that it is a piece of.
        pattern: Of the call's first operand.
    """
    if is_split(call) and node is call:
        pieces = list(call.users)
        taken = all(piece.target is operator.getitem for piece in pieces)
        return taken and all(is_free(piece, call, pattern) for piece in pieces)
    packet = getattr(call.target, "overloadpacket", None)
    dim, rows = moves.picked(node, call) if packet in SLICES or is_split(call) else (0, None)
    if rows is None:
        return False
    seen = pattern if pattern.shape[dim] == 1 else pattern.index_select(dim, rows)
    if bool((seen < 0).all()):
        return True
    # What else it holds may go to nobody.
    seen = seen if seen.ndim == node.meta["val"].ndim else seen.squeeze(dim)
    return bool(node.users) and all(is_free(user, user, seen) for user in node.users)


def _packet(node: fx.Node) -> Any:
    if node.op not in ("call_method", "call_function"):
        return None
    packet = getattr(node.target, "overloadpacket", None)
    if packet is not None:
        return packet
    spelled = _METHODS.get(str(node.target)) if node.op == "call_method" else None
    spelled = spelled or _FUNCTIONS.get(node.target)
    # Operands by keyword are put in order by an expansion.
    least = 2 if spelled in (*_FACTORS, *_SUMS, *_MIXES) else 1
    return spelled if len(node.args) >= least else None


def _is_real(node: Any) -> bool:
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return isinstance(value, Tensor) and value.dtype.is_floating_point


def _pass(node: fx.Node, pattern: Pattern, _: Ties) -> Ways:
    operand = node.args[0]
    if not _is_real(operand) or not _is_real(node):
        return []
    return [[Need(operand, pattern)]]  # type: ignore[arg-type]


# --- several operands ------------------------------------------------------------------------


def _as_vector(operand: Any, pattern: Pattern, role: str) -> Need | None:
    """The need for an operand to be divided at this call, where it has an element a channel."""
    if not _is_real(operand):
        return None
    shape = shape_of(operand)
    if not all(isinstance(size, int) for size in shape) or len(shape) > pattern.ndim:
        return None
    aligned = (1,) * (pattern.ndim - len(shape)) + shape
    fits = all(
        p == size or (p == 1 and size == 1) for p, size in zip(pattern.shape, aligned, strict=True)
    )
    return Need(operand, pattern.reshape(shape), role) if fits else None


def _as_value(node: fx.Node, operand: Any, pattern: Pattern) -> Need | None:
    """The need for an operand, broadcast to the result, to be divided where it is made."""
    if not _is_real(operand):
        return None
    pulled = broadcast_back(pattern, shape_of(node), shape_of(operand), None)
    return None if pulled is None else Need(operand, pulled)


def _scaled(node: fx.Node, pattern: Pattern, _: Ties) -> Ways:
    """A product of elements: either factor may be divided."""
    if node.kwargs.get("rounding_mode") is not None:
        return []
    factors = [node.args[0]]
    if _packet(node) is _aten.mul:
        factors += node.args[1:2]
    if len(factors) == 2 and factors[0] is factors[1]:
        return []
    vectors = [_as_vector(factor, pattern, "factor") for factor in factors]
    values = [_as_value(node, factor, pattern) for factor in factors]
    return [[need] for need in (*vectors, *values) if need is not None]


def _added(node: fx.Node, pattern: Pattern, _: Ties) -> Ways:
    """A sum: both addends have to be divided."""
    terms = node.args[:2]
    if terms[0] is terms[1]:
        return []
    needs = []
    for term in terms:
        need = _as_vector(term, pattern, "addend") or _as_value(node, term, pattern)
        if need is None:
            return []
        needs.append(need)
    return [needs] if not all(need.vector for need in needs) else []


def _mixed(node: fx.Node, pattern: Pattern, _: Ties) -> Ways:
    """``mixing @ values``: a scale of the values' columns, or of a matrix of the batch."""
    values = node.args[1]
    rank = len(shape_of(values))
    mixing = node.args[0].meta["val"].ndim  # type: ignore[union-attr]
    if min(rank, mixing) < 2 or pattern.shape[-2] != 1:
        return []
    result = (*shape_of(node)[:-2], *shape_of(values)[-2:])
    pulled = broadcast_back(pattern, result, shape_of(values), None)
    return [] if pulled is None else [[Need(values, pulled)]]  # type: ignore[arg-type]


def _attended(node: fx.Node, pattern: Pattern, ties: Ties) -> Ways:
    """Attention mixes the values, and several query heads may share a head of them."""
    query, _, values = node.args[:3]
    if pattern.shape[-2] != 1:
        return []
    grouped = bool(node.kwargs.get("enable_gqa"))
    if grouped and pattern.shape[-3] > 1:
        heads, shared = shape_of(query)[-3], shape_of(values)[-3]
        if not isinstance(heads, int) or not isinstance(shared, int) or heads % shared:
            return []
        split = pattern.unflatten(-3, (shared, heads // shared))
        joined = ties.join(split, pattern.ndim - 2)
        if joined is None:
            return []
        pattern = joined.squeeze(pattern.ndim - 2)
    elif not grouped:
        pulled = broadcast_back(pattern, shape_of(node), shape_of(values), None)
        if pulled is None:
            return []
        pattern = pulled
    return [[Need(values, pattern)]]  # type: ignore[arg-type]


def _normed(node: fx.Node, pattern: Pattern, _: Ties) -> Ways:
    """A norm with a weight of its own, and a bias."""
    size = node.args[1]
    names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
    given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    if not isinstance(given.get("weight"), fx.Node):
        return []
    lead = pattern.ndim - len(size)  # type: ignore[arg-type]
    if any(extent != 1 for extent in pattern.shape[:lead]):
        return []
    inner = pattern.reshape(pattern.shape[lead:])
    needs = [_as_vector(given["weight"], inner, "factor")]
    if given.get("bias") is not None:
        needs.append(_as_vector(given["bias"], inner, "addend"))
    return [needs] if all(needs) else []  # type: ignore[list-item]


_COPIES = frozenset(
    (
        _aten._to_copy, _aten.alias, _aten.clone, _aten.contiguous, _aten.detach, _aten.lift_fresh,
        _aten.lift_fresh_copy, _aten.detach_copy, _aten.to, _aten.type_as,
        _aten._autocast_to_full_precision, _aten._autocast_to_reduced_precision,
    )
)  # fmt: skip
# Odd, or scaled by what is positive: f(x / s) = f(x) / s.
_HOMOGENEOUS = frozenset(
    (_aten.abs, _aten.dropout, _aten.leaky_relu, _aten.neg, _aten.relu, _aten.positive)
)
_FACTORS, _SUMS, _MIXES = (_aten.mul, _aten.div), (_aten.add, _aten.sub), (_aten.matmul, _aten.bmm)
_HANDLERS: dict[Any, Handler] = {
    **moves.HANDLERS,
    **dict.fromkeys((*_COPIES, *_HOMOGENEOUS), _pass),
    **dict.fromkeys(_FACTORS, _scaled),
    **dict.fromkeys(_SUMS, _added),
    **dict.fromkeys(_MIXES, _mixed),
    **dict.fromkeys((_aten.layer_norm, _aten.rms_norm), _normed),
    _aten.scaled_dot_product_attention: _attended,
}
# Spellings of Dynamo's that are like the ATen call; others are expanded to be read.
_METHODS: dict[str, Any] = {
    name: packet
    for packet in (*_COPIES, *RESHAPES, *PERMUTES, *EXPANDS, *_FACTORS, *_SUMS, *_MIXES)
    if hasattr(torch.Tensor, name := str(packet).rpartition(".")[2])
} | dict.fromkeys(("float", "half", "bfloat16", "double"), _aten.to)
_FUNCTIONS: dict[Any, Any] = {
    operator.mul: _aten.mul, operator.truediv: _aten.div, operator.add: _aten.add,
    operator.sub: _aten.sub, operator.matmul: _aten.matmul, torch.mul: _aten.mul,
    torch.div: _aten.div, torch.add: _aten.add, torch.sub: _aten.sub, torch.matmul: _aten.matmul,
    torch.bmm: _aten.bmm,
}  # fmt: skip
