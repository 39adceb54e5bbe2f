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
def finish(acc, acc1, out, m, n, rows):
    """The epilogue on the sums of rows m and outputs n, rounded and stored."""
    v0 = acc / (1.0 + tl.exp((-acc)))
    v1 = v0 * acc1
    where = m * 5632 + n
    tl.store(out + where, v1.to(out.dtype.element_ty), mask=(m < rows))


@triton.jit
def add(x, y):
    """What sums are made of."""
    return x + y


@triton.jit(do_not_specialize=["rows"])
def nf4_gate_up_5632x2048_silu_gemv(
    x, codes, scales, nested, offset, codes1, scales1, nested1, offset1, scale_levels, out, partial,
    rows, x_stride_m, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """Few rows: every program streams its share of BLOCK_N outputs' weights once."""
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    n0 = tl.program_id(1) * BLOCK_N
    share = tl.program_id(2)
    x_rows = x + m[:, None, None] * x_stride_m
    sums = tl.full((BLOCK_M, BLOCK_N, BLOCK_K), 0.0, tl.float32)
    sums1 = tl.full((BLOCK_M, BLOCK_N, BLOCK_K), 0.0, tl.float32)
    for k0 in range(share * BLOCK_K, 2048, BLOCK_K * SPLIT):
        k = k0 + tl.arange(0, BLOCK_K)[None, None, :]
        x_tile = tl.load(x_rows + k, mask=(m < rows)[:, None, None], other=0.0)
        # load and decode
        w = decode(codes, scales, nested, offset, scale_levels, n0, k0, BLOCK_N, BLOCK_K)
        sums += x_tile.to(tl.float32) * w[None, :, :].to(tl.float32)
        # load and decode
        w = decode(codes1, scales1, nested1, offset1, scale_levels, n0, k0, BLOCK_N, BLOCK_K)
        sums1 += x_tile.to(tl.float32) * w[None, :, :].to(tl.float32)
    acc = tl.reduce(sums, 2, add)
    acc1 = tl.reduce(sums1, 2, add)
    # epilogue
    n = n0 + tl.arange(0, BLOCK_N)
    m, n = m[:, None], n[None, :]
    if SPLIT == 1:
        finish(acc, acc1, out, m, n, rows)
    else:
        where = (share * 2 * rows + m) * 5632 + n
        tl.store(partial + where, acc, mask=(m < rows))
        where = ((share * 2 + 1) * rows + m) * 5632 + n
        tl.store(partial + where, acc1, mask=(m < rows))


@triton.jit(do_not_specialize=["rows"])
def nf4_gate_up_5632x2048_silu_gemm(
    x, codes, scales, nested, offset, codes1, scales1, nested1, offset1, scale_levels, out, partial,
    rows, x_stride_m, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """Many rows: weight tile by activation tile on tensor cores, acc is [outputs, rows]."""
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    n0 = tl.program_id(1) * BLOCK_N
    share = tl.program_id(2)
    x_rows = x + m[None, :] * x_stride_m
    acc = tl.full((BLOCK_N, BLOCK_M), 0.0, tl.float32)
    acc1 = tl.full((BLOCK_N, BLOCK_M), 0.0, tl.float32)
    for k0 in range(share * BLOCK_K, 2048, BLOCK_K * SPLIT):
        k = k0 + tl.arange(0, BLOCK_K)[:, None]
        x_tile = tl.load(x_rows + k, mask=(m < rows)[None, :], other=0.0)
        # load and decode
        w = decode(codes, scales, nested, offset, scale_levels, n0, k0, BLOCK_N, BLOCK_K)
        # dot
        acc = tl.dot(w, x_tile, acc)
        # load and decode
        w = decode(codes1, scales1, nested1, offset1, scale_levels, n0, k0, BLOCK_N, BLOCK_K)
        # dot
        acc1 = tl.dot(w, x_tile, acc1)
    # epilogue
    n = n0 + tl.arange(0, BLOCK_N)
    m, n = m[None, :], n[:, None]
    if SPLIT == 1:
        finish(acc, acc1, out, m, n, rows)
    else:
        where = (share * 2 * rows + m) * 5632 + n
        tl.store(partial + where, acc, mask=(m < rows))
        where = ((share * 2 + 1) * rows + m) * 5632 + n
        tl.store(partial + where, acc1, mask=(m < rows))


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
    "offset1": "*fp32", "scale_levels": "*fp32", "rows": "i32", "x_stride_m": "i32",
}

# Most rows -> kernel, constants, launch options; the last serves all above too.
VARIANTS = {
    1: (
        nf4_gate_up_5632x2048_silu_gemv,
        {"BLOCK_M": 1, "BLOCK_N": 2, "BLOCK_K": 512, "SPLIT": 1},
        {"num_warps": 4, "num_stages": 2},
    ),
    2: (
        nf4_gate_up_5632x2048_silu_gemv,
        {"BLOCK_M": 2, "BLOCK_N": 2, "BLOCK_K": 512, "SPLIT": 1},
        {"num_warps": 4, "num_stages": 2},
    ),
    4: (
        nf4_gate_up_5632x2048_silu_gemv,
        {"BLOCK_M": 4, "BLOCK_N": 2, "BLOCK_K": 512, "SPLIT": 1},
        {"num_warps": 4, "num_stages": 2},
    ),
    16: (
        nf4_gate_up_5632x2048_silu_gemm,
        {"BLOCK_M": 16, "BLOCK_N": 64, "BLOCK_K": 64, "SPLIT": 8},
        {"num_warps": 4, "num_stages": 3},
    ),
    32: (
        nf4_gate_up_5632x2048_silu_gemm,
        {"BLOCK_M": 32, "BLOCK_N": 64, "BLOCK_K": 64, "SPLIT": 1},
        {"num_warps": 4, "num_stages": 3},
    ),
    64: (
        nf4_gate_up_5632x2048_silu_gemm,
        {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 64, "SPLIT": 1},
        {"num_warps": 4, "num_stages": 3},
    ),
    128: (
        nf4_gate_up_5632x2048_silu_gemm,
        {"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_K": 64, "SPLIT": 1},
        {"num_warps": 8, "num_stages": 3},
    ),
}

# Shares -> the kernel that adds them.
REDUCTIONS = {
    8: (nf4_gate_up_5632x2048_silu_reduce, {"BLOCK_N": 128, "SPLIT": 8}, {"num_warps": 4}),
}


@functools.cache
def prepare(device):
    """The tables of levels on a device: make them before a CUDA graph is captured."""
    return [torch.tensor(t, dtype=torch.float32, device=device) for t in (SCALE_LEVELS,)]


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
            add_shares[grid](partial, out, rows, **tile, **options)
    return out
