"""Few rows: every code is decoded in registers and used at once for all rows of a panel."""

from __future__ import annotations

from fxquant.codegen.cpp.plan import Plan


def few(plan: Plan) -> str:
    """The text of the skeleton for few rows; nothing for scales that change inside a group."""
    if not plan.is_regular:
        return ""
    begin = "sums_of(0)"
    if plan.path == "int8" and plan.byte_bias:
        begin = "spread(uint32_t(-BYTE_BIAS * sums[block * ROWS + row]))"
    elif plan.path == "int8":
        begin = "spread(uint32_t(0))"
    end = "to_float(sum)"
    if plan.encoding.zero_point:
        xsum = "spread(-float(sums[block * ROWS + row]))"
        end = f"fma(load(zeros + (v0 + v) * LANES), {xsum}, to_float(sum))"
    zeros = "    const float* zeros = scales.zeros_at(block);\n" if plan.encoding.zero_point else ""
    heights = "\n".join(
        f"    case {height}: return few_rows<{height}>(w, tile, x, sums, totals);"
        for height in plan.isa.few_heights
    )
    return (
        _FEW.replace("@BEGIN@", begin.replace("sums_of(0)", "spread(0.0f)"))
        .replace("@END@", end)
        .replace("@ZEROS@", zeros)
        .replace("@HEIGHTS@", heights)
    )


_FEW = """\
// Vectors of outputs whose sums are kept at once.
constexpr int vectors_of(int rows, int all) {
  return all == 1 || rows * all <= MOST_SUMS ? all : vectors_of(rows, all / 2);
}

// ROWS rows against one tile of outputs: totals[row][64].
template <int ROWS>
ALONE void few_rows(const Weight& w, int64_t tile, const x_t* x, const xsum_t* sums, float* totals) {
  constexpr int ALL = TILE / LANES;  // vectors that hold a tile's outputs
  constexpr int VECTORS = vectors_of(ROWS, ALL);
  // Few sums would wait for each other: they are made in turns.
  constexpr int TURNS = ROWS * VECTORS * 2 <= MOST_SUMS && STEPS > 1 ? 2 : 1;
  (void)sums;
  const Decoder decoder;
  Scales scales(w, tile);
  std::memset(totals, 0, ROWS * TILE * sizeof(float));
  for (int64_t block = 0; block < BLOCKS; ++block) {
    const float* scale = scales.at(block);
@ZEROS@    const int64_t first = block * GROUPS_OF_BLOCK;
    const int64_t last = std::min(first + GROUPS_OF_BLOCK, GROUPS);
    for (int v0 = 0; v0 < ALL; v0 += VECTORS) {
      Sums<VECTORS * ROWS> part, turn;
      each<VECTORS * ROWS>([&](auto i) INLINE_LAMBDA {
        constexpr int row = i % ROWS;
        (void)row;
        at<i>(part) = @BEGIN@;
        if (TURNS == 2) at<i>(turn) = sum_t{};
      });
      const uint32_t* codes = w.codes() + ((tile * GROUPS + first) * TILE + v0 * LANES);
      const x_t* xs = x + first * STEPS * ROWS;
#pragma GCC unroll 1
      for (int64_t group = first; group < last; ++group) {
        if (v0 == 0) prefetch(codes + AHEAD);
        each<VECTORS>([&](auto v) INLINE_LAMBDA {
          const vi code = load(codes + v * LANES);
          each<STEPS>([&](auto step) INLINE_LAMBDA {
            const auto operand = decoder.operand(code, step);
            each<ROWS>([&](auto row) INLINE_LAMBDA {
              constexpr bool is_second = TURNS == 2 && step % 2;
              dot(at<v * ROWS + row>(is_second ? turn : part), operand, xs + step * ROWS + row);
            });
          });
        });
        codes += TILE;
        xs += STEPS * ROWS;
      }
      each<VECTORS * ROWS>([&](auto i) INLINE_LAMBDA {
        constexpr int row = i % ROWS, v = i / ROWS;
        const sum_t sum = TURNS == 2 ? add(at<i>(part), at<i>(turn)) : at<i>(part);
        float* total = totals + row * TILE + (v0 + v) * LANES;
        store(total, fma(@END@, load(scale + (v0 + v) * LANES), load(total)));
      });
    }
  }
}

void few_rows(int height, const Weight& w, int64_t tile, const x_t* x, const xsum_t* sums,
              float* totals) {
  switch (height) {
@HEIGHTS@
  }
}

// All tiles of outputs, each against all panels while its codes are near.
void run_few(Call& call, int64_t super_first, int64_t rows, int threads) {
  const int64_t panels = panels_of(rows, FEW_HEIGHTS), heights = padded(rows, FEW_HEIGHTS);
#pragma omp parallel num_threads(threads)
  {
    const Share of(omp_get_thread_num(), omp_get_num_threads());
    pack(call, super_first, rows, FEW_HEIGHTS, of);
    const auto tiles = of.part(E * N_TILES);
    alignas(64) float totals[FEW_HEIGHTS[0] * TILE];
    for (int64_t tile = tiles.first; tile < tiles.last; ++tile) {
      const int64_t e = tile / N_TILES;
      for (int64_t panel = 0; panel < panels; ++panel) {
        const int64_t row = panel * FEW_HEIGHTS[0], at = e * heights + row;
        const int height = height_of(rows - row, FEW_HEIGHTS);
        few_rows(height, call.weight, tile, call.panels + at * ALL_STEPS, call.sums + at * BLOCKS,
                 totals);
        finish(call, tile, super_first, row, std::min<int64_t>(height, rows - row), rows, totals);
      }
    }
  }
}
"""
