"""How Triton spells ATen's pointwise ops."""

from __future__ import annotations

import math

from fxquant.codegen.pointwise import Ops

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

PRELUDE = {
    "tanh": '''
@triton.jit
def tanh(x):
    """Hyperbolic tangent; a series where the quotient would cancel."""
    decay = tl.exp(-2.0 * tl.abs(x))
    quotient = (1.0 - decay) / (1.0 + decay)
    square = x * x
    series = x * (1.0 + square * (-1.0 / 3.0 + square * (2.0 / 15.0)))
    return tl.where(tl.abs(x) < 0.05, series, tl.where(x < 0.0, -quotient, quotient))
''',
    "power": '''
@triton.jit
def power(x, y):
    """``x ** y`` as C defines it: signs for whole exponents, NaN for roots of negatives."""
    x, y = tl.broadcast(x, y)
    zero = tl.where(y > 0.0, 0.0, float("inf"))
    size = tl.where(x == 0.0, zero, tl.exp2(y * tl.log2(tl.where(x == 0.0, 1.0, tl.abs(x)))))
    odd = tl.floor(y * 0.5) * 2.0 != y
    signed = tl.where(tl.floor(y) == y, tl.where(odd, -size, size), float("nan"))
    return tl.where((y == 0.0) | (x == 1.0), 1.0, tl.where(x < 0.0, signed, size))
''',
}
"""Helper functions that the texts below call, by name."""


class TritonOps(Ops):
    """Texts over float32 tensors, `tl` being ``triton.language``."""

    target = "Triton"

    def cast(self, x: str, dtype: str) -> str:
        """Rounds to a dtype and back."""
        if dtype == "bool":
            return f"({x} != 0.0)"
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
        if name == "pow":
            return self._power(*args)
        self.prelude.add(name)
        return f"{name}({', '.join(args)})"

    def _power(self, x: str, y: str) -> str:
        try:
            exponent = float(y)
        except ValueError:
            exponent = math.nan
        plain = {
            1.0: x,
            2.0: f"({x} * {x})",
            3.0: f"({x} * {x} * {x})",
            0.5: f"tl.sqrt_rn({x})",
            -1.0: f"(1.0 / {x})",
            -0.5: f"tl.rsqrt({x})",
        }
        if exponent in plain:
            return plain[exponent]
        self.prelude.add("power")
        wrapped = [
            a if math.isnan(_number(a)) else f"tl.full((1, 1), {a}, tl.float32)" for a in (x, y)
        ]
        return f"power({', '.join(wrapped)})"


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan
