// nf4_gate_up_5632x2048_silu.
//
// out[m, 5632] = x[m, 2048] @ weight.T for 2 weights, then silu, mul (bfloat16 to bfloat16).
//
// Printed by fxquant. The spec, which fxquant.codegen.reference defines:
//   {"compute_dtype": "bfloat16", "epilogue": {"nodes": [["aten.silu.default", ["%acc"], []],
//   ["aten.mul.Tensor", ["%0", "%acc1"], []]], "operands": []}, "name":
//   "nf4_gate_up_5632x2048_silu", "out_dtype": "bfloat16", "weight": {"batch": null, "encoding":
//   {"bits": 4, "levels": "nf4", "scale": {"bits": 8, "block": [256], "levels": "dynamic8",
//   "offset": true}}, "k": 2048, "n": 5632, "offset": 0, "shape": [5632, 2048], "strides": [0,
//   2048, 1]}, "weights": 2, "x_dtype": "bfloat16"}
//
// Weight: [5632, 2048], 4 bits nf4 in blocks of 64, scales 8 bits dynamic8 in blocks of 256
// Scheme: nf4
// Modules: golden

#include "fxquant_floats.h"  // functions of floats
#include "fxquant_amx.h"  // vectors, threads and memory, as all kernels use them

namespace {

using stored_t = uint16_t;  // the activation, in bfloat16
using out_t = uint16_t;  // the result, in bfloat16
constexpr int64_t E = 1;  // matrices
constexpr int64_t WEIGHTS = 2;  // that are multiplied with the activation
constexpr int64_t N = 5632;  // outputs
constexpr int64_t K = 2048;  // inputs
constexpr int64_t BLOCK = 64;  // inputs that are summed before a scale is applied
constexpr int64_t CHUNK = 256;  // inputs that are decoded at a time for many rows
constexpr int64_t SUPER_ROWS = 320;  // rows that are worked off at a time
constexpr int64_t NESTED = 704;  // scales of the scales

// Where the weight of matrix e, output n, input k is stored.
INLINE int64_t element_of(int64_t e, int64_t n, int64_t k) { return n * 2048 + k; }
// The same of its scale and of the scale's scale; k counts blocks.
INLINE int64_t scale_of(int64_t e, int64_t n, int64_t k) { return n * 32 + k; }
INLINE int64_t nested_of(int64_t e, int64_t n, int64_t k) { return n / 8; }

alignas(64) constexpr float LEVELS[16] = {
    -1.0f, -0.6961928f, -0.52507305f, -0.3949175f, -0.28444138f, -0.18477343f, -0.091050036f, 0.0f,
    0.0795803f, 0.1609302f, 0.2461123f, 0.33791524f, 0.44070983f, 0.562617f, 0.72295684f, 1.0f,
};
alignas(64) constexpr uint16_t OPERAND_LEVELS[32] = {
    0xbf80, 0xbf32, 0xbf06, 0xbeca, 0xbe92, 0xbe3d, 0xbdba, 0x0000, 0x3da3, 0x3e25, 0x3e7c, 0x3ead,
    0x3ee2, 0x3f10, 0x3f39, 0x3f80, 0xbf80, 0xbf32, 0xbf06, 0xbeca, 0xbe92, 0xbe3d, 0xbdba, 0x0000,
    0x3da3, 0x3e25, 0x3e7c, 0x3ead, 0x3ee2, 0x3f10, 0x3f39, 0x3f80,
};
struct Decoder {
  vf levels = load(LEVELS);
  INLINE vf value(vi codes, int place) const {  // 4-bit place to float32
    return _mm512_permutexvar_ps(shift_right(codes, 4 * place), levels);
  }
  vi operands = load(reinterpret_cast<const uint32_t*>(OPERAND_LEVELS));
  INLINE vi operand(vi codes, int step) const {  // both halves at once
    return _mm512_permutexvar_epi16(shift_right(codes, 4 * step), operands);
  }
};

// One row of a tile: epilogue and rounding.
template <typename Call>
INLINE void finish_row(const Call& call, int64_t e, int64_t row, int64_t n0, int64_t count,
                       const float* sums, const float* sums1) {
  const int64_t at = (e * call.m + row) * N + n0;
  uint16_t* out = call.out + at;
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    const float acc = sums[i];
    const float acc1 = sums1[i];
    const float silu_0 = lane_silu(acc);
    const float mul_1 = silu_0 * acc1;
    out[i] = to_bf16(mul_1);
  }
}

}  // namespace

#include "weight_647b9e53.h"  // the repacked weight and its scales
#include "rows_26cbab28.h"  // of the activation, packed, and of the result
#include "few_ae01ec9e.h"  // few rows: every code is decoded in registers and used
#include "many_f5572a06.h"  // many rows: tiles of the weight are decoded once
#include "entry_e6170e75.h"  // what is called from outside
