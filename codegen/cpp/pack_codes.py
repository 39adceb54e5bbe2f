"""The parts of a packing file that know levels: from a block's peak to its scale and its codes.

Every form provides ``scale_of(peak, last)``, which fills a ``Scale``, and ``encode``, which takes
`STEP` elements to as many codes, one a byte, by one ``Scale`` or by one for each element.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Iterable

import torch

from fxquant.codegen.cpp.isa import Isa
from fxquant.formats import Encoding
from fxquant.formats.quantizers import (
    FEW,
    TINY,
    FullRangeQuantizer,
    Quantizer,
    TableQuantizer,
    UniformQuantizer,
    ZeroPointQuantizer,
)


def fill_in(text: str, **values: object) -> str:
    """A text with every ``@name`` replaced."""
    return re.sub(r"@([a-z_]+)", lambda match: str(values[match[1]]), text)


def floats(numbers: Iterable[float]) -> str:
    """float32 numbers as C++ spells them, exactly."""
    texts = [f"{float(torch.tensor(number)):.9g}" for number in numbers]
    return ", ".join(f"{text if set(text) & set('.en') else text + '.0'}f" for text in texts)


SCALE = """
// What a block's peak comes to: what its elements are multiplied with, or divided by, and for a
// zero point what is added to their codes.
struct Scale {
  Known peak;
  float factor, zero = 0.0f;
  bool divides = false;
  inline float factor_at(int) const { return factor; }
  inline float zero_at(int) const { return zero; }
};

// The same for each of STEP elements that lie in several blocks.
struct Scales {
  float factors[STEP], zeros[STEP];
  static constexpr bool divides = false;
  inline float factor_at(int i) const { return factors[i]; }
  inline float zero_at(int i) const { return zeros[i]; }
  inline void put(int first, int count, const Scale& scale) {
    for (int i = first; i < first + count; ++i) {
      factors[i] = scale.factor;
      zeros[i] = scale.zero;
    }
  }
};
"""

_TABLE_SCALE = """
// Blocks are divided by their peak, but never by less than this.
constexpr float TINY = @tiny;
inline Scale scale_of(const Peak& found, bool last) {
  const float peak = found.value(), divisor = peak < TINY ? TINY : peak;
  if (last && @is_flat) return {divisor, divisor, 0.0f, true};
  return {peak, 1.0f / divisor};
}
template <class S>
inline void rescale(float* values, const S& scale) {
  if (scale.divides)
    for (int i = 0; i < STEP; ++i) values[i] /= scale.factor_at(i);
  else
    for (int i = 0; i < STEP; ++i) values[i] *= scale.factor_at(i);
}
"""

_CLIMB = """
// A value takes the first code, and a step more for each midpoint that it lies above.
inline int32_t code_of(float x) {
  int32_t code = @first;
@steps
  return code;
}
template <class S>
inline void encode(const Bits* x, uint8_t* codes, const S& scale) {
  float values[STEP];
  int32_t found[STEP];
  widen(x, values);
  rescale(values, scale);
  for (int i = 0; i < STEP; ++i) found[i] = code_of(values[i]);
  for (int i = 0; i < STEP; ++i) codes[i] = uint8_t(found[i]);
}
"""

_BISECT_AVX512 = """
alignas(64) constexpr float MIDPOINTS[] = {@midpoints};
alignas(16) constexpr uint8_t CODES[] = {@codes};
// How many midpoints each value lies above: by halves, the midpoint to compare with next being
// looked up by what is known so far.
inline __m512i rank(__m512 x) {
  __m512i found = _mm512_setzero_si512();
@steps
  return found;
}
template <class S>
inline void encode(const Bits* x, uint8_t* codes, const S& scale) {
  float values[STEP];
  widen(x, values);
  rescale(values, scale);
  const __m512i a = rank(_mm512_loadu_ps(values)), b = rank(_mm512_loadu_ps(values + 16)),
                c = rank(_mm512_loadu_ps(values + 32)), d = rank(_mm512_loadu_ps(values + 48));
  // Lane by lane: four dwords of a, of b, of c, of d.
  const __m512i mixed = _mm512_packus_epi16(_mm512_packus_epi32(a, b), _mm512_packus_epi32(c, d));
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  const __m512i table = _mm512_broadcast_i32x4(_mm_load_si128((const __m128i*)CODES));
  const __m512i ranks = _mm512_permutexvar_epi32(order, mixed);
  _mm512_storeu_si512(codes, _mm512_shuffle_epi8(table, ranks));
}
"""

_BISECT_AVX2 = """
alignas(32) constexpr float MIDPOINTS[][8] = {@midpoints};
alignas(16) constexpr uint8_t CODES[] = {@codes};
// How many midpoints each value lies above, negative: by halves, the midpoint to compare with next
// being looked up by what is known so far (a comparison that holds is -1).
inline __m256i rank(const float* values) {
  const __m256 x = _mm256_loadu_ps(values);
  __m256i found = _mm256_setzero_si256();
  for (const float* table : {@tables}) {
    const __m256 midpoint = _mm256_permutevar8x32_ps(_mm256_load_ps(table), found);
    const __m256i above = _mm256_castps_si256(_mm256_cmp_ps(x, midpoint, _CMP_GT_OQ));
    found = _mm256_add_epi32(_mm256_add_epi32(found, found), above);
  }
  return found;
}
template <class S>
inline void encode(const Bits* x, uint8_t* codes, const S& scale) {
  float values[STEP];
  widen(x, values);
  rescale(values, scale);
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  const __m256i table = _mm256_broadcastsi128_si256(_mm_load_si128((const __m128i*)CODES));
  for (int i = 0; i < STEP; i += 32) {
    const __m256i ab = _mm256_packs_epi32(rank(values + i), rank(values + i + 8));
    const __m256i cd = _mm256_packs_epi32(rank(values + i + 16), rank(values + i + 24));
    // Lane by lane: four dwords of the first eight values, of the second ..
    const __m256i mixed = _mm256_abs_epi8(_mm256_packs_epi16(ab, cd));
    const __m256i ranks = _mm256_permutevar8x32_epi32(mixed, order);
    _mm256_storeu_si256((__m256i*)(codes + i), _mm256_shuffle_epi8(table, ranks));
  }
}
"""

_LOOKUP = """
constexpr float MIDPOINTS[] = {@midpoints, INFINITY};
constexpr uint8_t CODES[] = {@codes};
// For the upper 16 bits of a float, how many midpoints the least float with them lies above.
struct Ranks {
  uint8_t of[1 << 16];
  Ranks() {
    for (uint32_t key = 0; key < 1 << 16; ++key) {
      const float least = from_bits(key << 16 | (key >> 15 ? 0xffff : 0));
      of[key] = uint8_t(std::lower_bound(MIDPOINTS, MIDPOINTS + @count, least) - MIDPOINTS);
    }
  }
};
template <class S>
inline void encode(const Bits* x, uint8_t* codes, const S& scale) {
  static const Ranks ranks;
  float values[STEP];
  widen(x, values);
  rescale(values, scale);
  for (int i = 0; i < STEP; ++i) {
    uint32_t bits;
    std::memcpy(&bits, values + i, sizeof bits);
    int rank = ranks.of[bits >> 16];
    for (int k = 0; k < @most; ++k) rank += values[i] > MIDPOINTS[rank];
    codes[i] = CODES[rank];
  }
}
"""

_GRID = """
inline Scale scale_of(const Peak& found, bool) {
  const float peak = found.value();
  return {peak, 1.0f / peak};
}
constexpr float MIDPOINTS[] = {@midpoints};
constexpr uint8_t CODES[] = {@codes};
// The code of every point of an even grid over [-1, 1].
struct Grid {
  uint8_t code[@grid];
  Grid() {
    for (int i = 0; i < @grid; ++i) {
      const float point = (float(i) + float(i)) / @last.0f - 1.0f;
      code[i] = CODES[std::lower_bound(MIDPOINTS, MIDPOINTS + @count, point) - MIDPOINTS];
    }
  }
};
template <class S>
inline void encode(const Bits* x, uint8_t* codes, const S& scale) {
  static const Grid grid;
  float values[STEP];
  int32_t points[STEP];
  widen(x, values);
  for (int i = 0; i < STEP; ++i) {
    float value = values[i] * scale.factor_at(i);
    value = value >= -1.0f ? value : -1.0f;  // NaN too: 0 * inf, in a block of zeros
    value = value <= 1.0f ? value : 1.0f;
    value = (value + 1.0f) * 0.5f;
    points[i] = int32_t(float(double(value) * @last.0 + 0.5));  // rounded once
  }
  for (int i = 0; i < STEP; ++i) codes[i] = grid.code[points[i]];
}
"""

_SYMMETRIC_SCALE = """
inline Scale scale_of(const Peak& found, bool) {
  const float peak = found.value(), scale = peak / @largest;
  return {peak, scale == 0.0f ? INFINITY : scale};
}
"""

_FULL_RANGE_SCALE = """
inline Scale scale_of(const Peak& found, bool) {
  const Known peak = found.value();
  const float scale = (peak.high > peak.low ? -peak.high : peak.low) / @span;
  return {peak, scale == 0.0f ? INFINITY : scale};
}
"""

_ZERO_POINT_SCALE = """
inline Scale scale_of(const Peak& found, bool) {
  const Known peak = found.value();
  const float low = peak.low > 0.0f ? peak.low : 0.0f, high = peak.high > 0.0f ? peak.high : 0.0f;
  const float scale = low / @largest + high / @largest;
  const float divisor = scale == 0.0f ? INFINITY : scale;
  return {peak, divisor, std::min(std::max(std::nearbyint(low / divisor), 0.0f), @largest)};
}
"""

_ROUND = """
template <class S>
inline void encode(const Bits* x, uint8_t* codes, const S& scale) {
  constexpr float WHOLE = 12582912.0f;  // 1.5 * 2**23: a sum with it is rounded to a whole number,
  float values[STEP];                   // halves to even, which stands in its lower bits
  widen(x, values);
  for (int i = 0; i < STEP; ++i) {
    const float least = @least, most = @most;
    float value = values[i] / scale.factor_at(i);
    value = value > least ? value : least;
    value = value < most ? value : most;
    value += WHOLE;
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    codes[i] = uint8_t(bits@zero) & @mask;
  }
}
"""


def codes_of(encoding: Encoding, found: Quantizer, isa: Isa) -> str:
    """From peaks to scales and codes, as `found` does it.

    Args:
        encoding: Of the tensor.
        found: Its quantizer.
        isa: What is printed for.
    """
    if isinstance(found, TableQuantizer):
        return _table(encoding, found, isa)
    assert isinstance(found, (UniformQuantizer, ZeroPointQuantizer)), "a kind of quantizer"
    largest = f"{found.largest}.0f"
    values = {"mask": 2**encoding.bits - 1, "zero": "", "most": largest}
    if isinstance(found, ZeroPointQuantizer):
        values |= {"least": "-scale.zero_at(i)", "most": f"{largest} - scale.zero_at(i)"}
        values["zero"] = " + uint32_t(scale.zero_at(i))"
        return fill_in(_ZERO_POINT_SCALE + _ROUND, **values, largest=largest)
    values["least"] = f"{found.smallest}.0f"
    if isinstance(found, FullRangeQuantizer):
        return fill_in(_FULL_RANGE_SCALE + _ROUND, **values, span=f"{-found.smallest}.0f")
    return fill_in(_SYMMETRIC_SCALE + _ROUND, **values, largest=largest)


def _table(encoding: Encoding, found: TableQuantizer, isa: Isa) -> str:
    """The nearest level of a codebook."""
    codes = found.thresholds.codes
    # Sums with 0 are never -0, which would sort apart from 0 by its bits.
    midpoints = tuple(midpoint + 0.0 for midpoint in found.thresholds.midpoints)
    values: dict[str, object] = {
        "midpoints": floats(midpoints),
        "codes": ", ".join(map(str, codes)),
        "count": len(midpoints),
    }
    if found.book.grid:
        return fill_in(_GRID, **values, grid=found.book.grid, last=found.book.grid - 1)
    scale = fill_in(_TABLE_SCALE, tiny=floats([TINY]), is_flat=str(encoding.is_flat).lower())
    if len(codes) > FEW:
        upper = torch.tensor(midpoints).view(torch.int32) >> 16
        most = max(Counter(upper.tolist()).values())
        return scale + fill_in(_LOOKUP, **values, most=most)
    form = {"avx512": _bisect_avx512, "avx2": _bisect_avx2}.get(isa.vectors, _climb)
    return scale + form(midpoints, codes)


def _climb(midpoints: tuple[float, ...], codes: tuple[int, ...]) -> str:
    lines = [
        f"  code += x > {floats([midpoint])} ? {after - before} : 0;"
        for midpoint, (before, after) in zip(midpoints, itertools.pairwise(codes), strict=True)
    ]
    return fill_in(_CLIMB, first=codes[0], steps="\n".join(lines))


def _padded(codes: tuple[int, ...]) -> str:
    return ", ".join(map(str, codes + (0,) * (16 - len(codes))))


def _bisect_avx512(midpoints: tuple[float, ...], codes: tuple[int, ...]) -> str:
    lines, half = [], len(codes) // 2
    while half:
        table = f"_mm512_loadu_ps(MIDPOINTS + {half - 1})"
        above = f"_mm512_cmp_ps_mask(x, _mm512_permutexvar_ps(found, {table}), _CMP_GT_OQ)"
        lines.append(
            f"  found = _mm512_mask_add_epi32(found, {above}, found, _mm512_set1_epi32({half}));"
        )
        half //= 2
    padded = midpoints + (0.0,) * (16 + len(codes) // 2 - len(midpoints))
    return fill_in(
        _BISECT_AVX512, midpoints=floats(padded), codes=_padded(codes), steps="\n".join(lines)
    )


def _bisect_avx2(midpoints: tuple[float, ...], codes: tuple[int, ...]) -> str:
    rows, known = [], 1
    while known < len(codes):
        width = len(codes) // known
        row = [0.0] * 8
        for place in range(known):
            row[-place % 8] = midpoints[place * width + width // 2 - 1]
        rows.append(f"{{{floats(row)}}}")
        known *= 2
    tables = ", ".join(f"MIDPOINTS[{i}]" for i in range(len(rows)))
    return fill_in(_BISECT_AVX2, midpoints=", ".join(rows), codes=_padded(codes), tables=tables)
