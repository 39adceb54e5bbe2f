"""A spec as one C++17 file, put together from its parts."""

from __future__ import annotations

import math

import torch

from fxquant.codegen.cpp import (
    call,
    decode,
    few,
    finish,
    layout,
    many,
    rows,
    scales,
    share,
    thirds,
    vectors,
)
from fxquant.codegen.cpp.isa import PORTABLE, Isa
from fxquant.codegen.cpp.math import prelude_text
from fxquant.codegen.cpp.ops import constant
from fxquant.codegen.cpp.plan import CHUNK, CTYPES, TILE, Plan
from fxquant.codegen.cpp.unused import without_unused
from fxquant.codegen.header import Header
from fxquant.codegen.spec import KernelSpec


def render(spec: KernelSpec, header: Header, isa: Isa = PORTABLE) -> str:
    """The C++ source of a spec's kernel for an instruction set.

    Raises:
        KernelError: The epilogue holds an op that C++ has no spelling for.
    """
    plan = Plan(spec, isa)
    comment = header.comment(spec).strip('"').rstrip('"\n')
    parts = [
        "\n".join(f"// {line}".rstrip() for line in comment.splitlines()),
        preamble(isa),
        "namespace {",
        _sizes(plan),
        vectors.vectors(isa.vectors, plan.path),
        vectors.pair(isa.vectors, "bf16" if plan.has_thirds else plan.path),
        vectors.dot(isa, "f32" if plan.few_in_floats else plan.path),
        SUMS,
        prelude_text(finish.prelude(plan)).strip("\n"),
        _conversions(plan),
        decode.decode(plan),
        layout.weight(plan),
        scales.scales(plan),
        share.SHARE,
        rows.rows(plan),
        call.helpers(plan),
        finish.finish(plan),
        few.few(plan),
        many.many(plan),
        "}  // namespace",
        layout.prepare(plan),
        call.entry(plan),
    ]
    text = "\n\n".join(part.strip("\n") for part in parts if part.strip()) + "\n"
    return without_unused(text)


def headers(isa: Isa) -> list[str]:
    """Lines that include what every file needs."""
    lines = [f"#include <{name}>" for name in ("algorithm", "cmath", "cstdint", "cstring")]
    lines += ["#include <type_traits>", "#include <utility>"]
    return lines if isa.vectors == "portable" else [*lines, "", "#include <immintrin.h>"]


def preamble(isa: Isa) -> str:
    """What every file starts with."""
    omp = (
        "#ifdef _OPENMP\n#include <omp.h>\n#else\n"
        "inline int omp_get_thread_num() { return 0; }\n"
        "inline int omp_get_num_threads() { return 1; }\n#endif"
    )
    macros = (
        "#define INLINE [[gnu::always_inline]] inline\n"
        "#define INLINE_LAMBDA __attribute__((always_inline))\n"
        "#define ALONE [[gnu::noinline]]  // inlined, GCC would keep sums in memory"
    )
    return "\n".join([*headers(isa), omp, "", macros])


def _sizes(plan: Plan) -> str:
    spec, weight = plan.spec, plan.spec.weight
    experts, n, k = weight.sizes
    chunk = plan.chunk
    per_step = {"f32": "float", "bf16": "uint32_t", "int8": "uint32_t"}[plan.path]
    stored = plan.path == "int8" and plan.encoding.bits == 8
    decoded = 0 if stored else chunk // plan.per_step * TILE
    if plan.has_thirds:
        decoded = thirds.OPERANDS * len(plan.level_thirds)
    totals = (plan.super_rows + plan.many_heights[0]) * TILE
    if plan.uses_tiles and plan.path == "int8" and not plan.scales_sums:
        decoded += totals  # sums of bytes are kept until a block ends
    heights = (*plan.few_heights, *plan.many_heights)
    lines = [
        f"using stored_t = {CTYPES[spec.x_dtype]};  // the activation, in {spec.x_dtype}",
        f"using out_t = {CTYPES[spec.out_dtype]};  // the result, in {spec.out_dtype}",
        f"using x_t = {per_step};  // the activation, as products take it",
        f"using operand_t = {per_step};  // the weight, as products take it",
        f"using sum_of_one_t = {'uint32_t' if plan.path == 'int8' else 'float'};  // a lane's sum",
        f"using xsum_t = {'int32_t' if plan.path == 'int8' else 'float'};",
        "typedef uint16_t half_t __attribute__((may_alias));  // bfloat16, read in pairs",
    ]
    counts = (
        ("E", plan.matrices, "matrices"),
        ("EXPERTS", experts, "matrices of the weight, of which each row has one"),
        ("WEIGHTS", spec.weights, "that are multiplied with the activation"),
        ("N", n, "outputs"),
        ("K", k, "inputs"),
        ("OFFSET", weight.offset, "of the first weight in the stored tensor, in elements"),
        ("STRIDE_E", weight.strides[0], ""),
        ("STRIDE_N", weight.strides[1], ""),
        ("STRIDE_K", weight.strides[2], ""),
        ("TILE", TILE, "outputs that are worked on together"),
        ("N_TILES", plan.n_tiles, ""),
        ("K_PADDED", plan.k_padded, "inputs, up to whole tiles"),
        ("BITS", plan.encoding.bits, "of a code"),
        ("PER_DWORD", plan.per_dword, "codes in a dword: the inputs of a group"),
        ("PER_STEP", plan.per_step, "inputs that one instruction multiplies"),
        ("GROUPS", plan.k_padded // plan.per_dword, "in a row"),
        ("ALL_STEPS", plan.k_padded // plan.per_step, "instructions for a row"),
        ("BLOCK", plan.block, "inputs that are summed before a scale is applied"),
        ("BLOCKS", plan.blocks, "in a row"),
        ("GROUPS_OF_BLOCK", plan.block // plan.per_dword, ""),
        ("GROUPS_AT_ONCE", CHUNK // plan.per_dword, "that few rows go through before the next"),
        ("BLOCKS_AT_ONCE", plan.blocks_at_once, "whose scales stand side by side"),
        ("BLOCKS_HELD", plan.blocks_held, "by registers of the tile unit"),
        ("GROUPS_OF_CHUNK", chunk // plan.per_dword, "that are decoded at a time for many rows"),
        ("GROUPS_HELD", plan.held // plan.per_dword, "that registers of the tile unit hold"),
        ("CHUNKS", -(-plan.k_padded // chunk), "in a row"),
        ("DECODED", decoded, "dwords of a decoded chunk"),
        ("STEPS_OF_PAIRS", plan.per_dword // 2, "that use up a group, two inputs each"),
        ("SPAN_ROWS", plan.span_rows, "up to which sums are scaled"),
        ("SUPER_ROWS", plan.super_rows, "rows that are worked off at a time"),
        ("TOTALS", totals, "floats of the sums of one weight, for many rows"),
        ("NEAR_TOTALS", 8192, "the same that few rows make before they are read"),
        ("OWN_BYTES", 4 * (decoded + spec.weights * totals), "a thread"),
        ("OPERANDS", len(spec.epilogue.operands), "of the epilogue"),
        ("ENDS", plan.ends, "which operand says where the rows of each matrix end"),
        ("OUTLIERS", spec.outliers.columns or 0 if spec.outliers else 0, "given columns"),
        ("AHEAD", 2048, "dwords of codes that are asked for in advance"),
        ("NEAR", 512, "the same, into the first-level cache"),
    )
    lines += [_constant("int64_t", name, str(value), comment) for name, value, comment in counts]
    lines += [
        _constant("int", "STEPS", str(plan.steps), "instructions that use up a group"),
        _constant("int", "MOST_SUMS", str(plan.isa.sums), "registers of sums"),
        _constant("int", "PLACES", plan.places, "of a dword: whose codes stand there"),
        _constant("int", "MOST_ROWS", str(max(heights)), "of a panel"),
        _constant("int", "FEW_HEIGHTS", plan.few_heights, "of panels, in rows"),
        _constant("int", "MANY_HEIGHTS", plan.many_heights, "of panels, in rows"),
        _constant("int", "BYTE_BIAS", str(plan.byte_bias), "makes bytes of the weight unsigned"),
        _constant("float", "LEVEL_UNIT", constant(plan.level_unit), "what one of a byte is"),
    ]
    if spec.outliers is not None:
        lines += _bits(spec.x_dtype, spec.outliers.threshold)
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


def _conversions(plan: Plan) -> str:
    """From the activation's dtype to floats, and to what products take."""
    short = {"bfloat16": "bf16", "float16": "fp16"}
    spec = plan.spec
    x = short.get(spec.x_dtype)
    lines = [f"INLINE float x_of(stored_t x) {{ return {f'from_{x}(x)' if x else 'x'}; }}"]
    if plan.path == "bf16":
        value = "x" if x == "bf16" else "to_bf16(x_of(x))"
        lines.append(f"INLINE uint16_t half_of(stored_t x) {{ return {value}; }}")
    return "\n".join(lines)


SUMS = """\
// Codes on their way to the second-level cache; what lies behind the weight does no harm.
INLINE void prefetch(const uint32_t* codes) { __builtin_prefetch(codes, 0, 2); }

// The same from there to the first-level cache.
INLINE void bring_near(const uint32_t* codes) { __builtin_prefetch(codes, 0, 3); }

// Calls f with 0, 1 .. COUNT - 1 as constants.
template <typename F, int... I> INLINE void each(F&& f, std::integer_sequence<int, I...>) {
  (f(std::integral_constant<int, I>{}), ...);
}
template <int COUNT, typename F> INLINE void each(F&& f) {
  each(f, std::make_integer_sequence<int, COUNT>{});
}

// Sums that stay in registers: members, for GCC would keep an array in memory.
template <int COUNT, typename T = sum_t> struct Sums {
  T first;
  Sums<COUNT - 1, T> rest;
};
template <typename T> struct Sums<0, T> {};

template <int I, int COUNT, typename T> INLINE T& at(Sums<COUNT, T>& sums) {
  if constexpr (I == 0)
    return sums.first;
  else
    return at<I - 1>(sums.rest);
}
"""
