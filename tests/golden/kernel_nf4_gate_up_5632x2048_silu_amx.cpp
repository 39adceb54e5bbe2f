// nf4_gate_up_5632x2048_silu.
//
// out[m, 5632] = x[m, 2048] @ weight.T for 2 weights, then silu, mul (bfloat16 to bfloat16).
//
// Printed by fxquant. The spec, which fxquant.codegen.reference defines:
//   {"compute_dtype": "bfloat16", "epilogue": {"nodes": [["aten.silu.default", ["%acc"], []],
//   ["aten.mul.Tensor", ["%0", "%acc1"], []]], "operands": []}, "name":
//   "nf4_gate_up_5632x2048_silu", "out_dtype": "bfloat16", "weight": {"batch": null, "encoding":
//   {"bits": 4, "levels": "nf4", "scale": {"bits": 8, "block": [256], "levels": "dynamic8",
//   "offset": true}}, "k": 2048, "n": 5632, "offset": 0, "shape": [5632, 2048], "strides": [0,
//   2048, 1]}, "weights": 2, "x_dtype": "bfloat16"}
//
// Weight: [5632, 2048], 4 bits nf4 in blocks of 64, scales 8 bits dynamic8 in blocks of 256
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
using sum_of_one_t = float;  // a lane's sum
using xsum_t = float;
typedef uint16_t half_t __attribute__((may_alias));  // bfloat16, read in pairs
constexpr int64_t E = 1;  // matrices
constexpr int64_t WEIGHTS = 2;  // that are multiplied with the activation
constexpr int64_t N = 5632;  // outputs
constexpr int64_t K = 2048;  // inputs
constexpr int64_t OFFSET = 0;  // of the first weight in the stored tensor, in elements
constexpr int64_t STRIDE_E = 0;
constexpr int64_t STRIDE_N = 2048;
constexpr int64_t STRIDE_K = 1;
constexpr int64_t TILE = 64;  // outputs that are worked on together
constexpr int64_t N_TILES = 88;
constexpr int64_t K_PADDED = 2048;  // inputs, up to whole tiles
constexpr int64_t BITS = 4;  // of a code
constexpr int64_t PER_DWORD = 8;  // codes in a dword: the inputs of a group
constexpr int64_t GROUPS = 256;  // in a row
constexpr int64_t ALL_STEPS = 1024;  // instructions for a row
constexpr int64_t BLOCK = 64;  // inputs that are summed before a scale is applied
constexpr int64_t BLOCKS = 32;  // in a row
constexpr int64_t GROUPS_OF_BLOCK = 8;
constexpr int64_t GROUPS_AT_ONCE = 32;  // that few rows go through before the next
constexpr int64_t BLOCKS_AT_ONCE = 2;  // whose scales stand side by side
constexpr int64_t GROUPS_OF_CHUNK = 32;  // that are decoded at a time for many rows
constexpr int64_t CHUNKS = 8;  // in a row
constexpr int64_t DECODED = 8192;  // dwords of a decoded chunk
constexpr int64_t SPAN_ROWS = 64;  // up to which sums are scaled
constexpr int64_t SUPER_ROWS = 320;  // rows that are worked off at a time
constexpr int64_t TOTALS = 21504;  // floats of the sums of one weight, for many rows
constexpr int64_t NEAR_TOTALS = 8192;  // the same that few rows make before they are read
constexpr int64_t OWN_BYTES = 204800;  // a thread
constexpr int64_t AHEAD = 2048;  // dwords of codes that are asked for in advance
constexpr int64_t NEAR = 512;  // the same, into the first-level cache
constexpr int STEPS = 4;  // instructions that use up a group
constexpr int MOST_SUMS = 24;  // registers of sums
constexpr int PLACES[8] = {0, 2, 4, 6, 1, 3, 5, 7};  // of a dword: whose codes stand there
constexpr int MOST_ROWS = 16;  // of a panel
constexpr int FEW_HEIGHTS[1] = {1};  // of panels, in rows
// of panels, in rows
constexpr int MANY_HEIGHTS[16] = {16, 15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1};

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

// Left to itself GCC loads every activation into a register first, and runs out of them.
INLINE void dot(vf& sum, vf w, const float* x) {
  asm("vfmadd231ps %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(w), "m"(*x));
}

// Codes on their way to the second-level cache; what lies behind the weight does no harm.
INLINE void prefetch(const uint32_t* codes) { __builtin_prefetch(codes, 0, 2); }

// The same from there to the first-level cache.
INLINE void bring_near(const uint32_t* codes) { __builtin_prefetch(codes, 0, 3); }

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

// a * b + c: one instruction where there is one, never a call of the library.
[[gnu::always_inline]] static inline float madd(float a, float b, float c) {
#ifdef FP_FAST_FMAF
    return std::fma(a, b, c);
#else
    return a * b + c;
#endif
}

// The larger of x and a bound that is no NaN; NaN if x is.
[[gnu::always_inline]] static inline float at_least(float x, float bound) {
    return x < bound ? bound : x;
}

// The smaller of x and a bound that is no NaN; NaN if x is.
[[gnu::always_inline]] static inline float at_most(float x, float bound) {
    return x > bound ? bound : x;
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

// e^r for |r| <= ln(2) / 2: 1 + r + r^2 p(r), relative error 5e-9.
[[gnu::always_inline]] static inline float exp_fraction(float r) {
    float p = 0.0013813145f;
    p = madd(p, r, 0.008369419f);
    p = madd(p, r, 0.041668456f);
    p = madd(p, r, 0.16666515f);
    p = madd(p, r, 0.49999994f);
    p = madd(p, r, 1.0f);
    return madd(p, r, 1.0f);
}

// 1 + e^-x, for quotients: e^-x stays at 4e-38 where it does not change the sum, and one step
// makes 2^k: half of it, which is normal up to k = 128, with e^r doubled.
[[gnu::always_inline]] static inline float one_plus_exp_of_minus(float x) {
    const float z = at_most(at_least(x, -89.0f), 86.0f);
    const float shifted = madd(z, -1.44269504f, 12582912.0f);
    const float k = shifted - 12582912.0f;
    const float r = madd(k, 2.12194440e-4f, madd(k, -0.693359375f, -z));
    const float half = float_of((bits_of(shifted) - 0x4b400000u + 126u) << 23);
    return madd(2.0f * exp_fraction(r), half, 1.0f);
}

[[gnu::always_inline]] static inline float lane_silu(float x) {
    return x / one_plus_exp_of_minus(x);
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
  uint8_t* scale_codes() const { return reinterpret_cast<uint8_t*>(base + 5767168); }
  uint64_t* changes() const { return reinterpret_cast<uint64_t*>(base + 5947392); }
  float* first_nested() const { return reinterpret_cast<float*>(base + 5969920); }
  float* nested() const { return reinterpret_cast<float*>(base + 5992448); }
  float* offset() const { return reinterpret_cast<float*>(base + 5995264); }
};
constexpr int64_t PREPARED_BYTES = 5995328;

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
    return n / 8;
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
  Weight weights[WEIGHTS];
  const stored_t* x;  // [e, m, k] with these strides
  int64_t x_e, x_row, x_col, m;
  out_t* out;  // [e, m, n]
  const void* const* extra;

  Turn* turns;  // how far each thread is with its part
  x_t* lines;  // [e][row][step]
  x_t* panels;  // [e][panel][step][row of it]
  xsum_t* sums;  // none are needed
  float* floats;  // [thread][k], a row
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

// The same for the tile unit: 16 steps of one row lie behind those of another, as it loads them.
void pack_tiles(const Call& call, int64_t super_first, int64_t rows, const Share& of) {
  const auto mine = of.part(E * rows);
  x_t* own = call.lines + mine.first * ALL_STEPS;  // stays near from row to row
  for (int64_t item = mine.first; item < mine.last; ++item) {
    const int64_t e = item / rows, row = item % rows, panel_row = row / 16 * 16;
    const bool is_last = item + 1 == mine.last;
    if (!call.is_line) make_line(call, super_first, rows, item, MANY_HEIGHTS, is_last, own);
    const stored_t* x = call.x + e * call.x_e + (super_first + row) * call.x_row;
    const x_t* line = call.is_line ? reinterpret_cast<const x_t*>(x) : own;
    const int64_t height = std::min<int64_t>(rows - panel_row, 16);
    x_t* panel = call.panels + (e * rows + panel_row) * ALL_STEPS + (row - panel_row) * 16;
    for (int64_t step = 0; step < ALL_STEPS; step += 16)
      std::memcpy(panel + step * height, line + step, 64);
  }
  of.wait();
}

// One row of a tile: epilogue and rounding.
INLINE void finish_row(const Call& call, int64_t e, int64_t row, int64_t n0, int64_t count,
                       const float* sums, const float* sums1) {
  const int64_t at = (e * call.m + row) * N + n0;
  uint16_t* out = call.out + at;
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    const float acc = sums[i];
    const float acc1 = sums1[i];
    const float v0 = lane_silu(acc);
    const float v1 = (v0 * acc1);
    out[i] = to_bf16(v1);
  }
}

// The rows from panel_row on of the rows that are under work, which start at super_first. The
// totals of each further weight lie apart.
void finish(const Call& call, int64_t tile, int64_t super_first, int64_t panel_row, int64_t rows,
            int64_t all_rows, float* totals, int64_t apart) {
  const int64_t e = tile / N_TILES, n0 = tile % N_TILES * TILE;
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t at = super_first + panel_row + row;
    const float *sums = totals + row * TILE, *sums1 = sums + apart;
    if (N - n0 >= TILE)
      finish_row(call, e, at, n0, TILE, sums, sums1);
    else
      finish_row(call, e, at, n0, N - n0, sums, sums1);
  }
}

// A line of bfloat16 as floats: made once for all tiles.
struct FloatLine {
  float* floats;
  const x_t* made_of = nullptr;

  const float* of(const x_t* line) {
    if (line != made_of) {
      const half_t* half = reinterpret_cast<const half_t*>(line);
      for (int64_t k = 0; k < K_PADDED; ++k) floats[k] = from_bf16(half[k]);
      made_of = line;
    }
    return floats;
  }
};

// Vectors of outputs whose sums are kept at once.
constexpr int vectors_of(int rows, int all) {
  return all == 1 || rows * all <= MOST_SUMS ? all : vectors_of(rows, all / 2);
}

// ROWS rows against groups of a tile: totals[row][64] += , for VECTORS vectors of outputs.
template <int ROWS, int VECTORS>
ALONE void few_sums(const uint32_t* codes, const uint32_t* ahead, int64_t groups, const float* x,
                    const xsum_t* sums, uint32_t once, const float* scale, const float* zeros,
                    float* totals) {
  // Few sums would wait for each other: they are made in turns.
  constexpr int TURNS = ROWS * VECTORS * 2 <= MOST_SUMS && PER_DWORD > 1 ? 2 : 1;
  constexpr bool ASKS_AHEAD = true;
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
      bring_near(codes + NEAR + v * LANES);
      const vi code = load(codes + v * LANES);
      each<PER_DWORD>([&](auto step) INLINE_LAMBDA {
        const auto operand = decoder.value(code, step);
        each<ROWS>([&](auto row) INLINE_LAMBDA {
          if constexpr (TURNS == 2 && step % 2)
            dot(at<v * ROWS + row>(turn), operand, x + PLACES[step] * ROWS + row);
          else
            dot(at<v * ROWS + row>(part), operand, x + PLACES[step] * ROWS + row);
        });
      });
    });
    codes += TILE;
    ahead += VECTORS * LANES;
    x += PER_DWORD * ROWS;
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
void few_rows(const Weight& w, int64_t tile, const float* x, const xsum_t* sums, float* totals) {
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
        few_sums<ROWS, VECTORS>(codes + n, ahead, groups, x + group * PER_DWORD * ROWS,
                                sums + block * ROWS, group == start, scale + n, zeros + n,
                                totals + n);
    }
  }
}

void few_rows(int height, const Weight& w, int64_t tile, const float* x, const xsum_t* sums,
              float* totals) {
  switch (height) {
    case 1: return few_rows<1>(w, tile, x, sums, totals);
  }
}

// All tiles of outputs. Each weight is read some tiles at a time: every change from one to another
// keeps memory waiting. Of many panels some are worked off at a time, while their totals are near.
void few_tiles(const Call& call, int64_t super_first, int64_t rows, const Share& of,
               const Part& part) {
  constexpr int64_t HEIGHT = FEW_HEIGHTS[0], NEAR_PANELS = NEAR_TOTALS / (HEIGHT * TILE);
  const int64_t panels = panels_of(rows, FEW_HEIGHTS), heights = padded(rows, FEW_HEIGHTS);
  // Several times as many items as threads, which are not equally fast.
  const auto tiles = part.of(E * N_TILES);
  const int64_t all = tiles.last - tiles.first;
  const int64_t shared = std::max<int64_t>(1, all / (4 * of.threads));
  const int64_t near_tiles = std::max<int64_t>(1, std::min(shared, NEAR_TOTALS / (heights * TILE)));
  float* totals = reinterpret_cast<float*>(call.own + of.thread * OWN_BYTES);
  FloatLine line{call.floats + of.thread * K_PADDED};
  of.each((all + near_tiles - 1) / near_tiles, [&](int64_t number) {
    const int64_t first = tiles.first + number * near_tiles;
    const int64_t last = std::min(first + near_tiles, tiles.last);
    for (int64_t panel = 0; panel < panels; panel += NEAR_PANELS) {
      const int64_t first_row = panel * HEIGHT;
      const int64_t last_row = std::min(rows, (panel + NEAR_PANELS) * HEIGHT);
      for (int i = 0; i < WEIGHTS; ++i)
        for (int64_t tile = first; tile < last; ++tile) {
          float* own = totals + i * NEAR_TOTALS + (tile - first) * heights * TILE;
          for (int64_t row = first_row; row < last_row; row += HEIGHT) {
            const int64_t at = tile / N_TILES * heights + row;
            const float* x = line.of(call.panels + at * ALL_STEPS);
            few_rows(height_of(rows - row, FEW_HEIGHTS), call.weights[i], tile, x,
                     call.sums + at * BLOCKS, own + (row - first_row) * TILE);
          }
        }
      for (int64_t tile = first; tile < last; ++tile)
        finish(call, tile, super_first, first_row, last_row - first_row, rows,
               totals + (tile - first) * heights * TILE, NEAR_TOTALS);
    }
  });
}

void run_few(const Call& call, int64_t super_first, int64_t rows, const Share& of,
             const Part& part) {
  if (part.is_first) pack(call, super_first, rows, FEW_HEIGHTS, of);
  few_tiles(call, super_first, rows, of, part);
}

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

// --- the tile unit: eight registers of up to 16 rows of 64 bytes ---

template <int TO> INLINE void tile_load(const void* from, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(stride), "i"(TO) : "memory");
}
template <int FROM> INLINE void tile_store(void* to, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(to), "r"(stride), "i"(FROM) : "memory");
}
template <int AT> INLINE void tile_zero() { asm volatile("tilezero %%tmm%c0" : : "i"(AT)); }
// sums[row][n] += steps [row] of X times steps [..][n] of W.
template <int SUMS, int X, int W> INLINE void tile_dot() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(SUMS), "i"(X), "i"(W));
}

// A thread's unit: how many rows each register has. To change it takes as long as ten products.
struct TileUnit {
  struct alignas(64) {
    uint8_t palette = 1, start = 0, none[14] = {};
    uint16_t bytes[16] = {};
    uint8_t rows[16] = {};
  } now;

  void take(const uint8_t (&rows)[8]) {
    if (std::memcmp(rows, now.rows, sizeof rows) == 0) return;
    for (int i = 0; i < 8; ++i) now.rows[i] = rows[i], now.bytes[i] = rows[i] ? 64 : 0;
    asm volatile("ldtilecfg %0" : : "m"(now));
  }
  // What is left to others in this thread is a unit as they would find it.
  ~TileUnit() { asm volatile("tilerelease"); }
};

// Operands are decoded 16 outputs after 16: what a register takes lies together.
constexpr int64_t OF_ROW = 64, OF_TILE = 256;             // bytes, dwords
constexpr int64_t apart(int64_t steps) { return steps; }  // dwords from one output to the next

// --- some rows: decoded beside the products ---

constexpr int64_t REGISTERS = ALL_STEPS / 16;  // of the tile unit, for a row
constexpr int PART = 2;  // whose products one register sums
constexpr int REST = 0;  // of the last part, where it is shorter
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
            tile_dot<2 * panel + NOW, 4 + panel, 6>();
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
    tile_dot<SUMS, X, 7>();
    tile_load<7>(next, OF_ROW);
    tile_dot<SUMS + 1, X, 7>();
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
        const int64_t block = inside ? n * 32 + k : 0;
        w.scale_codes()[at + (row / 4 % 4 * 16 + row / 16 * 4 + row % 4)] =
              inside ? static_cast<const uint8_t*>(parts[1])[block] : 0;
      }
    }
  }
  std::memcpy(w.nested(), parts[2], 704 * sizeof(float));
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
  call.floats = memory.take<float>(threads * K_PADDED);
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

extern "C" void fxquant_run(void* const* prepared, const void* x, int64_t x_e, int64_t x_row,
                            int64_t x_col, int64_t m, void* out, const void* const* extra,
                            void* scratch, int threads, int variant) {
  Call call{};
  for (int i = 0; i < WEIGHTS; ++i)
    call.weights[i].base = static_cast<unsigned char*>(prepared[i]);
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
