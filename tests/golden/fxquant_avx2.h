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

using vf = __m256;   // 8 floats
using vi = __m256i;  // 8 dwords
typedef uint32_t vu __attribute__((vector_size(32)));
typedef int32_t vs __attribute__((vector_size(32)));
constexpr int LANES = 8;

INLINE vf load(const float* p) { return _mm256_loadu_ps(p); }
INLINE vi load(const uint32_t* p) { return _mm256_loadu_si256(reinterpret_cast<const vi*>(p)); }
INLINE void store(float* p, vf x) { _mm256_storeu_ps(p, x); }
INLINE void store(uint32_t* p, vi x) { _mm256_storeu_si256(reinterpret_cast<vi*>(p), x); }
INLINE vf spread(float x) { return _mm256_set1_ps(x); }
INLINE vi spread(uint32_t x) { return _mm256_set1_epi32(int(x)); }
INLINE vf add(vf a, vf b) { return _mm256_add_ps(a, b); }
INLINE vi add(vi a, vi b) { return _mm256_add_epi32(a, b); }
INLINE vf sub(vf a, vf b) { return _mm256_sub_ps(a, b); }
INLINE vf mul(vf a, vf b) { return _mm256_mul_ps(a, b); }
INLINE vf fma(vf a, vf b, vf c) { return _mm256_fmadd_ps(a, b, c); }
INLINE vf to_float(vi x) { return _mm256_cvtepi32_ps(x); }
INLINE vf to_float(vf x) { return x; }
INLINE vi shift_right(vi x, int bits) { return vi(vu(x) >> bits); }
INLINE vi sign_byte(vi x, int first) {  // the byte that starts at a bit, as a signed dword
  return vi(vs(vu(x) << (24 - first)) >> 24);
}
INLINE vi plain_byte(vi x, int first) { return vi(vu(x) >> first & 255u); }
INLINE vi both_lanes(const uint8_t* p) {  // 16 bytes, in each half of a vector
  return _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}

// Where the bytes of four dwords go to, in halves of which unpacking makes four dwords of each
// byte: the first two bytes in one half, or the first of all before the second ones.
constexpr uint8_t PAIRS[16] = {0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15};
constexpr uint8_t TRANSPOSED[16] = {0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15};

// Bytes are multiplied as 16-bit words, exactly: the first and third of four, then the others.
// These are an activation's.
struct Words {
  uint32_t evens, odds;
};
INLINE uint32_t signed_words(uint32_t bytes) {  // of two unsigned ones
  const uint32_t signs = bytes & 0x00800080u;
  return bytes | ((signs << 9) - (signs << 1));
}
INLINE Words words_of(uint32_t four) {
  return {signed_words(four & 0x00ff00ffu), signed_words(four >> 8 & 0x00ff00ffu)};
}
INLINE vi evens(vi w) { return _mm256_and_si256(w, _mm256_set1_epi16(255)); }
INLINE vi odds(vi w) { return _mm256_srli_epi16(w, 8); }

// In one piece each: between them GCC would spill sums.
INLINE void add_words(vi& sum, vi w, const uint32_t& x) {
  vi both;
  asm("vpbroadcastd %3, %1\n\tvpmaddwd %1, %2, %1\n\tvpaddd %1, %0, %0"
      : "+x"(sum), "=&x"(both) : "x"(w), "m"(x));
}
INLINE void add_words(vi& sum0, vi& sum1, vi w0, vi w1, const uint32_t& x) {
  vi both0, both1;
  asm("vpbroadcastd %6, %2\n\tvpmaddwd %2, %5, %3\n\tvpmaddwd %2, %4, %2\n\t"
      "vpaddd %2, %0, %0\n\tvpaddd %3, %1, %1"
      : "+x"(sum0), "+x"(sum1), "=&x"(both0), "=&x"(both1) : "x"(w0), "x"(w1), "m"(x));
}
INLINE void dot(vi& sum, vi w, const Words* x) {  // += four unsigned bytes times signed ones
  add_words(sum, evens(w), x->evens);
  add_words(sum, odds(w), x->odds);
}

// In one piece: what outputs share GCC would load into a register each, and run out of them.
INLINE void dot(vf& sum, vf w, const float* x) {
  vf all;
  asm("vbroadcastss %3, %1\n\tvfmadd231ps %1, %2, %0" : "+x"(sum), "=&x"(all) : "x"(w), "m"(*x));
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

// Rows times two vectors: sums[row][2] += . All rows first take one half of the weight's bytes, for
// which there are registers.
template <int ROWS>
INLINE void add_products(Sums<2 * ROWS, vi>& sums, const uint32_t* w, const Words* x) {
  const vi w0 = load(w), w1 = load(w + LANES);
  const vi even0 = evens(w0), even1 = evens(w1);
  each<ROWS>([&](auto row) INLINE_LAMBDA {
    add_words(at<2 * row>(sums), at<2 * row + 1>(sums), even0, even1, x[row].evens);
  });
  const vi odd0 = odds(w0), odd1 = odds(w1);
  each<ROWS>([&](auto row) INLINE_LAMBDA {
    add_words(at<2 * row>(sums), at<2 * row + 1>(sums), odd0, odd1, x[row].odds);
  });
}

// Rows times two vectors: sums[row][2] += .
template <int ROWS>
INLINE void add_products(Sums<2 * ROWS, vf>& sums, const float* w, const float* x) {
  const vf w0 = load(w), w1 = load(w + LANES);
  each<ROWS>([&](auto row) INLINE_LAMBDA {
    const vf all = spread(x[row]);
    at<2 * row>(sums) = fma(w0, all, at<2 * row>(sums));
    at<2 * row + 1>(sums) = fma(w1, all, at<2 * row + 1>(sums));
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

}  // namespace
