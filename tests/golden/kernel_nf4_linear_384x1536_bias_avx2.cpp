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
#include "fxquant_avx2.h"  // vectors, threads and memory, as all kernels use them

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

// Levels: -1, -0.696193, -0.525073, -0.394917, -0.284441, -0.184773, -0.09105, 0, 0.0795803,
// 0.16093, 0.246112, 0.337915, 0.44071, 0.562617, 0.722957, 1.
alignas(64) constexpr uint8_t BYTE2[16] = {
    0x80, 0x32, 0x06, 0xca, 0x92, 0x3d, 0xba, 0x00, 0xa3, 0x25, 0x7c, 0xad, 0xe2, 0x10, 0x39, 0x80,
};
alignas(64) constexpr uint8_t BYTE3[16] = {
    0xbf, 0xbf, 0xbf, 0xbe, 0xbe, 0xbe, 0xbd, 0x00, 0x3d, 0x3e, 0x3e, 0x3e, 0x3e, 0x3f, 0x3f, 0x3f,
};
struct Decoder {
  vi byte2 = both_lanes(BYTE2), byte3 = both_lanes(BYTE3);
  vi order = both_lanes(PAIRS);
  // One look-up of a byte serves 32 codes: those of four inputs.
  INLINE vf value(vi codes, int input) const {  // of a group, to float32
    const vi code = shift_right(_mm256_shuffle_epi8(codes, order), 4 * (input / 4));
    const vi index = _mm256_and_si256(code, _mm256_set1_epi8(15));
    const vi b2 = _mm256_shuffle_epi8(byte2, index);
    const vi b3 = _mm256_shuffle_epi8(byte3, index);
    const bool first = input % 4 < 2;
    const vi pair = first ? _mm256_unpacklo_epi8(b2, b3) : _mm256_unpackhi_epi8(b2, b3);
    const vi upper = _mm256_set1_epi32(int(0xffff0000u));
    const vi level = input % 2 ? _mm256_and_si256(pair, upper) : _mm256_slli_epi32(pair, 16);
    return _mm256_castsi256_ps(level);
  }
  INLINE vf operand(vi codes, int step) const {
    return value(codes, step);
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

#include "weight_ac4bfa66.h"  // the repacked weight and its scales
#include "rows_9127d50b.h"  // of the activation, packed, and of the result
#include "few_96268203.h"  // few rows: every code is decoded in registers and used
#include "many_157990eb.h"  // many rows: tiles of the weight are decoded once
#include "entry_0f099a9e.h"  // what is called from outside
