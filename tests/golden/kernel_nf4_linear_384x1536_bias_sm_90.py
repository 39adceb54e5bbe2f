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

# Bytes of levels, four in a word: lower ones of 0 .. and 8 .., upper ones.
LEVEL_BYTES = [b for b in (-905563520, -1384372829, -1094729793, 1044266557) for _ in range(16)]

# Levels in bfloat16; for every byte those of its two codes.
LEVELS = (
    -1.0, -0.6953125, -0.5234375, -0.39453125, -0.28515625, -0.1845703125, -0.0908203125, 0.0,
    0.07958984375, 0.1611328125, 0.24609375, 0.337890625, 0.44140625, 0.5625, 0.72265625, 1.0,
)
LEVEL_PAIRS = [
    x for first in LEVELS for second in LEVELS for x in (first, second)
]


@triton.jit
def finish(acc, in0, out, m, n, rows):
    """The epilogue on the sums of rows m and outputs n, rounded and stored."""
    value0 = tl.load(in0 + n).to(tl.float32)
    add_0 = acc + value0
    where = m * 384 + n
    tl.store(out + where, add_0.to(out.dtype.element_ty), mask=(m < rows))


@triton.jit
def decode(word, bytes0, bytes1, bytes2, bytes3, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """Words as the first to the last pair of their codes' levels, in bfloat16."""
    # Four codes at a time: s are their lower three bits, t says which half of the table their
    # fourth bits pick, l and u are the lower and upper bytes of their levels, r0 to r3 pairs.
    w0, w1, w2, w3, w4, w5, w6, w7 = tl.inline_asm_elementwise(
        """
        {
        .reg .b32 s, t, low, high, l, u, r0, r1, r2, r3;
        and.b32 s, $8, 0x77777777;
        shr.u32 t, $8, 1;
        lop3.b32 t, t, 0x44444444, 0x32103210, 0xea;
        prmt.b32 low, $9, 0xba3d92, s;
        prmt.b32 high, $10, 0x803910e2, s;
        prmt.b32 l, low, high, t;
        prmt.b32 low, $11, 0xbdbebe, s;
        prmt.b32 high, $12, 0x3f3f3f3e, s;
        prmt.b32 u, low, high, t;
        prmt.b32 r0, l, u, 0x4051;
        prmt.b32 r1, l, u, 0x6273;
        shr.u32 s, s, 16;
        shr.u32 t, t, 16;
        prmt.b32 low, $9, 0xba3d92, s;
        prmt.b32 high, $10, 0x803910e2, s;
        prmt.b32 l, low, high, t;
        prmt.b32 low, $11, 0xbdbebe, s;
        prmt.b32 high, $12, 0x3f3f3f3e, s;
        prmt.b32 u, low, high, t;
        prmt.b32 r2, l, u, 0x4051;
        prmt.b32 r3, l, u, 0x6273;
        mov.b32 {$0, $1}, r0;
        mov.b32 {$2, $3}, r1;
        mov.b32 {$4, $5}, r2;
        mov.b32 {$6, $7}, r3;
        }
        """,
        "=h,=h,=h,=h,=h,=h,=h,=h,r,r,r,r,r",
        [word, bytes0, bytes1, bytes2, bytes3],
        dtype=(tl.bfloat16,) * 8,
        is_pure=True,
        pack=1,
    )
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
    block = n * 24 + run
    scale_code = tl.load(scales + block).to(tl.int32)
    coarse = tl.load(nested + ((n * 24 + run) // 256))
    scale = tl.load(scale_levels + scale_code) * coarse
    scale += tl.load(offset)
    return scale


@triton.jit
def arrived(acc):
    """Sums as they are: what uses them waits for the product that makes them."""
    return tl.inline_asm_elementwise(
        "// $0", "=f,0", [acc], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit(do_not_specialize=["rows"])
def nf4_linear_384x1536_bias_gemm(
    x, codes, scales, nested, offset, scale_levels, in0, out, partial, level_bytes, level_pairs,
    rows, x_stride_m, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    SPLIT: tl.constexpr,
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
    # One a word: uniform registers would be copied for every permutation.
    table = level_bytes + tl.arange(0, BLOCK_K // 8)[None, :]
    bytes0 = tl.load(table)
    bytes1 = tl.load(table + 16)
    bytes2 = tl.load(table + 32)
    bytes3 = tl.load(table + 48)
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
        w0, w1, w2, w3 = decode(word, bytes0, bytes1, bytes2, bytes3, BLOCK_N, BLOCK_K)
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


@triton.jit
def decode_bytes(code, scale, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """A tile's levels times their scales, in bfloat16."""
    # A scale as the sum of two numbers in bfloat16: products are rounded once.
    whole = tl.minimum(tl.maximum(scale, -3.389e38), 3.389e38).to(tl.bfloat16)
    rest = tl.broadcast_to((scale - whole.to(tl.float32)).to(tl.bfloat16), (BLOCK_N, BLOCK_K // 2))
    whole = tl.broadcast_to(whole, (BLOCK_N, BLOCK_K // 2))
    # Four codes at a time: s are their lower three bits, t says which half of the table their
    # fourth bits pick, l and u are the lower and upper bytes of their levels, r0 to r3 pairs.
    first, second = tl.inline_asm_elementwise(
        """
        {
        .reg .b32 s, t, low, high, l, u, r0, r1, r2, r3, b0, b1, b2, b3;
        mov.b32 b0, 0xca063280;
        mov.b32 b1, 0xad7c25a3;
        mov.b32 b2, 0xbebfbfbf;
        mov.b32 b3, 0x3e3e3e3d;
        and.b32 s, $4, 0x77777777;
        shr.u32 t, $4, 1;
        lop3.b32 t, t, 0x44444444, 0x32103210, 0xea;
        prmt.b32 low, b0, 0xba3d92, s;
        prmt.b32 high, b1, 0x803910e2, s;
        prmt.b32 l, low, high, t;
        prmt.b32 low, b2, 0xbdbebe, s;
        prmt.b32 high, b3, 0x3f3f3f3e, s;
        prmt.b32 u, low, high, t;
        prmt.b32 r0, l, u, 0x6240;
        prmt.b32 r1, l, u, 0x7351;
        shr.u32 s, s, 16;
        shr.u32 t, t, 16;
        prmt.b32 low, b0, 0xba3d92, s;
        prmt.b32 high, b1, 0x803910e2, s;
        prmt.b32 l, low, high, t;
        prmt.b32 low, b2, 0xbdbebe, s;
        prmt.b32 high, b3, 0x3f3f3f3e, s;
        prmt.b32 u, low, high, t;
        prmt.b32 r2, l, u, 0x6240;
        prmt.b32 r3, l, u, 0x7351;
        mul.rn.bf16x2 l, r1, $7;
        fma.rn.bf16x2 $0, r1, $5, l;
        mul.rn.bf16x2 l, r3, $8;
        fma.rn.bf16x2 $1, r3, $6, l;
        mul.rn.bf16x2 l, r0, $7;
        fma.rn.bf16x2 $2, r0, $5, l;
        mul.rn.bf16x2 l, r2, $8;
        fma.rn.bf16x2 $3, r2, $6, l;
        }
        """,
        "=r,=r,=r,=r,r,r,r,r,r",
        [code, whole, rest],
        dtype=(tl.bfloat16,) * 2,
        is_pure=True,
        pack=4,
    )
    return tl.join(first, second).reshape(BLOCK_N, BLOCK_K)


@triton.jit(do_not_specialize=["rows"])
def nf4_linear_384x1536_bias_scaled(
    x, codes, scales, nested, offset, scale_levels, in0, out, partial, level_bytes, level_pairs,
    rows, x_stride_m, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """Many rows: the weight tile with its scales by activation tile, acc is [outputs, rows]."""
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    n0 = tl.program_id(1) * BLOCK_N
    share = tl.program_id(2)
    SHARE: tl.constexpr = (1536 + BLOCK_K * SPLIT - 1) // (BLOCK_K * SPLIT) * BLOCK_K
    first_k = share * SHARE
    n = n0 + tl.arange(0, BLOCK_N)
    m, n = m[None, :], n[:, None]
    x_rows = x + m * x_stride_m
    acc = tl.full((BLOCK_N, BLOCK_M), 0.0, tl.float32)
    scale = scale_of(scales, nested, offset, scale_levels, n, first_k)
    for k0 in range(first_k, tl.minimum(first_k + SHARE, 1536), BLOCK_K):
        # load
        k = k0 + tl.arange(0, BLOCK_K)[:, None]
        x_tile = tl.load(x_rows + k, mask=m < rows, other=0.0)
        byte = k0 // 2 + tl.arange(0, BLOCK_K // 2)[None, :]
        code = tl.load(codes + (n * 768 + byte))
        next_k0 = tl.minimum(k0 + BLOCK_K, 1472)
        ahead = scale_of(scales, nested, offset, scale_levels, n, next_k0)
        # decode
        w = decode_bytes(code, scale, BLOCK_N, BLOCK_K)
        # dot
        acc = arrived(tl.dot(w, x_tile, acc))
        scale = ahead
    # epilogue
    if SPLIT == 1:
        finish(acc, in0, out, m, n, rows)
    else:
        where = (share * rows + m) * 384 + n
        tl.store(partial + where, acc, mask=(m < rows))


@triton.jit
def add(x, y):
    """What sums are made of."""
    return x + y


@triton.jit
def pair_table(level_pairs):
    """Where in shared memory the levels of 256 pairs of codes are, 16 times side by side."""
    table = tl.inline_asm_elementwise(
        "{ .shared .align 16 .b8 pairs[32768]; mov.u32 $0, pairs; }",
        "=r",
        [],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )
    byte, two = tl.arange(0, 256)[:, None], tl.arange(0, 8)[None, :]
    pair = tl.load(level_pairs.to(tl.pointer_type(tl.int64)) + tl.broadcast_to(byte, (256, 8)))
    tl.inline_asm_elementwise(
        "st.shared.v2.b64 [$1], {$2, $2}; mov.u32 $0, 0;",
        "=r,r,l",
        [table + byte * 128 + two * 16, pair],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )
    tl.debug_barrier()
    # What is read takes this value, so it is read behind the barrier.
    return tl.inline_asm_elementwise(
        "mov.b32 $0, $1;", "=r,r", [table], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def levels_of(word, copy, table):
    """The levels of a word's codes, from a copy of the table."""
    return tl.inline_asm_elementwise(
        """
        {
        .reg .b32 a, b, c, d;
        shl.b32 a, $8, 7;
        shr.u32 b, $8, 1;
        shr.u32 c, $8, 9;
        shr.u32 d, $8, 17;
        lop3.b32 a, a, 0x7f80, $9, 0xea;
        lop3.b32 b, b, 0x7f80, $9, 0xea;
        lop3.b32 c, c, 0x7f80, $9, 0xea;
        lop3.b32 d, d, 0x7f80, $9, 0xea;
        add.u32 a, a, $10;
        add.u32 b, b, $10;
        add.u32 c, c, $10;
        add.u32 d, d, $10;
        ld.shared.v2.f32 {$0, $1}, [a];
        ld.shared.v2.f32 {$2, $3}, [b];
        ld.shared.v2.f32 {$4, $5}, [c];
        ld.shared.v2.f32 {$6, $7}, [d];
        }
        """,
        "=f,=f,=f,=f,=f,=f,=f,=f,r,r,r",
        [word, copy, table],
        dtype=(tl.float32,) * 8,
        is_pure=True,
        pack=1,
    )


@triton.jit
def inputs_of(x, BLOCK_M: tl.constexpr, THREADS: tl.constexpr):
    """Eight inputs of each row and thread, one by one."""
    even, odd = tl.split(x.to(tl.float32).reshape(BLOCK_M, 1, THREADS, 2, 2, 2))
    x04, x26 = tl.split(even)
    x15, x37 = tl.split(odd)
    x0, x4 = tl.split(x04)
    x1, x5 = tl.split(x15)
    x2, x6 = tl.split(x26)
    x3, x7 = tl.split(x37)
    return x0, x1, x2, x3, x4, x5, x6, x7


@triton.jit
def words_of(word, BLOCK_N: tl.constexpr, THREADS: tl.constexpr):
    """Four words of each output and thread, one by one."""
    even, odd = tl.split(word.reshape(1, BLOCK_N, THREADS, 2, 2))
    word0, word2 = tl.split(even)
    word1, word3 = tl.split(odd)
    return word0, word1, word2, word3


@triton.jit
def add_products(sums, word, x, copy, table):
    """Adds the products of a word's eight weights."""
    w0, w1, w2, w3, w4, w5, w6, w7 = levels_of(word, copy, table)
    x0, x1, x2, x3, x4, x5, x6, x7 = x
    sums += w0 * x0
    sums += w1 * x1
    sums += w2 * x2
    sums += w3 * x3
    sums += w4 * x4
    sums += w5 * x5
    sums += w6 * x6
    return sums + w7 * x7


@triton.jit
def scale_code_of(scales, n, k0):
    """The codes of scales of outputs n at inputs k0 .."""
    run = k0 // 64
    block = n * 24 + run
    return tl.load(scales + block).to(tl.int32)


@triton.jit
def scale_from(scale_code, nested, offset, scale_levels, n, k0):
    """The scales of outputs n at inputs k0 .., from their codes."""
    run = k0 // 64
    coarse = tl.load(nested + ((n * 24 + run) // 256))
    scale = tl.load(scale_levels + scale_code) * coarse
    scale += tl.load(offset)
    return scale


@triton.jit(do_not_specialize=["rows"])
def nf4_linear_384x1536_bias_gemv(
    x, codes, scales, nested, offset, scale_levels, in0, out, partial, level_bytes, level_pairs,
    rows, x_stride_m, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """Few rows: a thread multiplies 32 inputs of all outputs at a time, acc is [rows, outputs]."""
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    n0 = tl.program_id(1) * BLOCK_N
    share = tl.program_id(2)
    SHARE: tl.constexpr = (1536 + BLOCK_K * SPLIT - 1) // (BLOCK_K * SPLIT) * BLOCK_K
    first_k = share * SHARE
    end = tl.minimum(first_k + SHARE, 1536)
    n = n0 + tl.arange(0, BLOCK_N)
    THREADS: tl.constexpr = BLOCK_K // 32
    thread = tl.arange(0, THREADS)
    copy = (thread % 16 * 8)[None, None, :]
    # In one piece, so that neighbours of a row go to neighbouring threads.
    j = tl.arange(0, 4 * THREADS)[None, :]
    row = tl.arange(0, BLOCK_M * THREADS)[:, None]
    x_m, x_k = tl.program_id(0).to(tl.int64) * BLOCK_M + row // THREADS, row % THREADS * 32
    inputs = x + x_m * x_stride_m + (x_k + tl.arange(0, 8)[None, :])
    sums = tl.full((BLOCK_M, BLOCK_N, THREADS), 0.0, tl.float32)
    run = tl.arange(0, BLOCK_N * THREADS)
    run_n, run_k = n0 + run // THREADS, run % THREADS * 32
    word = tl.load(
        codes.to(tl.pointer_type(tl.int32)) + (n[:, None] * 192 + (first_k // 8 + j)),
        mask=(first_k + j // 4 * 32 < end),
        other=0,
    )
    at = tl.minimum(first_k + run_k, 1504)
    scale = scale_code_of(scales, run_n, at)
    table = pair_table(level_pairs)
    for k0 in range(first_k, end, BLOCK_K):
        # load
        next_k0 = k0 + BLOCK_K
        next_word = tl.load(
            codes.to(tl.pointer_type(tl.int32)) + (n[:, None] * 192 + (next_k0 // 8 + j)),
            mask=(next_k0 + j // 4 * 32 < end),
            other=0,
        )
        at = tl.minimum(next_k0 + run_k, 1504)
        next_scale = scale_code_of(scales, run_n, at)
        tl.debug_barrier()
        wanted = (x_m < rows) & (k0 + x_k < end)
        x0 = inputs_of(tl.load(inputs + k0, mask=wanted, other=0.0), BLOCK_M, THREADS)
        x1 = inputs_of(tl.load(inputs + (k0 + 8), mask=wanted, other=0.0), BLOCK_M, THREADS)
        x2 = inputs_of(tl.load(inputs + (k0 + 16), mask=wanted, other=0.0), BLOCK_M, THREADS)
        x3 = inputs_of(tl.load(inputs + (k0 + 24), mask=wanted, other=0.0), BLOCK_M, THREADS)
        # decode and multiply
        part0, part1, part2, part3 = words_of(word, BLOCK_N, THREADS)
        products = tl.full((BLOCK_M, BLOCK_N, THREADS), 0.0, tl.float32)
        products = add_products(products, part0, x0, copy, table)
        products = add_products(products, part1, x1, copy, table)
        products = add_products(products, part2, x2, copy, table)
        products = add_products(products, part3, x3, copy, table)
        at = tl.minimum(k0 + run_k, 1504)
        scale = scale_from(scale, nested, offset, scale_levels, run_n, at)
        scaled = products * scale.reshape(1, BLOCK_N, THREADS)
        sums += tl.where((k0 + thread * 32 < end)[None, None, :], scaled, 0.0)
        scale = next_scale
        word = next_word
    acc = tl.reduce(sums, 2, add)
    m, n = m[:, None], n[None, :]
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
    "nested": "*fp32", "offset": "*fp32", "scale_levels": "*fp32", "level_bytes": "*i32",
    "level_pairs": "*fp32", "in0": "*bf16", "rows": "i32", "x_stride_m": "i32",
}

# Most rows -> kernel, constants, launch options; the last serves all above too.
VARIANTS = {
    64: (
        nf4_linear_384x1536_bias_gemm,
        {"BLOCK_M": 16, "BLOCK_N": 64, "BLOCK_K": 64, "SPLIT": 8},
        {"num_warps": 4, "num_stages": 5},
    ),
    128: (
        nf4_linear_384x1536_bias_scaled,
        {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 64, "SPLIT": 4},
        {"num_warps": 4, "num_stages": 4},
    ),
    256: (
        nf4_linear_384x1536_bias_scaled,
        {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 64, "SPLIT": 2},
        {"num_warps": 4, "num_stages": 4},
    ),
    2048: (
        nf4_linear_384x1536_bias_scaled,
        {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 64, "SPLIT": 1},
        {"num_warps": 4, "num_stages": 4},
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
        torch.tensor(LEVEL_BYTES, dtype=torch.int32, device=device),
        torch.tensor(LEVEL_PAIRS, dtype=torch.float32, device=device),
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
    scale_levels, level_bytes, level_pairs = prepare(x.device)
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
            x, codes, scales, nested, offset, scale_levels, in0, out, partial, level_bytes,
            level_pairs, rows, x.stride(0), **tile, **options,
        )
        if split > 1:
            add_shares, tile, options = REDUCTIONS[split]
            grid = (rows, -(-384 // tile["BLOCK_N"]), 1)
            add_shares[grid](
                partial, in0, out, rows, **tile, **options,
            )
    return out
