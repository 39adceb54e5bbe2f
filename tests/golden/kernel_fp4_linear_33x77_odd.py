"""fp4_linear_33x77_odd.

out[m, 33] = x[m, 77] @ weight.T (float32 to float32).

Printed by fxquant. The spec, which fxquant.codegen.reference defines:
  {"compute_dtype": "float32", "epilogue": {"nodes": [], "operands": []}, "name":
  "fp4_linear_33x77_odd", "out_dtype": "float32", "weight": {"batch": null, "encoding": {"bits":
  4, "levels": "fp4"}, "k": 77, "n": 33, "offset": 0, "shape": [33, 77], "strides": [0, 77, 1]},
  "x_dtype": "float32"}

Weight: [33, 77], 4 bits fp4 in blocks of 64
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
    """The weight at outputs n0 .. and inputs k0 .., [BLOCK_N, BLOCK_K] in float32."""
    # load
    n = n0 + tl.arange(0, BLOCK_N)[:, None]
    k = k0 + tl.arange(0, BLOCK_K)[None, :]
    code = tl.load(codes + ((n * 77 + k) // 2), mask=(n < 33) & (k < 77), other=0)
    shift = (1 - ((n * 77 + k) % 2)) * 4
    code = (code >> shift.to(tl.uint8)) & 15
    code = tl.broadcast_to(code, (BLOCK_N, BLOCK_K))
    # decode
    flat = code.to(tl.int32).reshape(BLOCK_N * BLOCK_K)
    level = tl.gather(codebook(), flat, 0).reshape(BLOCK_N, BLOCK_K)
    block = (n * 77 + k) // 64
    scale = tl.load(scales + block, mask=(n < 33) & (k < 77), other=0)
    return (level * scale).to(tl.float32)


@triton.jit
def finish(acc, out, m, n, rows):
    """The epilogue on the sums of rows m and outputs n, rounded and stored."""
    where = m * 33 + n
    tl.store(out + where, acc.to(out.dtype.element_ty), mask=(m < rows) & (n < 33))


@triton.jit
def add(x, y):
    """What sums are made of."""
    return x + y


@triton.jit(do_not_specialize=["rows"])
def fp4_linear_33x77_odd_gemv(
    x, codes, scales, out, partial, rows, x_stride_m, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, SPLIT: tl.constexpr,
):
    """Few rows: every program streams its share of BLOCK_N outputs' weights once."""
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    n0 = tl.program_id(1) * BLOCK_N
    share = tl.program_id(2)
    SHARE: tl.constexpr = (77 + BLOCK_K * SPLIT - 1) // (BLOCK_K * SPLIT) * BLOCK_K
    first_k = share * SHARE
    x_rows = x + m[:, None, None] * x_stride_m
    sums = tl.full((BLOCK_M, BLOCK_N, BLOCK_K), 0.0, tl.float32)
    for k0 in tl.range(first_k, tl.minimum(first_k + SHARE, 77), BLOCK_K, num_stages=3):
        k = k0 + tl.arange(0, BLOCK_K)[None, None, :]
        x_tile = tl.load(x_rows + k, mask=(m < rows)[:, None, None] & (k < 77), other=0.0)
        # load and decode
        w = decode(codes, scales, n0, k0, BLOCK_N, BLOCK_K)
        sums += x_tile * w[None, :, :]
    acc = tl.reduce(sums, 2, add)
    n = n0 + tl.arange(0, BLOCK_N)
    m, n = m[:, None], n[None, :]
    # epilogue
    if SPLIT == 1:
        finish(acc, out, m, n, rows)
    else:
        where = (share * rows + m) * 33 + n
        tl.store(partial + where, acc, mask=(m < rows) & (n < 33))


@triton.jit(do_not_specialize=["rows"])
def fp4_linear_33x77_odd_gemm(
    x, codes, scales, out, partial, rows, x_stride_m, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, SPLIT: tl.constexpr,
):
    """Many rows: weight tile by activation tile on tensor cores, acc is [outputs, rows]."""
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    n0 = tl.program_id(1) * BLOCK_N
    share = tl.program_id(2)
    SHARE: tl.constexpr = (77 + BLOCK_K * SPLIT - 1) // (BLOCK_K * SPLIT) * BLOCK_K
    first_k = share * SHARE
    x_rows = x + m[None, :] * x_stride_m
    acc = tl.full((BLOCK_N, BLOCK_M), 0.0, tl.float32)
    for k0 in range(first_k, tl.minimum(first_k + SHARE, 77), BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)[:, None]
        x_tile = tl.load(x_rows + k, mask=(m < rows)[None, :] & (k < 77), other=0.0)
        # load and decode
        w = decode(codes, scales, n0, k0, BLOCK_N, BLOCK_K)
        # dot
        acc = tl.dot(w, x_tile, acc, input_precision="ieee")
    n = n0 + tl.arange(0, BLOCK_N)
    m, n = m[None, :], n[:, None]
    # epilogue
    if SPLIT == 1:
        finish(acc, out, m, n, rows)
    else:
        where = (share * rows + m) * 33 + n
        tl.store(partial + where, acc, mask=(m < rows) & (n < 33))


# What the kernels take; everything in capitals is a constant.
TYPES = {
    "x": "*fp32", "out": "*fp32", "partial": "*fp32", "codes": "*u8", "scales": "*fp32",
    "rows": "i32", "x_stride_m": "i32",
}

# Most rows -> kernel, constants, launch options; the last serves all above too.
VARIANTS = {
    1: (
        fp4_linear_33x77_odd_gemv,
        {"BLOCK_M": 1, "BLOCK_N": 16, "BLOCK_K": 128, "SPLIT": 1},
        {"num_warps": 4, "num_stages": 3},
    ),
    2: (
        fp4_linear_33x77_odd_gemv,
        {"BLOCK_M": 2, "BLOCK_N": 16, "BLOCK_K": 128, "SPLIT": 1},
        {"num_warps": 4, "num_stages": 3},
    ),
    4: (
        fp4_linear_33x77_odd_gemv,
        {"BLOCK_M": 4, "BLOCK_N": 16, "BLOCK_K": 128, "SPLIT": 1},
        {"num_warps": 4, "num_stages": 3},
    ),
    2048: (
        fp4_linear_33x77_odd_gemm,
        {"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 32, "SPLIT": 1},
        {"num_warps": 4, "num_stages": 4},
    ),
}


def run(x, weight, extra, out=None):
    """The product: x [.., k] to [.., n] ([e, m, k] to [e, m, n] with a batch)."""
    shape = (*x.shape[:-1], 33)
    if out is None:
        out = torch.empty(shape, dtype=torch.float32, device=x.device)
    if not out.is_contiguous():
        return out.copy_(run(x, weight, extra))
    x = x.reshape(math.prod(x.shape[:-1]), 77)
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
    grid = (-(-rows // tile["BLOCK_M"]), -(-33 // tile["BLOCK_N"]), split)
    with torch.cuda.device_of(x):
        kernel[grid](
            x, codes, scales, out, partial, rows, x.stride(0), **tile, **options,
        )
    return out
