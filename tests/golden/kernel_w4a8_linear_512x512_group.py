"""w4a8_linear_512x512_group.

out[m, 512] = x[m, 512] @ weight.T in int8 (int8 to float16).

Printed by fxquant. The spec, which fxquant.codegen.reference defines:
  {"compute_dtype": "int8", "epilogue": {"nodes": [], "operands": []}, "name":
  "w4a8_linear_512x512_group", "out_dtype": "float16", "weight": {"batch": null, "encoding":
  {"bits": 4, "block": [1, 128], "zero_point": true}, "k": 512, "n": 512, "offset": 0, "shape":
  [512, 512], "strides": [0, 512, 1]}, "x_dtype": "int8"}

Weight: [512, 512], 4 bits uniform in blocks of 1x128
Activation: int8, quantized before, with amax of every row
Scheme: w4a8
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
def finish(acc, out, m, n, rows):
    """The epilogue on the sums of rows m and outputs n, rounded and stored."""
    where = m * 512 + n
    tl.store(out + where, acc.to(out.dtype.element_ty), mask=(m < rows))


@triton.jit
def decode(codes, n0, k0, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """The integers of outputs n0 .. and inputs k0 .., [BLOCK_N, BLOCK_K] in int8."""
    # load
    n = n0 + tl.arange(0, BLOCK_N)[:, None]
    byte = k0 // 2 + tl.arange(0, BLOCK_K // 2)[None, :]
    code = tl.load(codes + (n * 256 + byte))
    code = tl.join(code >> 4, code & 15).reshape(BLOCK_N, BLOCK_K)
    # decode
    level = code.to(tl.int8)
    return level


@triton.jit
def scale_of(scales, n, k0):
    """The scales of outputs n at inputs k0 .."""
    run = k0 // 128
    block = n * 4 + run
    scale = tl.load(scales + block)
    return scale


@triton.jit
def shift_of(zeros, n, k0):
    """What to add to the integers of outputs n: ``decode`` leaves the zero points to it."""
    run = k0 // 128
    block = n * 4 + run
    zero = tl.load(zeros + block).to(tl.int32)
    return -zero


@triton.jit(do_not_specialize=["rows"])
def w4a8_linear_512x512_group_gemm(
    q, amax, codes, scales, zeros, out, partial, rows, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, SPLIT: tl.constexpr,
):
    """Weight tile by activation tile on tensor cores, acc is [outputs, rows]."""
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    n0 = tl.program_id(1) * BLOCK_N
    share = tl.program_id(2)
    SHARE: tl.constexpr = (512 + BLOCK_K * SPLIT - 1) // (BLOCK_K * SPLIT) * BLOCK_K
    first_k = share * SHARE
    n = n0 + tl.arange(0, BLOCK_N)
    m, n = m[None, :], n[:, None]
    q_rows = q + m * 512
    acc = tl.full((BLOCK_N, BLOCK_M), 0.0, tl.float32)
    for k0 in range(first_k, tl.minimum(first_k + SHARE, 512), BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)[:, None]
        q_tile = tl.load(q_rows + k, mask=m < rows, other=0)
        total = tl.reduce(q_tile.to(tl.int32), 0, add)[None, :]
        # load and decode
        w = decode(codes, n0, k0, BLOCK_N, BLOCK_K)
        # dot
        sums = tl.dot(w, q_tile, out_dtype=tl.int32)
        sums += shift_of(zeros, n, k0) * total
        # scale
        acc += sums.to(tl.float32) * scale_of(scales, n, k0)
    peak = tl.load(amax + m, mask=m < rows, other=0.0)
    acc *= tl.div_rn(peak, 127.0)
    # epilogue
    if SPLIT == 1:
        finish(acc, out, m, n, rows)
    else:
        where = (share * rows + m) * 512 + n
        tl.store(partial + where, acc, mask=(m < rows))


@triton.jit(do_not_specialize=["rows"])
def w4a8_linear_512x512_group_reduce(
    partial, out, rows, BLOCK_N: tl.constexpr, SPLIT: tl.constexpr,
):
    """Adds the shares of a split."""
    m = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    acc = tl.full((1, BLOCK_N), 0.0, tl.float32)
    for share in range(SPLIT):
        where = (share * rows + m) * 512 + n
        acc += tl.load(partial + where)
    finish(acc, out, m, n, rows)


# What the kernels take; everything in capitals is a constant.
TYPES = {
    "out": "*fp16", "partial": "*fp32", "codes": "*u8", "scales": "*fp32", "zeros": "*u8",
    "q": "*i8", "amax": "*fp32", "rows": "i32",
}

# Most rows -> kernel, constants, launch options; the last serves all above too.
VARIANTS = {
    64: (
        w4a8_linear_512x512_group_gemm,
        {"BLOCK_M": 16, "BLOCK_N": 64, "BLOCK_K": 128, "SPLIT": 1},
        {"num_warps": 4, "num_stages": 4},
    ),
    512: (
        w4a8_linear_512x512_group_gemm,
        {"BLOCK_M": 32, "BLOCK_N": 64, "BLOCK_K": 128, "SPLIT": 1},
        {"num_warps": 4, "num_stages": 4},
    ),
    2048: (
        w4a8_linear_512x512_group_gemm,
        {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 128, "SPLIT": 1},
        {"num_warps": 4, "num_stages": 4},
    ),
}

# Shares -> the kernel that adds them.
REDUCTIONS = {
    split: (
        w4a8_linear_512x512_group_reduce,
        {"BLOCK_N": 128, "SPLIT": split},
        {"num_warps": 4},
    )
    for split in (2,)
}


def run(x, weight, extra, out=None):
    """The product: x [.., k] to [.., n] ([e, m, k] to [e, m, n] with a batch)."""
    shape = (*x.shape[:-1], 512)
    if out is None:
        out = torch.empty(shape, dtype=torch.float16, device=x.device)
    if not out.is_contiguous():
        return out.copy_(run(x, weight, extra))
    x = x.reshape(math.prod(x.shape[:-1]), 512)
    q = x.contiguous()
    rows = x.shape[-2]
    if rows == 0:
        return out
    codes, scales, zeros = weight
    amax = extra[0].contiguous()

    most = next((most for most in VARIANTS if rows <= most), max(VARIANTS))
    kernel, tile, options = VARIANTS[most]
    split = tile["SPLIT"]
    partial = out
    if split > 1:
        sums = (split, rows, 512)
        partial = torch.empty(sums, dtype=torch.float32, device=x.device)
    grid = (-(-rows // tile["BLOCK_M"]), -(-512 // tile["BLOCK_N"]), split)
    with torch.cuda.device_of(x):
        kernel[grid](
            q, amax, codes, scales, zeros, out, partial, rows, **tile, **options,
        )
        if split > 1:
            add_shares, tile, options = REDUCTIONS[split]
            grid = (rows, -(-512 // tile["BLOCK_N"]), 1)
            add_shares[grid](
                partial, out, rows, **tile, **options,
            )
    return out
