"""How C++ spells ATen's pointwise ops: scalar statements over float, for loops that vectorise."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fxquant.codegen.cpp.halves import SHORT
from fxquant.codegen.epilogue import Epilogue
from fxquant.codegen.pointwise import Ops, bare

_STANDARD = {
    "abs": "std::fabs",
    "round": "std::nearbyint",
    **{name: f"std::{name}" for name in ("ceil", "floor", "sqrt", "trunc")},
    **{name: f"std::{name}" for name in ("acos", "asin", "atan", "cos", "sin", "tan")},
    **{name: f"std::{name}" for name in ("acosh", "asinh", "atanh", "cosh", "sinh")},
    **{name: f"std::{name}" for name in ("erfc", "log10", "signbit")},
    **{name: f"std::{name}" for name in ("atan2", "copysign", "fmod", "hypot")},
}
"""Functions of the standard library, of which compilers vectorise few."""


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

    `prelude` names helpers of `fxquant.codegen.cpp.math`.
    """

    target = "C++"

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
            return self.condition(x)
        short = SHORT[dtype]
        return self._helper(f"from_{short}", self._helper(f"to_{short}", x))

    def where(self, condition: str, x: str, y: str) -> str:
        """Elementwise choice."""
        return f"({condition} ? {x} : {y})"

    def function(self, name: str, *args: str) -> str:
        """Functions of the standard library that vectorise, and those of the prelude."""
        if name in _STANDARD:
            return f"{_STANDARD[name]}({', '.join(args)})"
        if name == "rsqrt":
            return f"(1.0f / std::sqrt({args[0]}))"
        if name == "pow":
            return self._power(*args)
        if name in ("maximum", "minimum"):
            return self._extreme(name, *args)
        return self._helper(f"lane_{name}", *args)

    # --- operators that differ ---

    def logical_not(self, x: str) -> str:
        """Zero."""
        return f"(!{x})" if x in self.booleans else super().logical_not(x)

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
        return super()._to_copy(x if dtype in (None, "bool") else self.number(x), dtype)

    # --- parts ---

    def _helper(self, name: str, *args: str) -> str:
        self.prelude.add(name)
        return f"{name}({', '.join(args)})"

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
        The statements, one a node (``const float add_0 = ...;`` or ``const bool gt_0 = ...;``); the
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
        result = f"{node.word}_{number}"
        text = bare(ops.call(node, names, result))
        kind = "bool" if result in ops.booleans else "float"
        lines.append(f"const {kind} {result} = {text};")
        names[f"%{number}"] = result
    results = [epilogue.result, *(result.value for result in epilogue.more)]
    return lines, [names[result] for result in results], ops.prelude
