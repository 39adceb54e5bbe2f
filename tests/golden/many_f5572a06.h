// Many rows: tiles of the weight are decoded once.

namespace {

// Groups of a tile to operands, scales applied: out[output / 16][step][16].
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
          uint32_t* out_at = out + ((v * (last - first) + g - first) * STEPS + step) * LANES;
          store(out_at, pair(mul(decoder.value(code, step), s),
                           mul(decoder.value(code, step + STEPS), s)));
        }
      }
    }
    group = end;
  }
}

// Operands are decoded 16 outputs after 16: what a register takes lies together.
constexpr int64_t OF_ROW = 64, OF_TILE = 256;             // bytes, dwords
constexpr int64_t apart(int64_t steps) { return steps; }  // dwords from one output to the next

// --- some rows: decoded beside the products ---

constexpr int64_t REGISTERS = ALL_STEPS / 16;  // of the tile unit, for a row
constexpr int PART = 2;  // whose products one register sums
constexpr int REST = REGISTERS % PART;  // of the last part, where it is shorter
constexpr int64_t PARTS = (REGISTERS + PART - 1) / PART, PARTS_OF_BLOCK = 1;
constexpr int GROUPS_OF_REGISTER = 16 / STEPS;

// What sums are multiplied with.
struct ScaledBy {
  int64_t block;
  const float *scale, *zeros;
};

// One or two panels of rows against a tile of outputs: totals[row][64] += . Items take turns with
// two registers of sums for each.
template <int PANELS>
ALONE void span_panels(const Weight& w, int64_t tile, int rows, const x_t* x, const xsum_t* sums,
                       uint32_t* own, float* totals) {
  (void)sums;
  alignas(64) sum_of_one_t ends[PANELS * 2 * 256];
  const Decoder decoder;
  (void)decoder;
  Scales scales(w, tile);
  const uint32_t* codes = w.codes() + tile * GROUPS * TILE;
  ScaledBy now{}, before{};
  // One register of an item.
  const auto decode = [&](int64_t part, int n, int i) INLINE_LAMBDA {
    const int64_t number = part * PART + i;
    if (number >= REGISTERS) return;
#pragma GCC unroll 16
    for (int g = 0; g < GROUPS_OF_REGISTER; ++g) {
      const uint32_t* code_of_group = codes + (number * GROUPS_OF_REGISTER + g) * TILE + n * LANES;
      prefetch(code_of_group + AHEAD);
      bring_near(code_of_group + NEAR);
      const vi code = load(code_of_group);
      const auto* bytes = reinterpret_cast<const unsigned char*>(code_of_group);
      const vi further = _mm512_loadu_si512(bytes + 1);  // shifted by eight bits
#pragma GCC unroll 16
      for (int step = 0; step < STEPS; ++step) {
        const vi operand = decoder.operand(step * 4 < 8 ? code : further, step % 2);
        store(own + ((n * PART + i) * 16 + g * STEPS + step) * LANES, operand);
      }
    }
  };
  const int last_height = rows - (PANELS - 1) * 16;
  const auto height_of = [&](int panel) INLINE_LAMBDA {
    return panel + 1 < PANELS ? 16 : last_height;
  };
  const auto add = [&](int n, const ScaledBy& by) INLINE_LAMBDA {
    const float* zeros = by.zeros + n * LANES;
    (void)zeros;
    const vf scale = load(by.scale + n * LANES);
    for (int panel = 0; panel < PANELS; ++panel) {
      const int height = height_of(panel);
      const xsum_t* xsums = sums + panel * 16 * BLOCKS + by.block * height;
      (void)xsums;
      for (int r = 0; r < height; ++r) {
        const sum_of_one_t* part_of_row = ends + (panel * 2 + n % 2) * 256 + r * LANES;
        float* total = totals + (panel * 16 + r) * TILE + n * LANES;
        store(total, fma(to_float(load(part_of_row)), scale, load(total)));
      }
    }
  };
  const auto store_sums = [&](auto parity) INLINE_LAMBDA {
    each<PANELS>([&](auto panel) INLINE_LAMBDA {
      tile_store<2 * panel + parity>(ends + (panel * 2 + parity) * 256, 64);
    });
  };
  for (int i = 0; i < PART; ++i) decode(0, 0, i), decode(0, 1, i);
#pragma GCC unroll 1
  for (int64_t part = 0; part < PARTS; ++part) {
    before = now;
    if (part % PARTS_OF_BLOCK == 0) {
      const int64_t block = part / PARTS_OF_BLOCK;
      const float* scale = scales.at(block);
      now = {block, scale, scale};
    }
    each<TILE / LANES>([&](auto n) INLINE_LAMBDA {
      constexpr int NOW = n % 2, BEFORE = 1 - NOW;
      each<PANELS>([&](auto panel) INLINE_LAMBDA { tile_zero<2 * panel + NOW>(); });
#pragma GCC unroll 4
      for (int i = 0; i < PART; ++i) {
        const int64_t number = part * PART + i;
        if (REST == 0 || number < REGISTERS) {
          tile_load<6>(own + (n * PART + i) * 256, 64);
          each<PANELS>([&](auto panel) INLINE_LAMBDA {
            const x_t* of_panel = x + panel * 16 * ALL_STEPS;
            tile_load<4 + panel>(of_panel + number * 16 * height_of(panel), 64);
            tile_dot_bf16<2 * panel + NOW, 4 + panel, 6>();
          });
        }
        if (i == PART - 1) {
          if (n > 0 || part > 0) store_sums(std::integral_constant<int, BEFORE>{});
          if (n > 1)
            add(n - 2, now);
          else if (part > 0)
            add(n + 2, before);
        }
        if (n < 2)
          decode(part, n + 2, i);
        else
          decode(part + 1, n - 2, i);
      }
    });
  }
  store_sums(std::integral_constant<int, 1>{});
  add(2, now), add(3, now);
}

// One tile of outputs against some panels, with scales applied to sums: totals[row][64].
void span_tile(const Call& call, const Weight& w, int64_t tile, int64_t rows, int64_t first_panel,
                 int64_t last_panel, uint32_t* own, float* totals, TileUnit& unit) {
  const int64_t e = tile / N_TILES, first_row = first_panel * 16, at = e * rows + first_row;
  const int64_t count = std::min(rows, last_panel * 16) - first_row;
  std::memset(totals, 0, count * TILE * sizeof(float));
  for (int64_t row = 0; row < count; row += 32) {
    const int some = int(std::min<int64_t>(count - row, 32));
    const uint8_t first = uint8_t(std::min(some, 16)), second = uint8_t(some - first);
    unit.take({first, first, second, second, first, second, 16, 0});
    const auto run = second ? span_panels<2> : span_panels<1>;
    run(w, tile, some, call.panels + (at + row) * ALL_STEPS, call.sums + (at + row) * BLOCKS, own,
        totals + row * TILE);
  }
}

// A panel against steps of half of a decoded tile: sums[row][32] += , or = where they begin. With
// a neighbour on the core a product takes the longer the more registers are in use: there are four,
// and those of a last panel that is lower are zeroed, which ends their use.
template <bool ASKS_AHEAD, int SUMS, int X>
ALONE void panel_dots(const uint32_t* w, int64_t count, const x_t* x, int64_t height,
                      sum_of_one_t* sums, bool begin) {
  const uint32_t* next = w + 16 * apart(count * 16);
  if (begin)
    tile_zero<SUMS>(), tile_zero<SUMS + 1>();
  else
    tile_load<SUMS>(sums, 4 * TILE), tile_load<SUMS + 1>(sums + 16, 4 * TILE);
  for (int64_t i = 0; i < count; ++i, w += OF_TILE, next += OF_TILE) {
    tile_load<X>(x + i * 16 * height, 64), tile_load<7>(w, OF_ROW);
    tile_dot_bf16<SUMS, X, 7>();
    tile_load<7>(next, OF_ROW);
    tile_dot_bf16<SUMS + 1, X, 7>();
  }
  tile_store<SUMS>(sums, 4 * TILE), tile_store<SUMS + 1>(sums + 16, 4 * TILE);
  if constexpr (SUMS != 0) tile_zero<SUMS>(), tile_zero<SUMS + 1>(), tile_zero<X>();
}

// Panels against steps of a decoded tile: sums[row][64] += , or = where they begin.
void wide_panels(const uint32_t* w, int64_t first_step, int64_t steps, const x_t* x, int64_t rows,
                 sum_of_one_t* sums, bool begin, TileUnit& unit) {
  const uint8_t rest = uint8_t((rows - 1) % 16 + 1);
  unit.take({16, 16, 16, rest, rest, rest, 0, 16});
  // Half of the operands stays near while all rows are gone through.
  for (int n = 0; n < TILE; n += 32)
    for (int64_t row = 0; row < rows; row += 16) {
      const int64_t height = std::min<int64_t>(rows - row, 16);
      const auto run = height == 16 ? (row ? panel_dots<false, 0, 2> : panel_dots<true, 0, 2>)
                                    : (row ? panel_dots<false, 3, 5> : panel_dots<true, 3, 5>);
      run(w + n * apart(steps), steps / 16, x + row * ALL_STEPS + first_step * height, height,
          sums + row * TILE + n, begin);
    }
}

// One tile of outputs against some panels, scales in the weight: totals[row][64].
void wide_tile(const Call& call, const Weight& w, int64_t tile, int64_t rows, int64_t first_panel,
               int64_t last_panel, uint32_t* own, float* totals, TileUnit& unit) {
  const int64_t e = tile / N_TILES, first_row = first_panel * 16;
  const int64_t count = std::min(rows, last_panel * 16) - first_row;
  const x_t* panels = call.panels + (e * rows + first_row) * ALL_STEPS;
  Scales scales(w, tile);
  for (int64_t chunk = 0; chunk < CHUNKS; ++chunk) {
    const int64_t first = chunk * GROUPS_OF_CHUNK;
    const int64_t last = std::min(first + GROUPS_OF_CHUNK, GROUPS);
    decode_chunk(w, scales, tile, first, last, own);
    wide_panels(own, first * STEPS, (last - first) * STEPS, panels, count, totals, chunk == 0,
                unit);
  }
}

// One tile of outputs against some panels: totals[row][64]. The way depends on the rows of all
// panels, so that results do not depend on the number of threads.
void many_tile(const Call& call, const Weight& w, int64_t tile, int64_t rows, int64_t first_panel,
               int64_t last_panel, uint32_t* own, float* totals, TileUnit& unit) {
  if (rows <= SPAN_ROWS)
    return span_tile(call, w, tile, rows, first_panel, last_panel, own, totals, unit);
  wide_tile(call, w, tile, rows, first_panel, last_panel, own, totals, unit);
}

// Tiles of outputs, and parts of the panels where there are too few tiles for all threads.
void run_many(const Call& call, int64_t super_first, int64_t rows, const Share& of,
              const Part& part) {
  if (part.is_first) pack_tiles(call, super_first, rows, of);
  const int64_t panels = panels_of(rows, MANY_HEIGHTS);
  uint32_t* decoded = reinterpret_cast<uint32_t*>(call.own + of.thread * OWN_BYTES);
  float* totals = reinterpret_cast<float*>(decoded + DECODED);
  TileUnit unit;
  const int64_t wanted = (2 * of.threads + E * N_TILES - 1) / (E * N_TILES);
  const int64_t parts = std::max<int64_t>(1, std::min(wanted, panels));
  const auto items = part.of(E * N_TILES * parts);
  of.each(items.last - items.first, [&](int64_t number) {
    const int64_t item = items.first + number, tile = item / parts, at = item % parts;
    const int64_t first = panels * at / parts, last = panels * (at + 1) / parts;
    const int64_t first_row = first * MANY_HEIGHTS[0];
    const int64_t count = std::min(rows, last * MANY_HEIGHTS[0]) - first_row;
    for (int i = 0; i < WEIGHTS; ++i)
      many_tile(call, call.weights[i], tile, rows, first, last, decoded,
                totals + i * TOTALS, unit);
    finish(call, tile, super_first, first_row, count, rows, totals, TOTALS);
  });
}

}  // namespace
