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
def codebook():
    """The level of every code: the codebook 'nf4'."""
    code = tl.arange(0, 16)
    level = tl.full((16,), -1.0, tl.float32)
    level = tl.where(code == 1, -0.6961928009986877, level)
    level = tl.where(code == 2, -0.5250730514526367, level)
    level = tl.where(code == 3, -0.39491748809814453, level)
    level = tl.where(code == 4, -0.28444138169288635, level)
    level = tl.where(code == 5, -0.18477343022823334, level)
    level = tl.where(code == 6, -0.09105003625154495, level)
    level = tl.where(code == 7, 0.0, level)
    level = tl.where(code == 8, 0.07958029955625534, level)
    level = tl.where(code == 9, 0.16093020141124725, level)
    level = tl.where(code == 10, 0.24611230194568634, level)
    level = tl.where(code == 11, 0.33791524171829224, level)
    level = tl.where(code == 12, 0.44070982933044434, level)
    level = tl.where(code == 13, 0.5626170039176941, level)
    level = tl.where(code == 14, 0.7229568362236023, level)
    level = tl.where(code == 15, 1.0, level)
    return level


@triton.jit
def decode(
    codes, scales, nested, offset, scale_levels, n0, k0, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The weight at outputs n0 .. and inputs k0 .., [BLOCK_N, BLOCK_K] in bfloat16."""
    # load
    n = n0 + tl.arange(0, BLOCK_N)[:, None]
    byte = k0 // 2 + tl.arange(0, BLOCK_K // 2)[None, :]
    code = tl.load(codes + (n * 192 + byte))
    code = tl.join(code >> 4, code & 15).reshape(BLOCK_N, BLOCK_K)
    # decode
    flat = code.to(tl.int32).reshape(BLOCK_N * BLOCK_K)
    level = tl.gather(codebook(), flat, 0).reshape(BLOCK_N, BLOCK_K)
    run = k0 // 64 + tl.arange(0, BLOCK_K // 64)[None, :]
    block = n * 6 + run
    scale_code = tl.load(scales + block).to(tl.int32)
    coarse = tl.load(nested + ((n * 6 + run) // 256))
    scale = tl.load(scale_levels + scale_code) * coarse
    scale += tl.load(offset)
    if BLOCK_K > 64:
        scale = tl.broadcast_to(scale[:, :, None], (BLOCK_N, BLOCK_K // 64, 64))
        scale = scale.reshape(BLOCK_N, BLOCK_K)
    return (level * scale).to(tl.bfloat16)


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
    v0 = acc + value0
    v1 = (0.5 * v0) * (1.0 + tanh((0.7978845608028654 * (v0 + (0.044715 * (v0 * (v0 * v0)))))))
    v2 = v1 + value1
    where = m * 1536 + n
    tl.store(out + where, v2.to(out.dtype.element_ty), mask=(m < rows))


@triton.jit
def add(x, y):
    """What sums are made of."""
    return x + y


@triton.jit(do_not_specialize=["rows"])
def nf4_linear_1536x384_bias_gelu_add_gemv(
    x, codes, scales, nested, offset, scale_levels, in0, in1, out, partial, rows, x_stride_m,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT: tl.constexpr,
):
    """Few rows: every program streams its share of BLOCK_N outputs' weights once."""
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    n0 = tl.program_id(1) * BLOCK_N
    share = tl.program_id(2)
    x_rows = x + m[:, None, None] * x_stride_m
    sums = tl.full((BLOCK_M, BLOCK_N, BLOCK_K), 0.0, tl.float32)
    for k0 in range(share * BLOCK_K, 384, BLOCK_K * SPLIT):
        k = k0 + tl.arange(0, BLOCK_K)[None, None, :]
        x_tile = tl.load(x_rows + k, mask=(m < rows)[:, None, None], other=0.0)
        # load and decode
        w = decode(codes, scales, nested, offset, scale_levels, n0, k0, BLOCK_N, BLOCK_K)
        sums += x_tile.to(tl.float32) * w[None, :, :].to(tl.float32)
    acc = tl.reduce(sums, 2, add)
    # epilogue
    n = n0 + tl.arange(0, BLOCK_N)
    m, n = m[:, None], n[None, :]
    if SPLIT == 1:
        finish(acc, in0, in1, out, m, n, rows)
    else:
        where = (share * rows + m) * 1536 + n
        tl.store(partial + where, acc, mask=(m < rows))


@triton.jit(do_not_specialize=["rows"])
def nf4_linear_1536x384_bias_gelu_add_gemm(
    x, codes, scales, nested, offset, scale_levels, in0, in1, out, partial, rows, x_stride_m,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT: tl.constexpr,
):
    """Many rows: weight tile by activation tile on tensor cores, acc is [outputs, rows]."""
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    n0 = tl.program_id(1) * BLOCK_N
    share = tl.program_id(2)
    x_rows = x + m[None, :] * x_stride_m
    acc = tl.full((BLOCK_N, BLOCK_M), 0.0, tl.float32)
    for k0 in range(share * BLOCK_K, 384, BLOCK_K * SPLIT):
        k = k0 + tl.arange(0, BLOCK_K)[:, None]
        x_tile = tl.load(x_rows + k, mask=(m < rows)[None, :], other=0.0)
        # load and decode
        w = decode(codes, scales, nested, offset, scale_levels, n0, k0, BLOCK_N, BLOCK_K)
        # dot
        acc = tl.dot(w, x_tile, acc)
    # epilogue
    n = n0 + tl.arange(0, BLOCK_N)
    m, n = m[None, :], n[:, None]
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
    1: (
        nf4_linear_1536x384_bias_gelu_add_gemv,
        {"BLOCK_M": 1, "BLOCK_N": 16, "BLOCK_K": 128, "SPLIT": 1},
        {"num_warps": 4, "num_stages": 2},
    ),
    2: (
        nf4_linear_1536x384_bias_gelu_add_gemv,
        {"BLOCK_M": 2, "BLOCK_N": 16, "BLOCK_K": 128, "SPLIT": 1},
        {"num_warps": 4, "num_stages": 2},
    ),
    4: (
        nf4_linear_1536x384_bias_gelu_add_gemv,
        {"BLOCK_M": 4, "BLOCK_N": 16, "BLOCK_K": 128, "SPLIT": 1},
        {"num_warps": 4, "num_stages": 2},
    ),
    16: (
        nf4_linear_1536x384_bias_gelu_add_gemm,
        {"BLOCK_M": 16, "BLOCK_N": 64, "BLOCK_K": 64, "SPLIT": 2},
        {"num_warps": 4, "num_stages": 3},
    ),
    32: (
        nf4_linear_1536x384_bias_gelu_add_gemm,
        {"BLOCK_M": 32, "BLOCK_N": 64, "BLOCK_K": 64, "SPLIT": 1},
        {"num_warps": 4, "num_stages": 3},
    ),
    64: (
        nf4_linear_1536x384_bias_gelu_add_gemm,
        {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 64, "SPLIT": 1},
        {"num_warps": 4, "num_stages": 3},
    ),
    128: (
        nf4_linear_1536x384_bias_gelu_add_gemm,
        {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64, "SPLIT": 1},
        {"num_warps": 8, "num_stages": 3},
    ),
}

# Shares -> the kernel that adds them.
REDUCTIONS = {
    2: (nf4_linear_1536x384_bias_gelu_add_reduce, {"BLOCK_N": 128, "SPLIT": 2}, {"num_warps": 4}),
}


@functools.cache
def prepare(device):
    """The tables of levels on a device: make them before a CUDA graph is captured."""
    return [torch.tensor(t, dtype=torch.float32, device=device) for t in (SCALE_LEVELS,)]


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
            add_shares[grid](partial, in0, in1, out, rows, **tile, **options)
    return out
