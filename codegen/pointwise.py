"""The table of pointwise ops: which of ATen's kernels know, and how a target spells them.

An epilogue works in float32 on the accumulator (``[batch,] rows, outputs``); casts to 16 bits
round and the work goes on in float32; comparisons give booleans.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from fxquant import errors
from fxquant.codegen.epilogue import EpilogueNode

FUNCTIONS = {
    **dict.fromkeys(("abs", "ceil", "floor", "round", "sqrt", "trunc"), 1),
    **dict.fromkeys(("erf", "erfc", "exp", "exp2", "expm1", "log", "log10", "log1p", "log2"), 1),
    **dict.fromkeys(("acos", "asin", "atan", "cos", "sin", "tan"), 1),
    **dict.fromkeys(("acosh", "asinh", "atanh", "cosh", "sinh", "tanh"), 1),
    **dict.fromkeys(("rsqrt", "sign", "signbit"), 1),
    **dict.fromkeys(("atan2", "copysign", "fmod", "hypot", "maximum", "minimum", "pow"), 2),
}
"""ATen's functions that a target spells by name, and how many numbers each takes."""
_COMPARISONS = {"eq", "ne", "lt", "le", "gt", "ge", "isinf", "isnan", "signbit"}
_BITWISE = {
    "bitwise_and": "logical_and",
    "bitwise_or": "logical_or",
    "bitwise_xor": "logical_xor",
    "bitwise_not": "logical_not",
}
_LOGICAL = {*_BITWISE.values()}
_OF_BOOLEANS = {
    "add": "logical_or",
    "maximum": "logical_or",
    "mul": "logical_and",
    "minimum": "logical_and",
    **_BITWISE,
}
"""What ops of booleans are that give booleans: their sum is `or`, as torch has it."""
_TAKE_BOOLEANS = {"where", "_to_copy", "convert_element_type", *_LOGICAL}


class Ops:
    """How a target spells ATen's pointwise ops: one method each, from texts to text.

    A method's name is the op's without namespace and overload (``aten.add.Tensor`` is `add`); it
    takes the op's arguments as texts. What has no method is one of `FUNCTIONS`. A target
    subclasses this, fills in the primitives that raise `NotImplementedError` here, and may
    override the rest.

    Attributes:
        prelude: Helper functions that the texts call.
        booleans: The names that stand for booleans; every other is a float32.
    """

    target = "?"

    def __init__(self, booleans: Iterable[str] = ()) -> None:
        self.prelude: set[str] = set()
        self.booleans = set(booleans)

    def call(self, node: EpilogueNode, names: Mapping[str, str], result: str = "") -> str:
        """The text of one node.

        Args:
            node: The op and its arguments.
            names: What ``%acc``, ``%in0``, ``%0`` .. are called.
            result: What the node's value will be called.

        Raises:
            KernelError: The target has no entry for the op.
        """
        name = node.op.split(".")[1]
        if self.is_boolean(node, names):
            name = _OF_BOOLEANS.get(name, name)
            self.booleans.add(result)
        if name not in OPS:
            raise errors.no_pointwise_op(node.op, self.target, OPS)
        if name not in _TAKE_BOOLEANS:
            names = {key: self.number(text) for key, text in names.items()}
        args = [self.argument(value, names) for value in node.args]
        kwargs = {key: self.argument(value, names) for key, value in node.kwargs}
        try:
            if name in FUNCTIONS:
                return self.function(name, *_bound(name, *args, **kwargs))
            text: str = getattr(self, name)(*args, **kwargs)
        except TypeError as error:
            raise errors.no_pointwise_op(f"{node.op} ({error})", self.target, OPS) from error
        return text

    def is_boolean(self, node: EpilogueNode, names: Mapping[str, str]) -> bool:
        """Whether a node's result is a boolean."""
        name = node.op.split(".")[1]
        if name in {*_COMPARISONS, *_LOGICAL, *_BITWISE} or "bool" in node.values:
            return True
        values = node.args[1:] if name == "where" else node.args
        return name in {"where", *_OF_BOOLEANS} and all(
            isinstance(value, bool) or (isinstance(value, str) and names[value] in self.booleans)
            for value in values
        )

    def argument(self, value: Any, names: Mapping[str, str]) -> Any:
        """The text of an argument; None and the names of dtypes and modes stay as they are."""
        if isinstance(value, float):
            return self.constant(value)
        if isinstance(value, str):
            return names.get(value, value)
        return value

    # --- primitives: a target spells these ---

    def constant(self, value: float) -> str:
        """A float32 constant."""
        if math.isnan(value) or math.isinf(value):
            return f'float("{value}")'
        return repr(value)

    def cast(self, x: str, dtype: str) -> str:
        """Rounds to a dtype and returns to float32; ``"bool"`` is ``x != 0``."""
        raise NotImplementedError

    def function(self, name: str, *args: str) -> str:
        """One of `FUNCTIONS`; ``signbit`` gives a boolean."""
        raise NotImplementedError

    def where(self, condition: str, x: str, y: str) -> str:
        """Elementwise choice."""
        raise NotImplementedError

    def number(self, x: str) -> str:
        """A float32 in the place of a boolean; any other text as it is."""
        if x not in self.booleans:
            return x
        return self.where(x, self.constant(1.0), self.constant(0.0))

    def condition(self, x: str) -> str:
        """Whether a value is not zero."""
        return x if x in self.booleans else self.ne(x, self.constant(0.0))

    # --- operators ---

    def add(self, x: str, y: str, alpha: str | None = None) -> str:
        """``x + alpha * y``."""
        return f"({x} + {self._scaled(y, alpha)})"

    def sub(self, x: str, y: str, alpha: str | None = None) -> str:
        """``x - alpha * y``."""
        return f"({x} - {self._scaled(y, alpha)})"

    def rsub(self, x: str, y: str, alpha: str | None = None) -> str:
        """``y - alpha * x``."""
        return self.sub(y, x, alpha)

    def mul(self, x: str, y: str) -> str:
        """Product."""
        return f"({x} * {y})"

    def div(self, x: str, y: str, rounding_mode: str | None = None) -> str:
        """Quotient, as it is or the integer next to it: ``"floor"``, ``"trunc"``."""
        text = f"({x} / {y})"
        return text if rounding_mode is None else self.function(rounding_mode, bare(text))

    def remainder(self, x: str, y: str) -> str:
        """What a division with the quotient rounded down leaves: of the sign of `y`."""
        rest = self.function("fmod", x, y)
        other = self.ne(self.lt(rest, self.constant(0.0)), self.lt(y, self.constant(0.0)))
        turned = f"({other} & {self.ne(rest, self.constant(0.0))})"
        return self.where(turned, self.add(rest, y), rest)

    def ldexp(self, x: str, y: str) -> str:
        """``x * 2 ** y``."""
        return self.mul(x, self.function("exp2", y))

    def addcmul(self, x: str, y: str, z: str, value: str | None = None) -> str:
        """``x + value * y * z``."""
        return self.add(x, self.mul(y, z), value)

    def addcdiv(self, x: str, y: str, z: str, value: str | None = None) -> str:
        """``x + value * y / z``."""
        return self.add(x, self.div(y, z), value)

    def neg(self, x: str) -> str:
        """Negation."""
        return f"(-{x})"

    def reciprocal(self, x: str) -> str:
        """``1 / x``."""
        return self.div(self.constant(1.0), x)

    def square(self, x: str) -> str:
        """``x * x``."""
        return self.mul(x, x)

    def eq(self, x: str, y: str) -> str:
        """Equal."""
        return f"({x} == {y})"

    def ne(self, x: str, y: str) -> str:
        """Not equal."""
        return f"({x} != {y})"

    def lt(self, x: str, y: str) -> str:
        """Less."""
        return f"({x} < {y})"

    def le(self, x: str, y: str) -> str:
        """Less or equal."""
        return f"({x} <= {y})"

    def gt(self, x: str, y: str) -> str:
        """Greater."""
        return f"({x} > {y})"

    def ge(self, x: str, y: str) -> str:
        """Greater or equal."""
        return f"({x} >= {y})"

    def isnan(self, x: str) -> str:
        """Not equal to itself."""
        return self.ne(x, x)

    def isinf(self, x: str) -> str:
        """Of infinite magnitude."""
        return self.eq(self.function("abs", x), self.constant(math.inf))

    def logical_and(self, x: str, y: str) -> str:
        """Both are not zero."""
        return f"({self.condition(x)} & {self.condition(y)})"

    def logical_or(self, x: str, y: str) -> str:
        """Either is not zero."""
        return f"({self.condition(x)} | {self.condition(y)})"

    def logical_xor(self, x: str, y: str) -> str:
        """One of them is not zero."""
        return f"({self.condition(x)} != {self.condition(y)})"

    def logical_not(self, x: str) -> str:
        """Zero."""
        return f"({x} == False)" if x in self.booleans else self.eq(x, self.constant(0.0))

    # --- made of the above ---

    def clamp(self, x: str, min: str | None = None, max: str | None = None) -> str:  # noqa: A002
        """Limits to an interval."""
        if min is not None:
            x = self.function("maximum", x, min)
        return x if max is None else self.function("minimum", x, max)

    def clamp_min(self, x: str, min: str) -> str:  # noqa: A002
        """Limits from below."""
        return self.clamp(x, min)

    def clamp_max(self, x: str, max: str) -> str:  # noqa: A002
        """Limits from above."""
        return self.clamp(x, None, max)

    def hardtanh(self, x: str, min_val: str = "-1.0", max_val: str = "1.0") -> str:
        """Limits to an interval."""
        return self.clamp(x, min_val, max_val)

    def relu(self, x: str) -> str:
        """Rectifier."""
        return self.function("maximum", x, self.constant(0.0))

    def leaky_relu(self, x: str, negative_slope: str = "0.01") -> str:
        """Rectifier with a slope."""
        return self.where(self.gt(x, self.constant(0.0)), x, self.mul(x, negative_slope))

    def sigmoid(self, x: str) -> str:
        """Logistic function."""
        one = self.constant(1.0)
        return self.div(one, self.add(one, self.function("exp", self.neg(x))))

    def silu(self, x: str) -> str:
        """``x * sigmoid(x)``."""
        return self.div(x, self.add(self.constant(1.0), self.function("exp", self.neg(x))))

    def gelu(self, x: str, approximate: str = "none") -> str:
        """Gaussian error linear unit, exact or by tanh."""
        one, half = self.constant(1.0), self.constant(0.5)
        if approximate == "tanh":
            cube = self.mul(self.constant(0.044715), self.mul(x, self.square(x)))
            inner = self.mul(self.constant(math.sqrt(2 / math.pi)), self.add(x, cube))
            bell = self.function("tanh", inner)
        else:
            bell = self.function("erf", self.mul(x, self.constant(math.sqrt(0.5))))
        return self.mul(self.mul(half, x), self.add(one, bell))

    def _to_copy(self, x: str, dtype: str | None = None) -> str:
        return x if dtype in (None, "float32") else self.cast(x, str(dtype))

    def convert_element_type(self, x: str, dtype: str) -> str:
        """A cast."""
        return self._to_copy(x, dtype)

    def _scaled(self, y: str, alpha: str | None) -> str:
        return y if alpha in (None, "1.0") else self.mul(y, str(alpha))


def _bound(name: str, *args: str) -> tuple[str, ...]:
    """The arguments of a function, if there are as many as it takes."""
    if len(args) != FUNCTIONS[name]:
        raise TypeError(f"{len(args)} arguments")
    return args


_OWN = {"call", "is_boolean", "argument", "constant", "cast", "function", "number", "condition"}
_METHODS = tuple(
    name
    for name, value in vars(Ops).items()
    if callable(value) and name not in _OWN and (name == "_to_copy" or name[0] != "_")
)
OPS = tuple(sorted({*FUNCTIONS, *_METHODS, *_BITWISE}))
"""The ATen ops that an epilogue may hold."""


def is_pointwise(target: Any) -> bool:
    """Whether an FX node's target is an op that epilogues may hold."""
    return (
        isinstance(target, torch._ops.OpOverload)
        and target.namespace == "aten"
        and target._schema.name.removeprefix("aten::") in OPS
    )


@functools.lru_cache(maxsize=1024)
def boxed(op: str) -> frozenset[int | str]:
    """The arguments of an op, by place or keyword, that ATen wants as a tensor even if one number.

    Args:
        op: As in ``"aten.maximum.default"``.
    """
    _, name, overload = op.split(".")
    if name in ("add", "sub", "mul", "div"):
        return frozenset()
    found: Any = getattr(getattr(torch.ops.aten, name), overload)
    tensors = [
        (i, a.name) for i, a in enumerate(found._schema.arguments) if "Tensor" in str(a.type)
    ]
    return frozenset(key for pair in tensors for key in pair)


def is_spelled(node: EpilogueNode) -> bool:
    """Whether an op of the table has an entry with these arguments: overloads differ in theirs."""
    name = node.op.split(".")[1]
    kwargs = dict(node.kwargs)
    if name in FUNCTIONS:
        return len(node.args) == FUNCTIONS[name] and not kwargs
    try:
        inspect.signature(getattr(Ops, _BITWISE.get(name, name))).bind(None, *node.args, **kwargs)
    except TypeError:
        return False
    return kwargs.get("rounding_mode") in (None, "floor", "trunc")


def bare(text: str) -> str:
    """A text without the parentheses around all of it."""
    depth = 0
    for position, letter in enumerate(text):
        depth += {"(": 1, ")": -1}.get(letter, 0)
        if depth == 0:
            whole = position == len(text) - 1 and text[0] == "("
            return text[1:-1] if whole else text
    return text
