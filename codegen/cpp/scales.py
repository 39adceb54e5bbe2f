"""Scales of the repacked weight: 64 floats for a tile's outputs, block by block of inputs.

Double-quantized scales stay in 8 bits: a code is looked up in 256 levels and multiplied with its
nested scale. Nested scales change rarely along a row; a bit mask a block says for which outputs.
"""

from __future__ import annotations

import struct

from fxquant.codegen.cpp.decode import float_table
from fxquant.codegen.cpp.plan import Plan
from fxquant.formats import levels


def scales(plan: Plan) -> str:
    """The text of ``struct Scales``: ``at(block)`` points to the 64 scales of a tile's block."""
    if not plan.is_regular:
        return _gathered(plan)
    zeros = _ZEROS if plan.encoding.zero_point else ""
    if not plan.keeps_scale_codes:
        return _PLAIN.replace("@ZEROS@", zeros)
    assert plan.encoding.scale is not None
    table = levels(plan.encoding.scale)
    assert table is not None, "scales are encoded by a codebook"
    text, tables = _CODES, float_table("SCALE_LEVELS", table)
    if plan.isa.looks_up_bytes:
        text, tables = _PLANES, _byte_planes(table)
    elif plan.isa.vectors == "avx2":
        text = _EIGHTS
    add = " + offset" if plan.encoding.scale.offset else ""
    cursor = _CURSOR.replace("@ZEROS@", zeros)
    start = "    const float offset = w.offset()[0];\n" if add else ""
    lookup = text.replace("@ADD@", add).replace("@START@", start)
    if add:
        lookup = lookup.replace("@OFFSET@", "\n      x = add(x, spread(w.offset()[0]));")
    return f"{tables}\n{cursor.replace('@LOOKUP@', lookup.replace('@OFFSET@', ''))}"


def _byte_planes(table: tuple[float, ...]) -> str:
    """The levels taken apart into four tables of bytes, which a permute can look up."""
    words = [struct.unpack("<I", struct.pack("<f", level))[0] for level in table]
    lines = ["alignas(64) constexpr uint8_t SCALE_LEVELS[4][256] = {"]
    for plane in range(4):
        values = [str(word >> (8 * plane) & 255) for word in words]
        rows = [f"        {', '.join(values[start : start + 16])}," for start in range(0, 256, 16)]
        lines += ["    {", *rows, "    },"]
    return "\n".join([*lines, "};"])


_ZEROS = """
  const float* zeros_at(int64_t block) const {
    return w.zeros() + (tile * BLOCKS + block) * TILE;
  }"""

_PLAIN = """\
struct Scales {
  const Weight& w;
  const int64_t tile;  // number of the tile, all batches counted

  Scales(const Weight& w, int64_t tile) : w(w), tile(tile) {}
  const float* at(int64_t block) { return w.scales() + (tile * BLOCKS + block) * TILE; }@ZEROS@
};
"""

_CURSOR = """\
struct Scales {
  const Weight& w;
  const int64_t tile;  // number of the tile, all batches counted
  alignas(64) float nested[TILE], scales[BLOCKS_AT_ONCE * TILE];

  Scales(const Weight& w, int64_t tile) : w(w), tile(tile) {
    std::memcpy(nested, w.first_nested() + tile * TILE, sizeof nested);
  }

  // Blocks are entered in order, from the first.
  INLINE void enter(int64_t block) {
    const int64_t e = tile / N_TILES, n0 = tile % N_TILES * TILE;
    for (uint64_t left = w.changes()[tile * BLOCKS + block]; left; left &= left - 1) {
      const int64_t row = __builtin_ctzll(left);
      nested[row] = w.nested()[nested_of(e, n0 + row, block)];
    }
  }

  // Where BLOCKS_AT_ONCE of them stand side by side.
  ALONE const float* at(int64_t block) {
    enter(block);
    float* scale = scales + block % BLOCKS_AT_ONCE * TILE;
    const uint8_t* codes = w.scale_codes() + (tile * BLOCKS + block) * TILE;
@LOOKUP@
    return scale;
  }@ZEROS@
};
"""

_CODES = """\
@START@    for (int i = 0; i < TILE; ++i) scale[i] = SCALE_LEVELS[codes[i]] * nested[i]@ADD@;"""

_EIGHTS = """\
    // Left to itself GCC takes codes out of vectors one by one.
    const auto level = [&](int i) INLINE_LAMBDA { return SCALE_LEVELS[codes[i]]; };
    for (int i = 0; i < TILE; i += LANES) {
      vf x = _mm256_setr_ps(level(i), level(i + 1), level(i + 2), level(i + 3), level(i + 4),
                            level(i + 5), level(i + 6), level(i + 7));
      x = mul(x, load(nested + i));@OFFSET@
      store(scale + i, x);
    }"""

_PLANES = """\
    const vi code = _mm512_loadu_si512(codes);
    const __mmask64 upper = _mm512_movepi8_mask(code);
    vi byte[4];
#pragma GCC unroll 4
    for (int plane = 0; plane < 4; ++plane) {
      const uint8_t* table = SCALE_LEVELS[plane];
      const vi t0 = _mm512_load_si512(table), t1 = _mm512_load_si512(table + 64);
      const vi t2 = _mm512_load_si512(table + 128), t3 = _mm512_load_si512(table + 192);
      const vi low = _mm512_permutex2var_epi8(t0, code, t1);
      byte[plane] =
          _mm512_mask_mov_epi8(low, upper, _mm512_permutex2var_epi8(t2, code, t3));
    }
    const vi a = _mm512_unpacklo_epi8(byte[0], byte[1]), b = _mm512_unpackhi_epi8(byte[0], byte[1]);
    const vi c = _mm512_unpacklo_epi8(byte[2], byte[3]), d = _mm512_unpackhi_epi8(byte[2], byte[3]);
    const vi word[4] = {_mm512_unpacklo_epi16(a, c), _mm512_unpackhi_epi16(a, c),
                        _mm512_unpacklo_epi16(b, d), _mm512_unpackhi_epi16(b, d)};
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      vf x = mul(_mm512_castsi512_ps(word[i]), load(nested + 16 * i));@OFFSET@
      store(scale + 16 * i, x);
    }"""


def _gathered(plan: Plan) -> str:
    """Scales that change inside a group: fetched for each input and output."""
    return _GATHERED.replace("@ZEROS@", _GATHERED_ZEROS if plan.encoding.zero_point else "")


_GATHERED = """\
struct Scales {
  const Weight& w;
  const int64_t e, n0;

  Scales(const Weight& w, int64_t tile)
      : w(w), e(tile / N_TILES), n0(tile % N_TILES * TILE) {}

  int64_t block_of(int64_t n, int64_t k) const {  // what lies outside takes the last that is inside
    n = std::min(n, N - 1), k = std::min(k, K - 1);
    return scale_of(e, n, k);
  }

  // The scales of LANES outputs at one input.
  vf at(int64_t first, int64_t k) const {
    float out[LANES];
    for (int i = 0; i < LANES; ++i) out[i] = w.scales()[block_of(n0 + first + i, k)];
    return load(out);
  }@ZEROS@
};
"""

_GATHERED_ZEROS = """
  vf zeros_at(int64_t first, int64_t k) const {
    float out[LANES];
    for (int i = 0; i < LANES; ++i) out[i] = w.zeros()[block_of(n0 + first + i, k)];
    return load(out);
  }"""
