"""llm_int8_linear_384x1536_bias.

out[m, 384] = x[m, 1536] @ weight.T in int8, columns with any abs(x) >= 6.0 in bfloat16, then add
(bfloat16 to bfloat16).

Printed by fxquant. The spec, which fxquant.codegen.reference defines:
  {"compute_dtype": "int8", "epilogue": {"nodes": [["aten.add.Tensor", ["%acc", "%in0"], []]],
  "operands": [["n", "bfloat16"]]}, "name": "llm_int8_linear_384x1536_bias", "out_dtype":
  "bfloat16", "outliers": {"columns": null, "dtype": "bfloat16", "threshold": 6.0}, "weight":
  {"batch": null, "encoding": {"bits": 8, "block": [1, -1]}, "k": 1536, "n": 384, "offset": 0,
  "shape": [384, 1536], "strides": [0, 1536, 1]}, "x_dtype": "bfloat16"}

Weight: [384, 1536], 8 bits uniform in blocks of 1xall
Activation: rounded to int8, with a scale for every row
Outliers: columns with any abs(x) >= 6.0 in bfloat16
Scheme: llm
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
def most(x, y):
    """What the largest is found with."""
    return tl.maximum(x, y)


@triton.jit(do_not_specialize=["rows"])
def llm_int8_linear_384x1536_bias_find(
    x, outlier, rows, x_stride_m, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
    STEP_M: tl.constexpr,
):
    """Marks the columns with a magnitude of 6.0 or more."""
    k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]
    first_m = tl.program_id(1).to(tl.int64) * BLOCK_M
    large = tl.full((STEP_M, BLOCK_K), 0, tl.int1)
    for m0 in range(0, BLOCK_M, STEP_M):
        m = first_m + m0 + tl.arange(0, STEP_M)[:, None]
        mask = (m < rows) & (k < 1536)
        tile = tl.load(x + (m * x_stride_m + k), mask=mask, other=0.0)
        large |= tl.abs(tile.to(tl.float32)) >= 6.0
    hit = tl.reduce(large.to(tl.int32), 0, most, keep_dims=True)
    # With more rows than one program's, all marks are 0 beforehand.
    mask = (k < 1536) & ((hit > 0) | (tl.num_programs(1) == 1))
    tl.store(outlier + k, hit.to(tl.uint8), mask=mask)


@triton.jit
def list_columns(outlier, columns, count, counter):
    """The marked columns in order, and their number; counts calls and columns."""
    k = tl.arange(0, 2048)
    mark = tl.load(outlier + k, mask=k < 1536, other=0).to(tl.int32)
    place = tl.associative_scan(mark, 0, add) - 1
    tl.store(columns + place, k, mask=mark > 0)
    found = tl.reduce(mark, 0, add)
    tl.store(count, found)
    if counter is not None:
        tl.atomic_add(counter, 1, sem="relaxed")
        tl.atomic_add(counter + 1, found.to(tl.int64), sem="relaxed")


# The least magnitude that a scale is made of: 127 / amax and amax / 127 are normal numbers.
LEAST = tl.constexpr(2.0**-100)


@triton.jit
def bits_of(x):
    """Magnitudes as integers: in the order of the numbers, what is not finite above all."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def number_of(bits):
    """The magnitude behind an integer, NaN where it is not finite."""
    return tl.where(bits < 0x7F800000, bits.to(tl.float32, bitcast=True), float("nan"))


@triton.jit
def at_least(x):
    """What is not below LEAST; NaN stays."""
    return tl.where(x < LEAST, LEAST, x)


@triton.jit
def to_int8(x, peak):
    """Integers, half to even: at 1.5 * 2**23 a float32 number's last place is 1."""
    scaled = tl.minimum(tl.maximum(x * tl.div_rn(127.0, peak), -127.0), 127.0)
    code = (scaled + 12582912.0) - 12582912.0
    return tl.where(peak == peak, code, 0.0).to(tl.int8)


@triton.jit
def read(x_rows, outlier, m, k, rows):
    """Inputs k of rows m in float32, 0 in the columns of outliers."""
    mask = (m < rows) & (k < 1536)
    values = tl.load(x_rows + k, mask=mask, other=0.0).to(tl.float32)
    left_out = tl.load(outlier + k, mask=k < 1536, other=0) != 0
    values = tl.where(left_out, 0.0, values)
    return values


@triton.jit(do_not_specialize=["rows"])
def llm_int8_linear_384x1536_bias_quantize(
    x, outlier, q, amax, columns, count, counter, rows, x_stride_m, BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The scale and the integers of every row; the last program lists the outliers' columns."""
    if tl.program_id(0) == tl.num_programs(0) - 1:
        list_columns(outlier, columns, count, counter)
    else:
        m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
        x_rows = x + m * x_stride_m
        k = tl.arange(0, BLOCK_K)[None, :]
        values = read(x_rows, outlier, m, k, rows)
        bits = tl.reduce(bits_of(values), 1, most, keep_dims=True)
        peak = at_least(number_of(bits))
        tl.store(amax + m, peak, mask=m < rows)
        tl.store(q + (m * 1536 + k), to_int8(values, peak), mask=(m < rows) & (k < 1536))


@triton.jit
def finish(acc, in0, out, m, n, rows):
    """The epilogue on the sums of rows m and outputs n, rounded and stored."""
    value0 = tl.load(in0 + n).to(tl.float32)
    add_0 = acc + value0
    where = m * 384 + n
    tl.store(out + where, add_0.to(out.dtype.element_ty), mask=(m < rows))


@triton.jit
def decode(codes, n0, k0, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """The integers of outputs n0 .. and inputs k0 .., [BLOCK_N, BLOCK_K] in int8."""
    # load
    n = n0 + tl.arange(0, BLOCK_N)[:, None]
    k = k0 + tl.arange(0, BLOCK_K)[None, :]
    code = tl.load(codes + (n * 1536 + k))
    # decode
    level = code
    return level


@triton.jit
def scale_of(scales, n):
    """The scales of outputs n."""
    block = n
    scale = tl.load(scales + block)
    return scale


@triton.jit
def decode_columns(codes, scales, n, k, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """The weight at outputs n and inputs k, [BLOCK_N, BLOCK_K] in bfloat16."""
    # load
    code = tl.load(codes + (n * 1536 + k))
    code = tl.broadcast_to(code, (BLOCK_N, BLOCK_K))
    # decode
    level = code.to(tl.float32)
    block = n
    scale = tl.load(scales + block)
    return (level * scale).to(tl.bfloat16)


@triton.jit(do_not_specialize=["rows"])
def llm_int8_linear_384x1536_bias_gather(
    x, codes, scales, columns, count, apart, x_apart, rows, x_stride_m, BLOCK: tl.constexpr,
    GATHERED: tl.constexpr,
):
    """Outlier columns side by side, the weight's and those of x, and zeros up to the next tile."""
    found = tl.minimum(tl.load(count), GATHERED)
    OUTPUTS: tl.constexpr = (384 + BLOCK - 1) // BLOCK * BLOCK
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[:, None]
    m = (n - OUTPUTS).to(tl.int64)
    for c0 in range(16 * tl.program_id(1), found, 16 * tl.num_programs(1)):
        c = c0 + tl.arange(0, 16)[None, :]
        k = tl.load(columns + c, mask=c < found, other=0)
        if tl.program_id(0) * BLOCK < OUTPUTS:
            w = decode_columns(codes, scales, n, k, BLOCK, 16)
            w = tl.where(c < found, w, 0.0)
            tl.store(apart + (n * GATHERED + c), w)
        else:
            mask = (m < rows) & (c < found)
            x_tile = tl.load(x + (m * x_stride_m + k), mask=mask, other=0.0)
            tl.store(x_apart + (m * GATHERED + c), x_tile, mask=m < rows)


@triton.jit(do_not_specialize=["rows"])
def llm_int8_linear_384x1536_bias_gemm(
    q, amax, codes, scales, in0, x, columns, count, apart, x_apart, out, partial, rows, x_stride_m,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT: tl.constexpr,
    GATHERED: tl.constexpr,
):
    """Weight tile by activation tile on tensor cores, acc is [outputs, rows]."""
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    n0 = tl.program_id(1) * BLOCK_N
    share = tl.program_id(2)
    SHARE: tl.constexpr = (1536 + BLOCK_K * SPLIT - 1) // (BLOCK_K * SPLIT) * BLOCK_K
    first_k = share * SHARE
    n = n0 + tl.arange(0, BLOCK_N)
    m, n = m[None, :], n[:, None]
    q_rows = q + m * 1536
    sums = tl.full((BLOCK_N, BLOCK_M), 0, tl.int32)
    for k0 in range(first_k, tl.minimum(first_k + SHARE, 1536), BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)[:, None]
        q_tile = tl.load(q_rows + k, mask=m < rows, other=0)
        # load and decode
        w = decode(codes, n0, k0, BLOCK_N, BLOCK_K)
        # dot
        sums = tl.dot(w, q_tile, sums, out_dtype=tl.int32)
    # scale
    acc = sums.to(tl.float32) * scale_of(scales, n)
    peak = tl.load(amax + m, mask=m < rows, other=0.0)
    acc *= tl.div_rn(peak, 127.0)
    # outliers
    found = tl.load(count)
    for c0 in tl.range(GATHERED + share * 16, found, 16 * SPLIT, num_stages=1):
        c = c0 + tl.arange(0, 16)
        k = tl.load(columns + c, mask=c < found, other=0)
        mask = (m < rows) & (c[:, None] < found)
        x_tile = tl.load(x + (m * x_stride_m + k[:, None]), mask=mask, other=0.0)
        w = decode_columns(codes, scales, n, k[None, :], BLOCK_N, 16)
        w = tl.where(c[None, :] < found, w, 0.0)
        acc = tl.dot(w, x_tile, acc)
    if GATHERED > 0:
        for c0 in range(share * 16, tl.minimum(found, GATHERED), 16 * SPLIT):
            c = c0 + tl.arange(0, 16)
            x_tile = tl.load(x_apart + (m * GATHERED + c[:, None]), mask=m < rows, other=0.0)
            w = tl.load(apart + (n * GATHERED + c[None, :]))
            acc = tl.dot(w, x_tile, acc)
    # epilogue
    if SPLIT == 1:
        finish(acc, in0, out, m, n, rows)
    else:
        where = (share * rows + m) * 384 + n
        tl.store(partial + where, acc, mask=(m < rows))


@triton.jit(do_not_specialize=["rows"])
def llm_int8_linear_384x1536_bias_reduce(
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
    "x": "*bf16", "out": "*bf16", "partial": "*fp32", "codes": "*i8", "scales": "*fp32",
    "in0": "*bf16", "q": "*i8", "amax": "*fp32", "outlier": "*u8", "columns": "*i32",
    "count": "*i32", "counter": "*i64", "apart": "*bf16", "x_apart": "*bf16", "rows": "i32",
    "x_stride_m": "i32",
}

# Most rows -> kernel, constants, launch options; the last serves all above too.
VARIANTS = {
    64: (
        llm_int8_linear_384x1536_bias_gemm,
        {"BLOCK_M": 16, "BLOCK_N": 64, "BLOCK_K": 128, "SPLIT": 1, "GATHERED": 0},
        {"num_warps": 4, "num_stages": 4},
    ),
    128: (
        llm_int8_linear_384x1536_bias_gemm,
        {"BLOCK_M": 32, "BLOCK_N": 64, "BLOCK_K": 128, "SPLIT": 1, "GATHERED": 128},
        {"num_warps": 4, "num_stages": 4},
    ),
    2048: (
        llm_int8_linear_384x1536_bias_gemm,
        {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 128, "SPLIT": 1, "GATHERED": 128},
        {"num_warps": 4, "num_stages": 4},
    ),
}

# Shares -> the kernel that adds them.
REDUCTIONS = {
    split: (
        llm_int8_linear_384x1536_bias_reduce,
        {"BLOCK_N": 128, "SPLIT": split},
        {"num_warps": 4},
    )
    for split in (2, 4)
}

# Step -> the kernel that does it, its constants, launch options.
STEPS = {
    "find": (
        llm_int8_linear_384x1536_bias_find,
        {"BLOCK_M": 32, "BLOCK_K": 64, "STEP_M": 32},
        {"num_warps": 4},
    ),
    "find_many": (
        llm_int8_linear_384x1536_bias_find,
        {"BLOCK_M": 64, "BLOCK_K": 512, "STEP_M": 16},
        {"num_warps": 4},
    ),
    "quantize": (
        llm_int8_linear_384x1536_bias_quantize,
        {"BLOCK_M": 1, "BLOCK_K": 2048},
        {"num_warps": 4},
    ),
    "gather": (
        llm_int8_linear_384x1536_bias_gather,
        {"BLOCK": 32, "GATHERED": 128},
        {"num_warps": 4},
    ),
}


def quantize(x, counter):
    """Rows of an activation in int8, and the magnitudes that are 127 in them."""
    rows = x.shape[-2]
    q = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    amax = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    kernel, tile, options = STEPS["find" if rows <= 512 else "find_many"]
    make = torch.empty if rows <= tile["BLOCK_M"] else torch.zeros
    outlier = make(1536, dtype=torch.uint8, device=x.device)
    columns = torch.empty(1536, dtype=torch.int32, device=x.device)
    count = torch.empty(1, dtype=torch.int32, device=x.device)
    grid = (-(-1536 // tile["BLOCK_K"]), -(-rows // tile["BLOCK_M"]), 1)
    kernel[grid](x, outlier, rows, x.stride(0), **tile, **options)
    kernel, tile, options = STEPS["quantize"]
    grid = (-(-rows // tile["BLOCK_M"]) + 1, 1)
    kernel[grid](
        x, outlier, q, amax, columns, count, counter, rows, x.stride(0), **tile, **options,
    )
    return q, amax, columns, count


def gather(x, codes, scales, columns, count):
    """Outlier columns as matrices, as many as have room: [.., GATHERED]."""
    kernel, tile, options = STEPS["gather"]
    rows, block, width = x.shape[-2], tile["BLOCK"], tile["GATHERED"]
    apart = torch.empty((384, width), dtype=torch.bfloat16, device=x.device)
    x_apart = torch.empty((rows, width), dtype=torch.bfloat16, device=x.device)
    grid = (-(-384 // block) + -(-rows // block), 8)
    kernel[grid](
        x, codes, scales, columns, count, apart, x_apart, rows, x.stride(0), **tile, **options,
    )
    return apart, x_apart


def run(x, weight, extra, out=None, counter=None):
    """The product: x [.., k] to [.., n] ([e, m, k] to [e, m, n] with a batch)."""
    shape = (*x.shape[:-1], 384)
    if out is None:
        out = torch.empty(shape, dtype=torch.bfloat16, device=x.device)
    if not out.is_contiguous():
        return out.copy_(run(x, weight, extra, None, counter))
    x = x.reshape(math.prod(x.shape[:-1]), 1536)
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
        sums = (split, rows, 384)
        partial = torch.empty(sums, dtype=torch.float32, device=x.device)
    grid = (-(-rows // tile["BLOCK_M"]), -(-384 // tile["BLOCK_N"]), split)
    with torch.cuda.device_of(x):
        q, amax, columns, count = quantize(x, counter)
        apart = x_apart = None
        if tile["GATHERED"]:
            apart, x_apart = gather(x, codes, scales, columns, count)
        kernel[grid](
            q, amax, codes, scales, in0, x, columns, count, apart, x_apart, out, partial, rows,
            x.stride(0), **tile, **options,
        )
        if split > 1:
            add_shares, tile, options = REDUCTIONS[split]
            grid = (rows, -(-384 // tile["BLOCK_N"]), 1)
            add_shares[grid](
                partial, in0, out, rows, **tile, **options,
            )
    return out
