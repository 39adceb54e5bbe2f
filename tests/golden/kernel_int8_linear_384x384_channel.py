"""int8_linear_384x384_channel.

out[m, 384] = x[m, 384] @ weight.T (float16 to float16).

Printed by fxquant. The spec, which fxquant.codegen.reference defines:
  {"compute_dtype": "float16", "epilogue": {"nodes": [], "operands": []}, "name":
  "int8_linear_384x384_channel", "out_dtype": "float16", "weight": {"batch": null, "encoding":
  {"bits": 8, "block": [1, -1]}, "k": 384, "n": 384, "offset": 0, "shape": [384, 384],
  "strides": [0, 384, 1]}, "x_dtype": "float16"}

Weight: [384, 384], 8 bits uniform in blocks of 1xall
Scheme: int8
Modules: golden
"""

import math

import torch
import triton
import triton.language as tl


@triton.jit
def decode(codes, scales, n0, k0, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """The weight at outputs n0 .. and inputs k0 .., [BLOCK_N, BLOCK_K] in float16."""
    # load
    n = n0 + tl.arange(0, BLOCK_N)[:, None]
    k = k0 + tl.arange(0, BLOCK_K)[None, :]
    code = tl.load(codes + (n * 384 + k))
    # decode
    level = code.to(tl.float32)
    block = n
    scale = tl.load(scales + block)
    return (level * scale).to(tl.float16)


@triton.jit
def finish(acc, out, m, n, rows):
    """The epilogue on the sums of rows m and outputs n, rounded and stored."""
    where = m * 384 + n
    tl.store(out + where, acc.to(out.dtype.element_ty), mask=(m < rows))


@triton.jit
def add(x, y):
    """What sums are made of."""
    return x + y


@triton.jit(do_not_specialize=["rows"])
def int8_linear_384x384_channel_gemv(
    x, codes, scales, out, partial, rows, x_stride_m, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, SPLIT: tl.constexpr,
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
        w = decode(codes, scales, n0, k0, BLOCK_N, BLOCK_K)
        sums += x_tile.to(tl.float32) * w[None, :, :].to(tl.float32)
    acc = tl.reduce(sums, 2, add)
    # epilogue
    n = n0 + tl.arange(0, BLOCK_N)
    m, n = m[:, None], n[None, :]
    if SPLIT == 1:
        finish(acc, out, m, n, rows)
    else:
        where = (share * rows + m) * 384 + n
        tl.store(partial + where, acc, mask=(m < rows))


@triton.jit(do_not_specialize=["rows"])
def int8_linear_384x384_channel_gemm(
    x, codes, scales, out, partial, rows, x_stride_m, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, SPLIT: tl.constexpr,
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
        w = decode(codes, scales, n0, k0, BLOCK_N, BLOCK_K)
        # dot
        acc = tl.dot(w, x_tile, acc)
    # epilogue
    n = n0 + tl.arange(0, BLOCK_N)
    m, n = m[None, :], n[:, None]
    if SPLIT == 1:
        finish(acc, out, m, n, rows)
    else:
        where = (share * rows + m) * 384 + n
        tl.store(partial + where, acc, mask=(m < rows))


@triton.jit(do_not_specialize=["rows"])
def int8_linear_384x384_channel_reduce(
    partial, out, rows, BLOCK_N: tl.constexpr, SPLIT: tl.constexpr,
):
    """Adds the shares of a split."""
    m = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    acc = tl.full((1, BLOCK_N), 0.0, tl.float32)
    for share in range(SPLIT):
        where = (share * rows + m) * 384 + n
        acc += tl.load(partial + where)
    finish(acc, out, m, n, rows)


# What the kernels take; everything in capitals is a constant.
TYPES = {
    "x": "*fp16", "out": "*fp16", "partial": "*fp32", "codes": "*i8", "scales": "*fp32",
    "rows": "i32", "x_stride_m": "i32",
}

# Most rows -> kernel, constants, launch options; the last serves all above too.
VARIANTS = {
    1: (
        int8_linear_384x384_channel_gemv,
        {"BLOCK_M": 1, "BLOCK_N": 16, "BLOCK_K": 128, "SPLIT": 1},
        {"num_warps": 4, "num_stages": 2},
    ),
    2: (
        int8_linear_384x384_channel_gemv,
        {"BLOCK_M": 2, "BLOCK_N": 16, "BLOCK_K": 128, "SPLIT": 1},
        {"num_warps": 4, "num_stages": 2},
    ),
    4: (
        int8_linear_384x384_channel_gemv,
        {"BLOCK_M": 4, "BLOCK_N": 16, "BLOCK_K": 128, "SPLIT": 1},
        {"num_warps": 4, "num_stages": 2},
    ),
    16: (
        int8_linear_384x384_channel_gemm,
        {"BLOCK_M": 16, "BLOCK_N": 64, "BLOCK_K": 64, "SPLIT": 2},
        {"num_warps": 4, "num_stages": 3},
    ),
    32: (
        int8_linear_384x384_channel_gemm,
        {"BLOCK_M": 32, "BLOCK_N": 64, "BLOCK_K": 64, "SPLIT": 1},
        {"num_warps": 4, "num_stages": 3},
    ),
    64: (
        int8_linear_384x384_channel_gemm,
        {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 64, "SPLIT": 1},
        {"num_warps": 4, "num_stages": 3},
    ),
    128: (
        int8_linear_384x384_channel_gemm,
        {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64, "SPLIT": 1},
        {"num_warps": 8, "num_stages": 3},
    ),
}

# Shares -> the kernel that adds them.
REDUCTIONS = {
    2: (int8_linear_384x384_channel_reduce, {"BLOCK_N": 128, "SPLIT": 2}, {"num_warps": 4}),
}


def run(x, weight, extra, out=None):
    """The product: x [.., k] to [.., n] ([e, m, k] to [e, m, n] with a batch)."""
    shape = (*x.shape[:-1], 384)
    if out is None:
        out = torch.empty(shape, dtype=torch.float16, device=x.device)
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
    if split > 1:
        sums = (split, rows, 384)
        partial = torch.empty(sums, dtype=torch.float32, device=x.device)
    grid = (-(-rows // tile["BLOCK_M"]), -(-384 // tile["BLOCK_N"]), split)
    with torch.cuda.device_of(x):
        kernel[grid](
            x, codes, scales, out, partial, rows, x.stride(0), **tile, **options,
        )
        if split > 1:
            add_shares, tile, options = REDUCTIONS[split]
            grid = (rows, -(-384 // tile["BLOCK_N"]), 1)
            add_shares[grid](partial, out, rows, **tile, **options)
    return out
