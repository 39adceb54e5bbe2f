"""nf4_linear_384x1536_bias.

out[m, 384] = x[m, 1536] @ weight.T, then add (bfloat16 to bfloat16).

Printed by fxquant. The spec, which fxquant.codegen.reference defines:
  {"compute_dtype": "bfloat16", "epilogue": {"nodes": [["aten.add.Tensor", ["%acc", "%in0"],
  []]], "operands": [["n", "bfloat16"]]}, "name": "nf4_linear_384x1536_bias", "out_dtype":
  "bfloat16", "weight": {"batch": null, "encoding": {"bits": 4, "levels": "nf4", "scale":
  {"bits": 8, "block": [256], "levels": "dynamic8", "offset": true}}, "k": 1536, "n": 384,
  "offset": 0, "shape": [384, 1536], "strides": [0, 1536, 1]}, "x_dtype": "bfloat16"}

Weight: [384, 1536], 4 bits nf4 in blocks of 64, scales 8 bits dynamic8 in blocks of 256
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
def finish(acc, in0, out, m, n, rows):
    """The epilogue on the sums of rows m and outputs n, rounded and stored."""
    value0 = tl.load(in0 + n).to(tl.float32)
    add_0 = acc + value0
    where = m * 384 + n
    tl.store(out + where, add_0.to(out.dtype.element_ty), mask=(m < rows))


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
def pair_table():
    """What a byte stands for: the bits of its upper code's level, then of the lower one's."""
    byte = tl.arange(0, 256)
    first = level_of(byte >> 4).to(tl.int16, bitcast=True).to(tl.int32)
    second = level_of(byte & 15).to(tl.int16, bitcast=True).to(tl.int32)
    return first & 65535 | second << 16


@triton.jit
def levels_of(pair, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """Both levels of a pair, in bfloat16."""
    first = pair.to(tl.int16).to(tl.bfloat16, bitcast=True)
    second = (pair >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    return tl.join(first, second).reshape(BLOCK_N, BLOCK_K // 4)


@triton.jit
def decode(word, pairs, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """Words as the first to the last pair of their codes' levels, in bfloat16."""
    # the last axis of a join is its fastest: bytes 0, 2 beside 1, 3
    even = tl.join(word & 255, word >> 16 & 255)
    odd = tl.join(word >> 8 & 255, word >> 24 & 255)
    byte = tl.join(even, odd).reshape(BLOCK_N * BLOCK_K // 2)
    pair = tl.gather(pairs, byte, 0)
    even, odd = tl.split(pair.reshape(BLOCK_N, BLOCK_K // 8, 2, 2))
    p0, p2 = tl.split(even)
    p1, p3 = tl.split(odd)
    return (
        levels_of(p0, BLOCK_N, BLOCK_K),
        levels_of(p1, BLOCK_N, BLOCK_K),
        levels_of(p2, BLOCK_N, BLOCK_K),
        levels_of(p3, BLOCK_N, BLOCK_K),
    )


@triton.jit
def scale_of(scales, nested, offset, scale_levels, n, k0):
    """The scales of outputs n at inputs k0 .."""
    run = k0 // 64
    block = n * 24 + run
    scale_code = tl.load(scales + block).to(tl.int32)
    coarse = tl.load(nested + ((n * 24 + run) // 256))
    scale = tl.load(scale_levels + scale_code) * coarse
    scale += tl.load(offset)
    return scale


@triton.jit(do_not_specialize=["rows"])
def nf4_linear_384x1536_bias_gemm(
    x, codes, scales, nested, offset, scale_levels, in0, out, partial, rows, x_stride_m,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT: tl.constexpr,
):
    """Weight tile by activation tile on tensor cores, acc is [outputs, rows]."""
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    n0 = tl.program_id(1) * BLOCK_N
    share = tl.program_id(2)
    SHARE: tl.constexpr = (1536 + BLOCK_K * SPLIT - 1) // (BLOCK_K * SPLIT) * BLOCK_K
    first_k = share * SHARE
    n = n0 + tl.arange(0, BLOCK_N)
    m, n = m[None, :], n[:, None]
    # Input 8 * j + i of a tile goes with the first pair of word j, i being 0 or 1.
    i = tl.arange(0, BLOCK_K // 4)[:, None]
    x_pairs = x + m * x_stride_m + (i // 2 * 8 + i % 2)
    acc = tl.full((BLOCK_N, BLOCK_M), 0.0, tl.float32)
    pairs = pair_table()
    scale = scale_of(scales, nested, offset, scale_levels, n, first_k)
    for k0 in range(first_k, tl.minimum(first_k + SHARE, 1536), BLOCK_K):
        # load
        x0 = tl.load(x_pairs + k0, mask=m < rows, other=0.0)
        x1 = tl.load(x_pairs + (k0 + 2), mask=m < rows, other=0.0)
        x2 = tl.load(x_pairs + (k0 + 4), mask=m < rows, other=0.0)
        x3 = tl.load(x_pairs + (k0 + 6), mask=m < rows, other=0.0)
        j = k0 // 8 + tl.arange(0, BLOCK_K // 8)[None, :]
        word = tl.load(codes.to(tl.pointer_type(tl.int32)) + (n * 192 + j))
        next_k0 = tl.minimum(k0 + BLOCK_K, 1472)
        ahead = scale_of(scales, nested, offset, scale_levels, n, next_k0)
        # decode
        w0, w1, w2, w3 = decode(word, pairs, BLOCK_N, BLOCK_K)
        # dot
        sums = tl.dot(w0, x0)
        sums = tl.dot(w1, x1, sums)
        sums = tl.dot(w2, x2, sums)
        sums = tl.dot(w3, x3, sums)
        acc += sums * scale
        scale = ahead
    # epilogue
    if SPLIT == 1:
        finish(acc, in0, out, m, n, rows)
    else:
        where = (share * rows + m) * 384 + n
        tl.store(partial + where, acc, mask=(m < rows))


@triton.jit(do_not_specialize=["rows"])
def nf4_linear_384x1536_bias_reduce(
    partial, in0, out, rows, BLOCK_N: tl.constexpr, SPLIT: tl.constexpr,
):
    """Adds the shares of a split."""
    m = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    acc = tl.full((1, BLOCK_N), 0.0, tl.float32)
    for share in range(SPLIT):
        where = (share * rows + m) * 384 + n
        acc += tl.load(partial + where)
    finish(acc, in0, out, m, n, rows)


# What the kernels take; everything in capitals is a constant.
TYPES = {
    "x": "*bf16", "out": "*bf16", "partial": "*fp32", "codes": "*u8", "scales": "*u8",
    "nested": "*fp32", "offset": "*fp32", "scale_levels": "*fp32", "in0": "*bf16", "rows": "i32",
    "x_stride_m": "i32",
}

# Most rows -> kernel, constants, launch options; the last serves all above too.
VARIANTS = {
    64: (
        nf4_linear_384x1536_bias_gemm,
        {"BLOCK_M": 16, "BLOCK_N": 64, "BLOCK_K": 64, "SPLIT": 8},
        {"num_warps": 4, "num_stages": 5},
    ),
    128: (
        nf4_linear_384x1536_bias_gemm,
        {"BLOCK_M": 32, "BLOCK_N": 64, "BLOCK_K": 64, "SPLIT": 4},
        {"num_warps": 4, "num_stages": 5},
    ),
    256: (
        nf4_linear_384x1536_bias_gemm,
        {"BLOCK_M": 32, "BLOCK_N": 64, "BLOCK_K": 64, "SPLIT": 2},
        {"num_warps": 4, "num_stages": 5},
    ),
    2048: (
        nf4_linear_384x1536_bias_gemm,
        {"BLOCK_M": 32, "BLOCK_N": 64, "BLOCK_K": 64, "SPLIT": 1},
        {"num_warps": 4, "num_stages": 5},
    ),
}

# Shares -> the kernel that adds them.
REDUCTIONS = {
    split: (
        nf4_linear_384x1536_bias_reduce,
        {"BLOCK_N": 128, "SPLIT": split},
        {"num_warps": 4},
    )
    for split in (2, 4, 8)
}


@functools.cache
def prepare(device):
    """The tables of levels on a device: make them before a CUDA graph is captured."""
    return [
        torch.tensor(SCALE_LEVELS, dtype=torch.float32, device=device),
    ]


def run(x, weight, extra, out=None):
    """The product: x [.., k] to [.., n] ([e, m, k] to [e, m, n] with a batch)."""
    shape = (*x.shape[:-1], 384)
    if out is None:
        out = torch.empty(shape, dtype=torch.bfloat16, device=x.device)
    if not out.is_contiguous():
        return out.copy_(run(x, weight, extra))
    x = x.reshape(math.prod(x.shape[:-1]), 1536)
    if x.stride(-1) != 1:
        x = x.contiguous()
    rows = x.shape[-2]
    if rows == 0:
        return out
    codes, scales, nested, offset = weight
    scale_levels, = prepare(x.device)
    in0 = extra[0].contiguous()

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
            x, codes, scales, nested, offset, scale_levels, in0, out, partial, rows,
            x.stride(0), **tile, **options,
        )
        if split > 1:
            add_shares, tile, options = REDUCTIONS[split]
            grid = (rows, -(-384 // tile["BLOCK_N"]), 1)
            add_shares[grid](
                partial, in0, out, rows, **tile, **options,
            )
    return out
