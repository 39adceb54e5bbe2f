// Vectors, threads and memory, as all kernels use them.

#include <algorithm>
#include <type_traits>
#include <utility>
#include <immintrin.h>
#ifdef _OPENMP
#include <omp.h>
#else
inline int omp_get_thread_num() { return 0; }
inline int omp_get_num_threads() { return 1; }
#endif

#pragma GCC diagnostic ignored "-Wignored-attributes"  // of vectors in templates
#define INLINE_LAMBDA __attribute__((always_inline))
#define ALONE [[gnu::noinline]]  // inlined, GCC would keep sums in memory

namespace {

using vf = __m512;   // 16 floats
using vi = __m512i;  // 16 dwords
typedef uint32_t vu __attribute__((vector_size(64)));
typedef int32_t vs __attribute__((vector_size(64)));
constexpr int LANES = 16;

INLINE vf load(const float* p) { return _mm512_loadu_ps(p); }
INLINE vi load(const uint32_t* p) { return _mm512_loadu_si512(p); }
INLINE void store(float* p, vf x) { _mm512_storeu_ps(p, x); }
INLINE void store(uint32_t* p, vi x) { _mm512_storeu_si512(p, x); }
INLINE vf spread(float x) { return _mm512_set1_ps(x); }
INLINE vi spread(uint32_t x) { return _mm512_set1_epi32(int(x)); }
INLINE vf add(vf a, vf b) { return _mm512_add_ps(a, b); }
INLINE vi add(vi a, vi b) { return _mm512_add_epi32(a, b); }
INLINE vf sub(vf a, vf b) { return _mm512_sub_ps(a, b); }
INLINE vf mul(vf a, vf b) { return _mm512_mul_ps(a, b); }
INLINE vf fma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
INLINE vf to_float(vi x) { return _mm512_cvtepi32_ps(x); }
INLINE vf to_float(vf x) { return x; }
INLINE vi shift_right(vi x, int bits) { return vi(vu(x) >> bits); }
INLINE vi sign_byte(vi x, int first) {  // the byte that starts at a bit, as a signed dword
  return vi(vs(vu(x) << (24 - first)) >> 24);
}
INLINE vi plain_byte(vi x, int first) { return vi(vu(x) >> first & 255u); }

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

INLINE void dot(vi& sum, vi w, const uint32_t* x) {  // += four unsigned bytes times signed ones
  asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(w), "m"(*x));
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
template <int COUNT, typename T> struct Sums {
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

// Rows times two vectors: sums[row][2] += .
template <int ROWS, typename S, typename W, typename X>
INLINE void add_products(Sums<2 * ROWS, S>& sums, const W* w, const X* x) {
  const auto w0 = load(w), w1 = load(w + LANES);
  each<ROWS>([&](auto row) INLINE_LAMBDA {
    dot(at<2 * row>(sums), w0, x + row);
    dot(at<2 * row + 1>(sums), w1, x + row);
  });
}

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

// The tile unit has eight registers of up to 16 rows of 64 bytes.
template <int TO> INLINE void tile_load(const void* from, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(stride), "i"(TO) : "memory");
}
template <int FROM> INLINE void tile_store(void* to, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(to), "r"(stride), "i"(FROM) : "memory");
}
template <int AT> INLINE void tile_zero() { asm volatile("tilezero %%tmm%c0" : : "i"(AT)); }
// sums[row][n] += steps [row] of X times steps [..][n] of W: of pairs of bfloat16, of signed bytes,
// of signed ones of X and unsigned ones of W.
template <int SUMS, int X, int W> INLINE void tile_dot_bf16() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(SUMS), "i"(X), "i"(W));
}
template <int SUMS, int X, int W> INLINE void tile_dot_int8() {
  asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(SUMS), "i"(X), "i"(W));
}
template <int SUMS, int X, int W> INLINE void tile_dot_biased() {
  asm volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(SUMS), "i"(X), "i"(W));
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

}  // namespace
