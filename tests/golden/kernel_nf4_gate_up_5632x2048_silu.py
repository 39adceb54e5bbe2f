"""nf4_gate_up_5632x2048_silu.

out[m, 5632] = x[m, 2048] @ weight.T for 2 weights, then silu, mul (bfloat16 to bfloat16).

Printed by fxquant. The spec, which fxquant.codegen.reference defines:
  {"compute_dtype": "bfloat16", "epilogue": {"nodes": [["aten.silu.default", ["%acc"], []],
  ["aten.mul.Tensor", ["%0", "%acc1"], []]], "operands": []}, "name":
  "nf4_gate_up_5632x2048_silu", "out_dtype": "bfloat16", "weight": {"batch": null, "encoding":
  {"bits": 4, "levels": "nf4", "scale": {"bits": 8, "block": [256], "levels": "dynamic8",
  "offset": true}}, "k": 2048, "n": 5632, "offset": 0, "shape": [5632, 2048], "strides": [0,
  2048, 1]}, "weights": 2, "x_dtype": "bfloat16"}

Weight: [5632, 2048], 4 bits nf4 in blocks of 64, scales 8 bits dynamic8 in blocks of 256
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
def finish(acc, acc1, out, m, n, rows):
    """The epilogue on the sums of rows m and outputs n, rounded and stored."""
    silu_0 = acc / (1.0 + tl.exp((-acc)))
    mul_1 = silu_0 * acc1
    where = m * 5632 + n
    tl.store(out + where, mul_1.to(out.dtype.element_ty), mask=(m < rows))


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
    block = n * 32 + run
    scale_code = tl.load(scales + block).to(tl.int32)
    coarse = tl.load(nested + (n // 8))
    scale = tl.load(scale_levels + scale_code) * coarse
    scale += tl.load(offset)
    return scale


@triton.jit(do_not_specialize=["rows"])
def nf4_gate_up_5632x2048_silu_gemm(
    x, codes, scales, nested, offset, codes1, scales1, nested1, offset1, scale_levels, out, partial,
    rows, x_stride_m, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """Weight tile by activation tile on tensor cores, acc is [outputs, rows]."""
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    n0 = tl.program_id(1) * BLOCK_N
    share = tl.program_id(2)
    SHARE: tl.constexpr = (2048 + BLOCK_K * SPLIT - 1) // (BLOCK_K * SPLIT) * BLOCK_K
    first_k = share * SHARE
    n = n0 + tl.arange(0, BLOCK_N)
    m, n = m[None, :], n[:, None]
    # Input 8 * j + i of a tile goes with the first pair of word j, i being 0 or 1.
    i = tl.arange(0, BLOCK_K // 4)[:, None]
    x_pairs = x + m * x_stride_m + (i // 2 * 8 + i % 2)
    acc = tl.full((BLOCK_N, BLOCK_M), 0.0, tl.float32)
    acc1 = tl.full((BLOCK_N, BLOCK_M), 0.0, tl.float32)
    scale = scale_of(scales, nested, offset, scale_levels, n, first_k)
    scale1 = scale_of(scales1, nested1, offset1, scale_levels, n, first_k)
    for k0 in range(first_k, tl.minimum(first_k + SHARE, 2048), BLOCK_K):
        # load
        x0 = tl.load(x_pairs + k0, mask=m < rows, other=0.0)
        x1 = tl.load(x_pairs + (k0 + 2), mask=m < rows, other=0.0)
        x2 = tl.load(x_pairs + (k0 + 4), mask=m < rows, other=0.0)
        x3 = tl.load(x_pairs + (k0 + 6), mask=m < rows, other=0.0)
        j = k0 // 8 + tl.arange(0, BLOCK_K // 8)[None, :]
        word = tl.load(codes.to(tl.pointer_type(tl.int32)) + (n * 256 + j))
        next_k0 = tl.minimum(k0 + BLOCK_K, 1984)
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
        j = k0 // 8 + tl.arange(0, BLOCK_K // 8)[None, :]
        word = tl.load(codes1.to(tl.pointer_type(tl.int32)) + (n * 256 + j))
        next_k0 = tl.minimum(k0 + BLOCK_K, 1984)
        ahead = scale_of(scales1, nested1, offset1, scale_levels, n, next_k0)
        # decode
        w0, w1, w2, w3 = decode(word, BLOCK_N, BLOCK_K)
        # dot
        sums = tl.dot(w0, x0)
        sums = tl.dot(w1, x1, sums)
        sums = tl.dot(w2, x2, sums)
        sums = tl.dot(w3, x3, sums)
        acc1 += sums * scale1
        scale1 = ahead
    # epilogue
    if SPLIT == 1:
        finish(acc, acc1, out, m, n, rows)
    else:
        where = (share * 2 * rows + m) * 5632 + n
        tl.store(partial + where, acc, mask=(m < rows))
        where = ((share * 2 + 1) * rows + m) * 5632 + n
        tl.store(partial + where, acc1, mask=(m < rows))


@triton.jit
def decode_bytes(code, scale, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """A tile's levels times their scales, in bfloat16."""
    first = (level_of(code >> 4).to(tl.float32) * scale).to(tl.bfloat16)
    second = (level_of(code & 15).to(tl.float32) * scale).to(tl.bfloat16)
    return tl.join(first, second).reshape(BLOCK_N, BLOCK_K)


@triton.jit(do_not_specialize=["rows"])
def nf4_gate_up_5632x2048_silu_scaled(
    x, codes, scales, nested, offset, codes1, scales1, nested1, offset1, scale_levels, out, partial,
    rows, x_stride_m, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """Many rows: the weight tile with its scales by activation tile, acc is [outputs, rows]."""
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    n0 = tl.program_id(1) * BLOCK_N
    share = tl.program_id(2)
    SHARE: tl.constexpr = (2048 + BLOCK_K * SPLIT - 1) // (BLOCK_K * SPLIT) * BLOCK_K
    first_k = share * SHARE
    n = n0 + tl.arange(0, BLOCK_N)
    m, n = m[None, :], n[:, None]
    x_rows = x + m * x_stride_m
    acc = tl.full((BLOCK_N, BLOCK_M), 0.0, tl.float32)
    acc1 = tl.full((BLOCK_N, BLOCK_M), 0.0, tl.float32)
    scale = scale_of(scales, nested, offset, scale_levels, n, first_k)
    scale1 = scale_of(scales1, nested1, offset1, scale_levels, n, first_k)
    for k0 in range(first_k, tl.minimum(first_k + SHARE, 2048), BLOCK_K):
        # load
        k = k0 + tl.arange(0, BLOCK_K)[:, None]
        x_tile = tl.load(x_rows + k, mask=m < rows, other=0.0)
        byte = k0 // 2 + tl.arange(0, BLOCK_K // 2)[None, :]
        code = tl.load(codes + (n * 1024 + byte))
        next_k0 = tl.minimum(k0 + BLOCK_K, 1984)
        ahead = scale_of(scales, nested, offset, scale_levels, n, next_k0)
        # decode
        w = decode_bytes(code, scale, BLOCK_N, BLOCK_K)
        # dot
        acc = tl.dot(w, x_tile, acc)
        scale = ahead
        byte = k0 // 2 + tl.arange(0, BLOCK_K // 2)[None, :]
        code = tl.load(codes1 + (n * 1024 + byte))
        next_k0 = tl.minimum(k0 + BLOCK_K, 1984)
        ahead = scale_of(scales1, nested1, offset1, scale_levels, n, next_k0)
        # decode
        w = decode_bytes(code, scale1, BLOCK_N, BLOCK_K)
        # dot
        acc1 = tl.dot(w, x_tile, acc1)
        scale1 = ahead
    # epilogue
    if SPLIT == 1:
        finish(acc, acc1, out, m, n, rows)
    else:
        where = (share * 2 * rows + m) * 5632 + n
        tl.store(partial + where, acc, mask=(m < rows))
        where = ((share * 2 + 1) * rows + m) * 5632 + n
        tl.store(partial + where, acc1, mask=(m < rows))


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
def decode_tile(
    codes, scales, nested, offset, scale_levels, n0, k0, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The weight at outputs n0 .. and inputs k0 .., [BLOCK_N, BLOCK_K] in bfloat16."""
    # load
    n = n0 + tl.arange(0, BLOCK_N)[:, None]
    byte = k0 // 2 + tl.arange(0, BLOCK_K // 2)[None, :]
    code = tl.load(codes + (n * 1024 + byte))
    code = tl.join(code >> 4, code & 15).reshape(BLOCK_N, BLOCK_K)
    # decode
    flat = code.to(tl.int32).reshape(BLOCK_N * BLOCK_K)
    level = tl.gather(codebook(), flat, 0).reshape(BLOCK_N, BLOCK_K)
    run = k0 // 64 + tl.arange(0, BLOCK_K // 64)[None, :]
    block = n * 32 + run
    scale_code = tl.load(scales + block).to(tl.int32)
    coarse = tl.load(nested + (n // 8))
    scale = tl.load(scale_levels + scale_code) * coarse
    scale += tl.load(offset)
    if BLOCK_K > 64:
        scale = tl.broadcast_to(scale[:, :, None], (BLOCK_N, BLOCK_K // 64, 64))
        scale = scale.reshape(BLOCK_N, BLOCK_K)
    return (level * scale).to(tl.bfloat16)


@triton.jit
def nf4_gate_up_5632x2048_silu_dequantize(
    codes, scales, nested, offset, scale_levels, dense, first, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, CHUNK: tl.constexpr,
):
    """Outputs first .. first + CHUNK of the weight, decoded to memory."""
    start = tl.program_id(0) * BLOCK_N
    n0, k0 = first + start, tl.program_id(1) * BLOCK_K
    w = decode_tile(codes, scales, nested, offset, scale_levels, n0, k0, BLOCK_N, BLOCK_K)
    row = (start + tl.arange(0, BLOCK_N)).to(tl.int64)[:, None]
    k = k0 + tl.arange(0, BLOCK_K)[None, :]
    tl.store(dense + (row * 2048 + k), w)


@triton.jit(do_not_specialize=["rows"])
def nf4_gate_up_5632x2048_silu_reduce(
    partial, out, rows, BLOCK_N: tl.constexpr, SPLIT: tl.constexpr,
):
    """Adds the shares of a split."""
    m = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    acc = tl.full((1, BLOCK_N), 0.0, tl.float32)
    acc1 = tl.full((1, BLOCK_N), 0.0, tl.float32)
    for share in range(SPLIT):
        where = (share * 2 * rows + m) * 5632 + n
        acc += tl.load(partial + where)
        where = ((share * 2 + 1) * rows + m) * 5632 + n
        acc1 += tl.load(partial + where)
    finish(acc, acc1, out, m, n, rows)


# What the kernels take; everything in capitals is a constant.
TYPES = {
    "x": "*bf16", "out": "*bf16", "partial": "*fp32", "codes": "*u8", "scales": "*u8",
    "nested": "*fp32", "offset": "*fp32", "codes1": "*u8", "scales1": "*u8", "nested1": "*fp32",
    "offset1": "*fp32", "scale_levels": "*fp32", "dense": "*bf16", "rows": "i32",
    "x_stride_m": "i32", "first": "i32",
}

# Most rows -> kernel, constants, launch options; the last serves all above too.
VARIANTS = {
    16: (
        nf4_gate_up_5632x2048_silu_gemm,
        {"BLOCK_M": 16, "BLOCK_N": 128, "BLOCK_K": 64, "SPLIT": 8},
        {"num_warps": 4, "num_stages": 5},
    ),
    32: (
        nf4_gate_up_5632x2048_silu_gemm,
        {"BLOCK_M": 32, "BLOCK_N": 64, "BLOCK_K": 64, "SPLIT": 4},
        {"num_warps": 4, "num_stages": 5},
    ),
    64: (
        nf4_gate_up_5632x2048_silu_scaled,
        {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 64, "SPLIT": 4},
        {"num_warps": 4, "num_stages": 4},
    ),
    128: (
        nf4_gate_up_5632x2048_silu_scaled,
        {"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_K": 64, "SPLIT": 4},
        {"num_warps": 4, "num_stages": 4},
    ),
    256: (
        nf4_gate_up_5632x2048_silu_scaled,
        {"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_K": 64, "SPLIT": 2},
        {"num_warps": 4, "num_stages": 4},
    ),
    2048: (
        nf4_gate_up_5632x2048_silu_dequantize,
        {"BLOCK_N": 32, "BLOCK_K": 128, "CHUNK": 5632},
        {"num_warps": 4, "num_stages": 1},
    ),
}

# Shares -> the kernel that adds them.
REDUCTIONS = {
    split: (
        nf4_gate_up_5632x2048_silu_reduce,
        {"BLOCK_N": 128, "SPLIT": split},
        {"num_warps": 4},
    )
    for split in (1, 2, 4, 8, 16)
}


@functools.cache
def prepare(device):
    """The tables of levels on a device: make them before a CUDA graph is captured."""
    return [
        torch.tensor(SCALE_LEVELS, dtype=torch.float32, device=device),
    ]


def multiply(x, dense, sums):
    """The product with float32 sums, for the epilogue."""
    if x.is_cuda:
        torch.mm(x, dense.t(), out_dtype=torch.float32, out=sums)
    else:  # interpreted
        torch.mm(x.float(), dense.float().t(), out=sums)


def run_decoded(
    x, codes, scales, nested, offset, codes1, scales1, nested1, offset1, scale_levels, out, tile,
    options,
):
    """The weight decoded to memory, and torch's own product with it."""
    chunk = tile["CHUNK"]
    dense = torch.empty((chunk, 2048), dtype=torch.bfloat16, device=x.device)
    grid = (-(-chunk // tile["BLOCK_N"]), -(-2048 // tile["BLOCK_K"]))
    rows = x.shape[0]
    sums = torch.empty((2, rows, 5632), dtype=torch.float32, device=x.device)
    for first in range(0, 5632, chunk):
        nf4_gate_up_5632x2048_silu_dequantize[grid](
            codes, scales, nested, offset, scale_levels, dense, first, **tile, **options,
        )
        multiply(x, dense, sums[0][:, first : first + chunk])
    for first in range(0, 5632, chunk):
        nf4_gate_up_5632x2048_silu_dequantize[grid](
            codes1, scales1, nested1, offset1, scale_levels, dense, first, **tile, **options,
        )
        multiply(x, dense, sums[1][:, first : first + chunk])
    add_shares, tile, options = REDUCTIONS[1]
    grid = (rows, -(-5632 // tile["BLOCK_N"]), 1)
    add_shares[grid](
        sums, out, rows, **tile, **options,
    )


def run(x, weight, extra, out=None):
    """The products: x [.., k] to [.., n] ([e, m, k] to [e, m, n] with a batch)."""
    shape = (*x.shape[:-1], 5632)
    if out is None:
        out = torch.empty(shape, dtype=torch.bfloat16, device=x.device)
    if not out.is_contiguous():
        return out.copy_(run(x, weight, extra))
    x = x.reshape(math.prod(x.shape[:-1]), 2048)
    if x.stride(-1) != 1:
        x = x.contiguous()
    rows = x.shape[-2]
    if rows == 0:
        return out
    codes, scales, nested, offset, codes1, scales1, nested1, offset1 = weight
    scale_levels, = prepare(x.device)

    most = next((most for most in VARIANTS if rows <= most), max(VARIANTS))
    kernel, tile, options = VARIANTS[most]
    if "CHUNK" in tile:
        with torch.cuda.device_of(x):
            run_decoded(
                x, codes, scales, nested, offset, codes1, scales1, nested1, offset1, scale_levels,
                out, tile, options,
            )
        return out
    split = tile["SPLIT"]
    partial = out
    if split > 1:
        sums = (split, 2, rows, 5632)
        partial = torch.empty(sums, dtype=torch.float32, device=x.device)
    grid = (-(-rows // tile["BLOCK_M"]), -(-5632 // tile["BLOCK_N"]), split)
    with torch.cuda.device_of(x):
        kernel[grid](
            x, codes, scales, nested, offset, codes1, scales1, nested1, offset1, scale_levels,
            out, partial, rows, x.stride(0), **tile, **options,
        )
        if split > 1:
            add_shares, tile, options = REDUCTIONS[split]
            grid = (rows, -(-5632 // tile["BLOCK_N"]), 1)
            add_shares[grid](
                partial, out, rows, **tile, **options,
            )
    return out
