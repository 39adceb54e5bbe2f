"""nf4_linear_1536x384_bias_gelu_add.

out[m, 1536] = x[m, 384] @ weight.T, then add, gelu, add (bfloat16 to bfloat16).

Printed by fxquant. The spec, which fxquant.codegen.reference defines:
  {"compute_dtype": "bfloat16", "epilogue": {"nodes": [["aten.add.Tensor", ["%acc", "%in0"],
  []], ["aten.gelu.default", ["%0"], [["approximate", "tanh"]]], ["aten.add.Tensor", ["%1",
  "%in1"], []]], "operands": [["n", "bfloat16"], ["mn", "bfloat16"]]}, "name":
  "nf4_linear_1536x384_bias_gelu_add", "out_dtype": "bfloat16", "weight": {"batch": null,
  "encoding": {"bits": 4, "levels": "nf4", "scale": {"bits": 8, "block": [256], "levels":
  "dynamic8", "offset": true}}, "k": 384, "n": 1536, "offset": 0, "shape": [1536, 384],
  "strides": [0, 384, 1]}, "x_dtype": "bfloat16"}

Weight: [1536, 384], 4 bits nf4 in blocks of 64, scales 8 bits dynamic8 in blocks of 256
Scheme: nf4
Modules: golden
"""

import functools
import math

import torch
import triton
import triton.language as tl

from fxquant.formats.codebooks import get_codebook

# What the codes of the scales stand for.
SCALE_LEVELS = get_codebook("dynamic8").levels


@triton.jit
def tanh(x):
    """Hyperbolic tangent; a series where the quotient would cancel."""
    decay = tl.exp(-2.0 * tl.abs(x))
    quotient = (1.0 - decay) / (1.0 + decay)
    square = x * x
    series = x * (1.0 + square * (-1.0 / 3.0 + square * (2.0 / 15.0)))
    return tl.where(tl.abs(x) < 0.05, series, tl.where(x < 0.0, -quotient, quotient))


@triton.jit
def finish(acc, in0, in1, out, m, n, rows):
    """The epilogue on the sums of rows m and outputs n, rounded and stored."""
    value0 = tl.load(in0 + n).to(tl.float32)
    value1 = tl.load(in1 + (m * 1536 + n), mask=(m < rows), other=0).to(tl.float32)
    add_0 = acc + value0
    gelu_1 = (
        (0.5 * add_0) * (1.0 + tanh((0.7978845608028654 * (add_0 + (0.044715 * (add_0 * (add_0
        * add_0)))))))
    )
    add_2 = gelu_1 + value1
    where = m * 1536 + n
    tl.store(out + where, add_2.to(out.dtype.element_ty), mask=(m < rows))


@triton.jit
def level_of(code):
    """The level of a code, chosen by its bits from the last to the first."""
    one, two, four = code & 1 != 0, code & 2 != 0, code & 4 != 0
    v0 = tl.where(one, -0.6961928009986877, -1.0)
    v1 = tl.where(one, -0.39491748809814453, -0.5250730514526367)
    v2 = tl.where(one, -0.18477343022823334, -0.28444138169288635)
    v3 = tl.where(one, 0.0, -0.09105003625154495)
    v4 = tl.where(one, 0.16093020141124725, 0.07958029955625534)
    v5 = tl.where(one, 0.33791524171829224, 0.24611230194568634)
    v6 = tl.where(one, 0.5626170039176941, 0.44070982933044434)
    v7 = tl.where(one, 1.0, 0.7229568362236023)
    v0 = tl.where(two, v1, v0)
    v1 = tl.where(two, v3, v2)
    v2 = tl.where(two, v5, v4)
    v3 = tl.where(two, v7, v6)
    v0 = tl.where(four, v1, v0)
    v1 = tl.where(four, v3, v2)
    return tl.where(code & 8 != 0, v1, v0).to(tl.bfloat16)


@triton.jit
def decode(word, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """Words as the first to the last pair of their codes' levels, in bfloat16."""
    w0 = level_of(word >> 4 & 15)
    w1 = level_of(word & 15)
    w2 = level_of(word >> 12 & 15)
    w3 = level_of(word >> 8 & 15)
    w4 = level_of(word >> 20 & 15)
    w5 = level_of(word >> 16 & 15)
    w6 = level_of(word >> 28 & 15)
    w7 = level_of(word >> 24 & 15)
    return (
        tl.join(w0, w1).reshape(BLOCK_N, BLOCK_K // 4),
        tl.join(w2, w3).reshape(BLOCK_N, BLOCK_K // 4),
        tl.join(w4, w5).reshape(BLOCK_N, BLOCK_K // 4),
        tl.join(w6, w7).reshape(BLOCK_N, BLOCK_K // 4),
    )


@triton.jit
def scale_of(scales, nested, offset, scale_levels, n, k0):
    """The scales of outputs n at inputs k0 .."""
    run = k0 // 64
    block = n * 6 + run
    scale_code = tl.load(scales + block).to(tl.int32)
    coarse = tl.load(nested + ((n * 6 + run) // 256))
    scale = tl.load(scale_levels + scale_code) * coarse
    scale += tl.load(offset)
    return scale


@triton.jit(do_not_specialize=["rows"])
def nf4_linear_1536x384_bias_gelu_add_gemm(
    x, codes, scales, nested, offset, scale_levels, in0, in1, out, partial, rows, x_stride_m,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT: tl.constexpr,
):
    """Weight tile by activation tile on tensor cores, acc is [outputs, rows]."""
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    n0 = tl.program_id(1) * BLOCK_N
    share = tl.program_id(2)
    SHARE: tl.constexpr = (384 + BLOCK_K * SPLIT - 1) // (BLOCK_K * SPLIT) * BLOCK_K
    first_k = share * SHARE
    n = n0 + tl.arange(0, BLOCK_N)
    m, n = m[None, :], n[:, None]
    # Input 8 * j + i of a tile goes with the first pair of word j, i being 0 or 1.
    i = tl.arange(0, BLOCK_K // 4)[:, None]
    x_pairs = x + m * x_stride_m + (i // 2 * 8 + i % 2)
    acc = tl.full((BLOCK_N, BLOCK_M), 0.0, tl.float32)
    scale = scale_of(scales, nested, offset, scale_levels, n, first_k)
    for k0 in range(first_k, tl.minimum(first_k + SHARE, 384), BLOCK_K):
        # load
        x0 = tl.load(x_pairs + k0, mask=m < rows, other=0.0)
        x1 = tl.load(x_pairs + (k0 + 2), mask=m < rows, other=0.0)
        x2 = tl.load(x_pairs + (k0 + 4), mask=m < rows, other=0.0)
        x3 = tl.load(x_pairs + (k0 + 6), mask=m < rows, other=0.0)
        j = k0 // 8 + tl.arange(0, BLOCK_K // 8)[None, :]
        word = tl.load(codes.to(tl.pointer_type(tl.int32)) + (n * 48 + j))
        next_k0 = tl.minimum(k0 + BLOCK_K, 320)
        ahead = scale_of(scales, nested, offset, scale_levels, n, next_k0)
        # decode
        w0, w1, w2, w3 = decode(word, BLOCK_N, BLOCK_K)
        # dot
        sums = tl.dot(w0, x0)
        sums = tl.dot(w1, x1, sums)
        sums = tl.dot(w2, x2, sums)
        sums = tl.dot(w3, x3, sums)
        acc += sums * scale
        scale = ahead
    # epilogue
    if SPLIT == 1:
        finish(acc, in0, in1, out, m, n, rows)
    else:
        where = (share * rows + m) * 1536 + n
        tl.store(partial + where, acc, mask=(m < rows))


@triton.jit
def decode_bytes(code, scale, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """A tile's levels times their scales, in bfloat16."""
    first = (level_of(code >> 4).to(tl.float32) * scale).to(tl.bfloat16)
    second = (level_of(code & 15).to(tl.float32) * scale).to(tl.bfloat16)
    return tl.join(first, second).reshape(BLOCK_N, BLOCK_K)


@triton.jit(do_not_specialize=["rows"])
def nf4_linear_1536x384_bias_gelu_add_scaled(
    x, codes, scales, nested, offset, scale_levels, in0, in1, out, partial, rows, x_stride_m,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT: tl.constexpr,
):
    """Many rows: the weight tile with its scales by activation tile, acc is [outputs, rows]."""
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    n0 = tl.program_id(1) * BLOCK_N
    share = tl.program_id(2)
    SHARE: tl.constexpr = (384 + BLOCK_K * SPLIT - 1) // (BLOCK_K * SPLIT) * BLOCK_K
    first_k = share * SHARE
    n = n0 + tl.arange(0, BLOCK_N)
    m, n = m[None, :], n[:, None]
    x_rows = x + m * x_stride_m
    acc = tl.full((BLOCK_N, BLOCK_M), 0.0, tl.float32)
    scale = scale_of(scales, nested, offset, scale_levels, n, first_k)
    for k0 in range(first_k, tl.minimum(first_k + SHARE, 384), BLOCK_K):
        # load
        k = k0 + tl.arange(0, BLOCK_K)[:, None]
        x_tile = tl.load(x_rows + k, mask=m < rows, other=0.0)
        byte = k0 // 2 + tl.arange(0, BLOCK_K // 2)[None, :]
        code = tl.load(codes + (n * 192 + byte))
        next_k0 = tl.minimum(k0 + BLOCK_K, 320)
        ahead = scale_of(scales, nested, offset, scale_levels, n, next_k0)
        # decode
        w = decode_bytes(code, scale, BLOCK_N, BLOCK_K)
        # dot
        acc = tl.dot(w, x_tile, acc)
        scale = ahead
    # epilogue
    if SPLIT == 1:
        finish(acc, in0, in1, out, m, n, rows)
    else:
        where = (share * rows + m) * 1536 + n
        tl.store(partial + where, acc, mask=(m < rows))


@triton.jit(do_not_specialize=["rows"])
def nf4_linear_1536x384_bias_gelu_add_reduce(
    partial, in0, in1, out, rows, BLOCK_N: tl.constexpr, SPLIT: tl.constexpr,
):
    """Adds the shares of a split."""
    m = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    acc = tl.full((1, BLOCK_N), 0.0, tl.float32)
    for share in range(SPLIT):
        where = (share * rows + m) * 1536 + n
        acc += tl.load(partial + where)
    finish(acc, in0, in1, out, m, n, rows)


# What the kernels take; everything in capitals is a constant.
TYPES = {
    "x": "*bf16", "out": "*bf16", "partial": "*fp32", "codes": "*u8", "scales": "*u8",
    "nested": "*fp32", "offset": "*fp32", "scale_levels": "*fp32", "in0": "*bf16", "in1": "*bf16",
    "rows": "i32", "x_stride_m": "i32",
}

# Most rows -> kernel, constants, launch options; the last serves all above too.
VARIANTS = {
    64: (
        nf4_linear_1536x384_bias_gelu_add_gemm,
        {"BLOCK_M": 16, "BLOCK_N": 64, "BLOCK_K": 64, "SPLIT": 2},
        {"num_warps": 4, "num_stages": 5},
    ),
    128: (
        nf4_linear_1536x384_bias_gelu_add_gemm,
        {"BLOCK_M": 32, "BLOCK_N": 64, "BLOCK_K": 64, "SPLIT": 2},
        {"num_warps": 4, "num_stages": 5},
    ),
    256: (
        nf4_linear_1536x384_bias_gelu_add_scaled,
        {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 64, "SPLIT": 2},
        {"num_warps": 4, "num_stages": 4},
    ),
    512: (
        nf4_linear_1536x384_bias_gelu_add_scaled,
        {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 64, "SPLIT": 1},
        {"num_warps": 4, "num_stages": 4},
    ),
    2048: (
        nf4_linear_1536x384_bias_gelu_add_scaled,
        {"BLOCK_M": 256, "BLOCK_N": 64, "BLOCK_K": 64, "SPLIT": 1},
        {"num_warps": 4, "num_stages": 3},
    ),
}

# Shares -> the kernel that adds them.
REDUCTIONS = {
    split: (
        nf4_linear_1536x384_bias_gelu_add_reduce,
        {"BLOCK_N": 128, "SPLIT": split},
        {"num_warps": 4},
    )
    for split in (2,)
}


@functools.cache
def prepare(device):
    """The tables of levels on a device: make them before a CUDA graph is captured."""
    return [
        torch.tensor(SCALE_LEVELS, dtype=torch.float32, device=device),
    ]


def run(x, weight, extra, out=None):
    """The product: x [.., k] to [.., n] ([e, m, k] to [e, m, n] with a batch)."""
    shape = (*x.shape[:-1], 1536)
    if out is None:
        out = torch.empty(shape, dtype=torch.bfloat16, device=x.device)
    if not out.is_contiguous():
        return out.copy_(run(x, weight, extra))
    x = x.reshape(math.prod(x.shape[:-1]), 384)
    if x.stride(-1) != 1:
        x = x.contiguous()
    rows = x.shape[-2]
    if rows == 0:
        return out
    codes, scales, nested, offset = weight
    scale_levels, = prepare(x.device)
    in0 = extra[0].contiguous()
    in1 = extra[1].contiguous()

    most = next((most for most in VARIANTS if rows <= most), max(VARIANTS))
    kernel, tile, options = VARIANTS[most]
    split = tile["SPLIT"]
    partial = out
    if split > 1:
        sums = (split, rows, 1536)
        partial = torch.empty(sums, dtype=torch.float32, device=x.device)
    grid = (-(-rows // tile["BLOCK_M"]), -(-1536 // tile["BLOCK_N"]), split)
    with torch.cuda.device_of(x):
        kernel[grid](
            x, codes, scales, nested, offset, scale_levels, in0, in1, out, partial, rows,
            x.stride(0), **tile, **options,
        )
        if split > 1:
            add_shares, tile, options = REDUCTIONS[split]
            grid = (rows, -(-1536 // tile["BLOCK_N"]), 1)
            add_shares[grid](
                partial, in0, in1, out, rows, **tile, **options,
            )
    return out
