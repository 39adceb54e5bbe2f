"""Many rows on the tile unit (AMX): panels of 16 rows against registers of 16 steps by 16 outputs.

Weights are decoded to ``[output / 16][step][16]``, what a register takes together; codes of 8 bits
that are multiplied as they are stored are what the unit takes, too. The wide way sums 16 rows by 32
outputs at a time and keeps the sums in memory from chunk to chunk; scales are in the operands, or
follow where a block ends. The narrow one leaves a part of a weight of bytes in registers for one
panel after another and scales the sums of each block. For fewer rows there is a third one
(`spans`).
"""

from __future__ import annotations

from fxquant.codegen.cpp import unit
from fxquant.codegen.cpp.plan import HELD_TILES, TILE_ROWS, Plan
from fxquant.codegen.cpp.spans import spans


def tiles(plan: Plan) -> str:
    """The text of ``many_tile`` for the tile unit, and of what it needs but ``decode_chunk``."""
    is_int8, is_narrow = plan.path == "int8", plan.path == "int8" and plan.scales_sums
    dot = unit.BF16
    if is_int8:
        dot = unit.BIASED if _is_stored(plan) else unit.INT8
    parts = [_IN_PLACE if _is_stored(plan) else _APART]
    ways = [("", "narrow" if is_narrow else "wide")]
    if plan.has_spans:
        xsum = "xsums[r]"
        parts.append(spans(plan, _end(plan, "part_of_row", xsum, "zeros"), decoder(plan)))
        ways.insert(0, ("rows <= SPAN_ROWS", "span"))
    parts.append(_narrow(plan) if is_narrow else _wide(plan))
    parts.append(_MANY_TILE.replace("@BODY@", "".join(map(_way, ways))))
    text = "\n".join(part.strip("\n") + "\n" for part in parts)
    return text.replace("@DOT@", dot)


def _way(way: tuple[str, str]) -> str:
    """One of the ways through a tile, with its condition if it has one."""
    condition, name = way
    call = f"{name}_tile(call, w, tile, rows, first_panel, last_panel, own, totals, unit);\n"
    return f"  if ({condition})\n    return {call}" if condition else f"  {call}"


def _signed(plan: Plan) -> bool:
    """Whether bytes are decoded as signed ones, from which nothing has to be taken off later."""
    return plan.uses_tiles and plan.path == "int8" and not _is_stored(plan) and plan.byte_bias > 0


def decoder(plan: Plan) -> str:
    """What makes ``decoder``, which gives levels."""
    return _SIGNED if _signed(plan) else _DECODER


def _end(plan: Plan, part: str, xsum: str, zeros: str) -> str:
    """A vector of sums as floats, with what unsigned bytes or zero points add taken off."""
    if plan.encoding.zero_point:
        return f"fma(load({zeros}), spread(-float({xsum})), to_float(load({part})))"
    if plan.path == "int8" and plan.byte_bias and not _signed(plan):
        return f"to_float(add(load({part}), spread(uint32_t({xsum}))))"
    return f"to_float(load({part}))"


def _is_stored(plan: Plan) -> bool:
    """Whether codes are multiplied as they are stored."""
    return plan.path == "int8" and plan.encoding.bits == 8


def _narrow(plan: Plan) -> str:
    end = _end(plan, "part", "sums[b * height + r]", "zeros + b * TILE + n")
    zeros = "scales.zeros_at(block)" if plan.encoding.zero_point else "nullptr"
    operands = _STORED if _is_stored(plan) else _DECODED
    given = "operands, panels, count, first * STEPS, block, sums, scale, zeros, totals"
    rest = plan.k_padded // plan.per_step // TILE_ROWS % HELD_TILES
    call = f"narrow_panels<{HELD_TILES}>({given});"
    if rest:
        call = (
            f"if (last - first == GROUPS_HELD)\n      {call}\n"
            f"    else\n      narrow_panels<{rest}>({given});"
        )
    text = _NARROW.replace("@END@", end).replace("@ZEROS@", zeros)
    return text.replace("@OPERANDS@", operands).replace("@PANELS@", call)


def _wide(plan: Plan) -> str:
    panels = _PANELS.replace("@AHEAD@", _AHEAD if _is_stored(plan) else "")
    if plan.path != "int8":
        return panels + _WIDE_FLOATS
    end = _end(plan, "part + n", "sums[r]", "zeros + n")
    zeros = "scales.zeros_at(block)" if plan.encoding.zero_point else "nullptr"
    operands = _STORED if _is_stored(plan) else _DECODED
    single = plan.blocks == 1
    text = _WIDE_BYTES.replace("@BEGIN@", "" if single else _BEGIN)
    text = text.replace("@TOTAL@", _ONLY_BLOCK if single else _EACH_BLOCK)
    text = text.replace("@END@", end).replace("@ZEROS@", zeros)
    return panels + text.replace("@OPERANDS@", operands.replace("\n", "\n  "))


_DECODER = """\
  const Decoder decoder;
"""

_SIGNED = """\
  Decoder decoder;  // of signed bytes
  decoder.operands = _mm512_xor_si512(decoder.operands, _mm512_set1_epi8(-128));
"""

_APART = """\
// Operands are decoded 16 outputs after 16: what a register takes lies together.
constexpr int64_t OF_ROW = 64, OF_TILE = 256;             // bytes, dwords
constexpr int64_t apart(int64_t steps) { return steps; }  // dwords from one output to the next
"""

_IN_PLACE = """\
// Operands are multiplied where they are stored.
constexpr int64_t OF_ROW = 4 * TILE, OF_TILE = 16 * TILE;  // bytes, dwords
constexpr int64_t apart(int64_t) { return 1; }             // dwords from one output to the next
"""

_NARROW = """\
// A panel against COUNT registers of the weight, tmm4 and on: the sums of each block.
template <int COUNT, int EACH, int SUMS, int X>
INLINE void narrow_dots(const x_t* x, int height, sum_of_one_t* parts) {
  each<COUNT>([&](auto i) INLINE_LAMBDA {
    if constexpr (i % EACH == 0) tile_zero<SUMS>();
    tile_load<X>(x + i * 16 * height, 64);
    @DOT@<SUMS, X, 4 + i>();
    if constexpr (i % EACH == EACH - 1 || i == COUNT - 1)
      tile_store<SUMS>(parts + i / EACH * 16 * LANES, 64);
  });
}

// Panels against steps of a decoded tile, 16 outputs after 16: totals[row][64] += .
template <int COUNT>
ALONE void narrow_panels(const uint32_t* w, const x_t* x, int64_t rows, int64_t first_step,
                         int64_t block, const xsum_t* all_sums, const float* scales,
                         const float* zeros, float* totals) {
  (void)zeros;
  constexpr int EACH = std::min<int>(COUNT, BLOCK / PER_STEP / 16);
  constexpr int PARTS = (COUNT + EACH - 1) / EACH;
  alignas(64) sum_of_one_t parts[PARTS * 16 * LANES];
  for (int n = 0; n < TILE; n += LANES) {
    Sums<PARTS, vf> scale;
    each<PARTS>([&](auto b) INLINE_LAMBDA { at<b>(scale) = load(scales + b * TILE + n); });
    const uint32_t* ws = w + n * apart(COUNT * 16);
    each<COUNT>([&](auto i) INLINE_LAMBDA { tile_load<4 + i>(ws + i * OF_TILE, OF_ROW); });
    for (int64_t row = 0; row < rows; row += 16) {
      const int height = int(std::min<int64_t>(rows - row, 16));
      const x_t* panel = x + row * ALL_STEPS + first_step * height;
      const xsum_t* sums = all_sums + row * BLOCKS + block * height;
      (void)sums;
      if (height == 16)
        narrow_dots<COUNT, EACH, 0, 1>(panel, height, parts);
      else
        narrow_dots<COUNT, EACH, 2, 3>(panel, height, parts), tile_zero<2>(), tile_zero<3>();
#pragma GCC unroll 4
      for (int r = 0; r < height; ++r) {
        float* to = totals + (row + r) * TILE + n;
        vf total = load(to);
        each<PARTS>([&](auto b) INLINE_LAMBDA {
          const sum_of_one_t* part = parts + (b * 16 + r) * LANES;
          total = fma(@END@, at<b>(scale), total);
        });
        store(to, total);
      }
    }
  }
}

// One tile of outputs against some panels, with scales applied to sums: totals[row][64].
void narrow_tile(const Call& call, const Weight& w, int64_t tile, int64_t rows, int64_t first_panel,
                 int64_t last_panel, uint32_t* own, float* totals, TileUnit& unit) {
  const int64_t e = @MATRIX@, first_row = first_panel * 16, at = e * rows + first_row;
  const int64_t count = std::min(rows, last_panel * 16) - first_row;
  const x_t* panels = call.panels + at * ALL_STEPS;
  const xsum_t* sums = call.sums + at * BLOCKS;
  const uint8_t rest = uint8_t((count - 1) % 16 + 1);
  unit.take({16, 16, rest, rest, 16, 16, 16, 16});
  std::memset(totals, 0, count * TILE * sizeof(float));
  Scales scales(w, tile);
  for (int64_t first = 0; first < GROUPS; first += GROUPS_HELD) {
    const int64_t last = std::min(first + GROUPS_HELD, GROUPS), block = first / GROUPS_OF_BLOCK;
@OPERANDS@
    const float *scale = scales.at(block), *zeros = @ZEROS@;
    for (int64_t i = 1; i < BLOCKS_HELD && block + i < BLOCKS; ++i) scales.at(block + i);
    @PANELS@
  }
}
"""

_PANELS = """\
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
@AHEAD@    tile_load<X>(x + i * 16 * height, 64), tile_load<7>(w, OF_ROW);
    @DOT@<SUMS, X, 7>();
    tile_load<7>(next, OF_ROW);
    @DOT@<SUMS + 1, X, 7>();
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
"""

_AHEAD = """\
    if constexpr (ASKS_AHEAD)
      for (int step = 0; step < 16; ++step)
        for (int at = 0; at < 32; at += 16) prefetch(w + AHEAD + step * TILE + at);
"""

_WIDE_FLOATS = """
// One tile of outputs against some panels, scales in the weight: totals[row][64].
void wide_tile(const Call& call, const Weight& w, int64_t tile, int64_t rows, int64_t first_panel,
               int64_t last_panel, uint32_t* own, float* totals, TileUnit& unit) {
  const int64_t e = @MATRIX@, first_row = first_panel * 16;
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
"""

_WIDE_BYTES = """
// One tile of outputs against some panels: totals[row][64]. Sums of bytes end with a block.
void wide_tile(const Call& call, const Weight& w, int64_t tile, int64_t rows, int64_t first_panel,
               int64_t last_panel, uint32_t* own, float* totals, TileUnit& unit) {
  const int64_t e = @MATRIX@, first_row = first_panel * 16, at = e * rows + first_row;
  const int64_t count = std::min(rows, last_panel * 16) - first_row;
  uint32_t* parts = own + DECODED - TOTALS;
@BEGIN@  Scales scales(w, tile);
  for (int64_t block = 0; block < BLOCKS; ++block) {
    const int64_t start = block * GROUPS_OF_BLOCK, end = std::min(start + GROUPS_OF_BLOCK, GROUPS);
    for (int64_t first = start; first < end; first += GROUPS_OF_CHUNK) {
      const int64_t last = std::min(first + GROUPS_OF_CHUNK, end);
  @OPERANDS@
      wide_panels(operands, first * STEPS, (last - first) * STEPS, call.panels + at * ALL_STEPS,
                  count, parts, first == start, unit);
    }
    const float *scale = scales.at(block), *zeros = @ZEROS@;
    (void)zeros;
    for (int64_t row = 0; row < count; ++row) {
      const int64_t panel = row / 16 * 16, r = row - panel;
      const int64_t height = std::min<int64_t>(count - panel, 16);
      const xsum_t* sums = call.sums + (at + panel) * BLOCKS + block * height;
      const uint32_t* part = parts + row * TILE;
      for (int n = 0; n < TILE; n += LANES) {
        float* total = totals + row * TILE + n;
        @TOTAL@
      }
    }
  }
}
"""

_BEGIN = """\
  std::memset(totals, 0, count * TILE * sizeof(float));
"""
_ONLY_BLOCK = "store(total, mul(@END@, load(scale + n)));"
_EACH_BLOCK = "store(total, fma(@END@, load(scale + n), load(total)));"

_DECODED = """\
    decode_chunk(w, tile, first, last, own);
    const uint32_t* operands = own;"""

_STORED = """\
    const uint32_t* operands = w.codes() + (tile * GROUPS + first) * TILE;"""

_MANY_TILE = """\
// One tile of outputs against some panels: totals[row][64]. The way depends on the rows of all
// panels, so that results do not depend on the number of threads.
void many_tile(const Call& call, const Weight& w, int64_t tile, int64_t rows, int64_t first_panel,
               int64_t last_panel, uint32_t* own, float* totals, TileUnit& unit) {
@BODY@}
"""
