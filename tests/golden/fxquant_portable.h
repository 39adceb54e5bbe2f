// Vectors, threads and memory, as all kernels use them.

#include <algorithm>
#include <type_traits>
#include <utility>
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

// GCC's and Clang's vector types: whatever vector unit there is does the work.
typedef float vf __attribute__((vector_size(32)));     // 8 floats
typedef uint32_t vi __attribute__((vector_size(32)));  // 8 dwords
typedef int32_t vs __attribute__((vector_size(32)));
constexpr int LANES = 8;

INLINE vf load(const float* p) { vf x; std::memcpy(&x, p, sizeof x); return x; }
INLINE vi load(const uint32_t* p) { vi x; std::memcpy(&x, p, sizeof x); return x; }
INLINE void store(float* p, vf x) { std::memcpy(p, &x, sizeof x); }
INLINE void store(uint32_t* p, vi x) { std::memcpy(p, &x, sizeof x); }
INLINE vf spread(float x) { return vf{x, x, x, x, x, x, x, x}; }
INLINE vi spread(uint32_t x) { return vi{x, x, x, x, x, x, x, x}; }
INLINE vf add(vf a, vf b) { return a + b; }
INLINE vi add(vi a, vi b) { return a + b; }
INLINE vf sub(vf a, vf b) { return a - b; }
INLINE vf mul(vf a, vf b) { return a * b; }
INLINE vf fma(vf a, vf b, vf c) { return a * b + c; }
INLINE vf to_float(vi x) { return __builtin_convertvector(vs(x), vf); }
INLINE vf to_float(vf x) { return x; }
INLINE vi shift_right(vi x, int bits) { return x >> bits; }
INLINE vi sign_byte(vi x, int first) {  // the byte that starts at a bit, as a signed dword
  return vi(vs(x << (24 - first)) >> 24);
}
INLINE vi plain_byte(vi x, int first) { return x >> first & 255u; }

INLINE void dot(vi& sum, vi w, vi x) {  // += four unsigned bytes times signed ones
  sum += (w & 255u) * vi(vs(x << 24) >> 24) + ((w >> 8) & 255u) * vi(vs(x << 16) >> 24) +
         ((w >> 16) & 255u) * vi(vs(x << 8) >> 24) + (w >> 24) * vi(vs(x) >> 24);
}
INLINE void dot(vi& sum, vi w, const uint32_t* x) { dot(sum, w, spread(*x)); }

INLINE void dot(vf& sum, vf w, const float* x) { sum = fma(w, spread(*x), sum); }

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

}  // namespace
