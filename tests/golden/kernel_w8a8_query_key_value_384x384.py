"""w8a8_query_key_value_384x384.

out[m, 384] = x[m, 384] @ weight.T for 3 weights in int8, then add, add, add, 3 results (int8 to
float32).

Printed by fxquant. The spec, which fxquant.codegen.reference defines:
  {"compute_dtype": "int8", "epilogue": {"nodes": [["aten.add.Tensor", ["%acc1", "%in1"], []],
  ["aten.add.Tensor", ["%acc2", "%in2"], []], ["aten.add.Tensor", ["%acc", "%in0"], []]],
  "operands": [["n", "float32"], ["n", "float32"], ["n", "float32"]]}, "more": [["%0",
  "float32"], ["%1", "float32"]], "name": "w8a8_query_key_value_384x384", "out_dtype":
  "float32", "weight": {"batch": null, "encoding": {"bits": 8, "block": [1, -1]}, "k": 384, "n":
  384, "offset": 0, "shape": [384, 384], "strides": [0, 384, 1]}, "weights": 3, "x_dtype":
  "int8"}

Weight: [384, 384], 8 bits uniform in blocks of 1xall
Activation: int8, quantized before, with amax of every row
Scheme: w8a8
Modules: golden
"""

import math

import torch
import triton
import triton.language as tl


@triton.jit
def finish(acc, acc1, acc2, in0, in1, in2, out, out1, out2, m, n, rows):
    """The epilogue on the sums of rows m and outputs n, rounded and stored."""
    value0 = tl.load(in0 + n)
    value1 = tl.load(in1 + n)
    value2 = tl.load(in2 + n)
    add_0 = acc1 + value1
    add_1 = acc2 + value2
    add_2 = acc + value0
    where = m * 384 + n
    tl.store(out + where, add_2.to(out.dtype.element_ty), mask=(m < rows))
    tl.store(out1 + where, add_0.to(out1.dtype.element_ty), mask=(m < rows))
    tl.store(out2 + where, add_1.to(out2.dtype.element_ty), mask=(m < rows))


@triton.jit
def decode(codes, n0, k0, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """The integers of outputs n0 .. and inputs k0 .., [BLOCK_N, BLOCK_K] in int8."""
    # load
    n = n0 + tl.arange(0, BLOCK_N)[:, None]
    k = k0 + tl.arange(0, BLOCK_K)[None, :]
    code = tl.load(codes + (n * 384 + k))
    # decode
    level = code
    return level


@triton.jit
def scale_of(scales, n):
    """The scales of outputs n."""
    block = n
    scale = tl.load(scales + block)
    return scale


@triton.jit(do_not_specialize=["rows"])
def w8a8_query_key_value_384x384_gemm(
    q, amax, codes, scales, codes1, scales1, codes2, scales2, in0, in1, in2, out, out1, out2,
    partial, rows, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """Weight tile by activation tile on tensor cores, acc is [outputs, rows]."""
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    n0 = tl.program_id(1) * BLOCK_N
    share = tl.program_id(2)
    SHARE: tl.constexpr = (384 + BLOCK_K * SPLIT - 1) // (BLOCK_K * SPLIT) * BLOCK_K
    first_k = share * SHARE
    n = n0 + tl.arange(0, BLOCK_N)
    m, n = m[None, :], n[:, None]
    q_rows = q + m * 384
    sums = tl.full((BLOCK_N, BLOCK_M), 0, tl.int32)
    sums1 = tl.full((BLOCK_N, BLOCK_M), 0, tl.int32)
    sums2 = tl.full((BLOCK_N, BLOCK_M), 0, tl.int32)
    for k0 in range(first_k, tl.minimum(first_k + SHARE, 384), BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)[:, None]
        q_tile = tl.load(q_rows + k, mask=m < rows, other=0)
        # load and decode
        w = decode(codes, n0, k0, BLOCK_N, BLOCK_K)
        # dot
        sums = tl.dot(w, q_tile, sums, out_dtype=tl.int32)
        # load and decode
        w = decode(codes1, n0, k0, BLOCK_N, BLOCK_K)
        # dot
        sums1 = tl.dot(w, q_tile, sums1, out_dtype=tl.int32)
        # load and decode
        w = decode(codes2, n0, k0, BLOCK_N, BLOCK_K)
        # dot
        sums2 = tl.dot(w, q_tile, sums2, out_dtype=tl.int32)
    # scale
    acc = sums.to(tl.float32) * scale_of(scales, n)
    acc1 = sums1.to(tl.float32) * scale_of(scales1, n)
    acc2 = sums2.to(tl.float32) * scale_of(scales2, n)
    peak = tl.load(amax + m, mask=m < rows, other=0.0)
    acc *= tl.div_rn(peak, 127.0)
    acc1 *= tl.div_rn(peak, 127.0)
    acc2 *= tl.div_rn(peak, 127.0)
    # epilogue
    if SPLIT == 1:
        finish(acc, acc1, acc2, in0, in1, in2, out, out1, out2, m, n, rows)
    else:
        where = (share * 3 * rows + m) * 384 + n
        tl.store(partial + where, acc, mask=(m < rows))
        where = ((share * 3 + 1) * rows + m) * 384 + n
        tl.store(partial + where, acc1, mask=(m < rows))
        where = ((share * 3 + 2) * rows + m) * 384 + n
        tl.store(partial + where, acc2, mask=(m < rows))


# What the kernels take; everything in capitals is a constant.
TYPES = {
    "out": "*fp32", "out1": "*fp32", "out2": "*fp32", "partial": "*fp32", "codes": "*i8",
    "scales": "*fp32", "codes1": "*i8", "scales1": "*fp32", "codes2": "*i8", "scales2": "*fp32",
    "in0": "*fp32", "in1": "*fp32", "in2": "*fp32", "q": "*i8", "amax": "*fp32", "rows": "i32",
}

# Most rows -> kernel, constants, launch options; the last serves all above too.
VARIANTS = {
    64: (
        w8a8_query_key_value_384x384_gemm,
        {"BLOCK_M": 16, "BLOCK_N": 64, "BLOCK_K": 128, "SPLIT": 1},
        {"num_warps": 4, "num_stages": 4},
    ),
    128: (
        w8a8_query_key_value_384x384_gemm,
        {"BLOCK_M": 32, "BLOCK_N": 64, "BLOCK_K": 128, "SPLIT": 1},
        {"num_warps": 4, "num_stages": 4},
    ),
    2048: (
        w8a8_query_key_value_384x384_gemm,
        {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 128, "SPLIT": 1},
        {"num_warps": 4, "num_stages": 3},
    ),
}


def run(x, weight, extra):
    """The products: x [.., k] to [.., n] ([e, m, k] to [e, m, n] with a batch)."""
    shape = (*x.shape[:-1], 384)
    out = torch.empty(shape, dtype=torch.float32, device=x.device)
    out1 = torch.empty(shape, dtype=torch.float32, device=x.device)
    out2 = torch.empty(shape, dtype=torch.float32, device=x.device)
    x = x.reshape(math.prod(x.shape[:-1]), 384)
    q = x.contiguous()
    rows = x.shape[-2]
    if rows == 0:
        return [out, out1, out2]
    codes, scales, codes1, scales1, codes2, scales2 = weight
    in0 = extra[0].contiguous()
    in1 = extra[1].contiguous()
    in2 = extra[2].contiguous()
    amax = extra[3].contiguous()

    most = next((most for most in VARIANTS if rows <= most), max(VARIANTS))
    kernel, tile, options = VARIANTS[most]
    split = tile["SPLIT"]
    partial = out
    grid = (-(-rows // tile["BLOCK_M"]), -(-384 // tile["BLOCK_N"]), split)
    with torch.cuda.device_of(x):
        kernel[grid](
            q, amax, codes, scales, codes1, scales1, codes2, scales2, in0, in1, in2, out, out1,
            out2, partial, rows, **tile, **options,
        )
    return [out, out1, out2]
