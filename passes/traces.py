"""Calls of a captured graph as graphs of their own; of equal calls one is traced.

A trace takes milliseconds, and a model has hundreds of layers that differ in their weights only.
"""

from __future__ import annotations

import contextlib
import operator
import warnings
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._subclasses import FakeTensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_leaves

from fxquant.passes import opaque, values

_aten = torch.ops.aten
# Compositions that hide a product: pre-dispatch tracing keeps them whole unless told otherwise.
_DECOMPOSED = (
    _aten.einsum.default,
    _aten.tensordot.default,
    _aten.inner.default,
    _aten.chain_matmul.default,
    _aten.linalg_multi_dot.default,
    _aten.linalg_matmul.default,
    _aten.kron.default,
)
DECOMPOSITIONS: dict[Any, Callable[..., Any]] = {
    **{op: op.decompose for op in _DECOMPOSED},
    **opaque.DECOMPOSITIONS,
}


@dataclass(frozen=True)
class Trace:
    """A call as ATen calls.

    Attributes:
        gm: Its placeholders are the tensors and sizes that the call reads.
        found: What each of its nodes stands for.
    """

    gm: fx.GraphModule
    found: dict[fx.Node, Any]


@dataclass(frozen=True)
class _Given:
    """What a call reads at some place, whichever node that is."""

    number: int


_PLAIN = (
    *(_Given, int, float, bool, str, type(None)),
    *(torch.dtype, torch.device, torch.layout, torch.memory_format),
)


class Traces:
    """Traces of one graph's calls."""

    def __init__(self) -> None:
        self._known: dict[Hashable, fx.GraphModule] = {}

    def of(self, node: fx.Node) -> Trace | None:
        """The trace of a call, or None if it cannot be traced on its own.

        Autocast is taken from the surroundings.
        """
        inputs = node.all_input_nodes
        fakes = [values.value(given) for given in inputs]
        # Tensors that the call itself makes have to be fake too.
        mode = values.fake_mode_of(inputs)
        key = _key(node, inputs, fakes)
        with torch.no_grad(), mode or contextlib.nullcontext(), warnings.catch_warnings():
            # The user's own run has shown these already.
            warnings.simplefilter("ignore")
            try:
                if key in self._known:
                    return _replayed(self._known[key], fakes)
                gm = _traced(node, inputs, fakes)
            except Exception:  # noqa: BLE001 - what cannot be traced alone stays as Dynamo wrote it
                return None
        if key is not None and all(_is_plain(inner) for inner in gm.graph.nodes):
            self._known[key] = gm
        return Trace(gm, {inner: inner.meta.get("val") for inner in gm.graph.nodes})


def _traced(node: fx.Node, inputs: Sequence[fx.Node], fakes: Sequence[Any]) -> fx.GraphModule:
    def call(*given: Any) -> Any:
        bound = dict(zip(inputs, given, strict=True))
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: bound[n])
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        return node.target(*args, **kwargs)  # type: ignore[operator]

    return make_fx(call, decomposition_table=DECOMPOSITIONS, pre_dispatch=True)(*fakes)


def _replayed(gm: fx.GraphModule, fakes: Sequence[Any]) -> Trace:
    """A trace with values of other tensors: those of its own share memory with the first ones."""
    found: dict[fx.Node, Any] = {}
    given = iter(fakes)
    for inner in gm.graph.nodes:
        if inner.op == "placeholder":
            found[inner] = next(given)
        elif inner.op == "call_function":
            args, kwargs = fx.node.map_arg((inner.args, inner.kwargs), lambda n: found[n])
            found[inner] = inner.target(*args, **kwargs)
    return Trace(gm, found)


def _is_plain(inner: fx.Node) -> bool:
    """Whether a node of a trace means the same for other tensors: no constants, no modes."""
    if inner.op == "call_function":
        return isinstance(inner.target, torch._ops.OpOverload) or inner.target is operator.getitem
    return inner.op in ("placeholder", "output")


def _key(node: fx.Node, inputs: Sequence[fx.Node], fakes: Sequence[Any]) -> Hashable | None:
    """What equal calls have in common, or None for a call that is traced for itself."""
    forms = [_form(fake) for fake in fakes]
    places: dict[fx.Node, Any] = {given: _Given(i) for i, given in enumerate(inputs)}
    args = fx.node.map_arg((node.args, node.kwargs), lambda n: places[n])
    if None in forms or not all(isinstance(leaf, _PLAIN) for leaf in tree_leaves(args)):
        return None
    casts = [
        (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
        for kind in sorted({"cpu", *(fake.device.type for fake in fakes)})
        if torch.amp.is_autocast_available(kind)
    ]
    return (node.op, node.target, repr(args), tuple(forms), tuple(casts))


def _form(fake: Any) -> Hashable | None:
    """A tensor but for what it holds; None for a symbolic size, and for what is no plain tensor."""
    if type(fake) is not FakeTensor or fake.layout != torch.strided:
        return None
    sizes = (*fake.shape, *fake.stride(), fake.storage_offset())
    if not all(isinstance(size, int) for size in sizes):
        return None
    return (sizes, fake.dtype, fake.device, fake.is_conj(), fake.is_neg())
