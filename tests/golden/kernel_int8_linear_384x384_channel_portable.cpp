// int8_linear_384x384_channel.
//
// out[m, 384] = x[m, 384] @ weight.T in int8 (float32 to float32).
//
// Printed by fxquant. The spec, which fxquant.codegen.reference defines:
//   {"compute_dtype": "int8", "epilogue": {"nodes": [], "operands": []}, "name":
//   "int8_linear_384x384_channel", "out_dtype": "float32", "weight": {"batch": null, "encoding":
//   {"bits": 8, "block": [1, -1]}, "k": 384, "n": 384, "offset": 0, "shape": [384, 384],
//   "strides": [0, 384, 1]}, "x_dtype": "float32"}
//
// Weight: [384, 384], 8 bits uniform in blocks of 1xall
// Activation: rounded to int8, with a scale for every row
// Scheme: int8
// Modules: golden

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>
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

using stored_t = float;  // the activation, in float32
using out_t = float;  // the result, in float32
using x_t = uint32_t;  // the activation, as products take it
using operand_t = uint32_t;  // the weight, as products take it
using xsum_t = int32_t;
constexpr int64_t E = 1;  // matrices
constexpr int64_t N = 384;  // outputs
constexpr int64_t K = 384;  // inputs
constexpr int64_t OFFSET = 0;  // of the first weight in the stored tensor, in elements
constexpr int64_t STRIDE_E = 0;
constexpr int64_t STRIDE_N = 384;
constexpr int64_t STRIDE_K = 1;
constexpr int64_t TILE = 64;  // outputs that are worked on together
constexpr int64_t N_TILES = 6;
constexpr int64_t K_PADDED = 384;  // inputs, up to whole tiles
constexpr int64_t BITS = 8;  // of a code
constexpr int64_t PER_DWORD = 4;  // codes in a dword: the inputs of a group
constexpr int64_t GROUPS = 96;  // in a row
constexpr int64_t ALL_STEPS = 96;  // instructions for a row
constexpr int64_t BLOCK = 384;  // inputs that are summed before a scale is applied
constexpr int64_t BLOCKS = 1;  // in a row
constexpr int64_t GROUPS_OF_BLOCK = 96;
constexpr int64_t GROUPS_AT_ONCE = 64;  // that few rows go through before the next
constexpr int64_t GROUPS_OF_CHUNK = 96;  // that are decoded at a time for many rows
constexpr int64_t CHUNKS = 1;  // in a row
constexpr int64_t DECODED = 0;  // dwords of a decoded chunk
constexpr int64_t SUPER_ROWS = 768;  // rows that are worked off at a time
constexpr int64_t OWN_BYTES = 197632;  // a thread
constexpr int STEPS = 1;  // instructions that use up a group
constexpr int MOST_SUMS = 8;  // registers of sums
constexpr int PLACES[4] = {0, 1, 2, 3};  // of a dword: whose codes stand there
constexpr int MOST_ROWS = 8;  // of a panel
constexpr int FEW_HEIGHTS[4] = {8, 4, 2, 1};  // of panels, in rows
constexpr int MANY_HEIGHTS[2] = {4, 2};  // of panels, in rows
constexpr int BYTE_BIAS = 128;  // makes bytes of the weight unsigned

// GCC's and Clang's vector types: whatever vector unit there is does the work.
typedef float vf __attribute__((vector_size(32)));     // 8 floats
typedef uint32_t vi __attribute__((vector_size(32)));  // 8 dwords
typedef int32_t vs __attribute__((vector_size(32)));
using sum_t = vi;  // what products are summed in
constexpr int LANES = 8;

INLINE vf load(const float* p) { vf x; std::memcpy(&x, p, sizeof x); return x; }
INLINE vi load(const uint32_t* p) { vi x; std::memcpy(&x, p, sizeof x); return x; }
INLINE void store(float* p, vf x) { std::memcpy(p, &x, sizeof x); }
INLINE void store(uint32_t* p, vi x) { std::memcpy(p, &x, sizeof x); }
INLINE vf spread(float x) { return vf{x, x, x, x, x, x, x, x}; }
INLINE vi spread(uint32_t x) { return vi{x, x, x, x, x, x, x, x}; }
INLINE vf add(vf a, vf b) { return a + b; }
INLINE vi add(vi a, vi b) { return a + b; }
INLINE vf fma(vf a, vf b, vf c) { return a * b + c; }
INLINE vf to_float(vi x) { return __builtin_convertvector(vs(x), vf); }
INLINE vf to_float(vf x) { return x; }

INLINE void dot(vi& sum, vi w, vi x) {  // += four unsigned bytes times signed ones
  sum += (w & 255u) * vi(vs(x << 24) >> 24) + ((w >> 8) & 255u) * vi(vs(x << 16) >> 24) +
         ((w >> 16) & 255u) * vi(vs(x << 8) >> 24) + (w >> 24) * vi(vs(x) >> 24);
}
INLINE void dot(vi& sum, vi w, const uint32_t* x) { dot(sum, w, spread(*x)); }

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

// The larger of x and a bound that is no NaN; NaN if x is.
[[gnu::always_inline]] static inline float at_least(float x, float bound) {
    return x < bound ? bound : x;
}

// The smaller of x and a bound that is no NaN; NaN if x is.
[[gnu::always_inline]] static inline float at_most(float x, float bound) {
    return x > bound ? bound : x;
}

INLINE float x_of(stored_t x) { return x; }

struct Decoder {
  INLINE vi operand(vi codes, int step) const {
    return codes;
  }
};

struct Weight {
  unsigned char* base;

  uint32_t* codes() const { return reinterpret_cast<uint32_t*>(base); }
  float* scales() const { return reinterpret_cast<float*>(base + 147456); }
};
constexpr int64_t PREPARED_BYTES = 148992;

struct Scales {
  const Weight& w;
  const int64_t tile;  // number of the tile, all batches counted

  Scales(const Weight& w, int64_t tile) : w(w), tile(tile) {}
  const float* at(int64_t block) { return w.scales() + (tile * BLOCKS + block) * TILE; }
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
  xsum_t* sums;  // [e][panel][block][row of it]: sums of the activation
  float* row_scales;  // [e][row]
  unsigned char* own;  // of each thread
};

// A row on its way to the second-level cache: what is read row by row would wait for each of them.
INLINE void ask_ahead(const stored_t* row) {
  constexpr int64_t OF_LINE = 64 / sizeof(stored_t);
  for (int64_t k = 0; k < K; k += OF_LINE) __builtin_prefetch(row + k, 0, 2);
}

constexpr uint32_t INFINITE = 0x7f800000u;

// The largest magnitude in a row as its bits, which are in the order of magnitudes; those of
// infinity and NaN are the largest.
INLINE uint32_t largest_of(const stored_t* x, int64_t x_col) {
  uint32_t largest = 0;
#pragma omp simd reduction(max : largest)
  for (int64_t k = 0; k < K; ++k) {
    const float value = x_of(x[k * x_col]);
    const uint32_t size = bits_of(value) & 0x7fffffffu;
    largest = size > largest ? size : largest;
  }
  return largest;
}

// x * factor to the nearest integers, ties to even, from -127 to 127: what is added leaves them in
// the last bits of the sum. The bounds keep compilers from fusing product and sum, too.
INLINE void round_row(const stored_t* x, int64_t x_col, float factor, int8_t* q) {
#pragma omp simd
  for (int64_t k = 0; k < K; ++k) {
    const float value = x_of(x[k * x_col]);
    const float bounded = at_most(at_least(value * factor, -127.0f), 127.0f);
    q[k] = int8_t(bits_of(bounded + 12582912.0f));
  }
}

// Rounds a row to integers and gives its largest magnitude; zeros and NaN if it is not finite.
INLINE float quantize_row(const stored_t* x, int64_t x_col, int8_t* q) {
  const uint32_t largest = largest_of(x, x_col);
  if (largest >= INFINITE) {
    std::memset(q, 0, K);
    return NAN;
  }
  const float amax = at_least(float_of(largest), 0x1p-100f);
  round_row(x, x_col, 127.0f / amax, q);
  return amax;
}

// The sums of a line's blocks.
INLINE void sum_blocks(const int8_t* line, xsum_t* sums, int height) {
  for (int64_t block = 0; block < BLOCKS; ++block) {
    const int64_t last = std::min((block + 1) * BLOCK, K_PADDED);
    xsum_t sum = 0;
    for (int64_t k = block * BLOCK; k < last; ++k) sum += line[k];
    sums[block * height] = sum * -BYTE_BIAS;
  }
}

// A row as a line; its sums are a panel's height apart. Gives the row's scale.
INLINE float line_of(const stored_t* x, int64_t x_col, x_t* line, xsum_t* sums, int height) {
  int8_t* q = reinterpret_cast<int8_t*>(line);
  const float amax = quantize_row(x, x_col, q);
  std::memset(q + K, 0, K_PADDED - K);
  sum_blocks(q, sums, height);
  return amax / 127.0f;
}

float line_of(const Call& call, const stored_t* x, x_t* line, xsum_t* sums, int height) {
  // With the stride a constant the usual case becomes vector instructions.
  if (call.x_col == 1) return line_of(x, 1, line, sums, height);
  return line_of(x, call.x_col, line, sums, height);
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
  const int64_t panel_row = row / heights[0] * heights[0];
  xsum_t* sums = call.sums + (e * padded(rows, heights) + panel_row) * BLOCKS + (row - panel_row);
  const int height = height_of(rows - panel_row, heights);
  call.row_scales[item] = line_of(call, x, line, sums, height);
}

// Panels of the rows that are under work; every thread makes some.
template <int COUNT>
void pack(const Call& call, int64_t super_first, int64_t rows, const int (&heights)[COUNT],
          const Share& of) {
  const bool is_single = call.m == 1 && height_of(1, heights) == 1;
  const auto mine = of.part(E * rows);
  for (int64_t item = mine.first; item < mine.last; ++item)
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
                       const float* sums, float scale) {
  const int64_t at = (e * call.m + row) * N + n0;
  float* out = call.out + at;
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    const float acc = sums[i] * scale;
    out[i] = acc;
  }
}

// The rows from panel_row on of the rows that are under work, which start at super_first.
void finish(const Call& call, int64_t tile, int64_t super_first, int64_t panel_row, int64_t rows,
            int64_t all_rows, float* totals) {
  const int64_t e = tile / N_TILES, n0 = tile % N_TILES * TILE;
  const float* row_scales = call.row_scales + e * all_rows + panel_row;
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t at = super_first + panel_row + row;
    const float* sums = totals + row * TILE;
    if (N - n0 >= TILE)
      finish_row(call, e, at, n0, TILE, sums, row_scales[row]);
    else
      finish_row(call, e, at, n0, N - n0, sums, row_scales[row]);
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
    at<i>(part) = spread(once * uint32_t(sums[row]));
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
    case 8: return few_rows<8>(w, tile, x, sums, totals);
    case 4: return few_rows<4>(w, tile, x, sums, totals);
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
      at<i>(part) = spread(uint32_t(sums[row]));
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
      store(total, fma(to_float(sum), load(scale + at_n), load(total)));
    });
  }
}

void many_rows(int height, const uint32_t* w, int64_t steps, const x_t* x, const xsum_t* sums,
               const float* scale, const float* zeros, float* totals) {
  switch (height) {
    case 4: return many_rows<4>(w, steps, x, sums, scale, zeros, totals);
    case 2: return many_rows<2>(w, steps, x, sums, scale, zeros, totals);
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
    const uint32_t* operands = w.codes() + (tile * GROUPS + first) * TILE;
    const float *scale = scales.at(block), *zeros = nullptr;
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

alignas(64) constexpr uint8_t STORED_AS[256] = {
    128, 129, 130, 131, 132, 133, 134, 135, 136, 137, 138, 139, 140, 141, 142, 143, 144, 145, 146,
    147, 148, 149, 150, 151, 152, 153, 154, 155, 156, 157, 158, 159, 160, 161, 162, 163, 164, 165,
    166, 167, 168, 169, 170, 171, 172, 173, 174, 175, 176, 177, 178, 179, 180, 181, 182, 183, 184,
    185, 186, 187, 188, 189, 190, 191, 192, 193, 194, 195, 196, 197, 198, 199, 200, 201, 202, 203,
    204, 205, 206, 207, 208, 209, 210, 211, 212, 213, 214, 215, 216, 217, 218, 219, 220, 221, 222,
    223, 224, 225, 226, 227, 228, 229, 230, 231, 232, 233, 234, 235, 236, 237, 238, 239, 240, 241,
    242, 243, 244, 245, 246, 247, 248, 249, 250, 251, 252, 253, 254, 255, 0, 1, 2, 3, 4, 5, 6, 7, 8,
    9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31, 32,
    33, 34, 35, 36, 37, 38, 39, 40, 41, 42, 43, 44, 45, 46, 47, 48, 49, 50, 51, 52, 53, 54, 55, 56,
    57, 58, 59, 60, 61, 62, 63, 64, 65, 66, 67, 68, 69, 70, 71, 72, 73, 74, 75, 76, 77, 78, 79, 80,
    81, 82, 83, 84, 85, 86, 87, 88, 89, 90, 91, 92, 93, 94, 95, 96, 97, 98, 99, 100, 101, 102, 103,
    104, 105, 106, 107, 108, 109, 110, 111, 112, 113, 114, 115, 116, 117, 118, 119, 120, 121, 122,
    123, 124, 125, 126, 127,
};
float stored_scale(const void* const* parts, int64_t block) {
  return static_cast<const float*>(parts[1])[block];
}

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
          word |= uint32_t(STORED_AS[codes[element]]) << (BITS * place);
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
        const int64_t block = inside ? n : 0;
        w.scales()[at + row] = inside ? stored_scale(parts, block) : 0.0f;
      }
    }
  }
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
  call.sums = memory.take<xsum_t>(E * all * BLOCKS);
  call.row_scales = memory.take<float>(E * all);
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
