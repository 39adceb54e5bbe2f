"""quantize_1536_tensor.

q[m, 1536], amax[m] = x[m, 1536] in int8 per tensor, clipped (from bfloat16).

Printed by fxquant. The spec, which fxquant.codegen.reference defines:
  {"clipped": true, "k": 1536, "kind": "quantize", "name": "quantize_1536_tensor", "scope":
  "tensor", "x_dtype": "bfloat16"}

Scheme: quantize
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


@triton.jit
def read(x_rows, m, k, rows):
    """Inputs k of rows m in float32."""
    mask = (m < rows) & (k < 1536)
    values = tl.load(x_rows + k, mask=mask, other=0.0).to(tl.float32)
    return values


@triton.jit(do_not_specialize=["rows"])
def quantize_1536_tensor_peaks(
    x, peaks, rows, x_stride_m, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):
    """The largest magnitude of every program's rows."""
    peak = tl.full((BLOCK_M, 1), 0, tl.int32)
    for m0 in range(tl.program_id(0) * BLOCK_M, rows, tl.num_programs(0) * BLOCK_M):
        m = m0 + tl.arange(0, BLOCK_M)[:, None].to(tl.int64)
        x_rows = x + m * x_stride_m
        k = tl.arange(0, BLOCK_K)[None, :]
        values = read(x_rows, m, k, rows)
        bits = tl.reduce(bits_of(values), 1, most, keep_dims=True)
        peak = tl.maximum(peak, bits)
    tl.store(peaks + tl.program_id(0), tl.reduce(peak, None, most))


@triton.jit(do_not_specialize=["rows", "parts"])
def quantize_1536_tensor_quantize(
    x, limit, peaks, q, amax, counter, rows, parts, x_stride_m, BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The scale and the integers of every row."""
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    x_rows = x + m * x_stride_m
    part = tl.arange(0, 512)
    bits = tl.reduce(tl.load(peaks + part, mask=part < parts, other=0), 0, most)
    peak = at_least(number_of(bits)) + tl.full((BLOCK_M, 1), 0.0, tl.float32)
    limited = at_least(tl.load(limit))
    peak = tl.where(peak > limited, limited, peak)
    tl.store(amax + m, peak, mask=m < rows)
    k = tl.arange(0, BLOCK_K)[None, :]
    values = read(x_rows, m, k, rows)
    tl.store(q + (m * 1536 + k), to_int8(values, peak), mask=(m < rows) & (k < 1536))
    if counter is not None:
        beyond = tl.reduce((tl.abs(values) > peak).to(tl.int64), None, add)
        tl.atomic_add(counter, beyond, mask=beyond > 0, sem="relaxed")


# What the kernels take; everything in capitals is a constant.
TYPES = {
    "x": "*bf16", "limit": "*fp32", "peaks": "*i32", "q": "*i8", "amax": "*fp32", "counter": "*i64",
    "rows": "i32", "parts": "i32", "x_stride_m": "i32",
}

# Step -> the kernel that does it, its constants, launch options.
STEPS = {
    "peaks": (
        quantize_1536_tensor_peaks,
        {"BLOCK_M": 1, "BLOCK_K": 2048},
        {"num_warps": 4},
    ),
    "quantize": (
        quantize_1536_tensor_quantize,
        {"BLOCK_M": 1, "BLOCK_K": 2048},
        {"num_warps": 4},
    ),
}


def quantize(x, limit, counter):
    """Rows of an activation in int8, and the magnitudes that are 127 in them."""
    rows = x.shape[-2]
    q = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    amax = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    if rows == 0:
        return q, amax
    kernel, tile, options = STEPS["peaks"]
    parts = min(-(-rows // tile["BLOCK_M"]), 512)
    peaks = torch.empty(parts, dtype=torch.int32, device=x.device)
    kernel[parts,](x, peaks, rows, x.stride(0), **tile, **options)
    kernel, tile, options = STEPS["quantize"]
    grid = (-(-rows // tile["BLOCK_M"]), 1)
    kernel[grid](
        x, limit, peaks, q, amax, counter, rows, parts, x.stride(0), **tile, **options,
    )
    return q, amax


def run(x, extra, counter=None):
    """Codes and scales: x [.., k] to int8 [.., k] and float32 [..]."""
    shape = x.shape
    x = x.reshape(math.prod(shape[:-1]), 1536)
    if x.stride(-1) != 1:
        x = x.contiguous()
    limit = extra[0].contiguous()
    with torch.cuda.device_of(x):
        q, amax = quantize(x, limit, counter)
    return q.reshape(shape), amax.reshape(shape[:-1])
