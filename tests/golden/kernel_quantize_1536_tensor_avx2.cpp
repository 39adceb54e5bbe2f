// quantize_1536_tensor.
//
// q[m, 1536], amax[m] = x[m, 1536] in int8 per tensor, clipped (from bfloat16).
//
// Printed by fxquant. The spec, which fxquant.codegen.reference defines:
//   {"clipped": true, "k": 1536, "kind": "quantize", "name": "quantize_1536_tensor", "scope":
//   "tensor", "x_dtype": "bfloat16"}
//
// Scheme: quantize
// Modules: golden

#include <cmath>
#include <cstdint>
#include <cstring>

#define INLINE [[gnu::always_inline]] inline

namespace {

using stored_t = uint16_t;  // the activation, in bfloat16

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

// The upper half of a float32.
[[gnu::always_inline]] static inline float from_bf16(uint16_t half) {
    return float_of(uint32_t(half) << 16);
}

INLINE float x_of(stored_t x) { return from_bf16(x); }

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

}  // namespace

// Rounds m rows, x_row elements apart, to codes [m, K]; gives how many numbers were too large.
extern "C" int64_t fxquant_quantize(const void* x, int64_t x_row, int64_t x_col, int64_t m,
                                    const float* limit, void* codes, float* amax, int threads) {
  const stored_t* rows = static_cast<const stored_t*>(x);
  int8_t* q = static_cast<int8_t*>(codes);
  if (m * K < 1 << 14) threads = 1;  // to wake others takes longer
  uint32_t largest = 0;
  // With the stride a constant the usual case becomes vector instructions.
#pragma omp parallel for num_threads(threads) reduction(max : largest)
  for (int64_t row = 0; row < m; ++row) {
    const stored_t* from = rows + row * x_row;
    const uint32_t found = x_col == 1 ? largest_of(from, 1) : largest_of(from, x_col);
    largest = found > largest ? found : largest;
  }
  const float most = at_least(*limit, 0x1p-100f);
  const bool is_finite = largest < INFINITE && most == most;
  const float scale = is_finite ? at_most(at_least(float_of(largest), 0x1p-100f), most) : NAN;
  const float factor = 127.0f / scale;
  int64_t saturated = 0;
#pragma omp parallel for num_threads(threads) reduction(+ : saturated)
  for (int64_t row = 0; row < m; ++row) {
    const stored_t* from = rows + row * x_row;
    amax[row] = scale;
    if (!is_finite)
      std::memset(q + row * K, 0, K);
    else if (x_col == 1)
      round_row(from, 1, factor, q + row * K);
    else
      round_row(from, x_col, factor, q + row * K);
    if (is_finite && float_of(largest) > scale) saturated += count_above(from, x_col, scale);
  }
  return saturated;
}
