// quantize_1536_clipped.
//
// q[m, 1536], amax[m] = x[m, 1536] in int8 per token, clipped (from float32).
//
// Printed by fxquant. The spec, which fxquant.codegen.reference defines:
//   {"clipped": true, "k": 1536, "kind": "quantize", "name": "quantize_1536_clipped", "scope":
//   "token", "x_dtype": "float32"}
//
// Scheme: quantize
// Modules: golden

#include <cmath>
#include <cstdint>
#include <cstring>

#define INLINE [[gnu::always_inline]] inline

namespace {

using stored_t = float;  // the activation, in float32

constexpr int64_t K = 1536;  // inputs

[[gnu::always_inline]] static inline uint32_t bits_of(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits;
}

[[gnu::always_inline]] static inline float float_of(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}

// The larger of x and a bound that is no NaN; NaN if x is.
[[gnu::always_inline]] static inline float at_least(float x, float bound) {
    return x < bound ? bound : x;
}

// The smaller of x and a bound that is no NaN; NaN if x is.
[[gnu::always_inline]] static inline float at_most(float x, float bound) {
    return x > bound ? bound : x;
}

INLINE float x_of(stored_t x) { return x; }

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

// How many numbers of a row are larger than a limit.
INLINE int64_t count_above(const stored_t* x, int64_t x_col, float limit) {
  int64_t count = 0;
#pragma omp simd reduction(+ : count)
  for (int64_t k = 0; k < K; ++k) count += std::fabs(x_of(x[k * x_col])) > limit;
  return count;
}

// Rounds a row to integers and gives its largest magnitude or the limit, whichever is smaller;
// zeros and NaN if it is not finite.
INLINE float quantize_row(const stored_t* x, int64_t x_col, float limit, int64_t& saturated,
                          int8_t* q) {
  const uint32_t largest = largest_of(x, x_col);
  if (largest >= INFINITE || limit != limit) {
    std::memset(q, 0, K);
    return NAN;
  }
  const float amax = at_most(at_least(float_of(largest), 0x1p-100f), limit);
  round_row(x, x_col, 127.0f / amax, q);
  if (float_of(largest) > amax) saturated += count_above(x, x_col, amax);
  return amax;
}

}  // namespace

// Rounds m rows, x_row elements apart, to codes [m, K]; gives how many numbers were too large.
extern "C" int64_t fxquant_quantize(const void* x, int64_t x_row, int64_t x_col, int64_t m,
                                    const float* limit, void* codes, float* amax, int threads) {
  const stored_t* rows = static_cast<const stored_t*>(x);
  int8_t* q = static_cast<int8_t*>(codes);
  if (m * K < 1 << 14) threads = 1;  // to wake others takes longer
  const float most = at_least(*limit, 0x1p-100f);
  int64_t saturated = 0;
#pragma omp parallel for num_threads(threads) reduction(+ : saturated)
  for (int64_t row = 0; row < m; ++row) {
    const stored_t* from = rows + row * x_row;
    // With the stride a constant the usual case becomes vector instructions.
    amax[row] = x_col == 1 ? quantize_row(from, 1, most, saturated, q + row * K)
                           : quantize_row(from, x_col, most, saturated, q + row * K);
  }
  return saturated;
}
