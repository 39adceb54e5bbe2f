"""int8_linear_384x384_channel.

out[m, 384] = x[m, 384] @ weight.T in int8 (float32 to float32).

Printed by fxquant. The spec, which fxquant.codegen.reference defines:
  {"compute_dtype": "int8", "epilogue": {"nodes": [], "operands": []}, "name":
  "int8_linear_384x384_channel", "out_dtype": "float32", "weight": {"batch": null, "encoding":
  {"bits": 8, "block": [1, -1]}, "k": 384, "n": 384, "offset": 0, "shape": [384, 384],
  "strides": [0, 384, 1]}, "x_dtype": "float32"}

Weight: [384, 384], 8 bits uniform in blocks of 1xall
Activation: rounded to int8, with a scale for every row
Scheme: int8
Modules: golden
"""

import math

import torch
import triton
import triton.language as tl


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


@triton.jit
def read(x_rows, m, k, rows):
    """Inputs k of rows m in float32."""
    mask = (m < rows) & (k < 384)
    values = tl.load(x_rows + k, mask=mask, other=0.0).to(tl.float32)
    return values


@triton.jit(do_not_specialize=["rows"])
def int8_linear_384x384_channel_quantize(
    x, q, amax, rows, x_stride_m, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):
    """The scale and the integers of every row."""
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    x_rows = x + m * x_stride_m
    k = tl.arange(0, BLOCK_K)[None, :]
    values = read(x_rows, m, k, rows)
    bits = tl.reduce(bits_of(values), 1, most, keep_dims=True)
    peak = at_least(number_of(bits))
    tl.store(amax + m, peak, mask=m < rows)
    tl.store(q + (m * 384 + k), to_int8(values, peak), mask=(m < rows) & (k < 384))


@triton.jit
def finish(acc, out, m, n, rows):
    """The epilogue on the sums of rows m and outputs n, rounded and stored."""
    where = m * 384 + n
    tl.store(out + where, acc.to(out.dtype.element_ty), mask=(m < rows))


@triton.jit
def decode(codes, n0, k0, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """The integers of outputs n0 .. and inputs k0 .., [BLOCK_N, BLOCK_K] in int8."""
    # load
    n = n0 + tl.arange(0, BLOCK_N)[:, None]
    k = k0 + tl.arange(0, BLOCK_K)[None, :]
    code = tl.load(codes + (n * 384 + k))
    # decode
    level = code
    return level


@triton.jit
def scale_of(scales, n):
    """The scales of outputs n."""
    block = n
    scale = tl.load(scales + block)
    return scale


@triton.jit(do_not_specialize=["rows"])
def int8_linear_384x384_channel_gemm(
    q, amax, codes, scales, out, partial, rows, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, SPLIT: tl.constexpr,
):
    """Weight tile by activation tile on tensor cores, acc is [outputs, rows]."""
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    n0 = tl.program_id(1) * BLOCK_N
    share = tl.program_id(2)
    SHARE: tl.constexpr = (384 + BLOCK_K * SPLIT - 1) // (BLOCK_K * SPLIT) * BLOCK_K
    first_k = share * SHARE
    n = n0 + tl.arange(0, BLOCK_N)
    m, n = m[None, :], n[:, None]
    q_rows = q + m * 384
    sums = tl.full((BLOCK_N, BLOCK_M), 0, tl.int32)
    for k0 in range(first_k, tl.minimum(first_k + SHARE, 384), BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)[:, None]
        q_tile = tl.load(q_rows + k, mask=m < rows, other=0)
        # load and decode
        w = decode(codes, n0, k0, BLOCK_N, BLOCK_K)
        # dot
        sums = tl.dot(w, q_tile, sums, out_dtype=tl.int32)
    # scale
    acc = sums.to(tl.float32) * scale_of(scales, n)
    peak = tl.load(amax + m, mask=m < rows, other=0.0)
    acc *= tl.div_rn(peak, 127.0)
    # epilogue
    if SPLIT == 1:
        finish(acc, out, m, n, rows)
    else:
        where = (share * rows + m) * 384 + n
        tl.store(partial + where, acc, mask=(m < rows))


# What the kernels take; everything in capitals is a constant.
TYPES = {
    "x": "*fp32", "out": "*fp32", "partial": "*fp32", "codes": "*i8", "scales": "*fp32", "q": "*i8",
    "amax": "*fp32", "rows": "i32", "x_stride_m": "i32",
}

# Most rows -> kernel, constants, launch options; the last serves all above too.
VARIANTS = {
    64: (
        int8_linear_384x384_channel_gemm,
        {"BLOCK_M": 16, "BLOCK_N": 64, "BLOCK_K": 128, "SPLIT": 1},
        {"num_warps": 4, "num_stages": 4},
    ),
    128: (
        int8_linear_384x384_channel_gemm,
        {"BLOCK_M": 32, "BLOCK_N": 64, "BLOCK_K": 128, "SPLIT": 1},
        {"num_warps": 4, "num_stages": 4},
    ),
    2048: (
        int8_linear_384x384_channel_gemm,
        {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 128, "SPLIT": 1},
        {"num_warps": 4, "num_stages": 4},
    ),
}

# Step -> the kernel that does it, its constants, launch options.
STEPS = {
    "quantize": (
        int8_linear_384x384_channel_quantize,
        {"BLOCK_M": 4, "BLOCK_K": 512},
        {"num_warps": 4},
    ),
}


def quantize(x):
    """Rows of an activation in int8, and the magnitudes that are 127 in them."""
    rows = x.shape[-2]
    q = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    amax = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    if rows == 0:
        return q, amax
    kernel, tile, options = STEPS["quantize"]
    grid = (-(-rows // tile["BLOCK_M"]), 1)
    kernel[grid](
        x, q, amax, rows, x.stride(0), **tile, **options,
    )
    return q, amax


def run(x, weight, extra, out=None):
    """The product: x [.., k] to [.., n] ([e, m, k] to [e, m, n] with a batch)."""
    shape = (*x.shape[:-1], 384)
    if out is None:
        out = torch.empty(shape, dtype=torch.float32, device=x.device)
    if not out.is_contiguous():
        return out.copy_(run(x, weight, extra))
    x = x.reshape(math.prod(x.shape[:-1]), 384)
    if x.stride(-1) != 1:
        x = x.contiguous()
    rows = x.shape[-2]
    if rows == 0:
        return out
    codes, scales = weight

    most = next((most for most in VARIANTS if rows <= most), max(VARIANTS))
    kernel, tile, options = VARIANTS[most]
    split = tile["SPLIT"]
    partial = out
    grid = (-(-rows // tile["BLOCK_M"]), -(-384 // tile["BLOCK_N"]), split)
    with torch.cuda.device_of(x):
        q, amax = quantize(x)
        kernel[grid](
            q, amax, codes, scales, out, partial, rows, **tile, **options,
        )
    return out
