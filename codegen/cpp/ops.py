"""How C++ spells ATen's pointwise ops: scalar statements over float, for loops that vectorise."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fxquant.codegen.epilogue import Epilogue, EpilogueNode
from fxquant.codegen.pointwise import Ops

_STANDARD = {
    "abs": "std::fabs",
    "sqrt": "std::sqrt",
    "sin": "std::sin",
    "cos": "std::cos",
    "floor": "std::floor",
    "ceil": "std::ceil",
}
_COMPARISONS = {"eq", "ne", "lt", "le", "gt", "ge"}
_LOGICAL = {"logical_and", "logical_or", "logical_not"}
# Of two booleans torch makes a boolean: the sum is `or`, and so on.
_OF_BOOLEANS = {"add": "|", "maximum": "|", "mul": "&", "minimum": "&"}


class Constant(str):
    """The text of a float32 constant, with its value."""

    __slots__ = ("value",)
    value: float


def constant(value: float) -> Constant:
    """The shortest decimal text that C++ reads as the float32 nearest `value`."""
    with np.errstate(over="ignore"):
        number = np.float32(value)
    size = abs(number)
    if np.isnan(number):
        text = "NAN"
    elif np.isinf(number):
        text = "INFINITY"
    elif size == 0 or 1e-4 <= size < 1e7:
        text = f"{np.format_float_positional(size, unique=True, trim='0')}f"
    else:
        text = f"{np.format_float_scientific(size, unique=True, trim='0')}f"
    made = Constant(f"(-{text})" if np.signbit(number) else text)
    made.value = float(number)
    return made


class CppOps(Ops):
    """Texts over ``float`` and ``bool`` values of one lane.

    Attributes:
        prelude: Helpers of `fxquant.codegen.cpp.math` that the texts call.
        booleans: The names that stand for ``bool``; every other is a ``float``.
    """

    target = "C++"

    def __init__(self, booleans: Sequence[str] = ()) -> None:
        super().__init__()
        self.booleans = set(booleans)

    def call(self, node: EpilogueNode, names: Mapping[str, str]) -> str:
        """The text of one node."""
        name = node.op.split(".")[1]
        if self.is_boolean(node, names) and name in _OF_BOOLEANS:
            first, second = (names[value] for value in node.args)
            return f"({first} {_OF_BOOLEANS[name]} {second})"
        if name not in {"where", "_to_copy", "convert_element_type", *_LOGICAL}:
            names = {key: self._number(text) for key, text in names.items()}
        return super().call(node, names)

    def is_boolean(self, node: EpilogueNode, names: Mapping[str, str]) -> bool:
        """Whether a node's result is a ``bool``."""
        name = node.op.split(".")[1]
        if name in _COMPARISONS | _LOGICAL or "bool" in node.values:
            return True
        values = node.args[1:] if name == "where" else node.args
        return name in {"where", *_OF_BOOLEANS} and all(
            isinstance(value, str) and names[value] in self.booleans for value in values
        )

    def argument(self, value: Any, names: Mapping[str, str]) -> Any:
        """The text of an argument; None and dtype names stay as they are."""
        return self.constant(value) if isinstance(value, bool) else super().argument(value, names)

    # --- primitives ---

    def constant(self, value: float) -> str:
        """A float32 constant."""
        return constant(value)

    def cast(self, x: str, dtype: str) -> str:
        """Rounds to a dtype and back."""
        if dtype == "bool":
            return self._condition(x)
        short = {"float16": "fp16", "bfloat16": "bf16"}[dtype]
        return self._helper(f"from_{short}", self._helper(f"to_{short}", x))

    def where(self, condition: str, x: str, y: str) -> str:
        """Elementwise choice."""
        return f"({condition} ? {x} : {y})"

    def function(self, name: str, *args: str) -> str:
        """Functions of the standard library that vectorise, and those of the prelude."""
        if name in _STANDARD:
            return f"{_STANDARD[name]}({args[0]})"
        if name == "rsqrt":
            return f"(1.0f / std::sqrt({args[0]}))"
        if name == "pow":
            return self._power(*args)
        if name in ("maximum", "minimum"):
            return self._extreme(name, *args)
        return self._helper(f"lane_{name}", *args)

    # --- operators that differ ---

    def logical_and(self, x: str, y: str) -> str:
        """Both are not zero."""
        return f"({self._condition(x)} & {self._condition(y)})"

    def logical_or(self, x: str, y: str) -> str:
        """Either is not zero."""
        return f"({self._condition(x)} | {self._condition(y)})"

    def logical_not(self, x: str) -> str:
        """Zero."""
        return f"(!{x})" if x in self.booleans else f"({x} == 0.0f)"

    def hardtanh(self, x: str, min_val: str | None = None, max_val: str | None = None) -> str:
        """Limits to an interval."""
        return self.clamp(x, min_val or self.constant(-1.0), max_val or self.constant(1.0))

    def leaky_relu(self, x: str, negative_slope: str | None = None) -> str:
        """Rectifier with a slope."""
        return super().leaky_relu(x, negative_slope or self.constant(0.01))

    def sigmoid(self, x: str) -> str:
        """Logistic function."""
        return self._helper("lane_sigmoid", x)

    def silu(self, x: str) -> str:
        """``x * sigmoid(x)``."""
        return self._helper("lane_silu", x)

    def gelu(self, x: str, approximate: str = "none") -> str:
        """Gaussian error linear unit; the exact one in a form of its own, cheaper than erf's."""
        return (
            self._helper("lane_gelu", x) if approximate == "none" else super().gelu(x, approximate)
        )

    def _to_copy(self, x: str, dtype: str | None = None) -> str:
        return super()._to_copy(x if dtype in (None, "bool") else self._number(x), dtype)

    # --- parts ---

    def _helper(self, name: str, *args: str) -> str:
        self.prelude.add(name)
        return f"{name}({', '.join(args)})"

    def _number(self, x: str) -> str:
        """A choice, which compilers vectorise; they do not vectorise conversions of bool."""
        return f"({x} ? 1.0f : 0.0f)" if x in self.booleans else x

    def _condition(self, x: str) -> str:
        return x if x in self.booleans else f"({x} != 0.0f)"

    def _extreme(self, name: str, x: str, y: str) -> str:
        """One comparison is enough against a constant."""
        if isinstance(y, Constant) and not math.isnan(y.value):
            return self._helper("at_least" if name == "maximum" else "at_most", x, y)
        return self._helper(f"lane_{name}", x, y)

    def _power(self, x: str, y: str) -> str:
        """Torch's own short forms for some exponents, which differ from C's at -inf and -0."""
        if isinstance(y, Constant):
            plain = {
                0.5: f"std::sqrt({x})",
                1.0: x,
                2.0: f"({x} * {x})",
                3.0: f"({x} * {x} * {x})",
                -0.5: f"(1.0f / std::sqrt({x}))",
                -1.0: f"(1.0f / {x})",
                -2.0: f"(1.0f / ({x} * {x}))",
            }
            if y.value in plain:
                return plain[y.value]
        return self._helper("lane_power", x, y)

    def _scaled(self, y: str, alpha: str | None) -> str:
        unit = alpha is None or (isinstance(alpha, Constant) and alpha.value == 1.0)
        return y if unit else self.mul(y, str(alpha))


def epilogue_lines(
    epilogue: Epilogue, operands: Sequence[str], acc: str = "acc"
) -> tuple[list[str], list[str], set[str]]:
    """An epilogue as C++ statements for one element.

    Args:
        epilogue: What is done.
        operands: Names of the operands' elements at that place: ``bool`` for the dtype bool, else
            ``float`` (convert 16-bit ones on loading). Load a bool as ``flags[i] != 0`` through
            ``const uint8_t* flags``: loops with loads through ``const bool*`` stay scalar.
        acc: Name of the accumulator, a ``float``; those of further weights are ``acc1`` ..

    Returns:
        The statements, one a node (``const float v0 = ...;`` or ``const bool v0 = ...;``); the
        names of the results, the main one first; the helpers to print with
        `fxquant.codegen.cpp.math.prelude_text`.

    Raises:
        KernelError: An op that the table does not have.
    """
    ops = CppOps(
        [
            name
            for name, operand in zip(operands, epilogue.operands, strict=True)
            if operand.dtype == "bool"
        ]
    )
    names = {f"%in{number}": name for number, name in enumerate(operands)}
    names |= {f"%acc{number or ''}": f"{acc}{number or ''}" for number in range(epilogue.sums)}
    lines = []
    for number, node in enumerate(epilogue.nodes):
        result = f"v{number}"
        kind = "bool" if ops.is_boolean(node, names) else "float"
        lines.append(f"const {kind} {result} = {ops.call(node, names)};")
        if kind == "bool":
            ops.booleans.add(result)
        names[f"%{number}"] = result
    results = [epilogue.result, *(result.value for result in epilogue.more)]
    return lines, [names[result] for result in results], ops.prelude
