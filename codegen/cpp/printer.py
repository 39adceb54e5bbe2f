"""A spec as one C++17 file, put together from its parts."""

from __future__ import annotations

from fxquant.codegen.cpp import call, decode, few, finish, layout, many, rows, scales, vectors
from fxquant.codegen.cpp.isa import PORTABLE, Isa
from fxquant.codegen.cpp.math import prelude_text
from fxquant.codegen.cpp.ops import constant
from fxquant.codegen.cpp.plan import TILE, Plan
from fxquant.codegen.header import Header
from fxquant.codegen.spec import KernelSpec

CHUNK = 256
"""Inputs of a tile that are decoded at a time for many rows: 32 KiB of bfloat16."""

SUPER_ROWS = 768
"""Rows that are worked off at a time: what is decoded serves so many."""


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
        vectors.vectors(isa.name, plan.path),
        vectors.pair(isa.name, plan.path),
        vectors.dot(isa.name, plan.path),
        SUMS,
        prelude_text(finish.prelude(plan)).strip("\n"),
        _conversions(plan),
        decode.decode(plan),
        layout.weight(plan),
        scales.scales(plan),
        rows.rows(plan),
        call.helpers(plan),
        finish.finish(plan),
        few.few(plan),
        many.many(plan),
        "}  // namespace",
        layout.prepare(plan),
        call.entry(plan),
    ]
    return "\n\n".join(part.strip("\n") for part in parts if part.strip()) + "\n"


def preamble(isa: Isa) -> str:
    """What every file starts with."""
    lines = [f"#include <{name}>" for name in ("algorithm", "cmath", "cstdint", "cstring")]
    lines += ["#include <type_traits>", "#include <utility>"]
    lines += [] if isa.name == "portable" else ["", "#include <immintrin.h>"]
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
    return "\n".join([*lines, omp, "", macros])


def _sizes(plan: Plan) -> str:
    spec, weight = plan.spec, plan.spec.weight
    e, n, k = weight.sizes
    chunk = plan.block if plan.path == "int8" else min(CHUNK, plan.k_padded)
    per_step = {"f32": "float", "bf16": "uint32_t", "int8": "uint32_t"}[plan.path]
    types = {
        "stored_t": "float" if spec.x_dtype == "float32" else "uint16_t",
        "out_t": "float" if spec.out_dtype == "float32" else "uint16_t",
        "x_t": per_step,
        "operand_t": per_step,
        "xsum_t": "int32_t" if plan.path == "int8" else "float",
    }
    stored = plan.path == "int8" and plan.encoding.bits == 8
    decoded = 0 if stored else chunk // plan.per_step * TILE
    counts = {
        "E": e,
        "N": n,
        "K": k,
        "OFFSET": weight.offset,
        "STRIDE_E": weight.strides[0],
        "STRIDE_N": weight.strides[1],
        "STRIDE_K": weight.strides[2],
        "TILE": TILE,
        "N_TILES": plan.n_tiles,
        "K_PADDED": plan.k_padded,
        "BITS": plan.encoding.bits,
        "PER_DWORD": plan.per_dword,
        "PER_STEP": plan.per_step,
        "GROUPS": plan.k_padded // plan.per_dword,
        "ALL_STEPS": plan.k_padded // plan.per_step,
        "BLOCK": plan.block,
        "BLOCKS": plan.blocks,
        "GROUPS_OF_BLOCK": plan.block // plan.per_dword,
        "GROUPS_AT_ONCE": CHUNK // plan.per_dword,
        "GROUPS_OF_CHUNK": chunk // plan.per_dword,
        "CHUNKS": -(-plan.k_padded // chunk),
        "DECODED": decoded,
        "SUPER_ROWS": SUPER_ROWS,
        "OWN_BYTES": 4 * (decoded + (SUPER_ROWS + plan.isa.many_heights[0]) * TILE),
        "FEW_ROWS": plan.isa.few_heights[0] * 3,
        "OPERANDS": len(spec.epilogue.operands),
        "OUTLIERS": 0 if spec.outliers is None else (spec.outliers.columns or k),
        "AHEAD": 2048,
    }
    lines = [f"using {name} = {value};" for name, value in types.items()]
    lines += [f"constexpr int64_t {name} = {value};" for name, value in counts.items()]
    lines += [
        f"constexpr int STEPS = {plan.steps};",
        f"constexpr int MOST_SUMS = {plan.isa.sums};",
        f"constexpr int PLACES[{plan.per_dword}] = {{{', '.join(map(str, plan.places))}}};",
        f"constexpr int MOST_ROWS = {max(*plan.isa.few_heights, *plan.isa.many_heights)};",
        _heights("FEW", plan.isa.few_heights),
        _heights("MANY", plan.isa.many_heights),
        f"constexpr int BYTE_BIAS = {plan.byte_bias};",
        f"constexpr bool KEEPS_SUMS = {str(plan.keeps_sums).lower()};",
        f"constexpr float LEVEL_UNIT = {constant(plan.level_unit)};",
    ]
    if spec.outliers is not None and spec.outliers.threshold is not None:
        lines.append(f"constexpr float THRESHOLD = {constant(spec.outliers.threshold)};")
    return "\n".join(lines)


def _heights(name: str, heights: tuple[int, ...]) -> str:
    return f"constexpr int {name}_HEIGHTS[{len(heights)}] = {{{', '.join(map(str, heights))}}};"


def _conversions(plan: Plan) -> str:
    """From the activation's dtype to floats, and from floats to the result's."""
    short = {"bfloat16": "bf16", "float16": "fp16"}
    spec = plan.spec
    x, out = short.get(spec.x_dtype), short.get(spec.out_dtype)
    lines = [
        f"INLINE float x_of(stored_t x) {{ return {f'from_{x}(x)' if x else 'x'}; }}",
        f"INLINE out_t out_of(float x) {{ return {f'to_{out}(x)' if out else 'x'}; }}",
    ]
    if plan.path == "bf16":
        value = "x" if x == "bf16" else "to_bf16(x_of(x))"
        lines.append(f"INLINE uint16_t half_of(stored_t x) {{ return {value}; }}")
    return "\n".join(lines)


SUMS = """\
// Codes on their way to the second-level cache; what lies behind the weight does no harm.
INLINE void prefetch(const uint32_t* codes) { __builtin_prefetch(codes, 0, 2); }

// Calls f with 0, 1 .. COUNT - 1 as constants.
template <typename F, int... I> INLINE void each(F&& f, std::integer_sequence<int, I...>) {
  (f(std::integral_constant<int, I>{}), ...);
}
template <int COUNT, typename F> INLINE void each(F&& f) {
  each(f, std::make_integer_sequence<int, COUNT>{});
}

// Sums that stay in registers: members, for GCC would keep an array in memory.
template <int COUNT> struct Sums {
  sum_t first;
  Sums<COUNT - 1> rest;
};
template <> struct Sums<0> {};

template <int I, int COUNT> INLINE sum_t& at(Sums<COUNT>& sums) {
  if constexpr (I == 0)
    return sums.first;
  else
    return at<I - 1>(sums.rest);
}
"""
