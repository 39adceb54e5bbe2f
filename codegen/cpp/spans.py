"""Some rows on the tile unit: the totals of a panel stay in vector registers for a while.

A part is what one register sums before a scale is applied. While the unit multiplies one, the part
before it is added to the totals, and the one two parts on is decoded: what was stored just now
cannot be loaded into the unit before it has left the processor's store buffer. Panels after the
first one find the operands decoded.
"""

from __future__ import annotations

from fxquant.codegen.cpp.plan import SPAN, TILE_ROWS, Plan


def spans(plan: Plan, end: str, decoder: str) -> str:
    """The text of ``span_tile``.

    Args:
        plan: Of the kernel.
        end: The sums of a part as floats: of ``part_of_row``, ``sums`` and ``zeros``.
        decoder: What makes ``decoder``.
    """
    of_block = plan.block // plan.per_step // TILE_ROWS
    registers = plan.k_padded // plan.per_step // TILE_ROWS
    part = min(of_block, 4)
    zeros = "scales.zeros_at(block)" if plan.encoding.zero_point else "scale"
    text = _SPANS
    for name, value in {
        "@PART@": str(part),
        "@REST@": str(registers % part),
        "@SPAN@": str(min(SPAN, registers)),
        "@OF_BLOCK@": str(of_block),
        "@DECODER@": decoder,
        "@END@": end,
        "@ZEROS@": zeros,
    }.items():
        text = text.replace(name, value)
    return text


_SPANS = """\
// --- some rows: totals in registers ---

constexpr int64_t REGISTERS = ALL_STEPS / 16;  // of the tile unit, for a row
constexpr int64_t REGISTERS_OF_BLOCK = @OF_BLOCK@;
constexpr int64_t SPAN = @SPAN@;  // that 16 outputs go through before the next 16
constexpr int PART = @PART@;  // whose products one register sums
constexpr int REST = @REST@;  // of the last part, where it is shorter
constexpr int GROUPS_OF_REGISTER = 16 / STEPS;

// A panel times COUNT registers of the weight: end[row][16].
template <int COUNT, int SUMS, int X>
INLINE void part_dots(const uint32_t* w, const x_t* x, int height, sum_of_one_t* end) {
  tile_zero<SUMS>();
  each<COUNT>([&](auto i) INLINE_LAMBDA {
    tile_load<4>(w + i * 256, 64), tile_load<X>(x + i * 16 * height, 64);
    tile_dot<SUMS, X, 4>();
  });
  tile_store<SUMS>(end, 64);
}

// A span of a panel of up to ROWS rows against 16 outputs: totals[row][64] += .
template <bool DECODES, int ROWS, int SUMS, int X>
ALONE void span_rows(int height, const uint32_t* codes, const uint32_t* ahead, int64_t count,
                     const x_t* x, const xsum_t* sums, const float* scales, const float* all_zeros,
                     float* totals, uint32_t* own, sum_of_one_t* ends) {
  (void)codes, (void)ahead, (void)sums, (void)all_zeros;
@DECODER@  (void)decoder;
  const int64_t parts = (count + PART - 1) / PART;
  Sums<ROWS, vf> total;
  each<ROWS>([&](auto r) INLINE_LAMBDA { at<r>(total) = load(totals + r * TILE); });
  const auto decode = [&](int64_t part) INLINE_LAMBDA {
    if constexpr (!DECODES) return;
    const int64_t last = std::min<int64_t>(count, (part + 1) * PART);
    for (int64_t i = part * PART; i < last; ++i) {
#pragma GCC unroll 16
      for (int g = 0; g < GROUPS_OF_REGISTER; ++g) {
        const int64_t group = i * GROUPS_OF_REGISTER + g;
        prefetch(ahead + group * LANES);
        bring_near(codes + NEAR + group * TILE);
        const vi code = load(codes + group * TILE);
#pragma GCC unroll 16
        for (int step = 0; step < STEPS; ++step)
          store(own + (group * STEPS + step) * LANES, decoder.operand(code, step));
      }
    }
  };
  const auto dots = [&](int64_t part) INLINE_LAMBDA {
    const uint32_t* w = own + part * PART * 256;
    const x_t* from = x + part * PART * 16 * height;
    sum_of_one_t* end = ends + part % 2 * 256;
    if (REST == 0 || (part + 1) * PART <= count)
      part_dots<PART, SUMS, X>(w, from, height, end);
    else
      part_dots<REST, SUMS, X>(w, from, height, end);
  };
  const auto add = [&](int64_t part) INLINE_LAMBDA {
    const int64_t block = part * PART / REGISTERS_OF_BLOCK;
    const vf scale = load(scales + block * TILE);
    const float* zeros = all_zeros + block * TILE;
    (void)zeros;
    each<ROWS>([&](auto r) INLINE_LAMBDA {
      const sum_of_one_t* part_of_row = ends + part % 2 * 256 + r * LANES;
      at<r>(total) = fma(@END@, scale, at<r>(total));
    });
  };
  decode(0), decode(1);
#pragma GCC unroll 1
  for (int64_t part = 0; part < parts; ++part) {
    dots(part);
    if (part) add(part - 1);
    decode(part + 2);
  }
  add(parts - 1);
  each<ROWS>([&](auto r) INLINE_LAMBDA { store(totals + r * TILE, at<r>(total)); });
  tile_zero<SUMS>(), tile_zero<X>();  // ends their use: see `panel_dots`
}

// The last panel, which may be lower, has registers of its own.
template <bool DECODES, typename... Given>
INLINE void span_of_rows(bool is_last, int height, Given... given) {
  if (!is_last)
    span_rows<DECODES, 16, 0, 2>(height, given...);
  else if (height > 4)
    span_rows<DECODES, 16, 1, 3>(height, given...);
  else
    span_rows<DECODES, 4, 1, 3>(height, given...);
}

// One tile of outputs against some panels, with scales applied to sums: totals[row][64].
void span_tile(const Call& call, const Weight& w, int64_t tile, int64_t rows, int64_t first_panel,
                 int64_t last_panel, uint32_t* own, float* totals, TileUnit& unit) {
  const int64_t e = @MATRIX@, first_row = first_panel * 16, at = e * rows + first_row;
  const int64_t count = std::min(rows, last_panel * 16) - first_row;
  const x_t* panels = call.panels + at * ALL_STEPS;
  const xsum_t* all_sums = call.sums + at * BLOCKS;
  const uint8_t rest = uint8_t((count - 1) % 16 + 1);
  unit.take({16, rest, 16, rest, 16, 16, 16, 16});
  alignas(64) sum_of_one_t ends[2 * 256] = {};
  std::memset(totals, 0, (count + 15) / 16 * 16 * TILE * sizeof(float));
  Scales scales(w, tile);
  for (int64_t first = 0; first < REGISTERS; first += SPAN) {
    const int64_t registers = std::min(SPAN, REGISTERS - first), block = first / REGISTERS_OF_BLOCK;
    const float *scale = scales.at(block), *zeros = @ZEROS@;
    for (int64_t i = 1; i < BLOCKS_AT_ONCE && block + i < BLOCKS; ++i) scales.at(block + i);
    const uint32_t* codes = w.codes() + (tile * GROUPS + first * GROUPS_OF_REGISTER) * TILE;
    const uint32_t* ahead = codes + SPAN * GROUPS_OF_REGISTER * TILE;
    for (int n = 0; n < TILE; n += LANES, ahead += registers * GROUPS_OF_REGISTER * LANES)
      for (int64_t row = 0; row < count; row += 16) {
        const int height = int(std::min<int64_t>(count - row, 16));
        const x_t* x = panels + row * ALL_STEPS + first * 16 * height;
        const xsum_t* sums = all_sums + row * BLOCKS + block * height;
        const auto run = [&](auto decodes) INLINE_LAMBDA {
          span_of_rows<decodes>(row + 16 >= count, height, codes + n, ahead, registers, x, sums,
                                scale + n, zeros + n, totals + row * TILE + n, own, ends);
        };
        row ? run(std::false_type{}) : run(std::true_type{});  // then they are decoded
      }
  }
}
"""
