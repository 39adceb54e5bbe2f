"""Many rows of floats on the tile unit: each float as the sum of up to three bfloat16.

24 bits are three times eight: ``high = rne(x)``, ``middle = rne(x - high)`` and ``low``, what is
left, make up a float32 exactly: an activation's as the call packs it, a level's in a table. The
products of two parts are exact in float32. Those of ``low`` with ``middle`` or ``low`` are left
out: see `fxquant.codegen.bounds.float_sums`.

The unit takes subnormal numbers for zeros, which is next to nothing where levels are 2**-15 or more
and `x` is 2**-80 or more, and the parts of what is not finite are NaN. So a row with any `x` that
is neither zero nor of ``2**-80 .. 2**100`` is multiplied as one row is, and all are as few rows are
where those are many. Rows that are too few for a panel of their own are as one row, too.

One panel at a time is multiplied with 16 outputs by 64 inputs, as in `spans`, and decodes for
itself. Of the unit four registers are in use: with a neighbour on the core a product takes 12 ns
then, and 27 with eight.
"""

from __future__ import annotations

from fxquant.codegen.cpp.plan import Plan

OPERANDS = 2 * 32 * 32
"""Dwords of the decoded levels of four items, for each part: 16 outputs by 64 inputs."""


def thirds(plan: Plan) -> str:
    """The text of ``many_tile``, and of ``pack_thirds`` before it."""
    parts = len(plan.level_thirds)
    order, lines, last = plan.third_products, [], None
    for number, (x, w) in enumerate(order):
        loaded = f"x_of({x}), " if x != last else ""
        slot = f"std::integral_constant<int, i * {len(order)} + {number}>{{}}"
        lines.append(f"        {loaded}w_of({w}), beside({slot});")
        last = x
    stored = [
        f"      store(to + {256 * part}, decoder.part{part}(code, step));" for part in range(parts)
    ]
    text = _PACK + _TILE
    for name, value in {
        "@LINE@": _IN_PLACE if plan.reads_directly else "const x_t* line = own;",
        "@MADE_UNLESS@": "if (!call.is_line) " if plan.reads_directly else "",
        "@PARTS@": str(parts),
        "@SLOTS@": str(2 * len(order)),
        "@PRODUCTS@": "\n".join(lines),
        "@STORED@": "\n".join(stored),
    }.items():
        text = text.replace(name, value)
    return text


_IN_PLACE = """\
const stored_t* from = call.x + e * call.x_e + (super_first + row) * call.x_row;
    const x_t* line = call.is_line ? reinterpret_cast<const x_t*>(from) : own;"""

_PACK = """\
// --- floats as three bfloat16 each ---

constexpr int64_t ROW_THIRDS = K_PADDED / 2 * 3;  // dwords of a row
constexpr int64_t ROWS_APART = 3;

// Whether parts of a line are not what they should be: see the bounds of their exponents.
INLINE bool is_odd(const x_t* line) {
  constexpr uint32_t LEAST = (127 - 80) << 23, MOST = (127 + 100) << 23;
  uint32_t odd = 0;
  for (int64_t k = 0; k < K_PADDED; ++k) {
    const uint32_t size = bits_of(line[k]) & 0x7fffffffu;
    odd |= uint32_t(size - LEAST >= MOST - LEAST) & uint32_t(size != 0);
  }
  return odd != 0;
}

// Panels that are multiplied: the last one if it has more rows than take as long one by one.
constexpr int64_t full_panels(int64_t rows) { return (rows + 15 - ROWS_APART) / 16; }

// Panels of 16 rows: of 32 inputs each, the high parts of all rows, the middle ones, the low ones.
// A dword's halves are of inputs whose codes stand half a dword apart.
void pack_thirds(const Call& call, int64_t super_first, int64_t rows, const Share& of) {
  alignas(64) uint32_t order[16];
  for (int i = 0; i < 16; ++i) order[i] = i / STEPS_OF_PAIRS * PER_DWORD + i % STEPS_OF_PAIRS;
  const vi first = load(order), second = add(first, spread(uint32_t(STEPS_OF_PAIRS)));
  const auto mine = of.part(E * rows);
  x_t* own = call.lines + mine.first * ALL_STEPS;  // stays near from row to row
  for (int64_t item = mine.first; item < mine.last; ++item) {
    const int64_t e = item / rows, row = item % rows;
    const bool is_last = item + 1 == mine.last;
    @MADE_UNLESS@make_line(call, super_first, rows, item, MANY_HEIGHTS, is_last, own);
    @LINE@
    call.is_odd[item] = row >= 16 * full_panels(rows) || is_odd(line);
    if (call.is_odd[item]) std::memcpy(call.odd + item * K_PADDED, line, K_PADDED * sizeof(x_t));
    uint32_t* to = reinterpret_cast<uint32_t*>(call.panels);
    to += (e * padded(rows, MANY_HEIGHTS) + row / 16 * 16) * ROW_THIRDS + row % 16 * 16;
    for (int64_t k = 0; k < K_PADDED; k += 32) {
      const vf x = load(line + k), next = load(line + k + 16);
      vf low = _mm512_permutex2var_ps(x, first, next);
      vf high = _mm512_permutex2var_ps(x, second, next);
      for (int part = 0; part < 3; ++part, to += 256) {
        const vi both = pair(low, high);
        store(to, both);
        low = sub(low, vf(_mm512_slli_epi32(both, 16)));
        high = sub(high, vf(vi(vu(both) & 0xffff0000u)));
      }
    }
  }
  of.wait();
}

// Whether so many rows are odd that all take less time as few rows do.
INLINE bool are_odd(const Call& call, int64_t rows) {
  int64_t odd = 0;
  for (int64_t item = 0; item < E * rows; ++item) odd += call.is_odd[item];
  return rows > ROWS_APART && 4 * odd > E * rows;
}

"""

_TILE = """\
constexpr int PIECE = TILE / PER_DWORD;  // groups of 64 inputs
constexpr int64_t PIECES = K_PADDED / TILE;
constexpr int OF_ITEM = 2 * @PARTS@ * 256;  // dwords of 16 outputs by 64 inputs

// A panel against a tile of outputs: totals[row][64] += . An item is 16 outputs by 64 inputs.
// Beside its products the sums of the item before it are stored, those of the one before that are
// added to the totals, and the second next is decoded, in @SLOTS@ slots: nothing waits for what
// was made just now.
ALONE void panel_of_parts(const uint32_t* x, const Weight& w, int64_t tile, uint32_t* own,
                          float* totals) {
  const Decoder decoder;
  Scales scales(w, tile);
  const uint32_t* codes = w.codes() + tile * GROUPS * TILE;
  alignas(64) float ends[2][256];
  const float *scale = nullptr, *scale_before = nullptr;
  const auto decode = [&](int64_t piece, int n, int group) INLINE_LAMBDA {
    const int row = group * STEPS_OF_PAIRS;
    const uint32_t* from = codes + (piece * PIECE + group) * TILE + n * LANES;
    uint32_t* to = own + n * OF_ITEM + row / 16 * (@PARTS@ * 256) + row % 16 * LANES;
    prefetch(from + AHEAD);
    const vi code = load(from);
#pragma GCC unroll 16
    for (int step = 0; step < STEPS_OF_PAIRS; ++step, to += LANES) {
@STORED@
    }
  };
  const auto add = [&](int n, const float* by, int row) INLINE_LAMBDA {
    float* total = totals + row * TILE + n * LANES;
    store(total, fma(load(ends[n % 2] + row * LANES), load(by + n * LANES), load(total)));
  };
  for (int n = 0; n < 2; ++n)
    for (int group = 0; group < PIECE; ++group) decode(0, n, group);
#pragma GCC unroll 1
  for (int64_t piece = 0; piece < PIECES; ++piece) {
    scale_before = scale, scale = scales.at(piece * TILE / BLOCK);
    const bool is_first = piece == 0, is_last = piece + 1 == PIECES;
    each<TILE / LANES>([&](auto n) INLINE_LAMBDA {
      constexpr int NOW = n % 2, BEFORE = 1 - NOW;
      const auto beside = [&](auto slot) INLINE_LAMBDA {
        if constexpr (slot == 2)
          if (n > 0 || !is_first) tile_store<BEFORE>(ends[BEFORE], 64);
        if (n > 1 || !is_first) {
#pragma GCC unroll 16
          for (int row = slot * 16 / @SLOTS@; row < (slot + 1) * 16 / @SLOTS@; ++row)
            add((n + 2) % 4, n > 1 ? scale : scale_before, row);
        }
        if (n < 2 || !is_last) {
#pragma GCC unroll 16
          for (int group = slot * PIECE / @SLOTS@; group < (slot + 1) * PIECE / @SLOTS@; ++group)
            decode(piece + n / 2, (n + 2) % 4, group);
        }
      };
      tile_zero<NOW>();
      each<2>([&](auto i) INLINE_LAMBDA {
        const auto x_of = [&](int part) INLINE_LAMBDA {
          tile_load<2>(x + (piece * 6 + i * 3 + part) * 256, 64);
        };
        const auto w_of = [&](int part) INLINE_LAMBDA {
          tile_load<3>(own + n * OF_ITEM + (i * @PARTS@ + part) * 256, 64);
          tile_dot_bf16<NOW, 2, 3>();
        };
@PRODUCTS@
      });
    });
  }
  tile_store<1>(ends[1], 64);
  for (int n = 2; n < 4; ++n)
    for (int row = 0; row < 16; ++row) add(n, scale, row);
}

// The same for all rows of these panels.
void many_tile(const Call& call, const Weight& w, int64_t tile, int64_t rows, int64_t first_panel,
               int64_t last_panel, uint32_t* own, float* totals, TileUnit& unit) {
  const int64_t e = @MATRIX@, panels = std::min(last_panel, full_panels(rows)) - first_panel;
  const uint32_t* x = reinterpret_cast<const uint32_t*>(call.panels);
  x += (e * padded(rows, MANY_HEIGHTS) + first_panel * 16) * ROW_THIRDS;
  if (panels > 0) {
    unit.take({16, 16, 16, 16, 0, 0, 0, 0});
    std::memset(totals, 0, panels * 16 * TILE * sizeof(float));
  }
  for (int64_t panel = 0; panel < panels; ++panel)
    panel_of_parts(x + panel * 16 * ROW_THIRDS, w, tile, own, totals + panel * 16 * TILE);
  const int64_t last_row = std::min(rows, last_panel * 16);
  for (int64_t row = first_panel * 16; row < last_row; ++row)
    if (call.is_odd[e * rows + row])
      few_rows<1>(w, tile, call.odd + (e * rows + row) * K_PADDED, call.sums,
                  totals + (row - first_panel * 16) * TILE);
}
"""
