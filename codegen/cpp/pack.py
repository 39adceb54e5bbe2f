"""Prints the C++ that encodes a tensor: peaks of blocks, and codes packed into bytes.

The arithmetic is that of `fxquant.formats.quantizers`, operation by operation, so that the results
are the same bits. One file serves every tensor of one dtype under one encoding, whatever its shape:
the ABI takes blocks as runs of the flattened tensor.

``extern "C" void fxquant_pack(const void* x, int64_t blocks, int64_t width, int64_t rest,
uint8_t* codes, float* peaks, int threads)`` reads `blocks` runs of `width` elements and one of
`rest` elements where that is not 0. It writes ``packed_size`` bytes of codes and the peaks,
``[peak_rows, blocks]`` (one more where there is a rest). NaN and Inf in a block show in its peaks;
its codes are then undefined.
"""

from __future__ import annotations

import torch

from fxquant.codegen.cpp.isa import Isa
from fxquant.codegen.cpp.pack_codes import SCALE, codes_of, fill_in
from fxquant.formats import Encoding
from fxquant.formats.quantizers import TableQuantizer, quantizer

DTYPES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}
"""What can be read, and how the printed file calls it."""

_HEAD = """\
// Encodes @dtype as @encoding (@isa).
#include <cmath>
#include <cstdint>
#include <cstring>
#include <algorithm>
@immintrin
namespace {

using Bits = @int;  // an element as a signed integer
constexpr Bits MAGNITUDE = @magnitude;
constexpr int BITS = @bits, PER_BYTE = 8 / BITS;
constexpr int STEP = 64;  // elements encoded together
constexpr int64_t PIECE = 1 << 16;  // elements that a thread takes at a time
constexpr uint8_t FILL = @fill;  // the code that fills up the last byte

inline float from_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

"""

_FLOAT = {
    "float32": """\
// The value of an element.
inline float number(Bits x) { return from_bits(uint32_t(x)); }
inline float finite(Bits x) { return number(x); }
""",
    "bfloat16": """\
// The value of an element.
inline float number(Bits x) { return from_bits(uint32_t(uint16_t(x)) << 16); }
inline float finite(Bits x) { return number(x); }
""",
    "float16": """\
// The value of an element. No denormal of float32 is touched on the way: a caller may have them
// flushed to zero.
inline float finite(Bits x) {
  const uint32_t sign = uint32_t(x & ~MAGNITUDE) << 16, magnitude = x & MAGNITUDE;
  const float denormal = float(int32_t(magnitude)) * 0x1p-24f;
  uint32_t bits;
  std::memcpy(&bits, &denormal, sizeof bits);
  bits = magnitude < 0x400 ? bits : (magnitude << 13) + (112u << 23);
  return from_bits(bits | sign);
}
inline float number(Bits x) {
  return (x & 0x7c00) == 0x7c00 ? from_bits(0x7f800000u | uint32_t(x & 0x3ff) << 13) : finite(x);
}
""",
}

# Comparing magnitudes as integers is exact and carries NaN and Inf into the peak.
_PEAK_OF_MAGNITUDE = """
using Known = float;

// What is known of a block: its largest magnitude.
struct Peak {
  Bits high = 0;
  inline void look(const Bits* x, int64_t count) {
    Bits most = 0;
    for (int64_t i = 0; i < count; ++i) most = std::max(most, Bits(x[i] & MAGNITUDE));
    high = std::max(high, most);
  }
  inline void join(const Peak& other) { high = std::max(high, other.high); }
  inline float value() const { return number(high); }
};

inline void write_peak(float* peaks, int64_t count, int64_t block, Known peak) {
  (void)count;
  peaks[block] = peak;
}
"""

_PEAK_OF_BOTH_ENDS = """
// An element as an integer that orders as the values do, and back.
inline Bits ordered(Bits x) { return Bits(x ^ (x < 0 ? MAGNITUDE : 0)); }

struct Known {
  float low, high;  // the largest of -x, and of x
};

// What is known of a block: its smallest and its largest element.
struct Peak {
  Bits low = MAGNITUDE, high = Bits(~MAGNITUDE);
  inline void look(const Bits* x, int64_t count) {
    Bits least = low, most = high;
    for (int64_t i = 0; i < count; ++i) {
      const Bits element = ordered(x[i]);
      least = std::min(least, element);
      most = std::max(most, element);
    }
    low = least;
    high = most;
  }
  inline void join(const Peak& other) {
    low = std::min(low, other.low);
    high = std::max(high, other.high);
  }
  // A sum with 0 is never -0.
  inline Known value() const { return {0.0f - number(ordered(low)), number(ordered(high)) + 0.0f}; }
};

inline void write_peak(float* peaks, int64_t count, int64_t block, Known peak) {
  peaks[block] = peak.low;
  peaks[count + block] = peak.high;
}
"""

_WIDEN = """
inline void widen(const Bits* x, float* values) {
  for (int i = 0; i < STEP; ++i) values[i] = finite(x[i]);
}
"""

_WIDEN_F16C = {
    "avx512": """
inline void widen(const Bits* x, float* values) {
  for (int i = 0; i < STEP; i += 16)
    _mm512_storeu_ps(values + i, _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)(x + i))));
}
""",
    "avx2": """
inline void widen(const Bits* x, float* values) {
  for (int i = 0; i < STEP; i += 8)
    _mm256_storeu_ps(values + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(x + i))));
}
""",
}

_JOIN = {
    2: """
// Four codes a byte, the first in the highest bits.
inline void join(const uint8_t* codes, uint8_t* out) {
  for (int i = 0; i < STEP / 4; ++i)
    out[i] = uint8_t(codes[4 * i] << 6 | codes[4 * i + 1] << 4 | codes[4 * i + 2] << 2 |
                     codes[4 * i + 3]);
}
""",
    4: """
// Two codes a byte, the first in the higher bits.
inline void join(const uint8_t* codes, uint8_t* out) {
  for (int i = 0; i < STEP / 2; ++i) out[i] = uint8_t(codes[2 * i] << 4 | codes[2 * i + 1]);
}
""",
    8: """
inline void join(const uint8_t* codes, uint8_t* out) { std::memcpy(out, codes, STEP); }
""",
}

_RUN = """
// Encodes up to STEP elements, the first of which has code number `offset` of its byte.
inline void encode_part(const Bits* x, int offset, int count, uint8_t* out, const Scale& scale) {
  Bits padded[STEP + PER_BYTE] = {};
  uint8_t codes[STEP], bytes[STEP / PER_BYTE];
  std::memcpy(padded + offset, x, count * sizeof(Bits));
  encode(padded, codes, scale);
  join(codes, bytes);
  const int end = offset + count, used = (end + PER_BYTE - 1) / PER_BYTE;
  if (end % PER_BYTE) bytes[used - 1] &= uint8_t(0xff00 >> end % PER_BYTE * BITS);
  if (offset) bytes[0] = uint8_t((bytes[0] & (0xff >> offset * BITS)) | out[0]);
  std::memcpy(out, bytes, used);
}

// Encodes elements `first` to `first + count` of the tensor, which share a scale.
inline void encode_run(const Bits* x, int64_t first, int64_t count, uint8_t* out,
                       const Scale& scale) {
  int64_t i = first, end = first + count;
  if (const int offset = int(i % PER_BYTE)) {
    const int part = int(std::min<int64_t>(count, PER_BYTE - offset));
    encode_part(x + i, offset, part, out + i / PER_BYTE, scale);
    i += part;
  }
  for (; i + STEP <= end; i += STEP) {
    uint8_t codes[STEP];
    encode(x + i, codes, scale);
    join(codes, out + i / PER_BYTE);
  }
  if (i < end) encode_part(x + i, 0, int(end - i), out + i / PER_BYTE, scale);
}

// Looks at one block, and notes its peak.
inline Scale look(const Bits* x, int64_t block, int64_t width, int64_t count, float* peaks) {
  Peak peak;
  peak.look(x + block * width, width);
  const Scale scale = scale_of(peak, false);
  write_peak(peaks, count, block, scale.peak);
  return scale;
}

// As many blocks as make up STEP elements, from number `block` on.
inline void short_blocks(const Bits* x, int64_t block, int64_t width, int64_t count,
                         uint8_t* codes, float* peaks) {
  uint8_t found[STEP];
  Scales scales;
  for (int i = 0; i < STEP; i += int(width))
    scales.put(i, int(width), look(x, block + i / width, width, count, peaks));
  encode(x + block * width, found, scales);
  join(found, codes + block * width / PER_BYTE);
}

// A block of any length, all threads at work on its pieces.
void long_block(const Bits* x, int64_t first, int64_t length, int64_t block, int64_t count,
                uint8_t* codes, float* peaks, int threads, bool cut_short) {
  const int64_t end = first + length, from = first / PIECE, to = (end - 1) / PIECE + 1;
  Peak peak;
  (void)threads;
#pragma omp parallel num_threads(threads) if (to - from > 1)
  {
    Peak mine;
#pragma omp for nowait
    for (int64_t piece = from; piece < to; ++piece) {
      const int64_t start = std::max(first, piece * PIECE);
      mine.look(x + start, std::min(end, (piece + 1) * PIECE) - start);
    }
#pragma omp critical
    peak.join(mine);
  }
  const Scale scale = scale_of(peak, cut_short);
  write_peak(peaks, count, block, scale.peak);
#pragma omp parallel for num_threads(threads) if (to - from > 1)
  for (int64_t piece = from; piece < to; ++piece) {
    const int64_t start = std::max(first, piece * PIECE);
    encode_run(x, start, std::min(end, (piece + 1) * PIECE) - start, codes, scale);
  }
}

}  // namespace

extern "C" void fxquant_pack(const void* input, int64_t blocks, int64_t width, int64_t rest,
                             uint8_t* codes, float* peaks, int threads) {
  const Bits* x = static_cast<const Bits*>(input);
  const int64_t count = blocks + (rest != 0), total = blocks * width + rest;
  (void)threads;
  if (width > 4 * PIECE) {
    for (int64_t block = 0; block < blocks; ++block)
      long_block(x, block * width, width, block, count, codes, peaks, threads, false);
  } else {
    // Each thread writes whole bytes.
    const int64_t share = std::max<int64_t>(1, PIECE / width / PER_BYTE) * PER_BYTE;
    const int64_t per_step = width < STEP && STEP % width == 0 ? STEP / width : blocks + 1;
#pragma omp parallel for num_threads(threads) schedule(dynamic) if (blocks > share)
    for (int64_t first = 0; first < blocks; first += share) {
      const int64_t end = std::min(first + share, blocks);
      int64_t block = first;
      for (; block + per_step <= end; block += per_step)
        short_blocks(x, block, width, count, codes, peaks);
      for (; block < end; ++block) {
        const Scale scale = look(x, block, width, count, peaks);
        encode_run(x, block * width, width, codes, scale);
      }
    }
  }
  if (rest)
    long_block(x, blocks * width, rest, blocks, count, codes, peaks, threads, true);
  for (int64_t i = total; i % PER_BYTE; ++i)
    codes[i / PER_BYTE] |= uint8_t(FILL << (8 - BITS * (i % PER_BYTE + 1)));
}
"""


def can_pack(encoding: Encoding, dtype: torch.dtype) -> bool:
    """Whether there is a printed form for tensors of this dtype under this encoding.

    Clipped blocks need a quantile, and midpoints that overflow decide nothing: both are left to
    torch.
    """
    if dtype not in DTYPES or encoding.clip not in (None, 1.0):
        return False
    found = quantizer(encoding)
    return not isinstance(found, TableQuantizer) or all(
        abs(midpoint) < float("inf") for midpoint in found.thresholds.midpoints
    )


def render_pack(encoding: Encoding, dtype: torch.dtype, isa: Isa) -> str:
    """The C++17 file that encodes tensors of a dtype.

    Args:
        encoding: One that `can_pack`. Its block's shape does not matter beyond whether it is flat,
            nor how scales are encoded: `fxquant.formats.encode` does that.
        dtype: Of the tensors.
        isa: What it is compiled for.
    """
    found = quantizer(encoding)
    name = DTYPES[dtype]
    head = fill_in(
        _HEAD,
        dtype=name,
        encoding=encoding,
        isa=isa.name,
        immintrin="#include <immintrin.h>\n" if isa.features else "",
        int="int32_t" if dtype == torch.float32 else "int16_t",
        magnitude="0x7fffffff" if dtype == torch.float32 else "0x7fff",
        bits=encoding.bits,
        fill=found.fill,
    )
    peak = _PEAK_OF_MAGNITUDE if found.peak_rows == 1 else _PEAK_OF_BOTH_ENDS
    widen = _WIDEN_F16C[isa.vectors] if name == "float16" and "f16c" in isa.features else _WIDEN
    join = _JOIN[encoding.bits]
    codes = codes_of(encoding, found, isa)
    return head + _FLOAT[name] + widen + peak + SCALE + codes + join + _RUN
