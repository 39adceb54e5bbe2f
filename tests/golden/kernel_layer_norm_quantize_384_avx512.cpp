// layer_norm_quantize_384.
//
// q[m, 384], amax[m] = x[m, 384] in int8 per token (from bfloat16), x by add, rounded, mean, sub,
// mul, mean, add, rsqrt, mul, mul, add, rounded, with 1 of its values written out.
//
// Printed by fxquant. The spec, which fxquant.codegen.reference defines:
//   {"clipped": false, "k": 384, "kind": "quantize", "name": "layer_norm_quantize_384",
//   "prologue": {"more": [["%11", "bfloat16"]], "nodes": [["aten.add.Tensor", ["%in0", "%in1"],
//   []], ["aten._to_copy.default", ["%0"], [["dtype", "bfloat16"]]], ["aten.mean.dim", ["%1"],
//   []], ["aten.sub.Tensor", ["%1", "%2"], []], ["aten.mul.Tensor", ["%3", "%3"], []],
//   ["aten.mean.dim", ["%4"], []], ["aten.add.Tensor", ["%5", 1e-05], []], ["aten.rsqrt.default",
//   ["%6"], []], ["aten.mul.Tensor", ["%3", "%7"], []], ["aten.mul.Tensor", ["%8", "%in2"], []],
//   ["aten.add.Tensor", ["%9", "%in3"], []], ["aten._to_copy.default", ["%10"], [["dtype",
//   "bfloat16"]]]], "operands": [["mk", "bfloat16"], ["mk", "bfloat16"], ["k", "float32"], ["k",
//   "float32"]]}, "scope": "token", "x_dtype": "bfloat16"}
//
// Scheme: layer
// Modules: golden

#include <cmath>
#include <cstdint>
#include <cstring>

#define INLINE [[gnu::always_inline]] inline

namespace {

using stored_t = float;  // the activation, as made

constexpr int64_t K = 384;  // inputs

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

// To nearest, ties to even: adds just under half of the last place, more if it is odd. A NaN keeps
// its sign and becomes quiet.
[[gnu::always_inline]] static inline uint16_t to_bf16(float x) {
    const uint32_t bits = bits_of(x);
    const uint32_t nearest = bits + 0x7fffu + ((bits >> 16) & 1u);
    const uint32_t kept = (bits & 0x7fffffffu) > 0x7f800000u ? bits | 0x400000u : nearest;
    return uint16_t(kept >> 16);
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

struct Call {  // what is read and written beside the integers
  const void* const* operands;
  const int64_t* steps;  // from row to row of each operand, in elements
  void* const* more;
};

// Makes a row of what is quantized in row0, and what else is written of it.
INLINE void prologue(const Call& call, int64_t row, float* row0) {
  const uint16_t* p0 = static_cast<const uint16_t*>(call.operands[0]) + row * call.steps[0];
  const uint16_t* p1 = static_cast<const uint16_t*>(call.operands[1]) + row * call.steps[1];
  const float* p2 = static_cast<const float*>(call.operands[2]);
  const float* p3 = static_cast<const float*>(call.operands[3]);
  uint16_t* more0 = static_cast<uint16_t*>(call.more[0]) + row * K;
  float total_2 = 0.0f;
#pragma omp simd reduction(+ : total_2)
  for (int64_t k = 0; k < K; ++k) {
    const float in0 = from_bf16(p0[k]);
    const float in1 = from_bf16(p1[k]);
    const float add_0 = in0 + in1;
    const float rounded_1 = from_bf16(to_bf16(add_0));
    row0[k] = rounded_1;
    total_2 += rounded_1;
  }
  const float mean_2 = total_2 / float(K);
  float total_5 = 0.0f;
#pragma omp simd reduction(+ : total_5)
  for (int64_t k = 0; k < K; ++k) {
    const float rounded_1 = row0[k];
    const float sub_3 = rounded_1 - mean_2;
    row0[k] = sub_3;
    const float mul_4 = sub_3 * sub_3;
    total_5 += mul_4;
  }
  const float mean_5 = total_5 / float(K);
  const float add_6 = mean_5 + 1.0e-05f;
  const float rsqrt_7 = 1.0f / std::sqrt(add_6);
#pragma omp simd
  for (int64_t k = 0; k < K; ++k) {
    const float sub_3 = row0[k];
    const float mul_8 = sub_3 * rsqrt_7;
    const float in2 = p2[k];
    const float mul_9 = mul_8 * in2;
    const float in3 = p3[k];
    const float add_10 = mul_9 + in3;
    const float rounded_11 = from_bf16(to_bf16(add_10));
    row0[k] = rounded_11;
    more0[k] = to_bf16(add_10);
  }
}

}  // namespace

// Makes m rows and rounds them to codes [m, K]; gives how many numbers were too large.
extern "C" int64_t fxquant_rows(const void* const* operands, const int64_t* steps, int64_t m,
                                const float* limit, void* codes, float* amax, void* const* more,
                                int threads) {
  const Call call{operands, steps, more};
  int8_t* q = static_cast<int8_t*>(codes);
  if (m * K < 1 << 14) threads = 1;  // to wake others takes longer
#pragma omp parallel for num_threads(threads)
  for (int64_t row = 0; row < m; ++row) {
    alignas(64) float row0[K];
    prologue(call, row, row0);
    amax[row] = quantize_row(row0, 1, q + row * K);
  }
  return 0;
}
