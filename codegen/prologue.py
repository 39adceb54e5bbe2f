"""Prologues: the pointwise work and row reductions that make what is quantized, written down.

As an epilogue, a prologue is an FX graph of ATen ops in a form that is frozen, hashable and JSON.
Beside the pointwise ops of `fxquant.codegen.pointwise` it has reductions over a row, which is what
norms are made of.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from fxquant import errors
from fxquant.codegen.epilogue import OPERAND_DTYPES, EpilogueNode, EpilogueResult

DIMS = ("mk", "k", "m", "")
REDUCTIONS = {"aten.mean.dim": "mean", "aten.sum.dim_IntList": "sum", "aten.amax.default": "amax"}
"""Over the inputs of a row, which stay as a dimension of size 1. The order of sums is open."""
MOST_INPUTS = 16384
"""Of a row: longer ones do not stay in registers, or in the caches, from loop to loop."""
_REFERENCE = re.compile(r"%(in(?P<operand>\d+)|(?P<node>\d+))")


@dataclass(frozen=True)
class PrologueOperand:
    """A tensor that a prologue reads.

    Attributes:
        dims: The axes it has out of ``m`` (rows) and ``k`` (inputs): an activation is ``"mk"``, a
            norm's weight ``"k"``, a statistic of every row ``"m"``, a scalar ``""``.
        dtype: Its dtype, as in ``"float32"``.
    """

    dims: str
    dtype: str

    def __post_init__(self) -> None:
        if self.dims not in DIMS:
            raise errors.bad_spec("prologue operand's dims", self.dims, "'mk', 'k', 'm' or ''")
        if self.dtype not in OPERAND_DTYPES:
            expected = f"one of {', '.join(OPERAND_DTYPES)}"
            raise errors.bad_spec("prologue operand's dtype", self.dtype, expected)


@dataclass(frozen=True)
class Prologue:
    """What rows are made of before they are quantized; all in float32, casts to 16 bits round.

    Attributes:
        operands: The tensors that are read, at least one of them ``"mk"``.
        nodes: ATen ops on operands (``"%in0"``), results of earlier nodes (``"%0"``) and numbers;
            those of `REDUCTIONS` take one value. The last one is what is quantized.
        more: Values ``[m, k]`` that are written out, too: what others read of them.
    """

    operands: tuple[PrologueOperand, ...]
    nodes: tuple[EpilogueNode, ...]
    more: tuple[EpilogueResult, ...] = ()

    def __post_init__(self) -> None:
        if not self.nodes or all(operand.dims != "mk" for operand in self.operands):
            expected = "at least one node and one operand 'mk'"
            raise errors.bad_spec("prologue", (self.operands, self.nodes), expected)
        for number, node in enumerate(self.nodes):
            for value in node.values:
                if isinstance(value, str) and value.startswith("%"):
                    self._check_reference(value, number)
        for value in (self.result, *(result.value for result in self.more)):
            self._check_reference(value, len(self.nodes))
            if self.dims[value] != "mk" or value.startswith("%in"):
                expected = "a node's with all rows and inputs"
                raise errors.bad_spec("prologue result", value, expected)

    @property
    def result(self) -> str:
        """The reference that names what is quantized."""
        return f"%{len(self.nodes) - 1}"

    @property
    def dims(self) -> dict[str, str]:
        """The axes of every value, by its reference."""
        found = {f"%in{number}": operand.dims for number, operand in enumerate(self.operands)}
        for number, node in enumerate(self.nodes):
            axes = {axis for value in references(node) for axis in found[value]}
            if is_reduction(node):
                if "k" not in axes or len(node.values) > 1:
                    expected = "one value that has inputs"
                    raise errors.bad_spec(
                        f"prologue node {number}'s arguments", node.args, expected
                    )
                axes.discard("k")
            found[f"%{number}"] = "".join(axis for axis in "mk" if axis in axes)
        return found

    @property
    def names(self) -> dict[str, str]:
        """What kernels call every value: a node by its op and its number."""
        found = {f"%in{number}": f"in{number}" for number in range(len(self.operands))}
        found |= {f"%{number}": f"{node.word}_{number}" for number, node in enumerate(self.nodes)}
        return found

    def describe(self) -> str:
        """The ops in their order, as in ``add, mean, sub, mul``."""
        text = ", ".join(node.word for node in self.nodes)
        return f"{text}, with {len(self.more)} of its values written out" if self.more else text

    def as_json(self) -> dict[str, Any]:
        """What `from_json` takes, for `json.dumps`."""
        data: dict[str, Any] = {
            "operands": [[operand.dims, operand.dtype] for operand in self.operands],
            "nodes": [[node.op, node.args, node.kwargs] for node in self.nodes],
        }
        if self.more:
            data["more"] = [[result.value, result.dtype] for result in self.more]
        return data

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Prologue:
        """The prologue behind decoded JSON.

        Raises:
            KeyError: Something is missing.
            TypeError: Something is of another kind.
            KernelError: It is no prologue.
        """
        return cls(
            tuple(PrologueOperand(dims, dtype) for dims, dtype in data["operands"]),
            tuple(
                EpilogueNode(op, tuple(args), tuple((name, value) for name, value in kwargs))
                for op, args, kwargs in data["nodes"]
            ),
            tuple(EpilogueResult(value, dtype) for value, dtype in data.get("more", ())),
        )

    def _check_reference(self, value: str, number: int) -> None:
        match = _REFERENCE.fullmatch(value)
        known = match is not None
        if match and match["operand"]:
            known = int(match["operand"]) < len(self.operands)
        elif match:
            known = int(match["node"]) < number
        if not known:
            expected = "an operand '%in0' or an earlier node '%0'"
            raise errors.bad_spec(f"prologue node {number}'s argument", value, expected)


def is_reduction(node: EpilogueNode) -> bool:
    """Whether a node makes one number of the inputs of a row."""
    return node.op in REDUCTIONS


def references(node: EpilogueNode) -> list[str]:
    """The values that a node takes."""
    return [value for value in node.values if isinstance(value, str) and value.startswith("%")]


def is_cast(node: EpilogueNode, dtype: str) -> bool:
    """Whether a node does nothing but round to a dtype."""
    return node.op == "aten._to_copy.default" and dict(node.kwargs).get("dtype") == dtype


def cast(value: str, dtype: str) -> EpilogueNode:
    """The node that rounds a value to a dtype."""
    return EpilogueNode("aten._to_copy.default", (value,), (("dtype", dtype),))
