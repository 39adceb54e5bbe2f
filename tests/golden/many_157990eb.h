// Many rows: tiles of the weight are decoded once.

namespace {

// Groups of a tile to operands, scales applied: out[step][64].
void decode_chunk(const Weight& w, Scales& scales, int64_t tile, int64_t first, int64_t last,
                  uint32_t* out) {
  const Decoder decoder;
  constexpr int ALL = TILE / LANES;
  for (int64_t group = first; group < last;) {
    const int64_t block = group / GROUPS_OF_BLOCK;
    const int64_t end = std::min(last, (block + 1) * GROUPS_OF_BLOCK);
    const float* scale = scales.at(block);
    for (int v = 0; v < ALL; ++v) {
      const vf s = load(scale + v * LANES), z = vf{};
      (void)z;
      for (int64_t g = group; g < end; ++g) {
        const uint32_t* codes = w.codes() + (tile * GROUPS + g) * TILE;
        prefetch(codes + AHEAD + v * LANES);
        const vi code = load(codes + v * LANES);
#pragma GCC unroll 16
        for (int step = 0; step < STEPS; ++step) {
          uint32_t* out_at = out + ((g - first) * STEPS + step) * TILE + v * LANES;
          store(reinterpret_cast<float*>(out_at), mul(decoder.value(code, step), s));
        }
      }
    }
    group = end;
  }
}

// ROWS rows against steps of a decoded tile: totals[row][64] += .
template <int ROWS>
ALONE void many_rows(const uint32_t* w, int64_t steps, const x_t* x, const xsum_t* sums,
               const float* scale, const float* zeros, float* totals) {
  (void)sums, (void)scale, (void)zeros;
  for (int at0 = 0; at0 < TILE; at0 += 2 * LANES) {
    Sums<2 * ROWS, sum_t> part;
    each<2 * ROWS>([&](auto i) INLINE_LAMBDA {
      constexpr int row = i / 2;
      (void)row;
      at<i>(part) = sum_t{};
    });
    const operand_t* ws = reinterpret_cast<const operand_t*>(w) + at0;
    const x_t* xs = x;
#pragma GCC unroll 1
    for (int64_t step = 0; step < steps; ++step) {
      add_products<ROWS>(part, ws, xs);
      ws += TILE;
      xs += ROWS;
    }
    each<2 * ROWS>([&](auto i) INLINE_LAMBDA {
      constexpr int row = i / 2;
      const int at_n = at0 + i % 2 * LANES;
      float* total = totals + row * TILE + at_n;
      const sum_t sum = at<i>(part);
      store(total, add(load(total), sum));
    });
  }
}

void many_rows(int height, const uint32_t* w, int64_t steps, const x_t* x, const xsum_t* sums,
               const float* scale, const float* zeros, float* totals) {
  switch (height) {
    case 6: return many_rows<6>(w, steps, x, sums, scale, zeros, totals);
    case 4: return many_rows<4>(w, steps, x, sums, scale, zeros, totals);
    case 2: return many_rows<2>(w, steps, x, sums, scale, zeros, totals);
  }
}

// One tile of outputs against some panels: totals[row][64].
void many_tile(const Call& call, const Weight& w, int64_t tile, int64_t rows, int64_t first_panel,
               int64_t last_panel, uint32_t* decoded, float* totals) {
  const int64_t e = tile / N_TILES, base = e * padded(rows, MANY_HEIGHTS);
  const int64_t first_row = first_panel * MANY_HEIGHTS[0];
  const int64_t last_row = std::min(rows, last_panel * MANY_HEIGHTS[0]);
  std::memset(totals, 0, (last_row - first_row + MANY_HEIGHTS[0]) * TILE * sizeof(float));
  Scales scales(w, tile);
  for (int64_t chunk = 0; chunk < CHUNKS; ++chunk) {
    const int64_t first = chunk * GROUPS_OF_CHUNK;
    const int64_t last = std::min(first + GROUPS_OF_CHUNK, GROUPS);
    const int64_t block = first / GROUPS_OF_BLOCK;
    decode_chunk(w, scales, tile, first, last, decoded);
    const uint32_t* operands = decoded;
    const float *scale = nullptr, *zeros = nullptr;
    for (int64_t panel = first_panel; panel < last_panel; ++panel) {
      const int64_t row = panel * MANY_HEIGHTS[0], at = base + row;
      const int height = height_of(rows - row, MANY_HEIGHTS);
      many_rows(height, operands, (last - first) * STEPS,
                call.panels + at * ALL_STEPS + first * STEPS * height,
                call.sums + at * BLOCKS + block * height, scale, zeros,
                totals + (row - first_row) * TILE);
    }
  }
}

// Tiles of outputs, and parts of the panels where there are too few tiles for all threads.
void run_many(const Call& call, int64_t super_first, int64_t rows, const Share& of,
              const Part& part) {
  if (part.is_first) pack(call, super_first, rows, MANY_HEIGHTS, of);
  const int64_t panels = panels_of(rows, MANY_HEIGHTS);
  uint32_t* decoded = reinterpret_cast<uint32_t*>(call.own + of.thread * OWN_BYTES);
  float* totals = reinterpret_cast<float*>(decoded + DECODED);
  const int64_t wanted = (2 * of.threads + E * N_TILES - 1) / (E * N_TILES);
  const int64_t parts = std::max<int64_t>(1, std::min(wanted, panels));
  const auto items = part.of(E * N_TILES * parts);
  of.each(items.last - items.first, [&](int64_t number) {
    const int64_t item = items.first + number, tile = item / parts, at = item % parts;
    const int64_t first = panels * at / parts, last = panels * (at + 1) / parts;
    const int64_t first_row = first * MANY_HEIGHTS[0];
    const int64_t count = std::min(rows, last * MANY_HEIGHTS[0]) - first_row;
    many_tile(call, call.weight, tile, rows, first, last, decoded, totals);
    finish(call, tile, super_first, first_row, count, rows, totals);
  });
}

}  // namespace
