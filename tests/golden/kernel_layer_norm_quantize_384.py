"""layer_norm_quantize_384.

q[m, 384], amax[m] = x[m, 384] in int8 per token (from bfloat16), x by add, rounded, mean, sub,
mul, mean, add, rsqrt, mul, mul, add, rounded, with 1 of its values written out.

Printed by fxquant. The spec, which fxquant.codegen.reference defines:
  {"clipped": false, "k": 384, "kind": "quantize", "name": "layer_norm_quantize_384",
  "prologue": {"more": [["%11", "bfloat16"]], "nodes": [["aten.add.Tensor", ["%in0", "%in1"],
  []], ["aten._to_copy.default", ["%0"], [["dtype", "bfloat16"]]], ["aten.mean.dim", ["%1"],
  []], ["aten.sub.Tensor", ["%1", "%2"], []], ["aten.mul.Tensor", ["%3", "%3"], []],
  ["aten.mean.dim", ["%4"], []], ["aten.add.Tensor", ["%5", 1e-05], []], ["aten.rsqrt.default",
  ["%6"], []], ["aten.mul.Tensor", ["%3", "%7"], []], ["aten.mul.Tensor", ["%8", "%in2"], []],
  ["aten.add.Tensor", ["%9", "%in3"], []], ["aten._to_copy.default", ["%10"], [["dtype",
  "bfloat16"]]]], "operands": [["mk", "bfloat16"], ["mk", "bfloat16"], ["k", "float32"], ["k",
  "float32"]]}, "scope": "token", "x_dtype": "bfloat16"}

Scheme: layer
Modules: golden
"""

import math

import torch
import triton
import triton.language as tl


@triton.jit
def add(x, y):
    """What sums are made of."""
    return x + y


@triton.jit
def most(x, y):
    """What the largest is found with."""
    return tl.maximum(x, y)


# The least magnitude that a scale is made of: 127 / amax and amax / 127 are normal numbers.
LEAST = tl.constexpr(2.0**-100)


@triton.jit
def bits_of(x):
    """Magnitudes as integers: in the order of the numbers, what is not finite above all."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def number_of(bits):
    """The magnitude behind an integer, NaN where it is not finite."""
    return tl.where(bits < 0x7F800000, bits.to(tl.float32, bitcast=True), float("nan"))


@triton.jit
def at_least(x):
    """What is not below LEAST; NaN stays."""
    return tl.where(x < LEAST, LEAST, x)


@triton.jit
def to_int8(x, peak):
    """Integers, half to even: at 1.5 * 2**23 a float32 number's last place is 1."""
    scaled = tl.minimum(tl.maximum(x * tl.div_rn(127.0, peak), -127.0), 127.0)
    code = (scaled + 12582912.0) - 12582912.0
    return tl.where(peak == peak, code, 0.0).to(tl.int8)


@triton.jit(do_not_specialize=["rows"])
def layer_norm_quantize_384_rows(
    in0, in1, in2, in3, q, amax, more0, rows, in0_stride_m, in1_stride_m, BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Rows of an activation as they are made, their scales and their integers."""
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    k = tl.arange(0, BLOCK_K)[None, :]
    inside = (m < rows) & (k < 384)
    value0 = tl.load(in0 + m * in0_stride_m + k, mask=inside, other=0).to(tl.float32)
    value1 = tl.load(in1 + m * in1_stride_m + k, mask=inside, other=0).to(tl.float32)
    value2 = tl.load(in2 + k, mask=k < 384, other=0)
    value3 = tl.load(in3 + k, mask=k < 384, other=0)
    add_0 = value0 + value1
    rounded_1 = add_0.to(tl.bfloat16).to(tl.float32)
    mean_2 = tl.reduce(tl.where(k < 384, rounded_1, 0.0), 1, add, keep_dims=True) / 384.0
    sub_3 = rounded_1 - mean_2
    mul_4 = sub_3 * sub_3
    mean_5 = tl.reduce(tl.where(k < 384, mul_4, 0.0), 1, add, keep_dims=True) / 384.0
    add_6 = mean_5 + 1e-05
    rsqrt_7 = tl.rsqrt(add_6)
    mul_8 = sub_3 * rsqrt_7
    mul_9 = mul_8 * value2
    add_10 = mul_9 + value3
    rounded_11 = add_10.to(tl.bfloat16).to(tl.float32)
    x = tl.where(k < 384, rounded_11, 0.0)
    tl.store(more0 + m * 384 + k, rounded_11.to(tl.bfloat16), mask=inside)
    bits = tl.reduce(bits_of(x), 1, most, keep_dims=True)
    peak = at_least(number_of(bits))
    tl.store(amax + m, peak, mask=m < rows)
    tl.store(q + m * 384 + k, to_int8(x, peak), mask=inside)


# What the kernels take; everything in capitals is a constant.
TYPES = {
    "in0": "*bf16", "in1": "*bf16", "in2": "*fp32", "in3": "*fp32", "q": "*i8", "amax": "*fp32",
    "more0": "*bf16", "rows": "i32", "in0_stride_m": "i32", "in1_stride_m": "i32",
}

# Step -> the kernel that does it, its constants, launch options.
STEPS = {
    "rows": (
        layer_norm_quantize_384_rows,
        {"BLOCK_M": 4, "BLOCK_K": 512},
        {"num_warps": 4},
    ),
}


def as_rows(x):
    """An activation as one matrix, its inputs side by side."""
    x = x.reshape(math.prod(x.shape[:-1]), 384)
    return x if x.stride(-1) == 1 else x.contiguous()


def run(operands, extra):
    """Codes, scales and further results: int8 [.., k], float32 [..], [.., k]."""
    shape, device = operands[0].shape, operands[0].device
    in0, in1, in2, in3 = operands
    in0 = as_rows(in0)
    in1 = as_rows(in1)
    in2 = in2.contiguous()
    in3 = in3.contiguous()
    q = torch.empty(shape, dtype=torch.int8, device=device)
    amax = torch.empty(shape[:-1], dtype=torch.float32, device=device)
    more0 = torch.empty(shape, dtype=torch.bfloat16, device=device)
    if rows := amax.numel():
        kernel, tile, options = STEPS["rows"]
        with torch.cuda.device_of(q):
            kernel[-(-rows // tile["BLOCK_M"]),](
                in0, in1, in2, in3, q, amax, more0, rows, in0.stride(0), in1.stride(0), **tile,
                **options,
            )
    return [q, amax, more0]
