// nf4_linear_384x1536_bias.
//
// out[m, 384] = x[m, 1536] @ weight.T, then add (bfloat16 to bfloat16).
//
// Printed by fxquant. The spec, which fxquant.codegen.reference defines:
//   {"compute_dtype": "bfloat16", "epilogue": {"nodes": [["aten.add.Tensor", ["%acc", "%in0"],
//   []]], "operands": [["n", "bfloat16"]]}, "name": "nf4_linear_384x1536_bias", "out_dtype":
//   "bfloat16", "weight": {"batch": null, "encoding": {"bits": 4, "levels": "nf4", "scale":
//   {"bits": 8, "block": [256], "levels": "dynamic8", "offset": true}}, "k": 1536, "n": 384,
//   "offset": 0, "shape": [384, 1536], "strides": [0, 1536, 1]}, "x_dtype": "bfloat16"}
//
// Weight: [384, 1536], 4 bits nf4 in blocks of 64, scales 8 bits dynamic8 in blocks of 256
// Scheme: nf4
// Modules: golden

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include <immintrin.h>
#ifdef _OPENMP
#include <omp.h>
#else
inline int omp_get_thread_num() { return 0; }
inline int omp_get_num_threads() { return 1; }
#endif

#define INLINE [[gnu::always_inline]] inline
#define INLINE_LAMBDA __attribute__((always_inline))
#define ALONE [[gnu::noinline]]  // inlined, GCC would keep sums in memory

namespace {

using stored_t = uint16_t;  // the activation, in bfloat16
using out_t = uint16_t;  // the result, in bfloat16
using x_t = uint32_t;  // the activation, as products take it
using operand_t = uint32_t;  // the weight, as products take it
using xsum_t = float;
typedef uint16_t half_t __attribute__((may_alias));  // bfloat16, read in pairs
constexpr int64_t E = 1;  // matrices
constexpr int64_t N = 384;  // outputs
constexpr int64_t K = 1536;  // inputs
constexpr int64_t OFFSET = 0;  // of the first weight in the stored tensor, in elements
constexpr int64_t STRIDE_E = 0;
constexpr int64_t STRIDE_N = 1536;
constexpr int64_t STRIDE_K = 1;
constexpr int64_t TILE = 64;  // outputs that are worked on together
constexpr int64_t N_TILES = 6;
constexpr int64_t K_PADDED = 1536;  // inputs, up to whole tiles
constexpr int64_t BITS = 4;  // of a code
constexpr int64_t PER_DWORD = 8;  // codes in a dword: the inputs of a group
constexpr int64_t GROUPS = 192;  // in a row
constexpr int64_t ALL_STEPS = 768;  // instructions for a row
constexpr int64_t BLOCK = 64;  // inputs that are summed before a scale is applied
constexpr int64_t BLOCKS = 24;  // in a row
constexpr int64_t GROUPS_OF_BLOCK = 8;
constexpr int64_t GROUPS_AT_ONCE = 32;  // that few rows go through before the next
constexpr int64_t BLOCKS_AT_ONCE = 1;  // whose scales stand side by side
constexpr int64_t GROUPS_OF_CHUNK = 32;  // that are decoded at a time for many rows
constexpr int64_t CHUNKS = 6;  // in a row
constexpr int64_t DECODED = 8192;  // dwords of a decoded chunk
constexpr int64_t SUPER_ROWS = 768;  // rows that are worked off at a time
constexpr int64_t OWN_BYTES = 232448;  // a thread
constexpr int64_t AHEAD = 2048;  // dwords of codes that are asked for in advance
constexpr int STEPS = 4;  // instructions that use up a group
constexpr int MOST_SUMS = 24;  // registers of sums
constexpr int PLACES[8] = {0, 2, 4, 6, 1, 3, 5, 7};  // of a dword: whose codes stand there
constexpr int MOST_ROWS = 16;  // of a panel
constexpr int FEW_HEIGHTS[8] = {16, 12, 8, 6, 4, 3, 2, 1};  // of panels, in rows
constexpr int MANY_HEIGHTS[3] = {12, 8, 4};  // of panels, in rows

using vf = __m512;   // 16 floats
using vi = __m512i;  // 16 dwords
typedef uint32_t vu __attribute__((vector_size(64)));
using sum_t = vf;  // what products are summed in
constexpr int LANES = 16;

INLINE vf load(const float* p) { return _mm512_loadu_ps(p); }
INLINE vi load(const uint32_t* p) { return _mm512_loadu_si512(p); }
INLINE void store(float* p, vf x) { _mm512_storeu_ps(p, x); }
INLINE void store(uint32_t* p, vi x) { _mm512_storeu_si512(p, x); }
INLINE vf spread(float x) { return _mm512_set1_ps(x); }
INLINE vi spread(uint32_t x) { return _mm512_set1_epi32(int(x)); }
INLINE vf add(vf a, vf b) { return _mm512_add_ps(a, b); }
INLINE vi add(vi a, vi b) { return _mm512_add_epi32(a, b); }
INLINE vf mul(vf a, vf b) { return _mm512_mul_ps(a, b); }
INLINE vf fma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
INLINE vf to_float(vi x) { return _mm512_cvtepi32_ps(x); }
INLINE vf to_float(vf x) { return x; }
INLINE vi shift_right(vi x, int bits) { return vi(vu(x) >> bits); }

// Two vectors of floats rounded to bfloat16, each dword holding one of the first below one of the
// second.
INLINE vi pair(vf low, vf high) {
  alignas(64) static constexpr uint16_t ORDER[32] = {
      0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
      8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31,
  };
  const vi both = vi(_mm512_cvtne2ps_pbh(high, low));
  return _mm512_permutexvar_epi16(_mm512_load_si512(ORDER), both);
}

// GCC spills around its own intrinsic for this instruction: two to three times slower.
INLINE void dot(vf& sum, vi w, const uint32_t* x) {  // += w.lo * x.lo + w.hi * x.hi, bfloat16 pairs
  asm("vdpbf16ps %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(w), "m"(*x));
}

// Codes on their way to the second-level cache; what lies behind the weight does no harm.
INLINE void prefetch(const uint32_t* codes) { __builtin_prefetch(codes, 0, 2); }

// Calls f with 0, 1 .. COUNT - 1 as constants.
template <typename F, int... I> INLINE void each(F&& f, std::integer_sequence<int, I...>) {
  (f(std::integral_constant<int, I>{}), ...);
}
template <int COUNT, typename F> INLINE void each(F&& f) {
  each(f, std::make_integer_sequence<int, COUNT>{});
}

// Sums that stay in registers: members, for GCC would keep an array in memory.
template <int COUNT, typename T = sum_t> struct Sums {
  T first;
  Sums<COUNT - 1, T> rest;
};
template <typename T> struct Sums<0, T> {};

template <int I, int COUNT, typename T> INLINE T& at(Sums<COUNT, T>& sums) {
  if constexpr (I == 0)
    return sums.first;
  else
    return at<I - 1>(sums.rest);
}

[[gnu::always_inline]] static inline uint32_t bits_of(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits;
}

[[gnu::always_inline]] static inline float float_of(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}

// The upper half of a float32.
[[gnu::always_inline]] static inline float from_bf16(uint16_t half) {
    return float_of(uint32_t(half) << 16);
}

// To nearest, ties to even: adds just under half of the last place, more if it is odd. A NaN keeps
// its sign and becomes quiet.
[[gnu::always_inline]] static inline uint16_t to_bf16(float x) {
    const uint32_t bits = bits_of(x);
    const uint32_t nearest = bits + 0x7fffu + ((bits >> 16) & 1u);
    const uint32_t kept = (bits & 0x7fffffffu) > 0x7f800000u ? bits | 0x400000u : nearest;
    return uint16_t(kept >> 16);
}

INLINE uint16_t half_of(stored_t x) { return x; }

alignas(64) constexpr float LEVELS[16] = {
    (-1.0f), (-0.6961928f), (-0.52507305f), (-0.3949175f), (-0.28444138f), (-0.18477343f),
    (-0.091050036f), 0.0f, 0.0795803f, 0.1609302f, 0.2461123f, 0.33791524f, 0.44070983f, 0.562617f,
    0.72295684f, 1.0f,
};
alignas(64) constexpr uint16_t OPERAND_LEVELS[32] = {
    0xbf80, 0xbf32, 0xbf06, 0xbeca, 0xbe92, 0xbe3d, 0xbdba, 0x0000, 0x3da3, 0x3e25, 0x3e7c, 0x3ead,
    0x3ee2, 0x3f10, 0x3f39, 0x3f80, 0xbf80, 0xbf32, 0xbf06, 0xbeca, 0xbe92, 0xbe3d, 0xbdba, 0x0000,
    0x3da3, 0x3e25, 0x3e7c, 0x3ead, 0x3ee2, 0x3f10, 0x3f39, 0x3f80,
};
struct Decoder {
  vf levels = load(LEVELS);
  INLINE vf value(vi codes, int place) const {  // 4-bit place to float32
    return _mm512_permutexvar_ps(shift_right(codes, 4 * place), levels);
  }
  vi operands = load(reinterpret_cast<const uint32_t*>(OPERAND_LEVELS));
  INLINE vi operand(vi codes, int step) const {  // both halves at once
    return _mm512_permutexvar_epi16(shift_right(codes, 4 * step), operands);
  }
};

struct Weight {
  unsigned char* base;

  uint32_t* codes() const { return reinterpret_cast<uint32_t*>(base); }
  uint8_t* scale_codes() const { return reinterpret_cast<uint8_t*>(base + 294912); }
  uint64_t* changes() const { return reinterpret_cast<uint64_t*>(base + 304128); }
  float* first_nested() const { return reinterpret_cast<float*>(base + 305280); }
  float* nested() const { return reinterpret_cast<float*>(base + 306816); }
  float* offset() const { return reinterpret_cast<float*>(base + 307008); }
};
constexpr int64_t PREPARED_BYTES = 307072;

alignas(64) constexpr uint8_t SCALE_LEVELS[4][256] = {
    {
        51, 154, 0, 102, 205, 51, 154, 0, 102, 205, 51, 154, 0, 102, 205, 51,
        154, 0, 102, 205, 52, 154, 0, 102, 205, 52, 154, 0, 102, 205, 52, 154,
        0, 102, 204, 51, 50, 0, 204, 154, 102, 51, 0, 204, 154, 102, 51, 0,
        204, 154, 102, 52, 0, 153, 51, 205, 102, 0, 154, 51, 205, 102, 0, 52,
        133, 247, 103, 215, 72, 184, 42, 154, 10, 123, 235, 93, 205, 123, 93, 61,
        31, 0, 225, 195, 163, 133, 103, 72, 82, 21, 215, 154, 93, 31, 195, 72,
        100, 24, 205, 129, 106, 211, 59, 164, 13, 116, 221, 138, 92, 45, 252, 157,
        255, 62, 128, 193, 1, 131, 5, 11, 75, 179, 52, 6, 255, 148, 183, 0,
        183, 148, 255, 6, 52, 179, 75, 11, 5, 131, 1, 193, 128, 62, 255, 157,
        252, 45, 92, 138, 221, 116, 13, 164, 59, 211, 106, 129, 205, 24, 100, 72,
        195, 31, 93, 154, 215, 21, 82, 72, 103, 133, 163, 195, 225, 0, 31, 61,
        93, 123, 205, 93, 235, 123, 10, 154, 42, 184, 72, 215, 103, 247, 133, 52,
        0, 102, 205, 51, 154, 0, 102, 205, 51, 153, 0, 52, 102, 154, 204, 0,
        51, 102, 154, 204, 0, 51, 102, 154, 204, 0, 50, 51, 204, 102, 0, 154,
        52, 205, 102, 0, 154, 52, 205, 102, 0, 154, 52, 205, 102, 0, 154, 51,
        205, 102, 0, 154, 51, 205, 102, 0, 154, 51, 205, 102, 0, 154, 51, 0,
    },
    {
        51, 153, 0, 102, 204, 51, 153, 0, 102, 204, 51, 153, 0, 102, 204, 51,
        153, 0, 102, 204, 51, 153, 0, 102, 204, 51, 153, 0, 102, 204, 51, 153,
        0, 102, 204, 51, 51, 0, 204, 153, 102, 51, 0, 204, 153, 102, 51, 0,
        204, 153, 102, 51, 0, 153, 51, 204, 102, 0, 153, 51, 204, 102, 0, 51,
        235, 40, 102, 163, 225, 30, 92, 153, 215, 20, 81, 143, 204, 20, 143, 10,
        133, 0, 122, 245, 112, 235, 102, 225, 184, 174, 163, 153, 143, 133, 245, 225,
        59, 4, 204, 149, 188, 77, 223, 112, 2, 147, 36, 108, 143, 178, 169, 239,
        101, 232, 106, 236, 111, 226, 231, 215, 31, 239, 128, 66, 5, 26, 163, 0,
        163, 26, 5, 66, 128, 239, 31, 215, 231, 226, 111, 236, 106, 232, 101, 239,
        169, 178, 143, 108, 36, 147, 2, 112, 223, 77, 188, 149, 204, 4, 59, 225,
        245, 133, 143, 153, 163, 174, 184, 225, 102, 235, 112, 245, 122, 0, 133, 10,
        143, 20, 204, 143, 81, 20, 215, 153, 92, 30, 225, 163, 102, 40, 235, 51,
        0, 102, 204, 51, 153, 0, 102, 204, 51, 153, 0, 51, 102, 153, 204, 0,
        51, 102, 153, 204, 0, 51, 102, 153, 204, 0, 51, 51, 204, 102, 0, 153,
        51, 204, 102, 0, 153, 51, 204, 102, 0, 153, 51, 204, 102, 0, 153, 51,
        204, 102, 0, 153, 51, 204, 102, 0, 153, 51, 204, 102, 0, 153, 51, 0,
    },
    {
        126, 122, 119, 115, 111, 108, 104, 101, 97, 93, 90, 86, 83, 79, 75, 72,
        68, 65, 61, 57, 54, 50, 47, 43, 39, 36, 32, 29, 25, 21, 18, 14,
        11, 7, 3, 0, 249, 242, 234, 227, 220, 213, 206, 198, 191, 184, 177, 170,
        162, 155, 148, 141, 134, 125, 111, 96, 82, 68, 53, 39, 24, 10, 248, 219,
        201, 196, 190, 184, 178, 173, 167, 161, 155, 150, 144, 138, 132, 126, 114, 103,
        91, 80, 68, 56, 45, 33, 22, 10, 254, 231, 208, 185, 162, 139, 104, 58,
        31, 22, 12, 3, 244, 226, 207, 189, 171, 152, 134, 103, 66, 29, 241, 167,
        119, 89, 60, 30, 1, 199, 140, 35, 186, 138, 55, 178, 2, 90, 19, 0,
        19, 90, 2, 178, 55, 138, 186, 35, 140, 199, 1, 30, 60, 89, 119, 167,
        241, 29, 66, 103, 134, 152, 171, 189, 207, 226, 244, 3, 12, 22, 31, 58,
        104, 139, 162, 185, 208, 231, 254, 10, 22, 33, 45, 56, 68, 80, 91, 103,
        114, 126, 132, 138, 144, 150, 155, 161, 167, 173, 178, 184, 190, 196, 201, 219,
        248, 10, 24, 39, 53, 68, 82, 96, 111, 125, 134, 141, 148, 155, 162, 170,
        177, 184, 191, 198, 206, 213, 220, 227, 234, 242, 249, 0, 3, 7, 11, 14,
        18, 21, 25, 29, 32, 36, 39, 43, 47, 50, 54, 57, 61, 65, 68, 72,
        75, 79, 83, 86, 90, 93, 97, 101, 104, 108, 111, 115, 119, 122, 126, 128,
    },
    {
        191, 191, 191, 191, 191, 191, 191, 191, 191, 191, 191, 191, 191, 191, 191, 191,
        191, 191, 191, 191, 191, 191, 191, 191, 191, 191, 191, 191, 191, 191, 191, 191,
        191, 191, 191, 191, 190, 190, 190, 190, 190, 190, 190, 190, 190, 190, 190, 190,
        190, 190, 190, 190, 190, 190, 190, 190, 190, 190, 190, 190, 190, 190, 189, 189,
        189, 189, 189, 189, 189, 189, 189, 189, 189, 189, 189, 189, 189, 189, 189, 189,
        189, 189, 189, 189, 189, 189, 189, 189, 188, 188, 188, 188, 188, 188, 188, 188,
        188, 188, 188, 188, 187, 187, 187, 187, 187, 187, 187, 187, 187, 187, 186, 186,
        186, 186, 186, 186, 186, 185, 185, 185, 184, 184, 184, 183, 183, 182, 181, 0,
        53, 54, 55, 55, 56, 56, 56, 57, 57, 57, 58, 58, 58, 58, 58, 58,
        58, 59, 59, 59, 59, 59, 59, 59, 59, 59, 59, 60, 60, 60, 60, 60,
        60, 60, 60, 60, 60, 60, 60, 61, 61, 61, 61, 61, 61, 61, 61, 61,
        61, 61, 61, 61, 61, 61, 61, 61, 61, 61, 61, 61, 61, 61, 61, 61,
        61, 62, 62, 62, 62, 62, 62, 62, 62, 62, 62, 62, 62, 62, 62, 62,
        62, 62, 62, 62, 62, 62, 62, 62, 62, 62, 62, 63, 63, 63, 63, 63,
        63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63,
        63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63,
    },
};
struct Scales {
  const Weight& w;
  const int64_t tile;  // number of the tile, all batches counted
  alignas(64) float nested[TILE], scales[BLOCKS_AT_ONCE * TILE];

  Scales(const Weight& w, int64_t tile) : w(w), tile(tile) {
    std::memcpy(nested, w.first_nested() + tile * TILE, sizeof nested);
  }

  static int64_t nested_of(int64_t e, int64_t n, int64_t k) {  // k counts blocks
    return (n * 24 + k) / 256;
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
      vf x = mul(_mm512_castsi512_ps(word[i]), load(nested + 16 * i));
    x = add(x, spread(w.offset()[0]));
      store(scale + 16 * i, x);
    }
    return scale;
  }
};

// How many items of its part were taken from a thread: of this work, and of the next or the last.
struct Turn {
  alignas(64) int64_t taken[2];

  int64_t take(int64_t turn) { return __atomic_fetch_add(taken + turn % 2, 1, __ATOMIC_RELAXED); }
};

// What a thread takes of some work.
struct Share {
  const int64_t thread, threads;
  Turn* const turns;
  int64_t turn = 0;
  struct Range {
    int64_t first, last;
  };

  Share(int64_t thread, int64_t threads, Turn* turns = nullptr)
      : thread(thread), threads(threads), turns(turns) {}
  Range part(int64_t count) const {
    return {count * thread / threads, count * (thread + 1) / threads};
  }
  // Calls f with the items of its part, then with what is left of the others' parts: cores are not
  // equally fast.
  template <typename F> void each(int64_t count, F&& f) const {
    for (int64_t i = 0; i < threads; ++i) {
      const auto items = Share((thread + i) % threads, threads).part(count);
      Turn alone{}, &of = turns ? turns[(thread + i) % threads] : alone;
      for (int64_t item; (item = items.first + of.take(turn)) < items.last;) f(item);
    }
  }
  // After all have waited: the next each is about other items.
  void go_on() {
    if (turns) turns[thread].taken[turn % 2] = 0;
    ++turn;
  }
  // Until the others are here, too.
  void wait() const {
    if (threads == 1) return;
#pragma omp barrier
  }
};

// Which part of the outputs is to be made, and whether rows have to be packed for it first.
struct Part {
  int64_t part = 0, parts = 1;
  bool is_first = true;

  Share::Range of(int64_t count) const { return Share(part, parts).part(count); }
};

// One call: its operands, and what is made of the activation in scratch memory.
struct Call {
  Weight weight;
  const stored_t* x;  // [e, m, k] with these strides
  int64_t x_e, x_row, x_col, m;
  out_t* out;  // [e, m, n]
  const void* const* extra;

  Turn* turns;  // how far each thread is with its part
  x_t* lines;  // [e][row][step]
  x_t* panels;  // [e][panel][step][row of it]
  xsum_t* sums;  // none are needed
  unsigned char* own;  // of each thread
  bool is_line;  // rows are lines as they are
};

// A row on its way to the second-level cache: what is read row by row would wait for each of them.
INLINE void ask_ahead(const stored_t* row) {
  constexpr int64_t OF_LINE = 64 / sizeof(stored_t);
  for (int64_t k = 0; k < K; k += OF_LINE) __builtin_prefetch(row + k, 0, 2);
}

// A row as a line.
INLINE void line_of(const stored_t* x, int64_t x_col, x_t* line) {
  half_t* half = reinterpret_cast<half_t*>(line);
  for (int64_t k = 0; k < K; ++k) half[k] = half_of(x[k * x_col]);
  for (int64_t k = K; k < K_PADDED; ++k) half[k] = 0;
}

void line_of(const Call& call, const stored_t* x, x_t* line) {
  // With the stride a constant the usual case becomes vector instructions.
  if (call.x_col == 1) return line_of(x, 1, line);
  line_of(x, call.x_col, line);
}

// Panels: all but the last have the largest height, the last the smallest that will do.
template <int COUNT> INLINE int height_of(int64_t rows, const int (&heights)[COUNT]) {
  int found = heights[0];
  for (int height : heights)
    if (rows <= height) found = height;
  return found;
}
template <int COUNT> INLINE int64_t panels_of(int64_t rows, const int (&heights)[COUNT]) {
  return (rows + heights[0] - 1) / heights[0];
}
template <int COUNT> INLINE int64_t padded(int64_t rows, const int (&heights)[COUNT]) {
  const int64_t whole = rows / heights[0] * heights[0];
  return whole == rows ? rows : whole + height_of(rows - whole, heights);
}

// Makes the line of a row under work, the item-th of all matrices, and what else is kept of it.
template <int COUNT>
INLINE void make_line(const Call& call, int64_t super_first, int64_t rows, int64_t item,
                      const int (&heights)[COUNT], bool is_last, x_t* line) {
  const int64_t e = item / rows, row = item % rows;
  const stored_t* x = call.x + e * call.x_e + (super_first + row) * call.x_row;
  if (call.x_col == 1 && !is_last) ask_ahead(x + call.x_row);
  line_of(call, x, line);
}

// Panels of the rows that are under work; every thread makes some.
template <int COUNT>
void pack(const Call& call, int64_t super_first, int64_t rows, const int (&heights)[COUNT],
          const Share& of) {
  const bool is_single = call.m == 1 && height_of(1, heights) == 1;
  if (call.is_line && is_single) return;
  const auto mine = of.part(E * rows);
  for (int64_t item = mine.first; !call.is_line && item < mine.last; ++item)
    make_line(call, super_first, rows, item, heights, item + 1 == mine.last,
              call.lines + item * ALL_STEPS);
  of.wait();
  if (is_single) return;
  const int64_t all = padded(rows, heights), panels = panels_of(rows, heights);
  const int64_t parts = panels < of.threads ? of.threads : 1;
  for (int64_t item = of.thread; item < E * panels * parts; item += of.threads) {
    const int64_t e = item / parts / panels, panel_row = item / parts % panels * heights[0];
    const auto part = Share(item % parts, parts).part(ALL_STEPS / 16);
    const int height = height_of(rows - panel_row, heights);
    const x_t* lines[MOST_ROWS];
    for (int row = 0; row < height; ++row) {
      const int64_t line = std::min<int64_t>(panel_row + row, rows - 1);
      lines[row] = call.lines + (e * rows + line) * ALL_STEPS;
      if (call.is_line)
        lines[row] = reinterpret_cast<const x_t*>(call.x + e * call.x_e +
                                                  (super_first + line) * call.x_row);
    }
    x_t* panel = call.panels + (e * all + panel_row) * ALL_STEPS;
    // A cache line of a row at a time: rows are often apart by what evicts each other.
    for (int64_t first = part.first * 16; first < part.last * 16; first += 16)
      for (int row = 0; row < height; ++row)
        for (int64_t step = first; step < first + 16; ++step)
          panel[step * height + row] = lines[row][step];
  }
  of.wait();
}

// One row of a tile: epilogue and rounding.
INLINE void finish_row(const Call& call, int64_t e, int64_t row, int64_t n0, int64_t count,
                       const float* sums) {
  const int64_t at = (e * call.m + row) * N + n0;
  uint16_t* out = call.out + at;
  const uint16_t* p0 = static_cast<const uint16_t*>(call.extra[0]) + n0;
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    const float acc = sums[i];
    const float in0 = from_bf16(p0[i]);
    const float v0 = (acc + in0);
    out[i] = to_bf16(v0);
  }
}

// The rows from panel_row on of the rows that are under work, which start at super_first.
void finish(const Call& call, int64_t tile, int64_t super_first, int64_t panel_row, int64_t rows,
            int64_t all_rows, float* totals) {
  const int64_t e = tile / N_TILES, n0 = tile % N_TILES * TILE;
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t at = super_first + panel_row + row;
    const float* sums = totals + row * TILE;
    if (N - n0 >= TILE)
      finish_row(call, e, at, n0, TILE, sums);
    else
      finish_row(call, e, at, n0, N - n0, sums);
  }
}

// Vectors of outputs whose sums are kept at once.
constexpr int vectors_of(int rows, int all) {
  return all == 1 || rows * all <= MOST_SUMS ? all : vectors_of(rows, all / 2);
}

// ROWS rows against groups of a tile: totals[row][64] += , for VECTORS vectors of outputs.
template <int ROWS, int VECTORS>
ALONE void few_sums(const uint32_t* codes, const uint32_t* ahead, int64_t groups, const x_t* x,
                    const xsum_t* sums, uint32_t once, const float* scale, const float* zeros,
                    float* totals) {
  // Few sums would wait for each other: they are made in turns.
  constexpr int TURNS = ROWS * VECTORS * 2 <= MOST_SUMS && STEPS > 1 ? 2 : 1;
  // Where reading in order is all there is to do, processors look ahead better by themselves.
  constexpr bool ASKS_AHEAD = VECTORS * LANES < TILE || ROWS * STEPS > 4;
  (void)ahead, (void)sums, (void)once, (void)zeros;
  const Decoder decoder;
  Sums<VECTORS * ROWS> part, turn;
  each<VECTORS * ROWS>([&](auto i) INLINE_LAMBDA {
    constexpr int row = i % ROWS;
    (void)row;
    at<i>(part) = sum_t{};
    if constexpr (TURNS == 2) at<i>(turn) = sum_t{};
  });
#pragma GCC unroll 1
  for (int64_t group = 0; group < groups; ++group) {
    each<VECTORS>([&](auto v) INLINE_LAMBDA {
      if constexpr (ASKS_AHEAD) prefetch(ahead + v * LANES);
      const vi code = load(codes + v * LANES);
      each<STEPS>([&](auto step) INLINE_LAMBDA {
        const auto operand = decoder.operand(code, step);
        each<ROWS>([&](auto row) INLINE_LAMBDA {
          if constexpr (TURNS == 2 && step % 2)
            dot(at<v * ROWS + row>(turn), operand, x + step * ROWS + row);
          else
            dot(at<v * ROWS + row>(part), operand, x + step * ROWS + row);
        });
      });
    });
    codes += TILE;
    ahead += VECTORS * LANES;
    x += STEPS * ROWS;
  }
  each<VECTORS * ROWS>([&](auto i) INLINE_LAMBDA {
    constexpr int row = i % ROWS, v = i / ROWS;
    sum_t sum = at<i>(part);
    if constexpr (TURNS == 2) sum = add(sum, at<i>(turn));
    float* total = totals + row * TILE + v * LANES;
    store(total, fma(to_float(sum), load(scale + v * LANES), load(total)));
  });
}

// ROWS rows against one tile of outputs: totals[row][64].
template <int ROWS>
void few_rows(const Weight& w, int64_t tile, const x_t* x, const xsum_t* sums, float* totals) {
  constexpr int VECTORS = vectors_of(ROWS, TILE / LANES);
  Scales scales(w, tile);
  std::memset(totals, 0, ROWS * TILE * sizeof(float));
  for (int64_t block = 0; block < BLOCKS; ++block) {
    const float *scale = scales.at(block), *zeros = scale;
    const int64_t start = block * GROUPS_OF_BLOCK, end = std::min(start + GROUPS_OF_BLOCK, GROUPS);
    // Not more at a time than what stays near while it is gone through for all vectors.
    for (int64_t group = start; group < end; group += GROUPS_AT_ONCE) {
      const int64_t groups = std::min(GROUPS_AT_ONCE, end - group);
      const uint32_t* codes = w.codes() + (tile * GROUPS + group) * TILE;
      // Asked for meanwhile: what lies as far on as this is long, in the order in memory.
      const uint32_t* ahead = codes + GROUPS_AT_ONCE * TILE;
      for (int n = 0; n < TILE; n += VECTORS * LANES, ahead += groups * VECTORS * LANES)
        few_sums<ROWS, VECTORS>(codes + n, ahead, groups, x + group * STEPS * ROWS,
                                sums + block * ROWS, group == start, scale + n, zeros + n,
                                totals + n);
    }
  }
}

void few_rows(int height, const Weight& w, int64_t tile, const x_t* x, const xsum_t* sums,
              float* totals) {
  switch (height) {
    case 16: return few_rows<16>(w, tile, x, sums, totals);
    case 12: return few_rows<12>(w, tile, x, sums, totals);
    case 8: return few_rows<8>(w, tile, x, sums, totals);
    case 6: return few_rows<6>(w, tile, x, sums, totals);
    case 4: return few_rows<4>(w, tile, x, sums, totals);
    case 3: return few_rows<3>(w, tile, x, sums, totals);
    case 2: return few_rows<2>(w, tile, x, sums, totals);
    case 1: return few_rows<1>(w, tile, x, sums, totals);
  }
}

// All tiles of outputs, each against all panels while its codes are near.
void few_tiles(const Call& call, int64_t super_first, int64_t rows, const Share& of,
               const Part& part) {
  const int64_t panels = panels_of(rows, FEW_HEIGHTS), heights = padded(rows, FEW_HEIGHTS);
  alignas(64) float totals[FEW_HEIGHTS[0] * TILE];
  const auto tiles = part.of(E * N_TILES);
  of.each(tiles.last - tiles.first, [&](int64_t number) {
    const int64_t tile = tiles.first + number, e = tile / N_TILES;
    for (int64_t panel = 0; panel < panels; ++panel) {
      const int64_t row = panel * FEW_HEIGHTS[0], at = e * heights + row;
      const int height = height_of(rows - row, FEW_HEIGHTS);
      const x_t* x = call.panels + at * ALL_STEPS;
      few_rows(height, call.weight, tile, x, call.sums + at * BLOCKS, totals);
      finish(call, tile, super_first, row, std::min<int64_t>(height, rows - row), rows, totals);
    }
  });
}

void run_few(const Call& call, int64_t super_first, int64_t rows, const Share& of,
             const Part& part) {
  if (part.is_first) pack(call, super_first, rows, FEW_HEIGHTS, of);
  few_tiles(call, super_first, rows, of, part);
}

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
          store(out_at, pair(mul(decoder.value(code, step), s),
                           mul(decoder.value(code, step + STEPS), s)));
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
    Sums<2 * ROWS> part;
    each<2 * ROWS>([&](auto i) INLINE_LAMBDA {
      constexpr int row = i / 2;
      (void)row;
      at<i>(part) = sum_t{};
    });
    const operand_t* ws = reinterpret_cast<const operand_t*>(w) + at0;
    const x_t* xs = x;
#pragma GCC unroll 1
    for (int64_t step = 0; step < steps; ++step) {
      const auto w0 = load(ws), w1 = load(ws + LANES);
      each<ROWS>([&](auto row) INLINE_LAMBDA {
        dot(at<2 * row>(part), w0, xs + row);
        dot(at<2 * row + 1>(part), w1, xs + row);
      });
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
    case 12: return many_rows<12>(w, steps, x, sums, scale, zeros, totals);
    case 8: return many_rows<8>(w, steps, x, sums, scale, zeros, totals);
    case 4: return many_rows<4>(w, steps, x, sums, scale, zeros, totals);
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

extern "C" int64_t fxquant_prepared_bytes(void) { return PREPARED_BYTES; }

// Repacks a stored weight: tiles of 64 outputs, groups of PER_DWORD inputs.
extern "C" void fxquant_prepare(const void* const* parts, void* prepared, int threads) {
  const Weight w{static_cast<unsigned char*>(prepared)};
  const uint8_t* codes = static_cast<const uint8_t*>(parts[0]);
#pragma omp parallel for num_threads(threads)
  for (int64_t tile = 0; tile < E * N_TILES; ++tile) {
    const int64_t e = tile / N_TILES, n0 = tile % N_TILES * TILE;
    for (int64_t group = 0; group < GROUPS; ++group) {
      for (int64_t row = 0; row < TILE; ++row) {
        uint32_t word = 0;
        for (int place = 0; place < PER_DWORD; ++place) {
          const int64_t n = n0 + row, k = group * PER_DWORD + PLACES[place];
          if (n >= N || k >= K) continue;
          const int64_t element = OFFSET + e * STRIDE_E + n * STRIDE_N + k * STRIDE_K;
          word |= uint32_t(codes[element / 2] >> (4 - 4 * (element % 2)) & 15) << (BITS * place);
        }
        w.codes()[(tile * GROUPS + group) * TILE + row] = word;
      }
    }
  }
#pragma omp parallel for num_threads(threads)
  for (int64_t tile = 0; tile < E * N_TILES; ++tile) {
    const int64_t e = tile / N_TILES, n0 = tile % N_TILES * TILE;
    for (int64_t k = 0; k < BLOCKS; ++k) {  // counts blocks
      const int64_t at = (tile * BLOCKS + k) * TILE;
      for (int64_t row = 0; row < TILE; ++row) {
        const int64_t n = n0 + row;
        const bool inside = n < N && k * BLOCK < K;
        const int64_t block = inside ? n * 24 + k : 0;
        w.scale_codes()[at + (row / 4 % 4 * 16 + row / 16 * 4 + row % 4)] =
              inside ? static_cast<const uint8_t*>(parts[1])[block] : 0;
      }
    }
  }
  std::memcpy(w.nested(), parts[2], 36 * sizeof(float));
  for (int64_t tile = 0; tile < E * N_TILES; ++tile) {
    const int64_t e = tile / N_TILES, n0 = tile % N_TILES * TILE;
    for (int64_t row = 0; row < TILE; ++row) {
      const int64_t n = std::min(n0 + row, N - 1);
      w.first_nested()[tile * TILE + row] = w.nested()[Scales::nested_of(e, n, 0)];
    }
    for (int64_t k = 0; k < BLOCKS; ++k) {  // counts blocks
      uint64_t changes = 0;
      for (int64_t row = 0; k && k * BLOCK < K && row < TILE && n0 + row < N; ++row) {
        const int64_t n = n0 + row;
        const bool moved = Scales::nested_of(e, n, k) != Scales::nested_of(e, n, k - 1);
        changes |= uint64_t(moved) << row;
      }
      w.changes()[tile * BLOCKS + k] = changes;
    }
  }
  w.offset()[0] = *static_cast<const float*>(parts[3]);
}

// Scratch memory, dealt out in order; without a base it only counts.
struct Memory {
  unsigned char* base;
  int64_t used = 0;

  template <typename T> T* take(int64_t count) {
    T* start = base ? reinterpret_cast<T*>(base + used) : nullptr;
    used += (count * int64_t(sizeof(T)) + 63) / 64 * 64;
    return start;
  }
};

// What is kept of all rows.
void take_shared(Call& call, Memory& memory, int64_t threads) {
  call.turns = memory.take<Turn>(threads);
}

// What is kept of the rows under work.
void take_own(Call& call, Memory& memory, int64_t rows, int64_t threads) {
  const int64_t all = std::max(padded(rows, FEW_HEIGHTS), padded(rows, MANY_HEIGHTS));
  call.lines = memory.take<x_t>(E * rows * ALL_STEPS);
  call.panels = memory.take<x_t>(E * all * ALL_STEPS);
  call.sums = memory.take<xsum_t>(0);
  call.own = memory.take<unsigned char>(threads * OWN_BYTES);
}

// Which rows are worked off at a time: by all threads, or, where there are blocks of them for every
// thread, by one, for which what it makes of them stays in its own caches.
struct Split {
  int64_t rows;  // of a block, the same for any number of threads, which results do not depend on
  bool is_apart;

  Split(int64_t m, int64_t threads) {
    constexpr int64_t HEIGHT = 2 * MANY_HEIGHTS[0];
    const int64_t least = std::max<int64_t>(1, (m + SUPER_ROWS - 1) / SUPER_ROWS);
    const int64_t even = least + least % 2, each = (m + even - 1) / even;
    rows = std::min(SUPER_ROWS, least > 1 ? (each + HEIGHT - 1) / HEIGHT * HEIGHT : m);
    is_apart = threads > 1 && least >= threads;
  }
};

extern "C" int64_t fxquant_scratch_bytes(int64_t m, int threads) {
  Memory memory{nullptr};
  Call call{};
  take_shared(call, memory, threads);
  const Split split(m, threads);
  for (int64_t thread = 0; thread < (split.is_apart ? threads : 1); ++thread)
    take_own(call, memory, split.rows, split.is_apart ? 1 : threads);
  return memory.used;
}

extern "C" void fxquant_run(const void* prepared, const void* x, int64_t x_e, int64_t x_row,
                            int64_t x_col, int64_t m, void* out, const void* const* extra,
                            void* scratch, int threads, int variant) {
  Call call{};
  call.weight.base = static_cast<unsigned char*>(const_cast<void*>(prepared));
  call.x = static_cast<const stored_t*>(x);
  call.x_e = x_e, call.x_row = x_row, call.x_col = x_col, call.m = m;
  call.out = static_cast<out_t*>(out);
  const uint64_t places = reinterpret_cast<uint64_t>(x) | x_e * sizeof(stored_t) |
                          x_row * sizeof(stored_t);
  call.is_line = x_col == 1 && places % sizeof(x_t) == 0;
  call.extra = extra;
  Memory memory{static_cast<unsigned char*>(scratch)};
  take_shared(call, memory, threads);
  for (int thread = 0; thread < threads; ++thread) call.turns[thread] = {};
  const bool is_few = variant == 0;
  const Split split(m, threads);
#pragma omp parallel num_threads(threads)
  {
    const Share all(omp_get_thread_num(), omp_get_num_threads(), call.turns);
    Share of = split.is_apart ? Share(0, 1) : all;
    Call own = call;
    Memory mine = memory;
    for (int64_t thread = 0; thread < (split.is_apart ? all.thread + 1 : 1); ++thread)
      take_own(own, mine, split.rows, split.is_apart ? 1 : threads);
    if (call.is_line) own.lines = const_cast<x_t*>(reinterpret_cast<const x_t*>(x));
    if (is_few && m == 1) own.panels = own.lines;  // a panel of one row is a line
    const int64_t blocks = m ? (m + split.rows - 1) / split.rows : 0;
    const auto work_off = [&](int64_t block, const Part& part) {
      const int64_t first = block * split.rows, rows = std::min(split.rows, m - first);
      if (is_few)
        run_few(own, first, rows, of, part);
      else
        run_many(own, first, rows, of, part);
    };
    if (split.is_apart) {
      // Of few blocks threads take a part of the outputs at a time.
      const int64_t parts = std::max<int64_t>(1, std::min<int64_t>(4, 8 * threads / blocks));
      int64_t last = -1;
      all.each(blocks * parts, [&](int64_t item) {
        const int64_t block = item / parts;
        work_off(block, {item % parts, parts, block != last});
        last = block;
      });
    } else {
      for (int64_t block = 0; block < blocks; ++block) {
        if (block) of.wait(), of.go_on();  // for those who still read what is made anew
        work_off(block, {});
      }
    }
  }
}
