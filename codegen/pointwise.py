"""Pointwise epilogues: which ATen ops there are, how a target spells them, and FX graphs of them.

An epilogue works in float32 on the accumulator (``[batch,] rows, outputs``); casts to 16 bits
round and the work goes on in float32; comparisons give booleans.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from fxquant import errors
from fxquant.codegen.epilogue import OPERAND_DTYPES, Epilogue, EpilogueNode, EpilogueOperand


class Ops:
    """How a target spells ATen's pointwise ops: one method each, from texts to text.

    A method's name is the op's without namespace and overload (``aten.add.Tensor`` is `add`); it
    takes the op's arguments as texts. A target subclasses this, fills in the primitives that
    raise `NotImplementedError` here, and may override the rest. `prelude` collects the names of
    helper functions that the texts call.
    """

    target = "?"

    def __init__(self) -> None:
        self.prelude: set[str] = set()

    def call(self, node: EpilogueNode, names: Mapping[str, str]) -> str:
        """The text of one node.

        Args:
            node: The op and its arguments.
            names: What ``%acc``, ``%in0``, ``%0`` .. are called.

        Raises:
            KernelError: The target has no entry for the op.
        """
        name = node.op.split(".")[1]
        method: Callable[..., str] | None = getattr(self, name, None) if name in OPS else None
        if method is None:
            raise errors.no_pointwise_op(node.op, self.target, OPS)
        args = [self.argument(value, names) for value in node.args]
        kwargs = {key: self.argument(value, names) for key, value in node.kwargs}
        try:
            return method(*args, **kwargs)
        except TypeError as error:
            raise errors.no_pointwise_op(f"{node.op} ({error})", self.target, OPS) from error

    def argument(self, value: Any, names: Mapping[str, str]) -> Any:
        """The text of an argument; None and dtype names stay as they are."""
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
        """A function of floats that is no operator: exp, log, sqrt, rsqrt, erf, tanh, pow ..."""
        raise NotImplementedError

    def where(self, condition: str, x: str, y: str) -> str:
        """Elementwise choice."""
        raise NotImplementedError

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

    def div(self, x: str, y: str) -> str:
        """Quotient."""
        return f"({x} / {y})"

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

    def logical_and(self, x: str, y: str) -> str:
        """Both, of booleans."""
        return f"({x} & {y})"

    def logical_or(self, x: str, y: str) -> str:
        """Either, of booleans."""
        return f"({x} | {y})"

    def logical_not(self, x: str) -> str:
        """Neither zero nor true."""
        return self.where(x, "False", "True")

    # --- functions ---

    def abs(self, x: str) -> str:
        """Magnitude."""
        return self.function("abs", x)

    def exp(self, x: str) -> str:
        """Exponential."""
        return self.function("exp", x)

    def exp2(self, x: str) -> str:
        """Power of two."""
        return self.function("exp2", x)

    def log(self, x: str) -> str:
        """Natural logarithm."""
        return self.function("log", x)

    def log2(self, x: str) -> str:
        """Binary logarithm."""
        return self.function("log2", x)

    def sqrt(self, x: str) -> str:
        """Square root."""
        return self.function("sqrt", x)

    def rsqrt(self, x: str) -> str:
        """``1 / sqrt(x)``."""
        return self.function("rsqrt", x)

    def erf(self, x: str) -> str:
        """Error function."""
        return self.function("erf", x)

    def sin(self, x: str) -> str:
        """Sine."""
        return self.function("sin", x)

    def cos(self, x: str) -> str:
        """Cosine."""
        return self.function("cos", x)

    def floor(self, x: str) -> str:
        """The next integer downwards."""
        return self.function("floor", x)

    def ceil(self, x: str) -> str:
        """The next integer upwards."""
        return self.function("ceil", x)

    def tanh(self, x: str) -> str:
        """Hyperbolic tangent."""
        return self.function("tanh", x)

    def pow(self, x: str, y: str) -> str:
        """Power."""
        return self.function("pow", x, y)

    def maximum(self, x: str, y: str) -> str:
        """The larger; NaN if either is."""
        return self.function("maximum", x, y)

    def minimum(self, x: str, y: str) -> str:
        """The smaller; NaN if either is."""
        return self.function("minimum", x, y)

    # --- made of the above ---

    def clamp(self, x: str, min: str | None = None, max: str | None = None) -> str:  # noqa: A002
        """Limits to an interval."""
        if min is not None:
            x = self.maximum(x, min)
        return x if max is None else self.minimum(x, max)

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
        return self.maximum(x, self.constant(0.0))

    def leaky_relu(self, x: str, negative_slope: str = "0.01") -> str:
        """Rectifier with a slope."""
        return self.where(self.gt(x, self.constant(0.0)), x, self.mul(x, negative_slope))

    def sigmoid(self, x: str) -> str:
        """Logistic function."""
        one = self.constant(1.0)
        return self.div(one, self.add(one, self.exp(self.neg(x))))

    def silu(self, x: str) -> str:
        """``x * sigmoid(x)``."""
        return self.div(x, self.add(self.constant(1.0), self.exp(self.neg(x))))

    def gelu(self, x: str, approximate: str = "none") -> str:
        """Gaussian error linear unit, exact or by tanh."""
        one, half = self.constant(1.0), self.constant(0.5)
        if approximate == "tanh":
            cube = self.mul(self.constant(0.044715), self.mul(x, self.square(x)))
            inner = self.mul(self.constant(math.sqrt(2 / math.pi)), self.add(x, cube))
            bell = self.tanh(inner)
        else:
            bell = self.erf(self.mul(x, self.constant(math.sqrt(0.5))))
        return self.mul(self.mul(half, x), self.add(one, bell))

    def _to_copy(self, x: str, dtype: str | None = None) -> str:
        return x if dtype in (None, "float32") else self.cast(x, str(dtype))

    def convert_element_type(self, x: str, dtype: str) -> str:
        """A cast."""
        return self._to_copy(x, dtype)

    def _scaled(self, y: str, alpha: str | None) -> str:
        return y if alpha in (None, "1.0") else self.mul(y, str(alpha))


_OWN = {"call", "argument", "constant", "cast", "function"}
OPS = tuple(
    sorted(
        name
        for name, value in vars(Ops).items()
        if callable(value) and name not in _OWN and (name == "_to_copy" or name[0] != "_")
    )
)
"""The ATen ops that an epilogue may hold."""


def to_fx(epilogue: Epilogue) -> fx.Graph:
    """The epilogue as a graph: placeholders ``acc``, ``in0`` .., ATen calls, one output.

    With several weights ``acc1`` .. follow ``acc``; with further results the output is a tuple.
    """
    graph = fx.Graph()
    nodes = {"%acc": graph.placeholder("acc")}
    for number in range(1, epilogue.sums):
        nodes[f"%acc{number}"] = graph.placeholder(f"acc{number}")
    for number in range(len(epilogue.operands)):
        nodes[f"%in{number}"] = graph.placeholder(f"in{number}")

    def value_of(value: Any) -> Any:
        if isinstance(value, str):
            return getattr(torch, value) if value in OPERAND_DTYPES else nodes.get(value, value)
        return value

    for number, node in enumerate(epilogue.nodes):
        _, name, overload = node.op.split(".")
        nodes[f"%{number}"] = graph.call_function(
            getattr(getattr(torch.ops.aten, name), overload),
            tuple(map(value_of, node.args)),
            {key: value_of(value) for key, value in node.kwargs},
        )
    results = [epilogue.result, *(result.value for result in epilogue.more)]
    graph.output(nodes[results[0]] if len(results) == 1 else tuple(nodes[r] for r in results))
    return graph


def from_fx(graph: fx.Graph, operands: Sequence[EpilogueOperand]) -> Epilogue:
    """The epilogue that a graph describes.

    Args:
        graph: Placeholders for the accumulator and for every operand, calls of ATen overloads,
            and one output.
        operands: What the placeholders after the first stand for.

    Raises:
        KernelError: A node is not a pointwise ATen op that epilogues may hold.
    """
    names: dict[fx.Node, str] = {}
    nodes: list[EpilogueNode] = []

    def written(value: Any) -> Any:
        if isinstance(value, fx.Node):
            return names[value]
        return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value

    for node in graph.nodes:
        if node.op == "placeholder":
            names[node] = f"%in{len(names) - 1}" if names else "%acc"
        elif node.op == "call_function":
            if not is_pointwise(node.target):
                raise errors.no_pointwise_op(node.target, "an epilogue", OPS)
            names[node] = f"%{len(nodes)}"
            kwargs = tuple((key, written(value)) for key, value in node.kwargs.items())
            args = tuple(written(value) for value in node.args)
            nodes.append(EpilogueNode(str(node.target), args, kwargs))
    (result,) = graph.output_node().args
    epilogue = Epilogue(tuple(operands), tuple(nodes))
    if not isinstance(result, fx.Node) or names[result] != epilogue.result:
        raise errors.bad_spec("epilogue", str(result), f"its last node, {epilogue.result}")
    return epilogue


def is_pointwise(target: Any) -> bool:
    """Whether an FX node's target is an op that epilogues may hold."""
    return (
        isinstance(target, torch._ops.OpOverload)
        and target.namespace == "aten"
        and target._schema.name.removeprefix("aten::") in OPS
    )


def bare(text: str) -> str:
    """A text without the parentheses around all of it."""
    depth = 0
    for position, letter in enumerate(text):
        depth += {"(": 1, ")": -1}.get(letter, 0)
        if depth == 0:
            whole = position == len(text) - 1 and text[0] == "("
            return text[1:-1] if whole else text
    return text
