"""Prints a program that measures a machine with the instructions that kernels are made of."""

from __future__ import annotations

from fxquant.codegen.cpp import support, unit
from fxquant.codegen.cpp.isa import Isa
from fxquant.codegen.cpp.support import paths

COUNTED = 6
"""Instructions of one turn of ``vector_instructions``, for each vector."""


def render_rates(isa: Isa) -> str:
    """The C++ source of the measuring functions.

    It exports ``fxquant_read(data, bytes, threads)``, which reads memory once, and
    ``fxquant_few_<path>(turns)``, ``fxquant_many_<path>(turns)`` (dot products in panels of either
    skeleton) and ``fxquant_vectors(turns)``, which give the number of instructions that they did.
    """
    parts = ["// Rates of a machine.", support.text(), support.text(isa)]
    for path in paths(isa):
        operand = "float" if path == "f32" else "uint32_t"
        of_row = "Words" if path == "int8" and isa.splits_bytes else operand
        sums = "uint32_t" if path == "int8" else "float"
        kind = "vi" if path == "int8" else "vf"
        body = _DOTS.replace("@OPERAND@", operand).replace("@X@", of_row).replace("@SUM@", sums)
        texts = [f"using sum_t = {kind};", body]
        has_tiles = isa.has_tiles and path != "f32"
        texts += [_TILES.replace("@DOT@", _TILE_DOTS[path])] if has_tiles else []
        inner = "\n".join(text.strip("\n") for text in texts)
        parts.append(f"namespace {path} {{\n{inner}\n}}  // namespace {path}")
        few = f"{path}::dots<{isa.few_heights[0]}, 1>"
        many = f"{path}::dots<{isa.many_heights[0]}, 2>"
        for name, call in (("few", few), ("many", f"{path}::tiles" if has_tiles else many)):
            parts.append(_EXPORTED.replace("@NAME@", f"{name}_{path}").replace("@CALL@", call))
    parts.append(_VECTORS.replace("@COUNTED@", str(COUNTED)))
    parts.append(_EXPORTED.replace("@NAME@", "vectors").replace("@CALL@", "f32::instructions"))
    return "\n\n".join(part.strip("\n") for part in [*parts, _READ]) + "\n"


_TILE_DOTS = {"bf16": unit.BF16, "int8": unit.BIASED}

_DOTS = """\
// A panel of rows against one or two vectors of operands.
template <int ROWS, int WIDE> ALONE int64_t dots(int64_t turns) {
  alignas(64) @X@ x[ROWS] = {};
  alignas(64) @OPERAND@ w[WIDE * LANES] = {};
  asm volatile("" : : "r"(x), "r"(w) : "memory");
  Sums<ROWS * WIDE, sum_t> sums;
  each<ROWS * WIDE>([&](auto i) INLINE_LAMBDA { at<i>(sums) = sum_t{}; });
#pragma GCC unroll 1
  for (int64_t turn = 0; turn < turns; ++turn) {
    asm volatile("" : : : "memory");  // what is multiplied may have changed
    if constexpr (WIDE == 2) {
      add_products<ROWS>(sums, w, x);
    } else {
      const auto w0 = load(w);
      each<ROWS>([&](auto row) INLINE_LAMBDA { dot(at<row>(sums), w0, x + row); });
    }
  }
  sum_t all{};
  each<ROWS * WIDE>([&](auto i) INLINE_LAMBDA { all = add(all, at<i>(sums)); });
  alignas(64) @SUM@ out[LANES];
  store(out, all);
  asm volatile("" : : "r"(out) : "memory");
  return turns * ROWS * WIDE;
}
"""

_TILES = """\
// A panel of rows against two registers of operands, all loaded before: counted as dots are.
ALONE int64_t tiles(int64_t turns) {
  alignas(64) uint32_t x[256] = {}, w[2 * 256] = {};
  asm volatile("" : : "r"(x), "r"(w) : "memory");
  TileUnit unit;
  unit.take({16, 16, 16, 16, 0, 0, 0, 0});
#pragma GCC unroll 1
  for (int64_t turn = 0; turn < turns; ++turn) {
    tile_load<2>(x, 64), tile_load<3>(w, 64);
    @DOT@<0, 2, 3>();
    tile_load<3>(w + 256, 64);
    @DOT@<1, 2, 3>();
  }
  return turns * 2 * 16 * 16;
}
"""

_VECTORS = """\
namespace f32 {
// Vectors are loaded, shifted, converted, multiplied, added and stored.
ALONE int64_t instructions(int64_t turns) {
  constexpr int COUNT = 16;
  alignas(64) uint32_t in[COUNT * LANES] = {};
  alignas(64) float out[COUNT * LANES];
  const vf factor = spread(0.5f), offset = spread(1.0f);
  for (int64_t turn = 0; turn < turns; ++turn) {
    asm volatile("" : : "r"(in), "r"(out) : "memory");
#pragma GCC unroll 16
    for (int i = 0; i < COUNT; ++i) {
      const vf x = mul(to_float(shift_right(load(in + i * LANES), 4)), factor);
      store(out + i * LANES, add(x, offset));
    }
  }
  asm volatile("" : : "r"(out) : "memory");
  return turns * COUNT * @COUNTED@;
}
}  // namespace f32
"""

_EXPORTED = """\
extern "C" int64_t fxquant_@NAME@(int64_t turns) { return @CALL@(turns); }
"""

_READ = """\
extern "C" int64_t fxquant_read(const char* data, int64_t bytes, int threads) {
  using Line = int64_t __attribute__((vector_size(64)));
  constexpr int64_t STREAMS = 4, LINE = sizeof(Line);  // more lines in flight than one keeps
  const int64_t share = bytes / threads / (STREAMS * LINE) * LINE;
  int64_t seen = 0;
#pragma omp parallel for schedule(static) num_threads(threads) reduction(+ : seen)
  for (int part = 0; part < threads; ++part) {
    const char* first = data + part * share * STREAMS;
    Line sum = {};
    for (int64_t at = 0; at < share; at += LINE)
      for (int64_t stream = 0; stream < STREAMS; ++stream)
        sum ^= *reinterpret_cast<const Line*>(first + stream * share + at);
    for (int lane = 0; lane < 8; ++lane) seen += sum[lane];
  }
  return seen;
}
"""
