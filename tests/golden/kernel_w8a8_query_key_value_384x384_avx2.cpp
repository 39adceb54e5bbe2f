// w8a8_query_key_value_384x384.
//
// out[m, 384] = x[m, 384] @ weight.T for 3 weights in int8, then add, add, add, 3 results (int8 to
// float32).
//
// Printed by fxquant. The spec, which fxquant.codegen.reference defines:
//   {"compute_dtype": "int8", "epilogue": {"nodes": [["aten.add.Tensor", ["%acc1", "%in1"], []],
//   ["aten.add.Tensor", ["%acc2", "%in2"], []], ["aten.add.Tensor", ["%acc", "%in0"], []]],
//   "operands": [["n", "float32"], ["n", "float32"], ["n", "float32"]]}, "more": [["%0",
//   "float32"], ["%1", "float32"]], "name": "w8a8_query_key_value_384x384", "out_dtype":
//   "float32", "weight": {"batch": null, "encoding": {"bits": 8, "block": [1, -1]}, "k": 384, "n":
//   384, "offset": 0, "shape": [384, 384], "strides": [0, 384, 1]}, "weights": 3, "x_dtype":
//   "int8"}
//
// Weight: [384, 384], 8 bits uniform in blocks of 1xall
// Activation: int8, quantized before, with amax of every row
// Scheme: w8a8
// Modules: golden

#include "fxquant_floats.h"  // functions of floats
#include "fxquant_avx2.h"  // vectors, threads and memory, as all kernels use them

namespace {

using stored_t = int8_t;  // the activation, in int8
using out_t = float;  // the result, in float32
constexpr int64_t E = 1;  // matrices
constexpr int64_t WEIGHTS = 3;  // that are multiplied with the activation
constexpr int64_t N = 384;  // outputs
constexpr int64_t K = 384;  // inputs
constexpr int64_t BLOCK = 384;  // inputs that are summed before a scale is applied
constexpr int64_t CHUNK = 384;  // inputs that are decoded at a time for many rows
constexpr int64_t SUPER_ROWS = 768;  // rows that are worked off at a time
constexpr int64_t OPERANDS = 3;  // of the epilogue

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
                       const float* sums, const float* sums1, const float* sums2, float scale) {
  const int64_t at = (e * call.m + row) * N + n0;
  float* out = call.out + at;
  float* out1 = call.out1 + at;
  float* out2 = call.out2 + at;
  const float* p0 = static_cast<const float*>(call.extra[0]) + n0;
  const float* p1 = static_cast<const float*>(call.extra[1]) + n0;
  const float* p2 = static_cast<const float*>(call.extra[2]) + n0;
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    const float acc = sums[i] * scale;
    const float acc1 = sums1[i] * scale;
    const float acc2 = sums2[i] * scale;
    const float in0 = p0[i];
    const float in1 = p1[i];
    const float in2 = p2[i];
    const float add_0 = acc1 + in1;
    const float add_1 = acc2 + in2;
    const float add_2 = acc + in0;
    out[i] = add_2;
    out1[i] = add_0;
    out2[i] = add_1;
  }
}

}  // namespace

#include "weight_950c6ecc.h"  // the repacked weight and its scales
#include "rows_09c36f47.h"  // of the activation, packed, and of the result
#include "few_f221663b.h"  // few rows: every code is decoded in registers and used
#include "many_aa4d4df1.h"  // many rows: tiles of the weight are decoded once
#include "entry_802a131d.h"  // what is called from outside
