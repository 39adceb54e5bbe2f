"""How Triton spells ATen's pointwise ops."""

from __future__ import annotations

import math

from fxquant.codegen.pointwise import Ops
from fxquant.codegen.triton.functions import PRELUDE, needed

__all__ = ["PRELUDE", "TritonOps"]

_BUILTIN = {
    "abs": "tl.abs",
    "exp": "tl.exp",
    "exp2": "tl.exp2",
    "log": "tl.log",
    "log2": "tl.log2",
    "sqrt": "tl.sqrt_rn",
    "rsqrt": "tl.rsqrt",
    "erf": "tl.erf",
    "sin": "tl.sin",
    "cos": "tl.cos",
    "floor": "tl.floor",
    "ceil": "tl.ceil",
}
_PRINTED = {
    **{name: name for name in PRELUDE},
    "pow": "power",
    "expm1": "exp_minus_one",
    "log1p": "log_one_plus",
    "signbit": "is_negative",
    "round": "round_to_even",
    "atan2": "angle",
    "atan": "arctangent",
    "asin": "arcsine",
    "acos": "arccosine",
    "tan": "tangent",
    "asinh": "arsinh",
    "acosh": "arcosh",
    "atanh": "artanh",
}
"""What functions that Triton has not are called where they are printed."""


class TritonOps(Ops):
    """Texts over float32 tensors, `tl` being ``triton.language``."""

    target = "Triton"

    def cast(self, x: str, dtype: str) -> str:
        """Rounds to a dtype and back."""
        if dtype == "bool":
            return self.condition(x)
        return f"{x}.to(tl.{dtype}).to(tl.float32)"

    def where(self, condition: str, x: str, y: str) -> str:
        """Elementwise choice."""
        return f"tl.where({condition}, {x}, {y})"

    def function(self, name: str, *args: str) -> str:
        """Builtins of Triton, and the functions of `PRELUDE`."""
        if name in _BUILTIN:
            return f"{_BUILTIN[name]}({args[0]})"
        if name in ("maximum", "minimum"):
            return f"tl.{name}({args[0]}, {args[1]}, propagate_nan=tl.PropagateNan.ALL)"
        if name == "log10":
            return self.mul(self.function("log", *args), self.constant(1 / math.log(10)))
        if name == "fmod":
            return f"({args[0]} % {args[1]})"
        if name == "pow":
            return self._power(*args)
        return self._helper(name, *args)

    def _power(self, x: str, y: str) -> str:
        plain = {
            1.0: x,
            2.0: f"({x} * {x})",
            3.0: f"({x} * {x} * {x})",
            0.5: f"tl.sqrt_rn({x})",
            -1.0: f"(1.0 / {x})",
            -0.5: f"tl.rsqrt({x})",
        }
        exponent = _number(y)
        return plain[exponent] if exponent in plain else self._helper("pow", x, y)

    def _helper(self, name: str, *args: str) -> str:
        """A call of a function of `PRELUDE`, whose arguments are tensors."""
        name = _PRINTED[name]
        self.prelude |= needed(name)
        tensors = [
            a if math.isnan(_number(a)) else f"tl.full((1, 1), {a}, tl.float32)" for a in args
        ]
        return f"{name}({', '.join(tensors)})"


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan
