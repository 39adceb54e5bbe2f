"""Where an element's code, scale and nested scale lie, as sympy expressions of e, n and k.

Element numbers are linear in the indices, so every floor division and remainder is taken apart
by divisibility and by the ranges of what is left: with ``K % 64 == 0`` the block of element
``n*K + k`` is ``n*(K/64) + k//64``, and a per-channel scale is simply ``n``. What cannot be
simplified stays as `Div` and `Rem`, which every target prints as ``//`` and ``%``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import sympy

from fxquant.codegen.spec import WeightOperand

Ranges = Mapping[sympy.Symbol, int]
"""The size of each index: it runs from 0 to the size, exclusive."""

E, N, K = sympy.symbols("e n k", integer=True, nonnegative=True)


class Div(sympy.Function):
    """Floor division of a number that is not negative by a positive integer."""

    nargs = 2

    def _eval_is_integer(self) -> bool:
        return True

    def _eval_is_nonnegative(self) -> bool:
        return True


class Rem(sympy.Function):
    """Remainder of a number that is not negative by a positive integer."""

    nargs = 2

    def _eval_is_integer(self) -> bool:
        return True

    def _eval_is_nonnegative(self) -> bool:
        return True


def largest(expr: sympy.Expr, ranges: Ranges) -> int:
    """An upper bound of an expression with coefficients that are not negative."""
    if expr.is_Integer:
        return int(expr)
    if expr.is_Symbol:
        return ranges[expr] - 1
    if isinstance(expr, Div):
        return largest(expr.args[0], ranges) // int(expr.args[1])
    if isinstance(expr, Rem):
        return min(int(expr.args[1]) - 1, largest(expr.args[0], ranges))
    bounds = [largest(arg, ranges) for arg in expr.args]
    return sum(bounds) if expr.is_Add else math.prod(bounds)


def divide(expr: sympy.Expr, by: int, ranges: Ranges) -> sympy.Expr:
    """``expr // by``, simplified."""
    whole, rest = _split(expr, by)
    whole = whole / by
    if largest(rest, ranges) < by:
        return whole
    reduced = _reduce(rest, by, ranges)
    if reduced is not None:
        return whole + divide(*reduced, ranges)
    if isinstance(rest, Div):
        return whole + Div(rest.args[0], rest.args[1] * by)
    return whole + Div(rest, sympy.Integer(by))


def _reduce(expr: sympy.Expr, by: int, ranges: Ranges) -> tuple[sympy.Expr, int] | None:
    """A smaller division with the same quotient: ``(64*a + b) // 128`` is ``a // 2`` if b < 64.

    Terms that share a divisor with `by` count in steps of it, and what is left never makes a step.
    """
    constant, terms = expr.as_coeff_Add()
    ordered = sorted(sympy.Add.make_args(terms), key=lambda t: -int(t.as_coeff_Mul()[0]))
    step = by
    for count, term in enumerate(ordered, 1):
        step = math.gcd(step, int(term.as_coeff_Mul()[0]))
        left = sympy.Add(*ordered[count:], int(constant) % step)
        if step > 1 and largest(left, ranges) < step:
            steps = sum(taken / step for taken in ordered[:count]) + int(constant) // step
            return steps, by // step
    return None


def remainder(expr: sympy.Expr, by: int, ranges: Ranges) -> sympy.Expr:
    """``expr % by``, simplified."""
    rest = _split(expr, by)[1]
    return rest if largest(rest, ranges) < by else Rem(rest, sympy.Integer(by))


def substitute(expr: sympy.Expr, old: sympy.Symbol, new: sympy.Expr, ranges: Ranges) -> sympy.Expr:
    """Replaces an index and simplifies with the ranges of the new ones."""
    if expr == old:
        return new
    if not expr.has(old):
        return expr
    args = [substitute(arg, old, new, ranges) for arg in expr.args]
    if isinstance(expr, Div):
        return divide(sympy.expand(args[0]), int(args[1]), ranges)
    if isinstance(expr, Rem):
        return remainder(sympy.expand(args[0]), int(args[1]), ranges)
    return sympy.expand(expr.func(*args))


def _split(expr: sympy.Expr, by: int) -> tuple[sympy.Expr, sympy.Expr]:
    """The part that `by` is certain to divide, and the rest."""
    constant, terms = sympy.expand(expr).as_coeff_Add()
    rest = sympy.Integer(int(constant) % by)
    whole = constant - rest
    for term in sympy.Add.make_args(terms):
        if int(term.as_coeff_Mul()[0]) % by == 0:
            whole += term
        else:
            rest += term
    return whole, rest


@dataclass(frozen=True)
class WeightIndex:
    """The addresses of element (e, n, k) of a weight.

    Attributes:
        ranges: Sizes of e, n and k.
        element: Its number in the flattened stored tensor.
        byte: The byte with its code.
        place: Which of the byte's codes it is, counted from the high bits.
        block: Its block: the number of its scale.
        nested: The block of its scale (0 without double quantization).
    """

    ranges: dict[sympy.Symbol, int]
    element: sympy.Expr
    byte: sympy.Expr
    place: sympy.Expr
    block: sympy.Expr
    nested: sympy.Expr

    @classmethod
    def of(cls, operand: WeightOperand) -> WeightIndex:
        """The addresses in an operand."""
        encoding = operand.encoding
        ranges = dict(zip((E, N, K), operand.sizes, strict=True))
        element = sympy.Integer(operand.offset)
        for symbol, stride in zip((E, N, K), operand.strides, strict=True):
            if ranges[symbol] > 1:
                element += stride * symbol
        block = _block(element, operand, ranges)
        scale = encoding.scale
        nested = _flat_block(block, scale.block[0], ranges) if scale else sympy.Integer(0)
        return cls(
            ranges,
            element,
            divide(element, encoding.codes_per_byte, ranges),
            remainder(element, encoding.codes_per_byte, ranges),
            block,
            nested,
        )

    def run_of_block(self, axis: sympy.Symbol, most: int) -> int:
        """How many consecutive, aligned indices of an axis are certain to share a scale.

        Returns:
            The largest power of two up to `most`; 0 when the axis does not matter at all.
        """
        if not self.block.has(axis):
            return 0
        run = most
        while run > 1 and self.per_run(self.block, axis, run) is None:
            run //= 2
        return run

    def packs_along(self, axis: sympy.Symbol, codes_per_byte: int) -> bool:
        """Whether aligned groups of an axis' consecutive elements are the codes of one byte."""
        if codes_per_byte == 1:
            return self.element.coeff(axis) == 1
        group, inner = _run_symbols()
        ranges = self._run_ranges(axis, codes_per_byte)
        place = substitute(self.place, axis, codes_per_byte * group + inner, ranges)
        return place == inner and self.per_run(self.byte, axis, codes_per_byte) is not None

    def aligned(self, axis: sympy.Symbol, count: int) -> sympy.Expr | None:
        """The number of an element over `count`, in terms of ``axis // count`` (written `axis`).

        None unless aligned groups of `count` consecutive indices are such elements, in order.
        """
        group, inner = _run_symbols()
        ranges = self._run_ranges(axis, count)
        place = remainder(self.element, count, self.ranges)
        if substitute(place, axis, count * group + inner, ranges) != inner:
            return None
        return self.per_run(divide(self.element, count, self.ranges), axis, count)

    def per_run(self, expr: sympy.Expr, axis: sympy.Symbol, run: int) -> sympy.Expr | None:
        """An expression in terms of ``axis // run`` (written `axis`), None if it varies inside."""
        group, inner = _run_symbols()
        ranges = self._run_ranges(axis, run)
        out = substitute(expr, axis, run * group + inner, ranges)
        return None if out.has(inner) else out.subs(group, axis)

    def _run_ranges(self, axis: sympy.Symbol, run: int) -> Ranges:
        group, inner = _run_symbols()
        return {**self.ranges, group: -(-self.ranges[axis] // run), inner: run}


def _run_symbols() -> tuple[sympy.Symbol, sympy.Symbol]:
    return sympy.symbols("group inner", integer=True, nonnegative=True)


def _block(element: sympy.Expr, operand: WeightOperand, ranges: Ranges) -> sympy.Expr:
    encoding, shape = operand.encoding, operand.shape
    if encoding.is_flat:
        return _flat_block(element, encoding.block[0], ranges)
    extents = (1,) * (len(shape) - len(encoding.block)) + encoding.block
    block, stride = sympy.Integer(0), operand.numel
    for dim, (size, extent) in enumerate(zip(shape, extents, strict=True)):
        width = size if extent == -1 else extent
        stride //= size
        coordinate = divide(element, stride, ranges)
        if dim > 0:
            coordinate = remainder(coordinate, size, ranges)
        block = block * -(-size // width) + divide(coordinate, width, ranges)
    return sympy.expand(block)


def _flat_block(number: sympy.Expr, block: int, ranges: Ranges) -> sympy.Expr:
    return sympy.Integer(0) if block == -1 else divide(number, block, ranges)


def index_text(expr: sympy.Expr, names: Mapping[sympy.Symbol, str], division: str = "//") -> str:
    """An index expression as source text.

    Args:
        expr: Made of sums, products with numbers, `Div` and `Rem`.
        names: What each symbol is called.
        division: How the language spells floor division of numbers that are not negative.
    """

    def tight(part: sympy.Expr) -> str:
        text = index_text(part, names, division)
        return text if part.is_Symbol or part.is_Integer else f"({text})"

    if expr.is_Add:
        terms = sorted(expr.args, key=lambda arg: (not arg.free_symbols, -_weight(arg), str(arg)))
        return " + ".join(index_text(arg, names, division) for arg in terms)
    if expr.is_Mul:
        coefficient, factor = expr.as_coeff_Mul()
        return f"{tight(factor)} * {coefficient}"
    if isinstance(expr, Div):
        return f"{tight(expr.args[0])} {division} {expr.args[1]}"
    if isinstance(expr, Rem):
        return f"{tight(expr.args[0])} % {expr.args[1]}"
    return names[expr] if expr.is_Symbol else str(expr)


def _weight(term: sympy.Expr) -> int:
    return int(term.as_coeff_Mul()[0])
