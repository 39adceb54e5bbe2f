// int8_linear_384x384_channel.
//
// out[m, 384] = x[m, 384] @ weight.T in int8 (float32 to float32).
//
// Printed by fxquant. The spec, which fxquant.codegen.reference defines:
//   {"compute_dtype": "int8", "epilogue": {"nodes": [], "operands": []}, "name":
//   "int8_linear_384x384_channel", "out_dtype": "float32", "weight": {"batch": null, "encoding":
//   {"bits": 8, "block": [1, -1]}, "k": 384, "n": 384, "offset": 0, "shape": [384, 384],
//   "strides": [0, 384, 1]}, "x_dtype": "float32"}
//
// Weight: [384, 384], 8 bits uniform in blocks of 1xall
// Activation: rounded to int8, with a scale for every row
// Scheme: int8
// Modules: golden

#include "fxquant_floats.h"  // functions of floats
#include "fxquant_portable.h"  // vectors, threads and memory, as all kernels use them

namespace {

using stored_t = float;  // the activation, in float32
using out_t = float;  // the result, in float32
constexpr int64_t E = 1;  // matrices
constexpr int64_t N = 384;  // outputs
constexpr int64_t K = 384;  // inputs
constexpr int64_t BLOCK = 384;  // inputs that are summed before a scale is applied
constexpr int64_t CHUNK = 384;  // inputs that are decoded at a time for many rows
constexpr int64_t SUPER_ROWS = 768;  // rows that are worked off at a time

// Where the weight of matrix e, output n, input k is stored.
INLINE int64_t element_of(int64_t e, int64_t n, int64_t k) { return n * 384 + k; }
// The same of its scale and of the scale's scale; k counts blocks.
INLINE int64_t scale_of(int64_t e, int64_t n, int64_t k) { return n; }

struct Decoder {
  INLINE vi operand(vi codes, int step) const {
    return codes;
  }
};

// One row of a tile: epilogue and rounding.
template <typename Call>
INLINE void finish_row(const Call& call, int64_t e, int64_t row, int64_t n0, int64_t count,
                       const float* sums, float scale) {
  const int64_t at = (e * call.m + row) * N + n0;
  float* out = call.out + at;
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    const float acc = sums[i] * scale;
    out[i] = acc;
  }
}

}  // namespace

#include "weight_2a141c00.h"  // the repacked weight and its scales
#include "rows_8aade8df.h"  // of the activation, packed, and of the result
#include "few_070e77da.h"  // few rows: every code is decoded in registers and used
#include "many_31deb4bc.h"  // many rows: tiles of the weight are decoded once
#include "entry_48a4d65c.h"  // what is called from outside
