"""The activation of a call: packed into panels of rows, rounded or quantized as products take it.

A panel holds ``height`` rows side by side: ``x[step][row]``, a dword a step, so that every product
reads the next one. Rows that are not there are zeros.
"""

from __future__ import annotations

from fxquant.codegen.cpp.plan import Plan


def rows(plan: Plan) -> str:
    """The text of ``struct Call`` and of the functions that pack a row of it."""
    parts = [_CALL]
    if plan.spec.outliers is not None:
        parts.append(_FLAG if plan.spec.outliers.columns is None else _LISTED)
    if plan.quantizes_x:
        inner = "flags[k] ? 0.0f : x_of(x[k * call.x_col])"
        plain = "x_of(x[k * call.x_col])"
        taken = plain if plan.spec.outliers is None else inner
        parts.append(_QUANTIZE.replace("@TAKEN@", taken))
        parts.append(_PACK_BYTES if plan.path == "int8" else _PACK_INTEGERS)
    else:
        parts.append(_PACK_PAIRS if plan.path == "bf16" else _pack_floats(plan))
    if plan.spec.outliers is not None:
        dtype = plan.spec.outliers.dtype
        parts.append(_PACK_OUTLIERS.replace("@ROUND@", rounded(dtype, "x_of(x[k * call.x_col])")))
    return "\n".join(parts)


def rounded(dtype: str, value: str) -> str:
    """A float rounded to a dtype."""
    short = {"bfloat16": "bf16", "float16": "fp16"}.get(dtype)
    return value if short is None else f"from_{short}(to_{short}({value}))"


def _pack_floats(plan: Plan) -> str:
    value = "x_of(x[k * call.x_col])"
    if plan.spec.compute_dtype != plan.spec.x_dtype:
        value = rounded(plan.spec.compute_dtype, value)
    sums = _FLOAT_SUMS if plan.encoding.zero_point else ""
    return _PACK_FLOATS.replace("@VALUE@", value).replace("@SUMS@", sums)


_CALL = """\
// One call: its operands, and what is made of the activation in scratch memory.
struct Call {
  Weight weight;
  const stored_t* x;  // [e, m, k] with these strides
  int64_t x_e, x_row, x_col, m;
  out_t* out;  // [e, m, n]
  const void* const* extra;

  x_t* panels;        // [e][panel][step][row of it]
  xsum_t* sums;       // [e][panel][block][row of it]: sums of the activation
  float* row_scales;  // [e][row]
  uint8_t* flags;     // [e][k], whether a column is an outlier
  int32_t* columns;   // [e][..], the outliers
  int64_t* outliers;  // [e], how many there are
  float* apart;       // [e][row][k]: the activation in them, the first ones of a row in use
  unsigned char* own;  // memory of each thread
  bool is_direct;      // the activation is read where it is
};
"""

_FLAG = """\
// Marks the columns in which any row is large, and lists them.
void find_outliers(const Call& call, int64_t e, int64_t first, int64_t last) {
  uint8_t* flags = call.flags + e * K;
  for (int64_t k = first; k < last; ++k) flags[k] = 0;
  for (int64_t row = 0; row < call.m; ++row) {
    const stored_t* x = call.x + e * call.x_e + row * call.x_row;
    for (int64_t k = first; k < last; ++k)
      flags[k] |= std::fabs(x_of(x[k * call.x_col])) >= THRESHOLD;
  }
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
float quantize_row(const Call& call, int64_t e, const stored_t* x, int8_t* q) {
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

_PACK_BYTES = """\
float pack_row(const Call& call, int64_t e, const stored_t* x, x_t* panel, xsum_t* sums,
               int height) {
  (void)e;
  alignas(64) int8_t q[K_PADDED];
  const float scale = quantize_row(call, e, x, q);
  for (int64_t block = 0; block < BLOCKS; ++block) {
    const int64_t last = std::min((block + 1) * BLOCK, K_PADDED);
    int32_t sum = 0;
    for (int64_t k = block * BLOCK; k < last; ++k) sum += q[k];
    sums[block * height] = sum;
  }
  for (int64_t step = 0; step < ALL_STEPS; ++step)
    std::memcpy(panel + step * height, q + 4 * step, 4);
  return scale * LEVEL_UNIT;
}
"""

_PACK_INTEGERS = """\
float pack_row(const Call& call, int64_t e, const stored_t* x, x_t* panel, xsum_t*, int height) {
  alignas(64) int8_t q[K_PADDED];
  const float scale = quantize_row(call, e, x, q);
  for (int64_t k = 0; k < K_PADDED; ++k) panel[k * height] = q[k];
  return scale * LEVEL_UNIT;
}
"""

_FLOAT_SUMS = """
  for (int64_t block = 0; block < BLOCKS; ++block) {
    const int64_t last = std::min((block + 1) * BLOCK, K_PADDED);
    float sum = 0;
    for (int64_t k = block * BLOCK; k < last; ++k) sum += panel[k * height];
    sums[block * height] = sum;
  }"""

_PACK_FLOATS = """\
float pack_row(const Call& call, int64_t e, const stored_t* x, x_t* panel, xsum_t* sums,
               int height) {
  (void)e;
  (void)sums;
  for (int64_t k = 0; k < K; ++k) panel[k * height] = @VALUE@;
  for (int64_t k = K; k < K_PADDED; ++k) panel[k * height] = 0;@SUMS@
  return 1;
}
"""

_PACK_PAIRS = """\
float pack_row(const Call& call, int64_t e, const stored_t* x, x_t* panel, xsum_t* sums,
               int height) {
  (void)e;
  (void)sums;
  const auto at = [&](int64_t k) { return uint32_t(pair_half(x[k * call.x_col])); };
  for (int64_t step = 0; step < K / 2; ++step)
    panel[step * height] = at(2 * step) | at(2 * step + 1) << 16;
  for (int64_t step = K / 2; step < ALL_STEPS; ++step)
    panel[step * height] = 2 * step < K ? at(2 * step) : 0;
  if (KEEPS_SUMS) {
    for (int64_t block = 0; block < BLOCKS; ++block) {
      const int64_t last = std::min((block + 1) * BLOCK, K_PADDED) / 2;
      float sum = 0;
      for (int64_t step = block * BLOCK / 2; step < last; ++step) {
        const uint32_t pair = panel[step * height];
        sum += from_bf16(uint16_t(pair)) + from_bf16(uint16_t(pair >> 16));
      }
      sums[block * height] = sum;
    }
  }
  return 1;
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
