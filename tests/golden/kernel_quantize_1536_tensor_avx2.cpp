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

#include "fxquant_floats.h"  // functions of floats

namespace {

using stored_t = uint16_t;  // the activation, in bfloat16

constexpr int64_t K = 1536;  // inputs

INLINE float x_of(stored_t x) { return from_bf16(x); }

}  // namespace

#include "rounding_4bba3159.h"  // rows to int8
#include "entry_77b020ca.h"  // what is called from outside
