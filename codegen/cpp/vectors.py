"""The few vector operations that skeletons are written in, for each instruction set.

``vf`` holds `LANES` floats, ``vi`` as many dwords. Everything else of a kernel is the same text for
every instruction set.
"""

from __future__ import annotations

from collections.abc import Collection

from fxquant.codegen.cpp.isa import Isa

_AVX512 = """\
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
"""

_AVX2 = """\
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
"""

_PORTABLE = """\
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
"""

_VECTORS = {"avx512": _AVX512, "avx2": _AVX2, "portable": _PORTABLE}


def vectors(isa: str) -> str:
    """The text for the vectors of that name."""
    return _VECTORS[isa]


_DOT_BF16 = """\
// GCC spills around its own intrinsic for this instruction: two to three times slower.
INLINE void dot(vf& sum, vi w, const uint32_t* x) {  // += w.lo * x.lo + w.hi * x.hi, bfloat16 pairs
  asm("vdpbf16ps %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(w), "m"(*x));
}
"""

_DOT_FLOAT = """\
INLINE void dot(vf& sum, vf w, const float* x) { sum = fma(w, spread(*x), sum); }
"""

_DOT_FLOAT_AVX2 = """\
// In one piece: what outputs share GCC would load into a register each, and run out of them.
INLINE void dot(vf& sum, vf w, const float* x) {
  vf all;
  asm("vbroadcastss %3, %1\\n\\tvfmadd231ps %1, %2, %0" : "+x"(sum), "=&x"(all) : "x"(w), "m"(*x));
}
"""

_DOT_FLOAT_AVX512 = """\
// Left to itself GCC loads every activation into a register first, and runs out of them.
INLINE void dot(vf& sum, vf w, const float* x) {
  asm("vfmadd231ps %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(w), "m"(*x));
}
"""

_DOT_INT8 = {
    "avx512": """\
INLINE void dot(vi& sum, vi w, const uint32_t* x) {  // += four unsigned bytes times signed ones
  asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(w), "m"(*x));
}
""",
    "avx2": """\
INLINE void dot(vi& sum, vi w, vi x) {  // += four unsigned bytes times signed ones
  asm("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sum) : "x"(w), "x"(x));
}
INLINE void dot(vi& sum, vi w, const uint32_t* x) { dot(sum, w, spread(*x)); }
""",
}
_DOT_INT8_WITHOUT = {
    "avx2": """\
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
  asm("vpbroadcastd %3, %1\\n\\tvpmaddwd %1, %2, %1\\n\\tvpaddd %1, %0, %0"
      : "+x"(sum), "=&x"(both) : "x"(w), "m"(x));
}
INLINE void add_words(vi& sum0, vi& sum1, vi w0, vi w1, const uint32_t& x) {
  vi both0, both1;
  asm("vpbroadcastd %6, %2\\n\\tvpmaddwd %2, %5, %3\\n\\tvpmaddwd %2, %4, %2\\n\\t"
      "vpaddd %2, %0, %0\\n\\tvpaddd %3, %1, %1"
      : "+x"(sum0), "+x"(sum1), "=&x"(both0), "=&x"(both1) : "x"(w0), "x"(w1), "m"(x));
}
INLINE void dot(vi& sum, vi w, const Words* x) {  // += four unsigned bytes times signed ones
  add_words(sum, evens(w), x->evens);
  add_words(sum, odds(w), x->odds);
}
""",
    "portable": """\
INLINE void dot(vi& sum, vi w, vi x) {  // += four unsigned bytes times signed ones
  sum += (w & 255u) * vi(vs(x << 24) >> 24) + ((w >> 8) & 255u) * vi(vs(x << 16) >> 24) +
         ((w >> 16) & 255u) * vi(vs(x << 8) >> 24) + (w >> 24) * vi(vs(x) >> 24);
}
INLINE void dot(vi& sum, vi w, const uint32_t* x) { dot(sum, w, spread(*x)); }
""",
}


_PAIR = """\
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
"""


def pair(isa: Isa) -> str:
    """The text of ``pair``, which makes operands of floats."""
    assert isa.dot_bf16, "only AVX512 multiplies pairs of bfloat16"
    return _PAIR


def dot(isa: Isa, path: str) -> str:
    """The text of ``dot``, the product that sums are made of.

    Args:
        isa: The instruction set.
        path: What is multiplied: ``"bf16"``, ``"f32"`` or ``"int8"``.
    """
    if path == "int8":
        return (_DOT_INT8 if isa.dot_int8 else _DOT_INT8_WITHOUT)[isa.vectors]
    if path == "bf16":
        return _DOT_BF16
    return {"avx512": _DOT_FLOAT_AVX512, "avx2": _DOT_FLOAT_AVX2}.get(isa.vectors, _DOT_FLOAT)


_PRODUCTS = """\
// Rows times two vectors: sums[row][2] += .
template <int ROWS, typename S, typename W, typename X>
INLINE void add_products(Sums<2 * ROWS, S>& sums, const W* w, const X* x) {
  const auto w0 = load(w), w1 = load(w + LANES);
  each<ROWS>([&](auto row) INLINE_LAMBDA {
    dot(at<2 * row>(sums), w0, x + row);
    dot(at<2 * row + 1>(sums), w1, x + row);
  });
}
"""
_PRODUCTS_OF_BYTES = _PRODUCTS.replace(", typename S, typename W, typename X>", ">").replace(
    "(Sums<2 * ROWS, S>& sums, const W* w, const X* x)",
    "(Sums<2 * ROWS, vi>& sums, const uint32_t* w, const uint32_t* x)",
)
"""The same beside another ``add_products``."""
_PRODUCTS_OF_FLOATS = """\
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
"""
_PRODUCTS_OF_WORDS = """\
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
"""


def products(isa: Isa, paths: Collection[str]) -> str:
    """The text of ``add_products``: `dot` for a panel of rows and two vectors.

    Args:
        isa: The instruction set.
        paths: What is multiplied.
    """
    if isa.vectors != "avx2":
        return _PRODUCTS
    of_bytes = _PRODUCTS_OF_WORDS if isa.splits_bytes else _PRODUCTS_OF_BYTES
    own = {"f32": _PRODUCTS_OF_FLOATS, "int8": of_bytes}
    return "\n".join(own[path] for path in paths)
