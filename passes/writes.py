"""Which tensors a graph writes to."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Iterable
from typing import Any

from torch import Tensor, fx
from torch.multiprocessing.reductions import StorageWeakRef

from fxquant.passes import regions
from fxquant.passes.regions import Region

_IN_PLACE = frozenset(
    (
        operator.iadd, operator.iand, operator.ifloordiv, operator.ilshift, operator.imatmul,
        operator.imod, operator.imul, operator.ior, operator.ipow, operator.irshift,
        operator.isub, operator.itruediv, operator.ixor, operator.setitem,
    )
)  # fmt: skip


def targets(node: fx.Node) -> list[Any]:
    """The arguments that a call writes to."""
    name = str(node.target) if node.op == "call_method" else _name(node)
    if node.op == "call_method" or getattr(node.target, "_schema", None) is None:
        wrote = name.endswith("_") and not name.endswith("__")
        first = list(node.args[:1]) if wrote or node.target in _IN_PLACE or _asks(node) else []
        return first + ([node.kwargs["out"]] if node.kwargs.get("out") is not None else [])
    out = []
    for position, argument in enumerate(node.target._schema.arguments):  # type: ignore[union-attr]
        if argument.alias_info is not None and argument.alias_info.is_write:
            given = node.args[position] if position < len(node.args) else None
            out.append(node.kwargs.get(argument.name, given))
    return out


def _name(node: fx.Node) -> str:
    return str(getattr(node.target, "__name__", "")) if node.op == "call_function" else ""


def _asks(node: fx.Node) -> bool:
    """Whether a function is told to work in place, as in ``relu(x, inplace=True)``."""
    if node.op != "call_function":
        return False
    if "inplace" in node.kwargs:
        return bool(node.kwargs["inplace"])
    try:
        names = list(inspect.signature(node.target).parameters)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return False
    if "inplace" not in names or len(node.args) <= names.index("inplace"):
        return False
    return bool(node.args[names.index("inplace")])


class Written:
    """The memory that some graphs write to, bodies of higher-order ops included.

    Args:
        every: The graphs, the outermost first.
    """

    def __init__(self, every: Iterable[Region]) -> None:
        self.storages: set[int] = set()
        for region in reversed(list(every)):
            for node in region.graph.nodes:
                for target in targets(node):
                    self._note(target)
            if region.call is not None:
                passed = regions.operands(region.call)
                for placeholder, operand in zip(region.placeholders, passed, strict=True):
                    if placeholder in self:
                        self._note(operand)

    def __contains__(self, node: fx.Node) -> bool:
        """Whether a node's value, or one that shares memory with it, is written to."""
        return _storage(node) in self.storages

    def _note(self, target: Any) -> None:
        for each in target if isinstance(target, (list, tuple)) else [target]:
            storage = _storage(each)
            if storage is not None:
                self.storages.add(storage)


def _storage(node: Any) -> int | None:
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    if not isinstance(value, Tensor):
        return None
    try:
        return int(StorageWeakRef(value.untyped_storage()).cdata)
    except (RuntimeError, NotImplementedError):
        return None
