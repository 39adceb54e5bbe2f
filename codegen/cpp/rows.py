"""The activation of a call, as products take it: rounded, or quantized row by row.

A row becomes a line of dwords, one a step. A panel holds ``height`` lines side by side,
``x[step][row]``, so that every product reads the next dword; lines that are not there are zeros.
"""

from __future__ import annotations

from fxquant.codegen.cpp.plan import Plan


def rows(plan: Plan) -> str:
    """The text of ``struct Call`` and of the functions that make lines of its rows."""
    parts = [_CALL]
    if plan.spec.outliers is not None:
        parts.append(_FLAG if plan.spec.outliers.columns is None else _LISTED)
    if plan.quantizes_x:
        plain = "x_of(x[k * x_col])"
        taken = plain if plan.spec.outliers is None else f"flags[k] ? 0.0f : {plain}"
        parts.append(_QUANTIZE.replace("@TAKEN@", taken))
    parts.append(_line(plan))
    if plan.spec.outliers is not None:
        dtype = plan.spec.outliers.dtype
        parts.append(_PACK_OUTLIERS.replace("@ROUND@", rounded(dtype, "x_of(x[k * call.x_col])")))
    return "\n".join(parts)


def rounded(dtype: str, value: str) -> str:
    """A float rounded to a dtype."""
    short = {"bfloat16": "bf16", "float16": "fp16"}.get(dtype)
    return value if short is None else f"from_{short}(to_{short}({value}))"


def _line(plan: Plan) -> str:
    if plan.path == "int8":
        body, value = _BYTES, "q[k]"
    elif plan.quantizes_x:
        body, value = _INTEGERS, ""
    elif plan.path == "bf16":
        body, value = _PAIRS, "from_bf16(half[k])"
    else:
        taken = "x_of(x[k * x_col])"
        if plan.spec.compute_dtype != plan.spec.x_dtype:
            taken = rounded(plan.spec.compute_dtype, taken)
        body, value = _FLOATS.replace("@VALUE@", taken), "line[k]"
    sums = _SUMS.replace("@VALUE@", value) if plan.keeps_sums else ""
    return _HEAD + body.replace("@SUMS@", sums) + _EITHER


_CALL = """\
// One call: its operands, and what is made of the activation in scratch memory.
struct Call {
  Weight weight;
  const stored_t* x;  // [e, m, k] with these strides
  int64_t x_e, x_row, x_col, m;
  out_t* out;  // [e, m, n]
  const void* const* extra;

  x_t* lines;         // [e][row][step]
  x_t* panels;        // [e][panel][step][row of it]
  xsum_t* sums;       // [e][panel][block][row of it]: sums of the activation
  float* row_scales;  // [e][row]
  uint8_t* flags;     // [e][k], whether a column is an outlier
  int32_t* columns;   // [e][..], the outliers
  int64_t* outliers;  // [e], how many there are
  float* apart;       // [e][row][k]: the activation in them, the first ones of a row in use
  unsigned char* own;  // memory of each thread
  bool is_line;        // rows are lines as they are
};
"""

_FLAG = """\
// Marks the columns in which any row is large, and lists them.
INLINE void find_outliers(const Call& call, int64_t e, int64_t x_col, int64_t first, int64_t last) {
  uint8_t* flags = call.flags + e * K;
  for (int64_t k = first; k < last; ++k) flags[k] = 0;
  for (int64_t row = 0; row < call.m; ++row) {
    const stored_t* x = call.x + e * call.x_e + row * call.x_row;
    for (int64_t k = first; k < last; ++k)
      flags[k] |= std::fabs(x_of(x[k * x_col])) >= THRESHOLD;
  }
}

void find_outliers(const Call& call, int64_t e, int64_t first, int64_t last) {
  if (call.x_col == 1)
    find_outliers(call, e, 1, first, last);
  else
    find_outliers(call, e, call.x_col, first, last);
}

void list_outliers(const Call& call, int64_t e) {
  int64_t count = 0;
  for (int64_t k = 0; k < K; ++k)
    if (call.flags[e * K + k]) call.columns[e * K + count++] = int32_t(k);
  call.outliers[e] = count;
}
"""

_LISTED = """\
// Marks the columns that are given.
void list_outliers(const Call& call, int64_t e) {
  const int32_t* columns = static_cast<const int32_t*>(call.extra[OPERANDS]);
  std::memset(call.flags + e * K, 0, K);
  for (int64_t i = 0; i < OUTLIERS; ++i) {
    call.columns[e * K + i] = columns[i];
    call.flags[e * K + columns[i]] = 1;
  }
  call.outliers[e] = OUTLIERS;
}
"""

_QUANTIZE = """\
// Rounds a row to integers from -127 to 127 and gives its scale; NaN if the row is not finite.
INLINE float quantize(const Call& call, int64_t e, const stored_t* x, int64_t x_col, int8_t* q) {
  const uint8_t* flags = call.flags + e * K;
  (void)flags;
  uint32_t largest = 0;  // magnitudes of floats are in the order of their bits
#pragma omp simd reduction(max : largest)
  for (int64_t k = 0; k < K; ++k) {
    const float value = @TAKEN@;
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    bits &= 0x7fffffffu;
    largest = bits > largest ? bits : largest;
  }
  std::memset(q + K, 0, K_PADDED - K);
  if (largest >= 0x7f800000u) {
    std::memset(q, 0, K);
    return NAN;
  }
  float amax;
  std::memcpy(&amax, &largest, 4);
  amax = amax < 0x1p-100f ? 0x1p-100f : amax;
  const float inverse = 127.0f / amax;
#pragma omp simd
  for (int64_t k = 0; k < K; ++k) {
    const float value = @TAKEN@;
    q[k] = int8_t(int32_t(std::rint(value * inverse)));
  }
  return amax / 127.0f;
}
"""

_SUMS = """\
  for (int64_t block = 0; block < BLOCKS; ++block) {
    const int64_t last = std::min((block + 1) * BLOCK, K_PADDED);
    xsum_t sum = 0;
    for (int64_t k = block * BLOCK; k < last; ++k) sum += @VALUE@;
    sums[block * height] = sum;
  }
"""

_HEAD = """\
// A row as a line; its sums are a panel's height apart. Gives the row's scale.
INLINE float line_of(const Call& call, int64_t e, const stored_t* x, int64_t x_col, x_t* line,
                     xsum_t* sums, int height) {
  (void)call, (void)e, (void)sums, (void)height;
"""

_EITHER = """
float line_of(const Call& call, int64_t e, const stored_t* x, x_t* line, xsum_t* sums, int height) {
  // With the stride a constant the usual case becomes vector instructions.
  return call.x_col == 1 ? line_of(call, e, x, 1, line, sums, height)
                         : line_of(call, e, x, call.x_col, line, sums, height);
}
"""

_BYTES = """\
  int8_t* q = reinterpret_cast<int8_t*>(line);
  const float scale = quantize(call, e, x, x_col, q);
@SUMS@  return scale * LEVEL_UNIT;
}
"""

_INTEGERS = """\
  alignas(64) int8_t q[K_PADDED];
  const float scale = quantize(call, e, x, x_col, q);
  for (int64_t k = 0; k < K_PADDED; ++k) line[k] = q[k];
  return scale * LEVEL_UNIT;
}
"""

_FLOATS = """\
  for (int64_t k = 0; k < K; ++k) line[k] = @VALUE@;
  for (int64_t k = K; k < K_PADDED; ++k) line[k] = 0;
@SUMS@  return 1;
}
"""

_PAIRS = """\
  typedef uint16_t half_t [[gnu::may_alias]];  // they are read as dwords
  half_t* half = reinterpret_cast<half_t*>(line);
  for (int64_t k = 0; k < K; ++k) half[k] = half_of(x[k * x_col]);
  for (int64_t k = K; k < K_PADDED; ++k) half[k] = 0;
@SUMS@  return 1;
}
"""

_PACK_OUTLIERS = """\
void pack_outliers(const Call& call, int64_t e, const stored_t* x, float* apart) {
  for (int64_t i = 0; i < call.outliers[e]; ++i) {
    const int64_t k = call.columns[e * K + i];
    apart[i] = @ROUND@;
  }
}
"""
