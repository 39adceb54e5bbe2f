"""The tile unit (AMX) of a core: its instructions, and what has to be told it before them."""

from __future__ import annotations

BF16, INT8, BIASED = "tile_dot_bf16", "tile_dot_int8", "tile_dot_biased"
"""Products of pairs of bfloat16, of signed bytes, and of signed rows and unsigned operands."""

UNIT = """\
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
"""
