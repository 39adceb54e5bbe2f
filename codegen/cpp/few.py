"""Few rows: every code is decoded in registers and used at once for all rows of a panel."""

from __future__ import annotations

from fxquant.codegen.cpp.plan import Plan


def few(plan: Plan) -> str:
    """The text of the skeleton for few rows; nothing for scales that change inside a group."""
    if not plan.is_regular:
        return ""
    begin = "sum_t{}"
    if plan.path == "int8" and plan.byte_bias:
        begin = "spread(once * uint32_t(sums[row]))"
    end = "to_float(sum)"
    if plan.encoding.zero_point:
        xsum = "spread(-float(once) * float(sums[row]))"
        end = f"fma(load(zeros + v * LANES), {xsum}, to_float(sum))"
    # Where there are no zero points the pointer is not followed.
    zeros = "scales.zeros_at(block)" if plan.encoding.zero_point else "scale"
    heights = "\n".join(
        f"    case {height}: return few_rows<{height}>(w, tile, x, sums, totals);"
        for height in plan.few_heights
    )
    text = _FLOAT_LINE + _FEW if plan.few_in_floats else _FEW
    for name, value in {
        "@TILES@": _TILES if plan.spec.weights == 1 else _TILES_OF_SEVERAL,
        "@NEAR@": "" if plan.isa.looks_ahead else "      bring_near(codes + NEAR + v * LANES);\n",
        "@ASKS@": _ASKS_AT_TIMES if plan.isa.looks_ahead else _ASKS,
        "@BEGIN@": begin,
        "@END@": end,
        "@ZEROS@": zeros,
        "@HEIGHTS@": heights,
        "@X@": plan.panel_type,
        **(_AS_FLOATS if plan.few_in_floats else _AS_OPERANDS),
    }.items():
        text = text.replace(name, value)
    return plan.placed(text)


_AS_OPERANDS = {
    "@COUNT@": "STEPS",
    "@OPERAND@": "operand",
    "@STEP@": "step",
    "@LINE@": "",
    "@PANEL@": "call.panels + at * ALL_STEPS",
}
"""What a code becomes, and what it is multiplied with."""

_AS_FLOATS = {
    "@X@": "float",
    "@COUNT@": "PER_DWORD",
    "@OPERAND@": "value",
    "@STEP@": "PLACES[step]",
    "@LINE@": "  FloatLine line{call.floats + of.thread * K_PADDED};\n",
    "@PANEL@": "line.of(call.panels + at * ALL_STEPS)",
}
"""The same for a row that is multiplied as floats."""

_TILES = """\
// All tiles of outputs, each against all panels while its codes are near.
void few_tiles(const Call& call, int64_t super_first, int64_t rows, const Share& of,
               const Part& part) {
  const int64_t panels = panels_of(rows, FEW_HEIGHTS), heights = padded(rows, FEW_HEIGHTS);
  alignas(64) float totals[FEW_HEIGHTS[0] * TILE];
@LINE@  const auto tiles = part.of(E * N_TILES);
  of.each(tiles.last - tiles.first, [&](int64_t number) {
    const int64_t tile = @FIRST@tiles.first + number, e = @MATRIX@;
    for (int64_t panel = 0; panel < panels; ++panel) {
      const int64_t row = panel * FEW_HEIGHTS[0], at = e * heights + row;
      const int height = height_of(rows - row, FEW_HEIGHTS);
      const @X@* x = @PANEL@;
      few_rows(height, call.weight, tile, x, call.sums + at * BLOCKS, totals);
      finish(call, tile, super_first, row, std::min<int64_t>(height, rows - row), rows, totals);
    }
  });
}
"""

_TILES_OF_SEVERAL = """\
// All tiles of outputs. Each weight is read some tiles at a time: every change from one to another
// keeps memory waiting. Of many panels some are worked off at a time, while their totals are near.
void few_tiles(const Call& call, int64_t super_first, int64_t rows, const Share& of,
               const Part& part) {
  constexpr int64_t HEIGHT = FEW_HEIGHTS[0], NEAR_PANELS = NEAR_TOTALS / (HEIGHT * TILE);
  const int64_t panels = panels_of(rows, FEW_HEIGHTS), heights = padded(rows, FEW_HEIGHTS);
  // Several times as many items as threads, which are not equally fast.
  const auto tiles = part.of(E * N_TILES);
  const int64_t all = tiles.last - tiles.first;
  const int64_t shared = std::max<int64_t>(1, all / (4 * of.threads));
  const int64_t near_tiles = std::max<int64_t>(1, std::min(shared, NEAR_TOTALS / (heights * TILE)));
  float* totals = reinterpret_cast<float*>(call.own + of.thread * OWN_BYTES);
@LINE@  of.each((all + near_tiles - 1) / near_tiles, [&](int64_t number) {
    const int64_t first = @FIRST@tiles.first + number * near_tiles;
    const int64_t last = std::min(first + near_tiles, @FIRST@tiles.last);
    for (int64_t panel = 0; panel < panels; panel += NEAR_PANELS) {
      const int64_t first_row = panel * HEIGHT;
      const int64_t last_row = std::min(rows, (panel + NEAR_PANELS) * HEIGHT);
      for (int i = 0; i < WEIGHTS; ++i)
        for (int64_t tile = first; tile < last; ++tile) {
          float* own = totals + i * NEAR_TOTALS + (tile - first) * heights * TILE;
          for (int64_t row = first_row; row < last_row; row += HEIGHT) {
            const int64_t at = @MATRIX@ * heights + row;
            const @X@* x = @PANEL@;
            few_rows(height_of(rows - row, FEW_HEIGHTS), call.weights[i], tile, x,
                     call.sums + at * BLOCKS, own + (row - first_row) * TILE);
          }
        }
      for (int64_t tile = first; tile < last; ++tile)
        finish(call, tile, super_first, first_row, last_row - first_row, rows,
               totals + (tile - first) * heights * TILE, NEAR_TOTALS);
    }
  });
}
"""

_FLOAT_LINE = """\
// A line of bfloat16 as floats: made once for all tiles.
struct FloatLine {
  float* floats;
  const x_t* made_of = nullptr;

  const float* of(const x_t* line) {
    if (line != made_of) {
      const half_t* half = reinterpret_cast<const half_t*>(line);
      for (int64_t k = 0; k < K_PADDED; ++k) floats[k] = from_bf16(half[k]);
      made_of = line;
    }
    return floats;
  }
};

"""

_ASKS_AT_TIMES = """\
  // Where reading in order is all there is to do, processors look ahead better by themselves.
  constexpr bool ASKS_AHEAD = VECTORS * LANES < TILE || ROWS * @COUNT@ > 4;
"""

_ASKS = """\
  constexpr bool ASKS_AHEAD = true;
"""

_FEW = """\
// Vectors of outputs whose sums are kept at once.
constexpr int vectors_of(int rows, int all) {
  return all == 1 || rows * all <= SUMS_AT_ONCE ? all : vectors_of(rows, all / 2);
}

// ROWS rows against groups of a tile: totals[row][64] += , for VECTORS vectors of outputs.
template <int ROWS, int VECTORS>
ALONE void few_sums(const uint32_t* codes, const uint32_t* ahead, int64_t groups, const @X@* x,
                    const xsum_t* sums, uint32_t once, const float* scale, const float* zeros,
                    float* totals) {
  // Few sums would wait for each other: they are made in turns.
  constexpr int TURNS = ROWS * VECTORS * 2 <= MOST_SUMS && @COUNT@ > 1 ? 2 : 1;
@ASKS@  (void)ahead, (void)sums, (void)once, (void)zeros;
  const Decoder decoder;
  Sums<VECTORS * ROWS, sum_t> part, turn;
  each<VECTORS * ROWS>([&](auto i) INLINE_LAMBDA {
    constexpr int row = i % ROWS;
    (void)row;
    at<i>(part) = @BEGIN@;
    if constexpr (TURNS == 2) at<i>(turn) = sum_t{};
  });
#pragma GCC unroll 1
  for (int64_t group = 0; group < groups; ++group) {
    each<VECTORS>([&](auto v) INLINE_LAMBDA {
      if constexpr (ASKS_AHEAD) prefetch(ahead + v * LANES);
@NEAR@      const vi code = load(codes + v * LANES);
      each<@COUNT@>([&](auto step) INLINE_LAMBDA {
        const auto operand = decoder.@OPERAND@(code, step);
        each<ROWS>([&](auto row) INLINE_LAMBDA {
          if constexpr (TURNS == 2 && step % 2)
            dot(at<v * ROWS + row>(turn), operand, x + @STEP@ * ROWS + row);
          else
            dot(at<v * ROWS + row>(part), operand, x + @STEP@ * ROWS + row);
        });
      });
    });
    codes += TILE;
    ahead += VECTORS * LANES;
    x += @COUNT@ * ROWS;
  }
  each<VECTORS * ROWS>([&](auto i) INLINE_LAMBDA {
    constexpr int row = i % ROWS, v = i / ROWS;
    sum_t sum = at<i>(part);
    if constexpr (TURNS == 2) sum = add(sum, at<i>(turn));
    float* total = totals + row * TILE + v * LANES;
    store(total, fma(@END@, load(scale + v * LANES), load(total)));
  });
}

// ROWS rows against one tile of outputs: totals[row][64].
template <int ROWS>
void few_rows(const Weight& w, int64_t tile, const @X@* x, const xsum_t* sums, float* totals) {
  constexpr int VECTORS = vectors_of(ROWS, TILE / LANES);
  Scales scales(w, tile);
  std::memset(totals, 0, ROWS * TILE * sizeof(float));
  for (int64_t block = 0; block < BLOCKS; ++block) {
    const float *scale = scales.at(block), *zeros = @ZEROS@;
    const int64_t start = block * GROUPS_OF_BLOCK, end = std::min(start + GROUPS_OF_BLOCK, GROUPS);
    // Not more at a time than what stays near while it is gone through for all vectors.
    for (int64_t group = start; group < end; group += GROUPS_AT_ONCE) {
      const int64_t groups = std::min(GROUPS_AT_ONCE, end - group);
      const uint32_t* codes = w.codes() + (tile * GROUPS + group) * TILE;
      // Asked for meanwhile: what lies as far on as this is long, in the order in memory.
      const uint32_t* ahead = codes + GROUPS_AT_ONCE * TILE;
      for (int n = 0; n < TILE; n += VECTORS * LANES, ahead += groups * VECTORS * LANES)
        few_sums<ROWS, VECTORS>(codes + n, ahead, groups, x + group * @COUNT@ * ROWS,
                                sums + block * ROWS, group == start, scale + n, zeros + n,
                                totals + n);
    }
  }
}

void few_rows(int height, const Weight& w, int64_t tile, const @X@* x, const xsum_t* sums,
              float* totals) {
  switch (height) {
@HEIGHTS@
  }
}

@TILES@
void run_few(const Call& call, int64_t super_first, int64_t rows, const Share& of,
             const Part& part) {
  if (part.is_first) pack(call, super_first, rows, FEW_HEIGHTS, of);
  few_tiles(call, super_first, rows, of, part);
}
"""
