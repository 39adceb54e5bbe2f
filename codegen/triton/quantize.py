"""Prints the kernels that take rows of an activation to int8: a scale and integers for each."""

from __future__ import annotations

from dataclasses import dataclass

from fxquant.codegen.triton.kernels import JIT
from fxquant.codegen.triton.printer import Lines, call

_WHOLE_ROW = 8192
_TILE = 2048
MOST_PARTS = 512

HELPERS = '''
# The least magnitude that a scale is made of: 127 / amax and amax / 127 are normal numbers.
LEAST = tl.constexpr(2.0**-100)


@triton.jit
def bits_of(x):
    """Magnitudes as integers: in the order of the numbers, what is not finite above all."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def number_of(bits):
    """The magnitude behind an integer, NaN where it is not finite."""
    return tl.where(bits < 0x7F800000, bits.to(tl.float32, bitcast=True), float("nan"))


@triton.jit
def at_least(x):
    """What is not below LEAST; NaN stays."""
    return tl.where(x < LEAST, LEAST, x)


@triton.jit
def to_int8(x, peak):
    """Integers, half to even: at 1.5 * 2**23 a float32 number's last place is 1."""
    scaled = tl.minimum(tl.maximum(x * tl.div_rn(127.0, peak), -127.0), 127.0)
    code = (scaled + 12582912.0) - 12582912.0
    return tl.where(peak == peak, code, 0.0).to(tl.int8)
'''


@dataclass(frozen=True)
class Rows:
    """Rows to print kernels for.

    Attributes:
        name: What the kernels' names start with.
        k: Inputs of a row.
        batch: Matrices of a batch, None for one matrix.
        scope: What shares a scale: ``"token"`` (a row) or ``"tensor"``; ``"static"``: a given one.
        clipped: No scale is above a given limit.
        outliers: Columns that are left out: ``""``, ``"found"`` at run time, or ``"given"``.
        counters: What is counted up, where columns are found.
        lists: Programs that list columns, where they are found.
    """

    name: str
    k: int
    batch: int | None = None
    scope: str = "token"
    clipped: bool = False
    outliers: str = ""
    counters: tuple[str, ...] = ()
    lists: int = 0

    @property
    def limited(self) -> bool:
        """Whether numbers can be beyond the scale, and are then counted."""
        return self.clipped or self.scope == "static"

    @property
    def tile(self) -> tuple[int, int]:
        """Rows and inputs that one program takes at a time."""
        inputs = max(16, 1 << (self.k - 1).bit_length())
        return (max(1, _TILE // inputs), inputs) if inputs <= _WHOLE_ROW else (1, _WHOLE_ROW // 2)

    @property
    def whole(self) -> bool:
        """Whether a row is one tile."""
        return self.tile[1] >= self.k

    @property
    def warps(self) -> int:
        """Warps of one program: four for every `_TILE` numbers, up to 16."""
        return min(16, max(4, 4 * self.tile[0] * self.tile[1] // _TILE))

    @property
    def strides(self) -> list[str]:
        """The activation's strides, as parameters."""
        return ["x_stride_m"] if self.batch is None else ["x_stride_e", "x_stride_m"]

    @property
    def pointers(self) -> list[str]:
        """What ``quantize`` takes beside the activation, and leaves."""
        left_out = ["outlier"] if self.outliers else []
        limit = ["limit"] if self.limited else []
        peaks = ["peaks"] if self.scope == "tensor" else []
        listed = ["columns", "count"] if self.outliers == "found" else []
        counter = ["counter"] if self.limited else [*self.counters]
        return ["x", *left_out, *limit, *peaks, "q", "amax", *listed, *counter]


def print_kernels(out: Lines, rows: Rows) -> None:
    """The helpers, ``quantize``, and what comes before it when all rows share a scale."""
    out.add("", *HELPERS.splitlines())
    _print_read(out, rows)
    if rows.scope == "tensor":
        _print_peaks(out, rows)
    _print_quantize(out, rows)


def _print_read(out: Lines, rows: Rows) -> None:
    left_out = ["outlier"] if rows.outliers else []
    params = ["x_rows", *left_out, "m", "k", "rows"]
    doc = "Inputs k of rows m in float32" + (", 0 in the columns of outliers." if left_out else ".")
    with out.function("read", params, doc):
        out.add(f"mask = (m < rows) & (k < {rows.k})")
        out.add("values = tl.load(x_rows + k, mask=mask, other=0.0).to(tl.float32)")
        if left_out:
            out.add(f"left_out = tl.load(outlier + k, mask=k < {rows.k}, other=0) != 0")
            out.add("values = tl.where(left_out, 0.0, values)")
        out.add("return values")


def _read(rows: Rows) -> str:
    left_out = ["outlier"] if rows.outliers else []
    return call("read", ["x_rows", *left_out, "m", "k", "rows"])


def _print_peak(out: Lines, rows: Rows) -> None:
    """Prints ``values`` where a row is one tile, and the bits of each row's largest magnitude."""
    largest = "tl.reduce(bits_of(values), 1, most, keep_dims=True)"
    if rows.whole:
        out.add(
            "k = tl.arange(0, BLOCK_K)[None, :]", f"values = {_read(rows)}", f"bits = {largest}"
        )
        return
    out.add("bits = tl.full((BLOCK_M, 1), 0, tl.int32)")
    with out.block(f"for k0 in range(0, {rows.k}, BLOCK_K):"):
        out.add("k = k0 + tl.arange(0, BLOCK_K)[None, :]", f"values = {_read(rows)}")
        out.add(f"bits = tl.maximum(bits, {largest})")


def _print_peaks(out: Lines, rows: Rows) -> None:
    params = ["x", "peaks", "rows", *rows.strides]
    params += ["BLOCK_M: tl.constexpr", "BLOCK_K: tl.constexpr"]
    doc = "The largest magnitude of every program's rows."
    with out.function(f"{rows.name}_peaks", params, doc, JIT):
        out.add("peak = tl.full((BLOCK_M, 1), 0, tl.int32)")
        step = "tl.num_programs(0) * BLOCK_M"
        with out.block(f"for m0 in range(tl.program_id(0) * BLOCK_M, rows, {step}):"):
            out.add("m = m0 + tl.arange(0, BLOCK_M)[:, None].to(tl.int64)")
            out.add("x_rows = x + m * x_stride_m")
            _print_peak(out, rows)
            out.add("peak = tl.maximum(peak, bits)")
        out.add("tl.store(peaks + tl.program_id(0), tl.reduce(peak, None, most))")


def _print_quantize(out: Lines, rows: Rows) -> None:
    parts = ["parts"] if rows.scope == "tensor" else []
    params = [*rows.pointers, "rows", *parts, *rows.strides]
    params += ["BLOCK_M: tl.constexpr", "BLOCK_K: tl.constexpr"]
    found = rows.outliers == "found"
    doc = "The scale and the integers of every row."
    if found:
        last = f"{rows.lists} programs list" if rows.lists > 1 else "program lists"
        doc = f"{doc[:-1]}; the last {last} the outliers' columns."
    jit = '(do_not_specialize=["rows", "parts"])' if parts else JIT
    with out.function(f"{rows.name}_quantize", params, doc, jit):
        if rows.batch is not None:
            out.add("e = tl.program_id(1).to(tl.int64)")
        if not found:
            _print_rows(out, rows)
            return
        if rows.batch is not None:
            out.add(f"outlier += e * {rows.k}")
        is_last = "tl.program_id(0) == tl.num_programs(0) - 1"
        if rows.lists > 1:
            out.add(f"part = tl.program_id(0) - (tl.num_programs(0) - {rows.lists})")
            is_last = "part >= 0"
        with out.block(f"if {is_last}:"):
            if rows.batch is not None:
                out.add(f"columns += e * {rows.k}", "count += e")
            which = ["part"] if rows.lists > 1 else []
            listed = [*which, "outlier", "columns", "count", *rows.counters]
            out.add(call("list_columns", listed))
        with out.block("else:"):
            _print_rows(out, rows)


def _print_rows(out: Lines, rows: Rows) -> None:
    matrix = "x" if rows.batch is None else "x + e * x_stride_e"
    out.add(
        "m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]",
        f"x_rows = {matrix} + m * x_stride_m",
    )
    _print_scale(out, rows)
    out.add(f"tl.store(amax + {_row(rows)}, peak, mask=m < rows)")
    if rows.whole:
        if rows.scope == "tensor":
            out.add("k = tl.arange(0, BLOCK_K)[None, :]", f"values = {_read(rows)}")
        _print_codes(out, rows)
        return
    with out.block(f"for k0 in range(0, {rows.k}, BLOCK_K):"):
        out.add("k = k0 + tl.arange(0, BLOCK_K)[None, :]", f"values = {_read(rows)}")
        _print_codes(out, rows)


def _row(rows: Rows) -> str:
    """The number of a row, over all matrices of a batch."""
    return "m" if rows.batch is None else "(e * rows + m)"


def _print_scale(out: Lines, rows: Rows) -> None:
    """Prints ``peak``: the magnitude that becomes 127."""
    if rows.scope == "tensor":
        out.add(
            f"part = tl.arange(0, {MOST_PARTS})",
            "bits = tl.reduce(tl.load(peaks + part, mask=part < parts, other=0), 0, most)",
            "peak = at_least(number_of(bits)) + tl.full((BLOCK_M, 1), 0.0, tl.float32)",
        )
    else:
        _print_peak(out, rows)
        if rows.scope == "token":
            out.add("peak = at_least(number_of(bits))")
    if rows.scope == "static":
        out.add(
            "limited = at_least(tl.load(limit))",
            "peak = tl.where(bits < 0x7F800000, limited, number_of(bits))",
        )
    elif rows.clipped:
        out.add(
            "limited = at_least(tl.load(limit))",
            "peak = tl.where(peak > limited, limited, peak)",
        )


def _print_codes(out: Lines, rows: Rows) -> None:
    mask = f"(m < rows) & (k < {rows.k})"
    out.add(f"tl.store(q + ({_row(rows)} * {rows.k} + k), to_int8(values, peak), mask={mask})")
    if rows.limited:
        with out.block("if counter is not None:"):
            out.add(
                "beyond = tl.reduce((tl.abs(values) > peak).to(tl.int64), None, add)",
                'tl.atomic_add(counter, beyond, mask=beyond > 0, sem="relaxed")',
            )
