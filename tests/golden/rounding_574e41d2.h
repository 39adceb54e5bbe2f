// Rows to int8.

namespace {

constexpr uint32_t INFINITE = 0x7f800000u;

// The largest magnitude in a row as its bits, which are in the order of magnitudes; those of
// infinity and NaN are the largest.
INLINE uint32_t largest_of(const stored_t* x, int64_t x_col) {
  uint32_t largest = 0;
#pragma omp simd reduction(max : largest)
  for (int64_t k = 0; k < K; ++k) {
    const float value = x_of(x[k * x_col]);
    const uint32_t size = bits_of(value) & 0x7fffffffu;
    largest = size > largest ? size : largest;
  }
  return largest;
}

// x * factor to the nearest integers, ties to even, from -127 to 127: what is added leaves them in
// the last bits of the sum. The bounds keep compilers from fusing product and sum, too.
INLINE void round_row(const stored_t* x, int64_t x_col, float factor, int8_t* q) {
#pragma omp simd
  for (int64_t k = 0; k < K; ++k) {
    const float value = x_of(x[k * x_col]);
    const float bounded = at_most(at_least(value * factor, -127.0f), 127.0f);
    q[k] = int8_t(bits_of(bounded + 12582912.0f));
  }
}

// Rounds a row to integers and gives its largest magnitude; zeros and NaN if it is not finite.
INLINE float quantize_row(const stored_t* x, int64_t x_col, int8_t* q) {
  const uint32_t largest = largest_of(x, x_col);
  if (largest >= INFINITE) {
    std::memset(q, 0, K);
    return NAN;
  }
  const float amax = at_least(float_of(largest), 0x1p-100f);
  round_row(x, x_col, 127.0f / amax, q);
  return amax;
}

}  // namespace
