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

#include "fxquant_floats.h"  // functions of floats

namespace {

using stored_t = float;  // the activation, as made

constexpr int64_t K = 384;  // inputs

INLINE float x_of(stored_t x) { return x; }

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

#include "rounding_574e41d2.h"  // rows to int8
#include "entry_1b4a304b.h"  // what is called from outside
