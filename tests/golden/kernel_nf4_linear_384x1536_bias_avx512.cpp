// nf4_linear_384x1536_bias.
//
// out[m, 384] = x[m, 1536] @ weight.T, then add (bfloat16 to bfloat16).
//
// Printed by fxquant. The spec, which fxquant.codegen.reference defines:
//   {"compute_dtype": "bfloat16", "epilogue": {"nodes": [["aten.add.Tensor", ["%acc", "%in0"],
//   []]], "operands": [["n", "bfloat16"]]}, "name": "nf4_linear_384x1536_bias", "out_dtype":
//   "bfloat16", "weight": {"batch": null, "encoding": {"bits": 4, "levels": "nf4", "scale":
//   {"bits": 8, "block": [256], "levels": "dynamic8", "offset": true}}, "k": 1536, "n": 384,
//   "offset": 0, "shape": [384, 1536], "strides": [0, 1536, 1]}, "x_dtype": "bfloat16"}
//
// Weight: [384, 1536], 4 bits nf4 in blocks of 64, scales 8 bits dynamic8 in blocks of 256
// Scheme: nf4
// Modules: golden

#include "fxquant_floats.h"  // functions of floats
#include "fxquant_avx512.h"  // vectors, threads and memory, as all kernels use them

namespace {

using stored_t = uint16_t;  // the activation, in bfloat16
using out_t = uint16_t;  // the result, in bfloat16
constexpr int64_t E = 1;  // matrices
constexpr int64_t N = 384;  // outputs
constexpr int64_t K = 1536;  // inputs
constexpr int64_t BLOCK = 64;  // inputs that are summed before a scale is applied
constexpr int64_t CHUNK = 256;  // inputs that are decoded at a time for many rows
constexpr int64_t SUPER_ROWS = 768;  // rows that are worked off at a time
constexpr int64_t NESTED = 36;  // scales of the scales

// Where the weight of matrix e, output n, input k is stored.
INLINE int64_t element_of(int64_t e, int64_t n, int64_t k) { return n * 1536 + k; }
// The same of its scale and of the scale's scale; k counts blocks.
INLINE int64_t scale_of(int64_t e, int64_t n, int64_t k) { return n * 24 + k; }
INLINE int64_t nested_of(int64_t e, int64_t n, int64_t k) { return (n * 24 + k) / 256; }

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
                       const float* sums) {
  const int64_t at = (e * call.m + row) * N + n0;
  uint16_t* out = call.out + at;
  const uint16_t* p0 = static_cast<const uint16_t*>(call.extra[0]) + n0;
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    const float acc = sums[i];
    const float in0 = from_bf16(p0[i]);
    const float add_0 = acc + in0;
    out[i] = to_bf16(add_0);
  }
}

}  // namespace

#include "weight_b12db501.h"  // the repacked weight and its scales
#include "rows_25aaaf94.h"  // of the activation, packed, and of the result
#include "few_48e1b0e8.h"  // few rows: every code is decoded in registers and used
#include "many_28a6239b.h"  // many rows: tiles of the weight are decoded once
#include "entry_b2f7d84c.h"  // what is called from outside
