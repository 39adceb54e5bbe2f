"""The activation of a call, as products take it: rounded, quantized row by row, or its codes.

A row becomes a line of dwords, one a step. A panel holds ``height`` lines side by side,
``x[step][row]``, so that every product reads the next dword; lines that are not there are zeros.
"""

from __future__ import annotations

from dataclasses import dataclass

from fxquant.codegen.cpp.halves import SHORT
from fxquant.codegen.cpp.plan import CTYPES, Plan
from fxquant.codegen.cpp.quantize import row_text, signature


@dataclass(frozen=True)
class Member:
    """A part of a call's scratch memory.

    Attributes:
        ctype: Of its elements.
        name: Its name in ``struct Call``.
        count: How many elements there are, as C++.
        comment: What they are.
    """

    ctype: str
    name: str
    count: str
    comment: str


def shared_members(plan: Plan) -> list[Member]:
    """What a call keeps in scratch memory for all of its rows."""
    outliers = plan.spec.outliers
    found = [Member("Turn", "turns", "threads", "how far each thread is with its part")]
    if outliers is None:
        return found
    parts = "E" if outliers.columns is not None else "threads * E"
    return [
        *found,
        Member("bits_t", "flags", f"{parts} * K", "[e][k]: all ones if a column is an outlier"),
        Member("int32_t", "columns", "E * K", "[e][..], the outliers"),
        Member("int64_t", "outliers", "E", "[e], how many there are"),
    ]


def members(plan: Plan) -> list[Member]:
    """What is kept in scratch memory of the rows that are under work."""
    sums = "E * all * BLOCKS" if plan.keeps_sums else "0"
    # Three times 16 bits for each float.
    panels = "E * all * ALL_STEPS * 3 / 2" if plan.has_thirds else "E * all * ALL_STEPS"
    found = [
        Member("x_t", "lines", "E * rows * ALL_STEPS", "[e][row][step]"),
        Member(plan.panel_type, "panels", panels, "[e][panel][step][row of it]"),
        Member(
            *("xsum_t", "sums", sums),
            "[e][panel][block][row of it]: sums of the activation"
            if plan.keeps_sums
            else "none are needed",
        ),
    ]
    if plan.few_in_floats:
        found.append(Member("float", "floats", "threads * K_PADDED", "[thread][k], a row"))
    if plan.has_thirds:
        found.append(Member("bool", "is_odd", "E * rows", "[e][row]: has no three parts"))
        found.append(Member("float", "odd", "E * rows * K_PADDED", "[e][row][k], those lines"))
    if plan.is_int8:
        found.append(Member("float", "row_scales", "E * all", "[e][row]"))
    if plan.spec.outliers is not None:
        comment = "[e][row][k]: the activation in outliers, the first ones of a row in use"
        found.append(Member("float", "apart", "E * rows * K", comment))
    return [*found, Member("unsigned char", "own", "threads * OWN_BYTES", "of each thread")]


def rows(plan: Plan) -> str:
    """The text of ``struct Call`` and of the functions that make lines of its rows."""
    parts, outliers = [_conversions(plan), _call(plan), _ASK_AHEAD], plan.spec.outliers
    if outliers is not None and outliers.columns is not None:
        parts.append(_LISTED)
    elif outliers is not None:
        bits = "bits_of(x)" if plan.spec.x_dtype == "float32" else "x"
        text = _FLAG.replace("@COUNT@", _COUNT_EACH if plan.spec.weights > 1 else _COUNT)
        parts.append(text.replace("@BITS@", bits))
    if plan.quantizes_x:
        parts.append(row_text(flagged=outliers is not None))
    parts.append(_lines(plan))
    if outliers is not None:
        taken = rounded(outliers.dtype, "x_of(x[k * call.x_col])")
        parts.append(_PACK_OUTLIERS.replace("@ROUND@", taken))
    return "\n".join(parts)


def rounded(dtype: str, value: str) -> str:
    """A float rounded to a dtype."""
    short = SHORT.get(dtype)
    return value if short is None else f"from_{short}(to_{short}({value}))"


def _conversions(plan: Plan) -> str:
    """From the activation's dtype to floats, and to what products take."""
    x = SHORT.get(plan.spec.x_dtype)
    lines = [f"INLINE float x_of(stored_t x) {{ return {f'from_{x}(x)' if x else 'x'}; }}"]
    if plan.path == "bf16":
        value = "x" if x == "bf16" else "to_bf16(x_of(x))"
        lines.append(f"INLINE uint16_t half_of(stored_t x) {{ return {value}; }}")
    return "\n".join([*lines, ""])


def _call(plan: Plan) -> str:
    lines = [
        f"  {one.ctype}* {one.name};  // {one.comment}"
        for one in (*shared_members(plan), *members(plan))
    ]
    if plan.reads_directly:
        lines.append("  bool is_line;  // rows are lines as they are")
    if plan.spec.grouped:
        lines.append("  int64_t first_tile;  // of the matrix under work")
    results = ["  out_t* out;  // [e, m, n]"]
    for number, dtype in enumerate(plan.result_dtypes[1:], start=1):
        results.append(f"  {CTYPES[dtype]}* out{number};  // [e, m, n], in {dtype}")
    weight = "Weight weight" if plan.spec.weights == 1 else "Weight weights[WEIGHTS]"
    text = _CALL.replace("@WEIGHT@", weight).replace("@RESULTS@", "\n".join(results))
    return text.replace("@MEMBERS@", "\n".join(lines))


def _lines(plan: Plan) -> str:
    """``line_of`` for a stride that is known, and for the stride of the call."""
    result, scale = ("float", "return ") if plan.quantizes_x else ("void", "")
    taken = ["const stored_t* x", "int64_t x_col", "x_t* line"]
    given = ["x", "@COL@", "line"]
    title = "A row as a line."
    if plan.quantizes_x and plan.spec.outliers is not None:
        taken.insert(0, "const bits_t* flags")
        given.insert(0, "flags")
    if plan.keeps_sums:
        taken += ["xsum_t* sums", "int height"]
        given += ["sums", "height"]
        title = "A row as a line; its sums are a panel's height apart."
    title += " Gives the row's scale." if plan.quantizes_x else ""
    others = ["const Call& call", *(one for one in taken if one != "int64_t x_col")]
    call = f"line_of({', '.join(given)})"
    return "\n".join(
        [
            *([_sums(plan)] if plan.keeps_sums else []),
            f"// {title}",
            signature(f"INLINE {result} line_of", taken),
            _body(plan) + "}",
            "",
            signature(f"{result} line_of", others),
            "  // With the stride a constant the usual case becomes vector instructions.",
            f"  if (call.x_col == 1) return {call.replace('@COL@', '1')};",
            f"  {scale}{call.replace('@COL@', 'call.x_col')};",
            "}",
            "",
        ]
    )


def _sums(plan: Plan) -> str:
    ctype, value = {
        "int8": ("int8_t", "line[k]"),
        "bf16": ("half_t", "from_bf16(line[k])"),
        "f32": ("float", "line[k]"),
    }[plan.path]
    # Weights are kept as unsigned bytes: what that adds is taken off with a constant a row.
    bias = " * -BYTE_BIAS" if plan.path == "int8" and plan.byte_bias else ""
    return _SUMS.replace("@TYPE@", ctype).replace("@VALUE@", value).replace("@BIAS@", bias)


def _body(plan: Plan) -> str:
    unit = " * LEVEL_UNIT" if plan.level_unit != 1 else ""
    flags = "flags, " if plan.spec.outliers is not None else ""
    if plan.is_int8 and plan.path == "int8":
        text, made = (_COPIED if plan.reads_codes else _BYTES), "q"
    elif plan.reads_codes:
        text, made = _FLOATS.replace("@VALUE@", "x[k * x_col]"), "line"
    elif plan.is_int8:
        text, made = _INTEGERS, "line"
    elif plan.path == "bf16":
        text, made = _PAIRS, "half"
    else:
        taken = "x_of(x[k * x_col])"
        if plan.spec.compute_dtype != plan.spec.x_dtype:
            taken = rounded(plan.spec.compute_dtype, taken)
        text, made = _FLOATS.replace("@VALUE@", taken), "line"
    summed = f"  sum_blocks({made}, sums, height);\n" if plan.keeps_sums else ""
    text = text.replace("@FLAGS@", flags).replace("@SUMS@", summed)
    return text.replace("@UNIT@", unit)


_CALL = """\
// One call: its operands, and what is made of the activation in scratch memory.
struct Call {
  @WEIGHT@;
  const stored_t* x;  // [e, m, k] with these strides
  int64_t x_e, x_row, x_col, m;
@RESULTS@
  const void* const* extra;

@MEMBERS@
};
"""

_ASK_AHEAD = """\
// A row on its way to the second-level cache: what is read row by row would wait for each of them.
INLINE void ask_ahead(const stored_t* row) {
  constexpr int64_t OF_LINE = 64 / sizeof(stored_t);
  for (int64_t k = 0; k < K; k += OF_LINE) __builtin_prefetch(row + k, 0, 2);
}
"""

_FLAG = """\
// Marks the columns in which any of some rows is large. Magnitudes are in the order of their bits;
// what is above infinity is NaN, and not large.
INLINE void find_outliers(const stored_t* rows, int64_t x_row, int64_t x_col, int64_t count,
                          bits_t* flags) {
  std::memset(flags, 0, K * sizeof(bits_t));
  for (int64_t row = 0; row < count; ++row) {
    const stored_t* line = rows + row * x_row;
    if (x_col == 1 && row + 1 < count) ask_ahead(line + x_row);
    for (int64_t k = 0; k < K; ++k) {
      const stored_t x = line[k * x_col];
      const bits_t size = @BITS@ & MAGNITUDE;
      flags[k] |= bits_t(size - LEAST_OUTLIER) <= bits_t(INFINITE_X - LEAST_OUTLIER) ? ALL_ONES : 0;
    }
  }
}

void find_outliers(const Call& call, int64_t e, int64_t first, int64_t last, bits_t* flags) {
  const stored_t* x = call.x + e * call.x_e + first * call.x_row;
  // With the stride a constant the usual case becomes vector instructions.
  if (call.x_col == 1)
    find_outliers(x, call.x_row, 1, last - first, flags);
  else
    find_outliers(x, call.x_row, call.x_col, last - first, flags);
}

// Lists the columns that any of some parts of the rows marked, and marks them in the first part.
void list_outliers(const Call& call, int64_t e, int64_t parts) {
  int64_t count = 0;
  for (int64_t part = 1; part < parts; ++part)
    for (int64_t k = 0; k < K; ++k) call.flags[e * K + k] |= call.flags[(part * E + e) * K + k];
  for (int64_t k = 0; k < K; ++k)
    if (call.flags[e * K + k]) call.columns[e * K + count++] = int32_t(k);
  call.outliers[e] = count;
  // How many calls there were, and outliers in all of them, are told to whoever asks.
@COUNT@}
"""

_COUNT = """\
  if (e == 0) __atomic_fetch_add(call.weight.counts(), 1, __ATOMIC_RELAXED);
  __atomic_fetch_add(call.weight.counts() + 1, count, __ATOMIC_RELAXED);
"""

_COUNT_EACH = """\
  for (const Weight& weight : call.weights) {
    if (e == 0) __atomic_fetch_add(weight.counts(), 1, __ATOMIC_RELAXED);
    __atomic_fetch_add(weight.counts() + 1, count, __ATOMIC_RELAXED);
  }
"""

_LISTED = """\
// Marks the columns that are given.
void list_outliers(const Call& call, int64_t e) {
  const int32_t* columns = static_cast<const int32_t*>(call.extra[OPERANDS]);
  std::memset(call.flags + e * K, 0, K * sizeof(bits_t));
  for (int64_t i = 0; i < OUTLIERS; ++i) {
    call.columns[e * K + i] = columns[i];
    call.flags[e * K + columns[i]] = ALL_ONES;
  }
  call.outliers[e] = OUTLIERS;
}
"""

_SUMS = """\
// The sums of a line's blocks.
INLINE void sum_blocks(const @TYPE@* line, xsum_t* sums, int height) {
  for (int64_t block = 0; block < BLOCKS; ++block) {
    const int64_t last = std::min((block + 1) * BLOCK, K_PADDED);
    xsum_t sum = 0;
    for (int64_t k = block * BLOCK; k < last; ++k) sum += @VALUE@;
    sums[block * height] = sum@BIAS@;
  }
}
"""

_BYTES = """\
  int8_t* q = reinterpret_cast<int8_t*>(line);
  const float amax = quantize_row(@FLAGS@x, x_col, q);
  std::memset(q + K, 0, K_PADDED - K);
@SUMS@  return amax / 127.0f@UNIT@;
"""

_COPIED = """\
  int8_t* q = reinterpret_cast<int8_t*>(line);
  for (int64_t k = 0; k < K; ++k) q[k] = x[k * x_col];
  std::memset(q + K, 0, K_PADDED - K);
@SUMS@"""

_INTEGERS = """\
  alignas(64) int8_t q[K];
  const float amax = quantize_row(@FLAGS@x, x_col, q);
  for (int64_t k = 0; k < K; ++k) line[k] = q[k];
  for (int64_t k = K; k < K_PADDED; ++k) line[k] = 0;
  return amax / 127.0f@UNIT@;
"""

_FLOATS = """\
  for (int64_t k = 0; k < K; ++k) line[k] = @VALUE@;
  for (int64_t k = K; k < K_PADDED; ++k) line[k] = 0;
@SUMS@"""

_PAIRS = """\
  half_t* half = reinterpret_cast<half_t*>(line);
  for (int64_t k = 0; k < K; ++k) half[k] = half_of(x[k * x_col]);
  for (int64_t k = K; k < K_PADDED; ++k) half[k] = 0;
@SUMS@"""

_PACK_OUTLIERS = """\
void pack_outliers(const Call& call, int64_t e, const stored_t* x, float* apart) {
  for (int64_t i = 0; i < call.outliers[e]; ++i) {
    const int64_t k = call.columns[e * K + i];
    apart[i] = @ROUND@;
  }
}
"""
