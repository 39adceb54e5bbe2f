"""fp4_conv1d_768x2304_bias.

out[m, 2304] = x[m, 768] @ weight.T, then add (bfloat16 to bfloat16).

Printed by fxquant. The spec, which fxquant.codegen.reference defines:
  {"compute_dtype": "bfloat16", "epilogue": {"nodes": [["aten.add.Tensor", ["%acc", "%in0"],
  []]], "operands": [["n", "bfloat16"]]}, "name": "fp4_conv1d_768x2304_bias", "out_dtype":
  "bfloat16", "weight": {"batch": null, "encoding": {"bits": 4, "levels": "fp4"}, "k": 768, "n":
  2304, "offset": 0, "shape": [768, 2304], "strides": [0, 1, 2304]}, "x_dtype": "bfloat16"}

Weight: [768, 2304], 4 bits fp4 in blocks of 64
Scheme: fp4
Modules: golden
"""

import math

import torch
import triton
import triton.language as tl


@triton.jit
def codebook():
    """The level of every code: the codebook 'fp4'."""
    code = tl.arange(0, 16)
    level = tl.full((16,), 0.0, tl.float32)
    level = tl.where(code == 1, 0.0052083334885537624, level)
    level = tl.where(code == 2, 0.6666666865348816, level)
    level = tl.where(code == 3, 1.0, level)
    level = tl.where(code == 4, 0.3333333432674408, level)
    level = tl.where(code == 5, 0.5, level)
    level = tl.where(code == 6, 0.1666666716337204, level)
    level = tl.where(code == 7, 0.25, level)
    level = tl.where(code == 8, 0.0, level)
    level = tl.where(code == 9, -0.0052083334885537624, level)
    level = tl.where(code == 10, -0.6666666865348816, level)
    level = tl.where(code == 11, -1.0, level)
    level = tl.where(code == 12, -0.3333333432674408, level)
    level = tl.where(code == 13, -0.5, level)
    level = tl.where(code == 14, -0.1666666716337204, level)
    level = tl.where(code == 15, -0.25, level)
    return level


@triton.jit
def decode(codes, scales, n0, k0, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """The weight at outputs n0 .. and inputs k0 .., [BLOCK_N, BLOCK_K] in bfloat16."""
    # load
    k = k0 + tl.arange(0, BLOCK_K)[:, None]
    byte = n0 // 2 + tl.arange(0, BLOCK_N // 2)[None, :]
    code = tl.load(codes + (k * 1152 + byte))
    code = tl.join(code >> 4, code & 15).reshape(BLOCK_K, BLOCK_N)
    # decode
    flat = code.to(tl.int32).reshape(BLOCK_K * BLOCK_N)
    level = tl.gather(codebook(), flat, 0).reshape(BLOCK_K, BLOCK_N)
    run = n0 // 64 + tl.arange(0, BLOCK_N // 64)[None, :]
    block = k * 36 + run
    scale = tl.load(scales + block)
    if BLOCK_N > 64:
        scale = tl.broadcast_to(scale[:, :, None], (BLOCK_K, BLOCK_N // 64, 64))
        scale = scale.reshape(BLOCK_K, BLOCK_N)
    return (level * scale).to(tl.bfloat16).trans()


@triton.jit
def finish(acc, in0, out, m, n, rows):
    """The epilogue on the sums of rows m and outputs n, rounded and stored."""
    value0 = tl.load(in0 + n).to(tl.float32)
    v0 = acc + value0
    where = m * 2304 + n
    tl.store(out + where, v0.to(out.dtype.element_ty), mask=(m < rows))


@triton.jit
def add(x, y):
    """What sums are made of."""
    return x + y


@triton.jit(do_not_specialize=["rows"])
def fp4_conv1d_768x2304_bias_gemv(
    x, codes, scales, in0, out, partial, rows, x_stride_m, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT: tl.constexpr,
):
    """Few rows: every program streams its share of BLOCK_N outputs' weights once."""
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    n0 = tl.program_id(1) * BLOCK_N
    share = tl.program_id(2)
    x_rows = x + m[:, None, None] * x_stride_m
    sums = tl.full((BLOCK_M, BLOCK_N, BLOCK_K), 0.0, tl.float32)
    for k0 in range(share * BLOCK_K, 768, BLOCK_K * SPLIT):
        k = k0 + tl.arange(0, BLOCK_K)[None, None, :]
        x_tile = tl.load(x_rows + k, mask=(m < rows)[:, None, None], other=0.0)
        # load and decode
        w = decode(codes, scales, n0, k0, BLOCK_N, BLOCK_K)
        sums += x_tile.to(tl.float32) * w[None, :, :].to(tl.float32)
    acc = tl.reduce(sums, 2, add)
    # epilogue
    n = n0 + tl.arange(0, BLOCK_N)
    m, n = m[:, None], n[None, :]
    if SPLIT == 1:
        finish(acc, in0, out, m, n, rows)
    else:
        where = (share * rows + m) * 2304 + n
        tl.store(partial + where, acc, mask=(m < rows))


@triton.jit(do_not_specialize=["rows"])
def fp4_conv1d_768x2304_bias_gemm(
    x, codes, scales, in0, out, partial, rows, x_stride_m, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT: tl.constexpr,
):
    """Many rows: weight tile by activation tile on tensor cores, acc is [outputs, rows]."""
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    n0 = tl.program_id(1) * BLOCK_N
    share = tl.program_id(2)
    x_rows = x + m[None, :] * x_stride_m
    acc = tl.full((BLOCK_N, BLOCK_M), 0.0, tl.float32)
    for k0 in range(share * BLOCK_K, 768, BLOCK_K * SPLIT):
        k = k0 + tl.arange(0, BLOCK_K)[:, None]
        x_tile = tl.load(x_rows + k, mask=(m < rows)[None, :], other=0.0)
        # load and decode
        w = decode(codes, scales, n0, k0, BLOCK_N, BLOCK_K)
        # dot
        acc = tl.dot(w, x_tile, acc)
    # epilogue
    n = n0 + tl.arange(0, BLOCK_N)
    m, n = m[None, :], n[:, None]
    if SPLIT == 1:
        finish(acc, in0, out, m, n, rows)
    else:
        where = (share * rows + m) * 2304 + n
        tl.store(partial + where, acc, mask=(m < rows))


@triton.jit(do_not_specialize=["rows"])
def fp4_conv1d_768x2304_bias_reduce(
    partial, in0, out, rows, BLOCK_N: tl.constexpr, SPLIT: tl.constexpr,
):
    """Adds the shares of a split."""
    m = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    acc = tl.full((1, BLOCK_N), 0.0, tl.float32)
    for share in range(SPLIT):
        where = (share * rows + m) * 2304 + n
        acc += tl.load(partial + where)
    finish(acc, in0, out, m, n, rows)


# What the kernels take; everything in capitals is a constant.
TYPES = {
    "x": "*bf16", "out": "*bf16", "partial": "*fp32", "codes": "*u8", "scales": "*fp32",
    "in0": "*bf16", "rows": "i32", "x_stride_m": "i32",
}

# Most rows -> kernel, constants, launch options; the last serves all above too.
VARIANTS = {
    1: (
        fp4_conv1d_768x2304_bias_gemv,
        {"BLOCK_M": 1, "BLOCK_N": 128, "BLOCK_K": 16, "SPLIT": 16},
        {"num_warps": 4, "num_stages": 2},
    ),
    2: (
        fp4_conv1d_768x2304_bias_gemv,
        {"BLOCK_M": 2, "BLOCK_N": 128, "BLOCK_K": 16, "SPLIT": 16},
        {"num_warps": 4, "num_stages": 2},
    ),
    4: (
        fp4_conv1d_768x2304_bias_gemv,
        {"BLOCK_M": 4, "BLOCK_N": 128, "BLOCK_K": 16, "SPLIT": 16},
        {"num_warps": 4, "num_stages": 2},
    ),
    16: (
        fp4_conv1d_768x2304_bias_gemm,
        {"BLOCK_M": 16, "BLOCK_N": 64, "BLOCK_K": 64, "SPLIT": 4},
        {"num_warps": 4, "num_stages": 3},
    ),
    32: (
        fp4_conv1d_768x2304_bias_gemm,
        {"BLOCK_M": 32, "BLOCK_N": 64, "BLOCK_K": 64, "SPLIT": 1},
        {"num_warps": 4, "num_stages": 3},
    ),
    64: (
        fp4_conv1d_768x2304_bias_gemm,
        {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 64, "SPLIT": 1},
        {"num_warps": 4, "num_stages": 3},
    ),
    128: (
        fp4_conv1d_768x2304_bias_gemm,
        {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64, "SPLIT": 1},
        {"num_warps": 8, "num_stages": 3},
    ),
}

# Shares -> the kernel that adds them.
REDUCTIONS = {
    4: (fp4_conv1d_768x2304_bias_reduce, {"BLOCK_N": 128, "SPLIT": 4}, {"num_warps": 4}),
    16: (fp4_conv1d_768x2304_bias_reduce, {"BLOCK_N": 128, "SPLIT": 16}, {"num_warps": 4}),
}


def run(x, weight, extra, out=None):
    """The product: x [.., k] to [.., n] ([e, m, k] to [e, m, n] with a batch)."""
    shape = (*x.shape[:-1], 2304)
    if out is None:
        out = torch.empty(shape, dtype=torch.bfloat16, device=x.device)
    if not out.is_contiguous():
        return out.copy_(run(x, weight, extra))
    x = x.reshape(math.prod(x.shape[:-1]), 768)
    if x.stride(-1) != 1:
        x = x.contiguous()
    rows = x.shape[-2]
    if rows == 0:
        return out
    codes, scales = weight
    in0 = extra[0].contiguous()

    most = next((most for most in VARIANTS if rows <= most), max(VARIANTS))
    kernel, tile, options = VARIANTS[most]
    split = tile["SPLIT"]
    partial = out
    if split > 1:
        sums = (split, rows, 2304)
        partial = torch.empty(sums, dtype=torch.float32, device=x.device)
    grid = (-(-rows // tile["BLOCK_M"]), -(-2304 // tile["BLOCK_N"]), split)
    with torch.cuda.device_of(x):
        kernel[grid](
            x, codes, scales, in0, out, partial, rows, x.stride(0), **tile, **options,
        )
        if split > 1:
            add_shares, tile, options = REDUCTIONS[split]
            grid = (rows, -(-2304 // tile["BLOCK_N"]), 1)
            add_shares[grid](partial, in0, out, rows, **tile, **options)
    return out
