"""nf4_linear_384x1536_bias.

out[m, 384] = x[m, 1536] @ weight.T, then add (bfloat16 to bfloat16).

Printed by fxquant. The spec, which fxquant.codegen.reference defines:
  {"compute_dtype":"bfloat16","epilogue":{"nodes":[["aten.add.Tensor",["%acc","%in0"],[]]],"oper
  ands":[["n","bfloat16"]]},"name":"nf4_linear_384x1536_bias","out_dtype":"bfloat16","weight":{"
  batch":null,"encoding":{"bits":4,"levels":"nf4","scale":{"bits":8,"block":[256],"levels":"dyna
  mic8","offset":true}},"k":1536,"n":384,"offset":0,"shape":[384,1536],"strides":[0,1536,1]},"x_
  dtype":"bfloat16"}

Weight: [384, 1536], 4 bits, see the spec's encoding
Scheme: nf4
Modules: golden
"""

import functools
import math

import torch
import triton
import triton.language as tl

# What the codes of the scales stand for: the codebook 'dynamic8'.
SCALE_LEVELS = (
    -0.992968738079071, -0.9789062738418579, -0.96484375, -0.9507812261581421, -0.936718761920929,
    -0.922656238079071, -0.9085937738418579, -0.89453125, -0.8804687261581421, -0.866406261920929,
    -0.852343738079071, -0.8382812738418579, -0.82421875, -0.8101562261581421, -0.796093761920929,
    -0.782031238079071, -0.7679687738418579, -0.75390625, -0.7398437261581421, -0.725781261920929,
    -0.7117187976837158, -0.6976562738418579, -0.68359375, -0.6695312261581421, -0.655468761920929,
    -0.6414062976837158, -0.6273437738418579, -0.61328125, -0.5992187261581421, -0.585156261920929,
    -0.5710937976837158, -0.5570312738418579, -0.54296875, -0.5289062261581421, -0.5148437023162842,
    -0.500781238079071, -0.48671871423721313, -0.47265625, -0.4585937261581421,
    -0.44453126192092896, -0.43046873807907104, -0.4164062440395355, -0.40234375,
    -0.3882812261581421, -0.37421876192092896, -0.36015623807907104, -0.3460937440395355,
    -0.33203125, -0.3179687261581421, -0.30390626192092896, -0.28984373807907104,
    -0.2757812738418579, -0.26171875, -0.24765624105930328, -0.23359374701976776,
    -0.21953125298023224, -0.20546874403953552, -0.19140625, -0.17734375596046448,
    -0.16328124701976776, -0.14921875298023224, -0.13515624403953552, -0.12109375,
    -0.10703125596046448, -0.09859374910593033, -0.09578125923871994, -0.09296875447034836,
    -0.09015624970197678, -0.08734375238418579, -0.08453124761581421, -0.08171875774860382,
    -0.07890625298023224, -0.07609374821186066, -0.07328125089406967, -0.07046874612569809,
    -0.0676562562584877, -0.06484375149011612, -0.062031250447034836, -0.05921875312924385,
    -0.05640624836087227, -0.053593751043081284, -0.05078125, -0.047968748956918716,
    -0.04515625163912773, -0.04234374687075615, -0.039531249552965164, -0.03671875223517418,
    -0.033906251192092896, -0.031093750149011612, -0.028281250968575478, -0.025468749925494194,
    -0.02265625074505806, -0.019843751564621925, -0.017031250521540642, -0.014218750409781933,
    -0.011406250298023224, -0.009718749672174454, -0.009156249463558197, -0.008593750186264515,
    -0.008031249977648258, -0.0074687497690320015, -0.006906250026077032, -0.006343749817460775,
    -0.005781250074505806, -0.0052187503315508366, -0.0046562496572732925, -0.004093749914318323,
    -0.0035312497057020664, -0.002968749962747097, -0.002406249986961484, -0.001843750011175871,
    -0.001281249918974936, -0.0009437500848434865, -0.0008312499849125743, -0.0007187500596046448,
    -0.0006062500760890543, -0.000493750034365803, -0.0003812500217463821, -0.0002687500382307917,
    -0.00015625001105945557, -8.874999912222847e-05, -6.625000241911039e-05, -4.374999844003469e-05,
    -2.1249998098937795e-05, -7.749999895168003e-06, -3.250000190746505e-06, -5.500000384017767e-07,
    0.0, 5.500000384017767e-07, 3.250000190746505e-06, 7.749999895168003e-06,
    2.1249998098937795e-05, 4.374999844003469e-05, 6.625000241911039e-05, 8.874999912222847e-05,
    0.00015625001105945557, 0.0002687500382307917, 0.0003812500217463821, 0.000493750034365803,
    0.0006062500760890543, 0.0007187500596046448, 0.0008312499849125743, 0.0009437500848434865,
    0.001281249918974936, 0.001843750011175871, 0.002406249986961484, 0.002968749962747097,
    0.0035312497057020664, 0.004093749914318323, 0.0046562496572732925, 0.0052187503315508366,
    0.005781250074505806, 0.006343749817460775, 0.006906250026077032, 0.0074687497690320015,
    0.008031249977648258, 0.008593750186264515, 0.009156249463558197, 0.009718749672174454,
    0.011406250298023224, 0.014218750409781933, 0.017031250521540642, 0.019843751564621925,
    0.02265625074505806, 0.025468749925494194, 0.028281250968575478, 0.031093750149011612,
    0.033906251192092896, 0.03671875223517418, 0.039531249552965164, 0.04234374687075615,
    0.04515625163912773, 0.047968748956918716, 0.05078125, 0.053593751043081284,
    0.05640624836087227, 0.05921875312924385, 0.062031250447034836, 0.06484375149011612,
    0.0676562562584877, 0.07046874612569809, 0.07328125089406967, 0.07609374821186066,
    0.07890625298023224, 0.08171875774860382, 0.08453124761581421, 0.08734375238418579,
    0.09015624970197678, 0.09296875447034836, 0.09578125923871994, 0.09859374910593033,
    0.10703125596046448, 0.12109375, 0.13515624403953552, 0.14921875298023224, 0.16328124701976776,
    0.17734375596046448, 0.19140625, 0.20546874403953552, 0.21953125298023224, 0.23359374701976776,
    0.24765624105930328, 0.26171875, 0.2757812738418579, 0.28984373807907104, 0.30390626192092896,
    0.3179687261581421, 0.33203125, 0.3460937440395355, 0.36015623807907104, 0.37421876192092896,
    0.3882812261581421, 0.40234375, 0.4164062440395355, 0.43046873807907104, 0.44453126192092896,
    0.4585937261581421, 0.47265625, 0.48671871423721313, 0.500781238079071, 0.5148437023162842,
    0.5289062261581421, 0.54296875, 0.5570312738418579, 0.5710937976837158, 0.585156261920929,
    0.5992187261581421, 0.61328125, 0.6273437738418579, 0.6414062976837158, 0.655468761920929,
    0.6695312261581421, 0.68359375, 0.6976562738418579, 0.7117187976837158, 0.725781261920929,
    0.7398437261581421, 0.75390625, 0.7679687738418579, 0.782031238079071, 0.796093761920929,
    0.8101562261581421, 0.82421875, 0.8382812738418579, 0.852343738079071, 0.866406261920929,
    0.8804687261581421, 0.89453125, 0.9085937738418579, 0.922656238079071, 0.936718761920929,
    0.9507812261581421, 0.96484375, 0.9789062738418579, 0.992968738079071, 1.0,
)


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
    code = tl.load(codes + (n * 768 + byte))
    code = tl.join(code >> 4, code & 15).reshape(BLOCK_N, BLOCK_K)
    # decode
    flat = code.to(tl.int32).reshape(BLOCK_N * BLOCK_K)
    level = tl.gather(codebook(), flat, 0).reshape(BLOCK_N, BLOCK_K)
    run = k0 // 64 + tl.arange(0, BLOCK_K // 64)[None, :]
    block = n * 24 + run
    scale_code = tl.load(scales + block).to(tl.int32)
    coarse = tl.load(nested + ((n * 24 + run) // 256))
    scale = tl.load(scale_levels + scale_code) * coarse
    scale += tl.load(offset)
    if BLOCK_K > 64:
        scale = tl.broadcast_to(scale[:, :, None], (BLOCK_N, BLOCK_K // 64, 64))
        scale = scale.reshape(BLOCK_N, BLOCK_K)
    return (level * scale).to(tl.bfloat16)


@triton.jit
def finish(acc, in0, out, m, n, rows):
    """The epilogue on the sums of rows m and outputs n, rounded and stored."""
    value0 = tl.load(in0 + n).to(tl.float32)
    v0 = acc + value0
    where = m * 384 + n
    tl.store(out + where, v0.to(out.dtype.element_ty), mask=(m < rows))


@triton.jit
def add(x, y):
    """What sums are made of."""
    return x + y


@triton.jit(do_not_specialize=["rows"])
def nf4_linear_384x1536_bias_gemv(
    x, codes, scales, nested, offset, scale_levels, in0, out, partial, rows, x_stride_m,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT: tl.constexpr,
):
    """Few rows: every program streams its share of BLOCK_N outputs' weights once."""
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    n0 = tl.program_id(1) * BLOCK_N
    share = tl.program_id(2)
    x_rows = x + m[:, None, None] * x_stride_m
    sums = tl.full((BLOCK_M, BLOCK_N, BLOCK_K), 0.0, tl.float32)
    for k0 in range(share * BLOCK_K, 1536, BLOCK_K * SPLIT):
        # load and decode
        w = decode(codes, scales, nested, offset, scale_levels, n0, k0, BLOCK_N, BLOCK_K)
        k = k0 + tl.arange(0, BLOCK_K)[None, None, :]
        x_tile = tl.load(x_rows + k, mask=(m < rows)[:, None, None], other=0.0)
        sums += x_tile.to(tl.float32) * w[None, :, :].to(tl.float32)
    acc = tl.reduce(sums, 2, add)
    # epilogue
    n = n0 + tl.arange(0, BLOCK_N)
    m, n = m[:, None], n[None, :]
    if SPLIT == 1:
        finish(acc, in0, out, m, n, rows)
    else:
        where = (share * rows + m) * 384 + n
        tl.store(partial + where, acc, mask=(m < rows))


@triton.jit(do_not_specialize=["rows"])
def nf4_linear_384x1536_bias_gemm(
    x, codes, scales, nested, offset, scale_levels, in0, out, partial, rows, x_stride_m,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT: tl.constexpr,
):
    """Many rows: weight tile by activation tile on tensor cores, acc is [outputs, rows]."""
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    n0 = tl.program_id(1) * BLOCK_N
    share = tl.program_id(2)
    x_rows = x + m[None, :] * x_stride_m
    acc = tl.full((BLOCK_N, BLOCK_M), 0.0, tl.float32)
    for k0 in range(share * BLOCK_K, 1536, BLOCK_K * SPLIT):
        # load and decode
        w = decode(codes, scales, nested, offset, scale_levels, n0, k0, BLOCK_N, BLOCK_K)
        k = k0 + tl.arange(0, BLOCK_K)[:, None]
        x_tile = tl.load(x_rows + k, mask=(m < rows)[None, :], other=0.0)
        # dot
        acc = tl.dot(w, x_tile, acc)
    # epilogue
    n = n0 + tl.arange(0, BLOCK_N)
    m, n = m[None, :], n[:, None]
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
    1: (
        nf4_linear_384x1536_bias_gemv,
        {"BLOCK_M": 1, "BLOCK_N": 4, "BLOCK_K": 512, "SPLIT": 1},
        {"num_warps": 4, "num_stages": 2},
    ),
    2: (
        nf4_linear_384x1536_bias_gemv,
        {"BLOCK_M": 2, "BLOCK_N": 4, "BLOCK_K": 512, "SPLIT": 1},
        {"num_warps": 4, "num_stages": 2},
    ),
    4: (
        nf4_linear_384x1536_bias_gemv,
        {"BLOCK_M": 4, "BLOCK_N": 4, "BLOCK_K": 512, "SPLIT": 1},
        {"num_warps": 4, "num_stages": 2},
    ),
    16: (
        nf4_linear_384x1536_bias_gemm,
        {"BLOCK_M": 16, "BLOCK_N": 64, "BLOCK_K": 64, "SPLIT": 8},
        {"num_warps": 4, "num_stages": 3},
    ),
    32: (
        nf4_linear_384x1536_bias_gemm,
        {"BLOCK_M": 32, "BLOCK_N": 64, "BLOCK_K": 64, "SPLIT": 1},
        {"num_warps": 4, "num_stages": 3},
    ),
    64: (
        nf4_linear_384x1536_bias_gemm,
        {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 64, "SPLIT": 1},
        {"num_warps": 4, "num_stages": 3},
    ),
    128: (
        nf4_linear_384x1536_bias_gemm,
        {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64, "SPLIT": 1},
        {"num_warps": 8, "num_stages": 3},
    ),
}

# Shares -> the kernel that adds them.
REDUCTIONS = {
    8: (nf4_linear_384x1536_bias_reduce, {"BLOCK_N": 128, "SPLIT": 8}, {"num_warps": 4}),
}


@functools.cache
def prepare(device):
    """The tables of levels on a device: make them before a CUDA graph is captured."""
    return [torch.tensor(t, dtype=torch.float32, device=device) for t in (SCALE_LEVELS,)]


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
            add_shares[grid](partial, in0, out, rows, **tile, **options)
    return out
