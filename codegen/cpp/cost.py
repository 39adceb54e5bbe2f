"""What the two skeletons of a kernel cost, and up to how many rows the one for few is the quicker.

Costs are sympy expressions in `M` (rows of the activation), `THREADS` and the rates of a machine.
Instructions are those on vectors of `Isa.lanes` dwords. What both skeletons do alike (rows to lines
and panels, the epilogue) is left out, and so is what caches do to panels that are read again.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import sympy

from fxquant.codegen.cpp.isa import Isa
from fxquant.codegen.cpp.layout import prepared_bytes
from fxquant.codegen.cpp.plan import CHUNK, SUPER_ROWS, TILE, TILE_ROWS, Plan

M, THREADS = sympy.symbols("m threads", integer=True, positive=True)
BANDWIDTH, DOTS, VECTORS = sympy.symbols("bandwidth dots vectors", positive=True)
"""Bytes a second of all threads, dot products and other vector instructions a second of each."""

DOUBT = 1.5
"""What decodes to memory, or loads the tile unit from there, suffers more from neighbours than what
stays in registers: by this it has to be better."""
ALL_ROWS = sys.maxsize
"""The threshold of a kernel for which few rows are never slower."""

_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1}


@dataclass(frozen=True)
class Rates:
    """What a machine does in a second.

    Attributes:
        bandwidth: Bytes that all threads read from memory.
        few: Dot products that one thread makes in panels of few rows, by `Plan.path`.
        many: The same in panels of many rows, which use each activation for two vectors. One
            product of tiles is 256 of them.
        vectors: Other instructions on vectors that one thread does.
    """

    bandwidth: float
    few: Mapping[str, float]
    many: Mapping[str, float]
    vectors: float


_USUAL = {
    "amx": Rates(
        20e9,
        {"bf16": 1.5e9, "int8": 6e9, "f32": 6e9},
        {"bf16": 48e9, "int8": 48e9, "f32": 6e9},
        6e9,
    ),
    "avx512": Rates(
        20e9,
        {"bf16": 3.6e9, "int8": 3.6e9, "f32": 3.6e9},
        {"bf16": 3.6e9, "int8": 3.6e9, "f32": 3.6e9},
        11e9,
    ),
    "avx512vbmi": Rates(20e9, {"int8": 5.5e9, "f32": 5.5e9}, {"int8": 5.5e9, "f32": 5.5e9}, 10e9),
    "avx512vnni": Rates(20e9, {"int8": 5.5e9, "f32": 5.5e9}, {"int8": 5.5e9, "f32": 5.5e9}, 10e9),
    "avx2vnni": Rates(20e9, {"int8": 4e9, "f32": 4.6e9}, {"int8": 5.7e9, "f32": 5.7e9}, 11e9),
    "avx2": Rates(20e9, {"int8": 1.6e9, "f32": 4.2e9}, {"int8": 1.8e9, "f32": 4.8e9}, 12e9),
    "portable": Rates(20e9, {"int8": 0.1e9, "f32": 1.3e9}, {"int8": 0.1e9, "f32": 1.3e9}, 5e9),
}


def usual_rates(isa: Isa) -> Rates:
    """Rates to reckon with where they cannot be measured.

    Those of a Zen 4 at 3.6 GHz, with tiles or without products of pairs those of a Sapphire Rapids
    at 3 GHz, of AVX2 those of a Zen 3 at 3 GHz.
    """
    return _USUAL[isa.name]


@dataclass(frozen=True)
class Cost:
    """One skeleton's work, as expressions in `M` and `THREADS`.

    Attributes:
        bytes: Read from or written to memory once: codes and scales, activation, result.
        dots: Dot-product instructions.
        operations: Other vector instructions: decoding, scales, totals out of and into the cache.
        share: Of the work, what the busiest thread does.
        is_ahead: Whether codes are asked for before they are needed: reading overlaps with work.
    """

    bytes: sympy.Expr
    dots: sympy.Expr
    operations: sympy.Expr
    share: sympy.Expr
    is_ahead: bool = True

    @property
    def work(self) -> sympy.Expr:
        """Seconds without those of reading, in `M`, `THREADS`, `DOTS` and `VECTORS`."""
        return self.share * (self.dots / DOTS + self.operations / VECTORS)

    @property
    def time(self) -> sympy.Expr:
        """Seconds, in `M`, `THREADS`, `BANDWIDTH`, `DOTS` and `VECTORS`."""
        read = self.bytes / BANDWIDTH
        # Unevaluated: sympy would take a tenth of a second to find out which is larger.
        if self.is_ahead:
            return sympy.Max(read, self.work, evaluate=False)
        return read + self.work


def few_cost(plan: Plan) -> Cost:
    """Of `few`: codes are decoded in registers again for every panel, of each weight."""
    panels = sympy.ceiling(M / plan.few_heights[0])
    tiles, steps, weights = _tiles(plan), _steps(plan), plan.spec.weights
    at_once = min(plan.block, CHUNK)
    decoded = panels * steps * (_operand(plan) + _words(plan))
    if plan.few_in_floats:
        steps = steps * plan.per_step
        decoded = panels * steps * _value(plan)
    totals = M * tiles * _vectors(plan) * math.ceil(plan.k_padded / at_once) * _round_trip(plan)
    scales = panels * tiles * plan.blocks * _scales(plan)
    work = weights * (decoded + totals + scales)
    return Cost(_traffic(plan), M * weights * steps, work, _share(tiles))


def few_rate(plan: Plan, rates: Rates) -> float:
    """Dot products a second that one thread makes of few rows."""
    return rates.few["f32" if plan.few_in_floats else plan.path]


def many_cost(plan: Plan) -> Cost:
    """Of `many`: a tile is decoded once for `SUPER_ROWS` rows, to memory, with its scales."""
    if plan.uses_tiles:
        return _tiles_cost(plan)
    if plan.has_thirds:
        return _thirds_cost(plan)
    least, most = plan.many_heights[-1], plan.many_heights[0]
    rows, supers = least * sympy.ceiling(M / least), sympy.ceiling(M / SUPER_ROWS)
    panels = sympy.ceiling(sympy.Min(M, SUPER_ROWS, evaluate=False) / most)
    tiles, steps, weights = _tiles(plan), _steps(plan), plan.spec.weights
    wanted = sympy.Min(sympy.ceiling(2 * THREADS / tiles), panels, evaluate=False)
    parts = sympy.Max(1, wanted, evaluate=False)
    decoded = supers * parts * steps * _stored_operand(plan)
    each = math.ceil(plan.k_padded / plan.chunk) * _round_trip(plan)
    if plan.keeps_totals:
        each += (plan.blocks - math.ceil(plan.k_padded / plan.chunk)) * (_round_trip(plan) - 2)
    totals = rows * tiles * _vectors(plan) * each
    scales = supers * parts * tiles * plan.blocks * _scales(plan)
    work = weights * (decoded + totals + scales)
    # Codes that are multiplied as they are stored are loaded by the products themselves.
    is_ahead = _stored_operand(plan) > 0
    return Cost(_traffic(plan), rows * weights * steps, work, _share(tiles * parts), is_ahead)


def _tiles_cost(plan: Plan) -> Cost:
    """Of `tiles`: eight rows take half a product's time; scales are of weights, or of sums."""
    rows, supers = 8 * sympy.ceiling(M / 8), sympy.ceiling(M / plan.super_rows)
    panels = sympy.ceiling(sympy.Min(M, plan.super_rows, evaluate=False) / TILE_ROWS)
    tiles, steps, weights = _tiles(plan), _steps(plan), plan.spec.weights
    wanted = sympy.Min(sympy.ceiling(2 * THREADS / tiles), panels, evaluate=False)
    parts = sympy.Max(1, wanted, evaluate=False)
    stored = plan.path == "int8" and plan.encoding.bits == 8
    levels = _LOAD_STORED if stored else _operand(plan) + _STORE + _LOAD
    sums, scales = M * tiles * _vectors(plan), parts * tiles * plan.blocks * _scales(plan)
    ends = max(plan.blocks, plan.k_padded // plan.held)
    if plan.path == "int8" and plan.scales_sums:
        # Rows are loaded for each product, and sums are stored and loaded to be scaled.
        work = supers * (parts * steps * levels + scales) + sums * ends * (_round_trip(plan) + 3)
    else:
        decoded = _LOAD + _stored_operand(plan) if plan.path == "bf16" else levels
        work = supers * (parts * steps * decoded + scales)
        work += sums * 2 * math.ceil(plan.k_padded / plan.chunk)
        work += sums * plan.blocks * _round_trip(plan) if plan.path == "int8" else 0
    if plan.has_spans:
        # Every two panels decode for themselves; rows are loaded for each product, and sums take a
        # trip through memory to totals that are there, too.
        pairs = sympy.ceiling(M / (2 * TILE_ROWS))
        decoded = pairs * steps * (_operand(plan) + _AT_ONCE + _LOAD)
        added = M * tiles * _vectors(plan) * ends * (_round_trip(plan) + 2)
        spans = decoded + pairs * tiles * plan.blocks * _scales(plan)
        spans += M * (steps // TILE_ROWS) * _LOAD + added
        work = sympy.Piecewise((spans, plan.span_rows >= M), (work, True))
    return Cost(_traffic(plan), rows * weights * steps, weights * work, _share(tiles * parts))


def _thirds_cost(plan: Plan) -> Cost:
    """Of `thirds`: whole panels times all parts, whose sums are scaled after every 64 inputs.

    Panels after the first decode once more, beside products that take longer.
    """
    panels, supers = sympy.ceiling(M / TILE_ROWS), sympy.ceiling(M / plan.super_rows)
    tiles, steps, weights = _tiles(plan), _steps(plan) // 2, plan.spec.weights
    wanted = sympy.Min(sympy.ceiling(2 * THREADS / tiles), panels, evaluate=False)
    parts = sympy.Max(1, wanted, evaluate=False)
    levels = len(plan.level_thirds)
    products = len(plan.third_products)
    decoded = supers * parts * steps * (1 + levels * (1 + _STORE))
    scales = supers * parts * tiles * plan.blocks * _scales(plan)
    # Every product has an operand that is loaded for it, and some have two.
    loaded = panels * steps * (products + 3) * _LOAD
    sums = TILE_ROWS * panels * tiles * _vectors(plan) * (plan.k_padded // TILE) * 4
    work = weights * (decoded + scales + loaded + sums)
    dots = TILE_ROWS * panels * weights * steps * products
    return Cost(_traffic(plan), dots, work, _share(tiles * parts))


def many_rate(plan: Plan, rates: Rates) -> float:
    """Dot products a second that one thread makes of many rows."""
    return rates.many["bf16" if plan.has_thirds else plan.path]


def threshold(plan: Plan, rates: Rates, threads: int) -> int:
    """The most rows for which the skeleton for few rows is chosen.

    Where both wait for memory alike, the one for many rows is if it has much less work: work is not
    all done meanwhile.

    Args:
        plan: Of the kernel.
        rates: Of the machine with this many threads.
        threads: That the kernel runs on.

    Returns:
        0 where there is no such skeleton, `ALL_ROWS` where it is always chosen.
    """
    if not plan.is_regular:
        return 0
    costs = (few_cost(plan), few_rate(plan, rates)), (many_cost(plan), many_rate(plan, rates))
    few, many = (_seconds(cost.time, rates, dots, threads) for cost, dots in costs)
    few_work, many_work = (_seconds(cost.work, rates, dots, threads) for cost, dots in costs)
    height, found = plan.few_heights[0], 0
    # Only whole panels are worth a look: a started one is decoded as a whole.
    for rows in (*range(1, height), *range(height, SUPER_ROWS + 1, height)):
        if (few(rows), few_work(rows)) > (many(rows), DOUBT * many_work(rows)):
            return found
        found = rows
    return ALL_ROWS


def prediction(plan: Plan, rates: Rates, threads: int) -> Callable[[int], float]:
    """The seconds of a call by its number of rows: of the skeleton that is the quicker one.

    Args:
        plan: Of the kernel.
        rates: Of the machine with this many threads.
        threads: That the kernel runs on.
    """
    many = _seconds(many_cost(plan).time, rates, many_rate(plan, rates), threads)
    if not plan.is_regular:
        return many
    few = _seconds(few_cost(plan).time, rates, few_rate(plan, rates), threads)
    return lambda rows: min(few(rows), many(rows))


def _seconds(time: sympy.Expr, rates: Rates, dots: float, threads: int) -> Callable[[int], float]:
    """A time on a machine, of the number of rows."""
    compiled = sympy.lambdify([M, THREADS, BANDWIDTH, DOTS, VECTORS], time, modules="math")
    return lambda rows: float(compiled(rows, threads, rates.bandwidth, dots, rates.vectors))


def _tiles(plan: Plan) -> int:
    return plan.matrices * plan.n_tiles


def _vectors(plan: Plan) -> int:
    return TILE // plan.isa.lanes


def _steps(plan: Plan) -> int:
    """Dot products of one row with one weight."""
    return _tiles(plan) * _vectors(plan) * (plan.k_padded // plan.per_step)


def _traffic(plan: Plan) -> sympy.Expr:
    experts, n, k = plan.spec.weight.sizes
    e, spec = plan.matrices, plan.spec
    results = n * sum(_BYTES[dtype] for dtype in plan.result_dtypes)
    weight = prepared_bytes(plan) * e // experts
    return spec.weights * weight + e * M * (k * _BYTES[spec.x_dtype] + results)


def _share(items: sympy.Expr | int) -> sympy.Expr:
    return sympy.ceiling(sympy.sympify(items) / THREADS) / items


# --- instructions, counted in what `decode`, `scales`, `few` and `many` print -----------------


_STORE = 4
"""A store of decoded operands: a chunk of them does not fit the first-level cache."""


_LOAD = 1
"""A register of the tile unit takes a vector of operands."""

_AT_ONCE = 2
"""A store of operands that are taken soon, with what that keeps waiting."""

_LOAD_STORED = 6
"""The same of codes as they are stored: not even those that were asked for are near enough."""


def _value(plan: Plan) -> int:
    """For a vector of float32 levels."""
    bits, isa = plan.encoding.bits, plan.isa
    if bits == 8:
        return 3 if plan.encoding.is_uniform else 2 + 2 * isa.lanes
    if isa.vectors == "portable":
        return 3 * isa.lanes
    if plan.joins_bytes:
        return 3 if plan.has_half_factors else 4
    return 2


def _operand(plan: Plan) -> int:
    """For what one instruction multiplies, decoded in registers."""
    bits, isa = plan.encoding.bits, plan.isa
    if plan.path == "f32":
        return _value(plan)
    if bits == 8:
        if plan.path == "int8":
            return 0
        return 2 * _value(plan) + (2 if plan.encoding.is_uniform else 3)
    if isa.vectors == "portable":
        return 12 * isa.lanes
    return 2 if isa.looks_up_bytes else 3


def _words(plan: Plan) -> int:
    """For the words that the bytes of an operand become."""
    return 0 if plan.panels_are_lines else 2


def _stored_operand(plan: Plan) -> int:
    """For the same, in memory and with its scale unless that comes later."""
    if plan.path == "int8":
        return 0 if plan.encoding.bits == 8 else _operand(plan) + _STORE
    scaled = _value(plan) + (3 if plan.encoding.zero_point else 1)
    # Pairs take a conversion, which counts twice, and a permute.
    return (2 * scaled + 3 if plan.path == "bf16" else scaled) + _STORE


def _round_trip(plan: Plan) -> int:
    """For sums that are begun, scaled, and added to totals that are loaded and stored."""
    converted = 1 if plan.path == "int8" else 0
    return 3 + converted + (1 if plan.encoding.zero_point else 0)


def _scales(plan: Plan) -> int:
    """For the scales of a tile's outputs at one block."""
    if not plan.keeps_scale_codes:
        return 0
    return 48 if plan.isa.looks_up_bytes else 3 * TILE
