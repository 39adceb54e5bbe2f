"""The numbers and types of a kernel: those of its own, and those that follow from them."""

from __future__ import annotations

import math

import sympy
import torch

from fxquant.codegen.cpp import thirds
from fxquant.codegen.cpp.layout import nested_count, scales_count
from fxquant.codegen.cpp.ops import constant
from fxquant.codegen.cpp.plan import CHUNK, CTYPES, TILE, Plan
from fxquant.codegen.indexing import E, K, N, index_text

_NAMES = {E: "e", N: "n", K: "k"}


def own(plan: Plan) -> str:
    """What no other kernel has: its sizes, and where its weight lies in the stored tensors."""
    spec, weight = plan.spec, plan.spec.weight
    experts, n, k = weight.sizes
    outliers = spec.outliers
    counts = (
        ("E", plan.matrices, "matrices"),
        ("EXPERTS", experts, "matrices of the weight, of which each row has one"),
        ("WEIGHTS", spec.weights, "that are multiplied with the activation"),
        ("N", n, "outputs"),
        ("K", k, "inputs"),
        ("BLOCK", plan.block, "inputs that are summed before a scale is applied"),
        ("CHUNK", plan.chunk, "inputs that are decoded at a time for many rows"),
        ("SUPER_ROWS", plan.super_rows, "rows that are worked off at a time"),
        ("SCALES", scales_count(plan), "of the weight"),
        ("NESTED", nested_count(plan), "scales of the scales"),
        ("OPERANDS", len(spec.epilogue.operands), "of the epilogue"),
        ("ENDS", plan.ends, "which operand says where the rows of each matrix end"),
        ("OUTLIERS", outliers.columns or 0 if outliers else 0, "given columns"),
    )
    lines = [
        f"using stored_t = {CTYPES[spec.x_dtype]};  // the activation, in {spec.x_dtype}",
        f"using out_t = {CTYPES[spec.out_dtype]};  // the result, in {spec.out_dtype}",
        *(_constant("int64_t", name, str(value), comment) for name, value, comment in counts),
        _constant("float", "LEVEL_UNIT", constant(plan.level_unit), "what one of a byte is"),
    ]
    if outliers is not None:
        lines += _bits(spec.x_dtype, outliers.threshold)
    return "\n".join(lines)


def places(plan: Plan) -> str:
    """Functions that say where the weight lies in the stored tensors."""
    weight = plan.spec.weight
    element = sympy.Integer(weight.offset)
    for stride, axis in zip(weight.strides, (E, N, K), strict=True):
        element += stride * axis
    parts = [_INDEX.format("element_of", index_text(element, _NAMES, "/"))]
    if plan.is_regular:
        parts.append("// The same of its scale and of the scale's scale; k counts blocks.")
        parts.append(_INDEX.format("scale_of", index_text(plan.block_index(), _NAMES, "/")))
        if plan.keeps_scale_codes:
            parts.append(_INDEX.format("nested_of", index_text(plan.nested_index(), _NAMES, "/")))
    else:
        parts.append("// The same of its scale.")
        parts.append(_INDEX.format("scale_of", index_text(plan.index.block, _NAMES, "/")))
    return "\n".join(["// Where the weight of matrix e, output n, input k is stored.", *parts])


_INDEX = "INLINE int64_t {}(int64_t e, int64_t n, int64_t k) {{ return {}; }}"


def derived(plan: Plan) -> str:
    """What follows from a kernel's own numbers, in the same words for many kernels."""
    spec = plan.spec
    per_step = {"f32": "float", "bf16": "uint32_t", "int8": "uint32_t"}[plan.path]
    is_int8 = plan.path == "int8"
    decoded = "CHUNK / PER_STEP * TILE"
    if is_int8 and plan.encoding.bits == 8:
        decoded = "0"
    if plan.has_thirds:
        decoded = str(thirds.OPERANDS * len(plan.level_thirds))
    if plan.uses_tiles and is_int8 and not plan.scales_sums:
        decoded += " + TOTALS"  # sums of bytes are kept until a block ends
    heights = (*plan.few_heights, *plan.many_heights)
    several = "WEIGHTS * " if spec.weights > 1 else ""
    lines = [
        f"using x_t = {per_step};  // the activation, as products take it",
        f"using operand_t = {per_step};  // the weight, as products take it",
        f"using sum_t = {'vi' if is_int8 else 'vf'};  // what products are summed in",
        f"using sum_of_one_t = {'uint32_t' if is_int8 else 'float'};  // a lane's sum",
        f"using xsum_t = {'int32_t' if is_int8 else 'float'};",
        "typedef uint16_t half_t __attribute__((may_alias));  // bfloat16, read in pairs",
    ]
    of_isa = (
        ("STEPS", str(plan.steps), "instructions that use up a group"),
        ("MOST_SUMS", str(plan.isa.sums), "registers of sums"),
        ("SUMS_AT_ONCE", str(plan.isa.sums_at_once), "of them, without those for turns"),
        ("PLACES", plan.places, "of a dword: whose codes stand there"),
        ("MOST_ROWS", str(max(heights)), "of a panel"),
        ("FEW_HEIGHTS", plan.few_heights, "of panels, in rows"),
        ("MANY_HEIGHTS", plan.many_heights, "of panels, in rows"),
        ("BYTE_BIAS", str(plan.byte_bias), "makes bytes of the weight unsigned"),
    )
    counts = (
        ("TILE", TILE, "outputs that are worked on together"),
        ("N_TILES", "(N + TILE - 1) / TILE", ""),
        ("K_PADDED", "(K + TILE - 1) / TILE * TILE", "inputs, up to whole tiles"),
        ("BITS", plan.encoding.bits, "of a code"),
        ("PER_DWORD", plan.per_dword, "codes in a dword: the inputs of a group"),
        ("PER_STEP", plan.per_step, "inputs that one instruction multiplies"),
        ("GROUPS", "K_PADDED / PER_DWORD", "in a row"),
        ("ALL_STEPS", "K_PADDED / PER_STEP", "instructions for a row"),
        ("BLOCKS", "(K_PADDED + BLOCK - 1) / BLOCK", "in a row"),
        ("GROUPS_OF_BLOCK", "BLOCK / PER_DWORD", ""),
        ("GROUPS_AT_ONCE", CHUNK // plan.per_dword, "that few rows go through before the next"),
        ("BLOCKS_AT_ONCE", plan.blocks_at_once, "whose scales stand side by side"),
        ("BLOCKS_HELD", plan.blocks_held, "by registers of the tile unit"),
        ("GROUPS_OF_CHUNK", "CHUNK / PER_DWORD", "that are decoded at a time for many rows"),
        ("GROUPS_HELD", plan.held // plan.per_dword, "that registers of the tile unit hold"),
        ("CHUNKS", "(K_PADDED + CHUNK - 1) / CHUNK", "in a row"),
        ("STEPS_OF_PAIRS", plan.per_dword // 2, "that use up a group, two inputs each"),
        ("SPAN_ROWS", plan.span_rows, "up to which sums are scaled"),
        ("TOTALS", "(SUPER_ROWS + MANY_HEIGHTS[0]) * TILE", "floats of one weight's sums"),
        ("NEAR_TOTALS", 8192, "the same that few rows make before they are read"),
        ("DECODED", decoded, "dwords of a decoded chunk"),
        ("OWN_BYTES", f"4 * (DECODED + {several}TOTALS)", "a thread"),
        ("AHEAD", 2048, "dwords of codes that are asked for in advance"),
        ("NEAR", 512, "the same, into the first-level cache"),
    )
    lines += [_constant("int", *one) for one in of_isa]
    lines += [_constant("int64_t", name, str(value), comment) for name, value, comment in counts]
    return "\n".join(lines)


def _bits(dtype: str, threshold: float | None) -> list[str]:
    """What outliers are told by: the bits of an activation, and those of the least one."""
    half = dtype != "float32"
    ctype, digits = ("uint16_t", 4) if half else ("uint32_t", 8)
    lines = [f"using bits_t = {ctype};  // of a number of the activation"]
    if threshold is None:
        counts = [("ALL_ONES", 2 ** (4 * digits) - 1, "")]
    else:
        least = torch.tensor([threshold, math.inf]).to(getattr(torch, dtype))
        found, infinite = least.view(torch.int16 if half else torch.int32).tolist()
        # The nearest one may be below the threshold, which is taken to float32 here as there.
        found += bool(least[0].float() < torch.tensor(threshold))
        counts = [
            ("ALL_ONES", 2 ** (4 * digits) - 1, ""),
            ("MAGNITUDE", 2 ** (4 * digits - 1) - 1, ""),
            ("INFINITE_X", infinite, ""),
            ("LEAST_OUTLIER", found, f"{threshold} or what follows it"),
        ]
    return lines + [
        _constant("bits_t", name, f"0x{value:0{digits}x}u", comment)
        for name, value, comment in counts
    ]


def _constant(ctype: str, name: str, value: str | tuple[int, ...], comment: str) -> str:
    if isinstance(value, tuple):
        name, value = f"{name}[{len(value)}]", f"{{{', '.join(map(str, value))}}}"
    text = f"constexpr {ctype} {name} = {value};"
    if not comment:
        return text
    line = f"{text}  // {comment}"
    return line if len(line) <= 100 else f"// {comment}\n{text}"
