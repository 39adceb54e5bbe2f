"""Many rows: a tile of the weight is decoded once and multiplied with one panel after the other."""

from __future__ import annotations

from fxquant.codegen.cpp.plan import Plan
from fxquant.codegen.cpp.thirds import thirds
from fxquant.codegen.cpp.tiles import decoder, tiles


def many(plan: Plan) -> str:
    """The text of the skeleton for many rows."""
    odd = ""
    whole = _WHOLE if plan.spec.weights == 1 else _WHOLE_OF_SEVERAL
    if plan.has_thirds:
        text = "\n".join([thirds(plan), _RUN])
        declared, given = "\n  TileUnit unit;", ", unit"
        pack = "pack_thirds(call, super_first, rows, of)"
        odd = "  if (are_odd(call, rows)) return run_few(call, super_first, rows, of, part);\n"
    elif plan.uses_tiles:
        text = "\n".join([_decode(plan), tiles(plan), _RUN])
        declared, given = "\n  TileUnit unit;", ", unit"
        pack = "pack_tiles(call, super_first, rows, of)"
    else:
        parts = [_decode(plan), _panels(plan), _TILES.replace("@CHUNK@", _chunk(plan)), _RUN]
        text, declared, given = "\n".join(parts), "", ""
        pack = "pack(call, super_first, rows, MANY_HEIGHTS, of)"
    text = (
        text.replace("@WHOLE@", whole)
        .replace("@UNIT@", declared)
        .replace("@GIVEN@", given)
        .replace("@PACK@", pack)
        .replace("@ODD@", odd)
    )
    return plan.placed(text)


def _panels(plan: Plan) -> str:
    """``many_rows`` of every height."""
    begin, end = "sum_t{}", "add(load(total), sum)"
    if plan.path == "int8":
        if plan.byte_bias:
            begin = "spread(uint32_t(sums[row]))"
        end = "to_float(sum)"
        if plan.encoding.zero_point:
            end = "fma(load(zeros + at_n), spread(-float(sums[row])), to_float(sum))"
        if not plan.keeps_totals:
            end = f"fma({end}, load(scale + at_n), load(total))"
    heights = "\n".join(
        f"    case {height}: return many_rows<{height}>(w, steps, x, sums, scale, zeros, totals);"
        for height in plan.many_heights
    )
    inner = _MANY_BLOCKS if plan.keeps_totals else _MANY
    text = (inner + _HEIGHTS).replace("@BEGIN@", begin).replace("@END@", end)
    text = text.replace("@X@", plan.panel_type)
    return text.replace("@HEIGHTS@", heights)


def _decode(plan: Plan) -> str:
    if plan.path == "int8":
        return "" if plan.encoding.bits == 8 else _levels(plan)
    if plan.is_regular:
        zeros = "load(scales.zeros_at(block) + v * LANES)" if plan.encoding.zero_point else "vf{}"
        text = _placed(plan, _DECODE_REGULAR.replace("@ZEROS@", zeros), "g")
    else:
        text = _placed(plan, _DECODE_GATHERED, "group")
    if plan.path == "bf16":
        body = f"store(out_at, pair({_scaled(plan, '')},\n{' ' * 27}{_scaled(plan, ' + STEPS')}));"
    else:
        body = f"store(reinterpret_cast<float*>(out_at), {_scaled(plan, '')});"
    return text.replace("@BODY@", body)


def _levels(plan: Plan) -> str:
    """A function that decodes without scales."""
    return _placed(plan, _DECODE_LEVELS.replace("@DECODER@", decoder(plan)), "group")


def _placed(plan: Plan, text: str, group: str) -> str:
    """A function that decodes, with where the operands of a step and a vector go to."""
    laid, place = "[step][64]", f"(({group} - first) * STEPS + step) * TILE + v * LANES"
    if plan.uses_tiles:
        laid = "[output / 16][step][16]"
        place = f"((v * (last - first) + {group} - first) * STEPS + step) * LANES"
    return text.replace("@LAID@", laid).replace("@PLACE@", place)


def _scaled(plan: Plan, half: str) -> str:
    """The decoded weight of a step; the second one of a pair stands half a dword on."""
    level = f"decoder.value(code, step{half})"
    scale, zero = "s", "z"
    if not plan.is_regular:
        k = "k + 1" if half else "k"
        scale, zero = f"scales.at(v * LANES, {k})", f"scales.zeros_at(v * LANES, {k})"
    if plan.encoding.zero_point:
        level = f"sub({level}, {zero})"
    return f"mul({level}, {scale})"


def _chunk(plan: Plan) -> str:
    if plan.path != "int8":
        return _CHUNK_FLOATS
    zeros = "scales.zeros_at(block)" if plan.encoding.zero_point else "nullptr"
    text = _CHUNK_STORED if plan.encoding.bits == 8 else _CHUNK_BYTES
    scales = _SCALES_OF_BLOCKS if plan.keeps_totals else _SCALES_OF_BLOCK
    return (text + scales).replace("@ZEROS@", zeros)


_DECODE_REGULAR = """\

// Groups of a tile to operands, scales applied: out@LAID@.
void decode_chunk(const Weight& w, Scales& scales, int64_t tile, int64_t first, int64_t last,
                  uint32_t* out) {
  const Decoder decoder;
  constexpr int ALL = TILE / LANES;
  for (int64_t group = first; group < last;) {
    const int64_t block = group / GROUPS_OF_BLOCK;
    const int64_t end = std::min(last, (block + 1) * GROUPS_OF_BLOCK);
    const float* scale = scales.at(block);
    for (int v = 0; v < ALL; ++v) {
      const vf s = load(scale + v * LANES), z = @ZEROS@;
      (void)z;
      for (int64_t g = group; g < end; ++g) {
        const uint32_t* codes = w.codes() + (tile * GROUPS + g) * TILE;
        prefetch(codes + AHEAD + v * LANES);
        const vi code = load(codes + v * LANES);
#pragma GCC unroll 16
        for (int step = 0; step < STEPS; ++step) {
          uint32_t* out_at = out + @PLACE@;
          @BODY@
        }
      }
    }
    group = end;
  }
}
"""

_DECODE_GATHERED = """\

// Groups of a tile to operands, scales applied: out@LAID@.
void decode_chunk(const Weight& w, Scales& scales, int64_t tile, int64_t first, int64_t last,
                  uint32_t* out) {
  const Decoder decoder;
  constexpr int ALL = TILE / LANES;
  for (int64_t group = first; group < last; ++group) {
    const uint32_t* codes = w.codes() + (tile * GROUPS + group) * TILE;
    for (int v = 0; v < ALL; ++v) {
      prefetch(codes + AHEAD + v * LANES);
      const vi code = load(codes + v * LANES);
#pragma GCC unroll 16
      for (int step = 0; step < STEPS; ++step) {
        const int64_t k = group * PER_DWORD + step * PER_STEP;
        uint32_t* out_at = out + @PLACE@;
        @BODY@
      }
    }
  }
}
"""

_DECODE_LEVELS = """\
// Groups of a tile to operands, without scales: out@LAID@.
void decode_chunk(const Weight& w, int64_t tile, int64_t first, int64_t last, uint32_t* out) {
@DECODER@  constexpr int ALL = TILE / LANES;
  for (int64_t group = first; group < last; ++group) {
    const uint32_t* codes = w.codes() + (tile * GROUPS + group) * TILE;
    for (int v = 0; v < ALL; ++v) {
      prefetch(codes + AHEAD + v * LANES);
      const vi code = load(codes + v * LANES);
#pragma GCC unroll 16
      for (int step = 0; step < STEPS; ++step) {
        store(out + @PLACE@,
              decoder.operand(code, step));
      }
    }
  }
}
"""

_MANY = """\
// ROWS rows against steps of a decoded tile: totals[row][64] += .
template <int ROWS>
ALONE void many_rows(const uint32_t* w, int64_t steps, const @X@* x, const xsum_t* sums,
               const float* scale, const float* zeros, float* totals) {
  (void)sums, (void)scale, (void)zeros;
  for (int at0 = 0; at0 < TILE; at0 += 2 * LANES) {
    Sums<2 * ROWS, sum_t> part;
    each<2 * ROWS>([&](auto i) INLINE_LAMBDA {
      constexpr int row = i / 2;
      (void)row;
      at<i>(part) = @BEGIN@;
    });
    const operand_t* ws = reinterpret_cast<const operand_t*>(w) + at0;
    const @X@* xs = x;
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
      store(total, @END@);
    });
  }
}

"""

_MANY_BLOCKS = """\
// ROWS rows against some blocks of a decoded tile, with totals in registers: totals[row][64] += .
template <int ROWS>
ALONE void many_rows(const uint32_t* w, int64_t steps, const @X@* x, const xsum_t* all_sums,
                     const float* scales, const float* all_zeros, float* totals) {
  for (int at_n = 0; at_n < TILE; at_n += LANES) {
    Sums<ROWS, vf> total;
    each<ROWS>([&](auto row) INLINE_LAMBDA { at<row>(total) = load(totals + row * TILE + at_n); });
    const uint32_t *ws = w + at_n, *last = ws + steps * TILE;
    const @X@* xs = x;
    const xsum_t* sums = all_sums;
    const float *scale = scales, *zeros = all_zeros;
    (void)sums, (void)zeros;
    while (ws < last) {
      Sums<ROWS, sum_t> part;
      each<ROWS>([&](auto row) INLINE_LAMBDA { (void)row, at<row>(part) = @BEGIN@; });
#pragma GCC unroll 1
      for (int step = 0; step < BLOCK / PER_STEP; ++step) {
        const vi operand = load(ws);
        each<ROWS>([&](auto row) INLINE_LAMBDA { dot(at<row>(part), operand, xs + row); });
        ws += TILE, xs += ROWS;
      }
      each<ROWS>([&](auto row) INLINE_LAMBDA {
        const sum_t sum = at<row>(part);
        at<row>(total) = fma(@END@, load(scale + at_n), at<row>(total));
      });
      sums += ROWS, scale += TILE, zeros += TILE;
    }
    each<ROWS>([&](auto row) INLINE_LAMBDA { store(totals + row * TILE + at_n, at<row>(total)); });
  }
}
"""

_HEIGHTS = """
void many_rows(int height, const uint32_t* w, int64_t steps, const @X@* x, const xsum_t* sums,
               const float* scale, const float* zeros, float* totals) {
  switch (height) {
@HEIGHTS@
  }
}
"""

_WHOLE = """\
    many_tile(call, call.weight, tile, rows, first, last, decoded, totals@GIVEN@);
    finish(call, tile, super_first, first_row, count, rows, totals);
"""

_WHOLE_OF_SEVERAL = """\
    for (int i = 0; i < WEIGHTS; ++i)
      many_tile(call, call.weights[i], tile, rows, first, last, decoded,
                totals + i * TOTALS@GIVEN@);
    finish(call, tile, super_first, first_row, count, rows, totals, TOTALS);
"""

_TILES = """\
// One tile of outputs against some panels: totals[row][64].
void many_tile(const Call& call, const Weight& w, int64_t tile, int64_t rows, int64_t first_panel,
               int64_t last_panel, uint32_t* decoded, float* totals) {
  const int64_t e = @MATRIX@, base = e * padded(rows, MANY_HEIGHTS);
  const int64_t first_row = first_panel * MANY_HEIGHTS[0];
  const int64_t last_row = std::min(rows, last_panel * MANY_HEIGHTS[0]);
  std::memset(totals, 0, (last_row - first_row + MANY_HEIGHTS[0]) * TILE * sizeof(float));
  Scales scales(w, tile);
  for (int64_t chunk = 0; chunk < CHUNKS; ++chunk) {
    const int64_t first = chunk * GROUPS_OF_CHUNK;
    const int64_t last = std::min(first + GROUPS_OF_CHUNK, GROUPS);
    const int64_t block = first / GROUPS_OF_BLOCK;
@CHUNK@
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

"""

_RUN = """\
// Tiles of outputs, and parts of the panels where there are too few tiles for all threads.
void run_many(const Call& call, int64_t super_first, int64_t rows, const Share& of,
              const Part& part) {
  if (part.is_first) @PACK@;
@ODD@  const int64_t panels = panels_of(rows, MANY_HEIGHTS);
  uint32_t* decoded = reinterpret_cast<uint32_t*>(call.own + of.thread * OWN_BYTES);
  float* totals = reinterpret_cast<float*>(decoded + DECODED);@UNIT@
  const int64_t wanted = (2 * of.threads + E * N_TILES - 1) / (E * N_TILES);
  const int64_t parts = std::max<int64_t>(1, std::min(wanted, panels));
  const auto items = part.of(E * N_TILES * parts);
  of.each(items.last - items.first, [&](int64_t number) {
    const int64_t item = items.first + number, tile = @FIRST@item / parts, at = item % parts;
    const int64_t first = panels * at / parts, last = panels * (at + 1) / parts;
    const int64_t first_row = first * MANY_HEIGHTS[0];
    const int64_t count = std::min(rows, last * MANY_HEIGHTS[0]) - first_row;
@WHOLE@  });
}
"""

_CHUNK_FLOATS = """\
    decode_chunk(w, scales, tile, first, last, decoded);
    const uint32_t* operands = decoded;
    const float *scale = nullptr, *zeros = nullptr;"""

_CHUNK_BYTES = """\
    decode_chunk(w, tile, first, last, decoded);
    const uint32_t* operands = decoded;
"""

_CHUNK_STORED = """\
    const uint32_t* operands = w.codes() + (tile * GROUPS + first) * TILE;
"""

_SCALES_OF_BLOCK = """\
    const float *scale = scales.at(block), *zeros = @ZEROS@;"""

_SCALES_OF_BLOCKS = (
    _SCALES_OF_BLOCK
    + """
    for (int64_t i = 1; i < BLOCKS_AT_ONCE && block + i < BLOCKS; ++i) scales.at(block + i);"""
)
