"""Epilogues: the pointwise work that follows a product, written down.

FX is the language of values: an epilogue is an FX graph of ATen ops in a form that is frozen,
hashable and JSON.
"""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass
from typing import Any

from fxquant import errors

AXES = ("e", "m", "n")
FLOAT_DTYPES = ("float16", "bfloat16", "float32")
OPERAND_DTYPES = (*FLOAT_DTYPES, "bool")
_WORDS = {"_to_copy": "rounded", "convert_element_type": "rounded", "where": "chosen"}
_AXIS_ORDERS = tuple("".join(c) for r in range(4) for c in itertools.combinations(AXES, r))
_REFERENCE = re.compile(r"%(acc(?P<sum>[1-9]\d*)?|in(?P<operand>\d+)|(?P<node>\d+))")


@dataclass(frozen=True)
class EpilogueOperand:
    """A further tensor that an epilogue reads.

    Attributes:
        dims: The axes it has, in order, out of ``e`` (batch), ``m`` (rows), ``n`` (outputs): a
            bias is ``"n"``, a residual ``"mn"`` or ``"emn"``, a scalar ``""``.
        dtype: Its dtype, as in ``"float32"``.
    """

    dims: str
    dtype: str

    def __post_init__(self) -> None:
        if self.dims not in _AXIS_ORDERS:
            raise errors.bad_spec(
                "epilogue operand's dims", self.dims, "letters of 'emn', in order"
            )
        if self.dtype not in OPERAND_DTYPES:
            raise errors.bad_spec(
                "epilogue operand's dtype", self.dtype, f"one of {', '.join(OPERAND_DTYPES)}"
            )


@dataclass(frozen=True)
class EpilogueNode:
    """One call of an FX epilogue graph, in a form that can be hashed and written down.

    Attributes:
        op: An ATen overload, as in ``"aten.add.Tensor"``.
        args: Each a number, None, a dtype name, or a reference: ``"%acc"`` (the sums, float32;
            ``"%acc1"`` those of the second weight), ``"%in0"`` (operand 0), ``"%0"`` (the result
            of node 0). Integers become floats, so that equal nodes are written alike.
        kwargs: Sorted pairs, with values like `args`.
    """

    op: str
    args: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...] = ()

    def __post_init__(self) -> None:
        if not re.fullmatch(r"aten\.\w+\.\w+", self.op):
            raise errors.bad_spec("epilogue op", self.op, "an overload, as in 'aten.add.Tensor'")
        object.__setattr__(self, "args", tuple(map(_canonical, self.args)))
        pairs = tuple((name, _canonical(value)) for name, value in sorted(self.kwargs))
        object.__setattr__(self, "kwargs", pairs)

    @property
    def values(self) -> tuple[Any, ...]:
        """The arguments, positional and by keyword."""
        return (*self.args, *(value for _, value in self.kwargs))

    @property
    def word(self) -> str:
        """What is done, as kernels name the result: ``"add"``, ``"rounded"``."""
        op = self.op.split(".")[1]
        return _WORDS.get(op, op)


@dataclass(frozen=True)
class EpilogueResult:
    """A value that an epilogue gives beside its main result.

    Attributes:
        value: A reference, as in `EpilogueNode.args`; made of sums.
        dtype: What it is rounded to.
    """

    value: str
    dtype: str

    def __post_init__(self) -> None:
        if self.dtype not in FLOAT_DTYPES:
            expected = f"one of {', '.join(FLOAT_DTYPES)}"
            raise errors.bad_spec("epilogue result's dtype", self.dtype, expected)


@dataclass(frozen=True)
class Epilogue:
    """Pointwise work on the sums: an FX graph of ATen ops, written down.

    The main result is the last node (``"%acc"`` when there is none), rounded to the spec's
    `out_dtype`. `fxquant.codegen.graphs` turns an epilogue into an `fx.Graph` and back.

    Attributes:
        operands: Further tensors that it reads.
        nodes: The ops, in order.
        more: Results beside the main one.
    """

    operands: tuple[EpilogueOperand, ...] = ()
    nodes: tuple[EpilogueNode, ...] = ()
    more: tuple[EpilogueResult, ...] = ()

    def __post_init__(self) -> None:
        for number, node in enumerate(self.nodes):
            for value in node.values:
                if isinstance(value, str) and value.startswith("%"):
                    self._check_reference(value, number)
        made = self._made_of_sums()
        for result in (self.result, *(result.value for result in self.more)):
            self._check_reference(result, len(self.nodes))
            if result not in made and not result.startswith("%acc"):
                raise errors.bad_spec("epilogue result", result, "made of the sums, '%acc'")

    @property
    def sums(self) -> int:
        """How many sums are named, up to the highest: ``"%acc"`` is the first."""
        values = [v for node in self.nodes for v in node.values if isinstance(v, str)]
        values += [self.result, *(result.value for result in self.more)]
        found = [_REFERENCE.fullmatch(value) for value in values]
        named = [int(m["sum"] or 0) for m in found if m and m[1].startswith("acc")]
        return max(named, default=-1) + 1

    def _made_of_sums(self) -> set[str]:
        made: set[str] = set()
        for number, node in enumerate(self.nodes):
            values = [value for value in node.values if isinstance(value, str)]
            if any(value in made or value.startswith("%acc") for value in values):
                made.add(f"%{number}")
        return made

    def _check_reference(self, value: str, number: int) -> None:
        match = _REFERENCE.fullmatch(value)
        known = match is not None
        if match and match["operand"]:
            known = int(match["operand"]) < len(self.operands)
        elif match and match["node"]:
            known = int(match["node"]) < number
        if not known:
            expected = "'%acc', an operand '%in0' or an earlier node '%0'"
            raise errors.bad_spec(f"epilogue node {number}'s argument", value, expected)

    @property
    def result(self) -> str:
        """The reference that names the result."""
        return f"%{len(self.nodes) - 1}" if self.nodes else "%acc"

    @classmethod
    def bias(cls, dtype: str, dims: str = "n") -> Epilogue:
        """Adds operand 0."""
        return cls(
            (EpilogueOperand(dims, dtype),), (EpilogueNode("aten.add.Tensor", ("%acc", "%in0")),)
        )


def _canonical(value: Any) -> Any:
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value
