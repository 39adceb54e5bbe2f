"""Some rows on the tile unit: operands are decoded while others are multiplied.

A part is what a register sums before a scale is applied; an item is a part of 16 outputs, of which
a tile has four. While the unit multiplies one, the sums of the item before it are stored, those of
the one before that are added to the totals, and the second next is decoded: nothing waits for what
was made just now. Two panels of rows are multiplied at a time; every two decode for themselves.
"""

from __future__ import annotations

from fxquant.codegen.cpp.plan import TILE_ROWS, Plan


def spans(plan: Plan, end: str, decoder: str) -> str:
    """The text of ``span_tile``.

    Args:
        plan: Of the kernel.
        end: The sums of a part as floats: of ``part_of_row``, ``sums`` and ``zeros``.
        decoder: What makes ``decoder``.
    """
    of_block = plan.block // plan.per_step // TILE_ROWS
    part = min(of_block, 4)
    # Shifts are made by one of the two units that look levels up: a load further on spares some.
    bits = plan.encoding.bits
    is_further = bits < 8 and bits * (plan.steps - 1) >= 8
    further = f"step * {bits} < 8 ? code : further, step % {8 // bits}"
    text = _SPANS
    for name, value in {
        "@FURTHER@": _FURTHER if is_further else "",
        "@OPERAND@": f"decoder.operand({further if is_further else 'code, step'})",
        "@PART@": str(part),
        "@OF_BLOCK@": str(of_block // part),
        "@DECODER@": decoder,
        "@END@": end,
        "@ZEROS@": "scales.zeros_at(block)" if plan.encoding.zero_point else "scale",
    }.items():
        text = text.replace(name, value)
    return text


_FURTHER = """\
      const auto* bytes = reinterpret_cast<const unsigned char*>(code_of_group);
      const vi further = _mm512_loadu_si512(bytes + 1);  // shifted by eight bits
"""

_SPANS = """\
// --- some rows: decoded beside the products ---

constexpr int64_t REGISTERS = ALL_STEPS / 16;  // of the tile unit, for a row
constexpr int PART = @PART@;  // whose products one register sums
constexpr int REST = REGISTERS % PART;  // of the last part, where it is shorter
constexpr int64_t PARTS = (REGISTERS + PART - 1) / PART, PARTS_OF_BLOCK = @OF_BLOCK@;
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
@DECODER@  (void)decoder;
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
@FURTHER@#pragma GCC unroll 16
      for (int step = 0; step < STEPS; ++step) {
        const vi operand = @OPERAND@;
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
        store(total, fma(@END@, scale, load(total)));
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
      now = {block, scale, @ZEROS@};
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
            @DOT@<2 * panel + NOW, 4 + panel, 6>();
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
  const int64_t e = @MATRIX@, first_row = first_panel * 16, at = e * rows + first_row;
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
"""
