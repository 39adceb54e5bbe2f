// Few rows: every code is decoded in registers and used.

namespace {

// Vectors of outputs whose sums are kept at once.
constexpr int vectors_of(int rows, int all) {
  return all == 1 || rows * all <= SUMS_AT_ONCE ? all : vectors_of(rows, all / 2);
}

// ROWS rows against groups of a tile: totals[row][64] += , for VECTORS vectors of outputs.
template <int ROWS, int VECTORS>
ALONE void few_sums(const uint32_t* codes, const uint32_t* ahead, int64_t groups, const x_t* x,
                    const xsum_t* sums, uint32_t once, const float* scale, const float* zeros,
                    float* totals) {
  // Few sums would wait for each other: they are made in turns.
  constexpr int TURNS = ROWS * VECTORS * 2 <= MOST_SUMS && STEPS > 1 ? 2 : 1;
  // Where reading in order is all there is to do, processors look ahead better by themselves.
  constexpr bool ASKS_AHEAD = VECTORS * LANES < TILE || ROWS * STEPS > 4;
  (void)ahead, (void)sums, (void)once, (void)zeros;
  const Decoder decoder;
  Sums<VECTORS * ROWS, sum_t> part, turn;
  each<VECTORS * ROWS>([&](auto i) INLINE_LAMBDA {
    constexpr int row = i % ROWS;
    (void)row;
    at<i>(part) = sum_t{};
    if constexpr (TURNS == 2) at<i>(turn) = sum_t{};
  });
#pragma GCC unroll 1
  for (int64_t group = 0; group < groups; ++group) {
    each<VECTORS>([&](auto v) INLINE_LAMBDA {
      if constexpr (ASKS_AHEAD) prefetch(ahead + v * LANES);
      const vi code = load(codes + v * LANES);
      each<STEPS>([&](auto step) INLINE_LAMBDA {
        const auto operand = decoder.operand(code, step);
        each<ROWS>([&](auto row) INLINE_LAMBDA {
          if constexpr (TURNS == 2 && step % 2)
            dot(at<v * ROWS + row>(turn), operand, x + step * ROWS + row);
          else
            dot(at<v * ROWS + row>(part), operand, x + step * ROWS + row);
        });
      });
    });
    codes += TILE;
    ahead += VECTORS * LANES;
    x += STEPS * ROWS;
  }
  each<VECTORS * ROWS>([&](auto i) INLINE_LAMBDA {
    constexpr int row = i % ROWS, v = i / ROWS;
    sum_t sum = at<i>(part);
    if constexpr (TURNS == 2) sum = add(sum, at<i>(turn));
    float* total = totals + row * TILE + v * LANES;
    store(total, fma(to_float(sum), load(scale + v * LANES), load(total)));
  });
}

// ROWS rows against one tile of outputs: totals[row][64].
template <int ROWS>
void few_rows(const Weight& w, int64_t tile, const x_t* x, const xsum_t* sums, float* totals) {
  constexpr int VECTORS = vectors_of(ROWS, TILE / LANES);
  Scales scales(w, tile);
  std::memset(totals, 0, ROWS * TILE * sizeof(float));
  for (int64_t block = 0; block < BLOCKS; ++block) {
    const float *scale = scales.at(block), *zeros = scale;
    const int64_t start = block * GROUPS_OF_BLOCK, end = std::min(start + GROUPS_OF_BLOCK, GROUPS);
    // Not more at a time than what stays near while it is gone through for all vectors.
    for (int64_t group = start; group < end; group += GROUPS_AT_ONCE) {
      const int64_t groups = std::min(GROUPS_AT_ONCE, end - group);
      const uint32_t* codes = w.codes() + (tile * GROUPS + group) * TILE;
      // Asked for meanwhile: what lies as far on as this is long, in the order in memory.
      const uint32_t* ahead = codes + GROUPS_AT_ONCE * TILE;
      for (int n = 0; n < TILE; n += VECTORS * LANES, ahead += groups * VECTORS * LANES)
        few_sums<ROWS, VECTORS>(codes + n, ahead, groups, x + group * STEPS * ROWS,
                                sums + block * ROWS, group == start, scale + n, zeros + n,
                                totals + n);
    }
  }
}

void few_rows(int height, const Weight& w, int64_t tile, const x_t* x, const xsum_t* sums,
              float* totals) {
  switch (height) {
    case 8: return few_rows<8>(w, tile, x, sums, totals);
    case 4: return few_rows<4>(w, tile, x, sums, totals);
    case 3: return few_rows<3>(w, tile, x, sums, totals);
    case 2: return few_rows<2>(w, tile, x, sums, totals);
    case 1: return few_rows<1>(w, tile, x, sums, totals);
  }
}

// All tiles of outputs, each against all panels while its codes are near.
void few_tiles(const Call& call, int64_t super_first, int64_t rows, const Share& of,
               const Part& part) {
  const int64_t panels = panels_of(rows, FEW_HEIGHTS), heights = padded(rows, FEW_HEIGHTS);
  alignas(64) float totals[FEW_HEIGHTS[0] * TILE];
  const auto tiles = part.of(E * N_TILES);
  of.each(tiles.last - tiles.first, [&](int64_t number) {
    const int64_t tile = tiles.first + number, e = tile / N_TILES;
    for (int64_t panel = 0; panel < panels; ++panel) {
      const int64_t row = panel * FEW_HEIGHTS[0], at = e * heights + row;
      const int height = height_of(rows - row, FEW_HEIGHTS);
      const x_t* x = call.panels + at * ALL_STEPS;
      few_rows(height, call.weight, tile, x, call.sums + at * BLOCKS, totals);
      finish(call, tile, super_first, row, std::min<int64_t>(height, rows - row), rows, totals);
    }
  });
}

void run_few(const Call& call, int64_t super_first, int64_t rows, const Share& of,
             const Part& part) {
  if (part.is_first) pack(call, super_first, rows, FEW_HEIGHTS, of);
  few_tiles(call, super_first, rows, of, part);
}

}  // namespace
