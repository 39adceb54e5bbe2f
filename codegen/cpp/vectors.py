"""The few vector operations that skeletons are written in, for each instruction set.

``vf`` holds `LANES` floats, ``vi`` as many dwords. Everything else of a kernel is the same text for
every instruction set.
"""

from __future__ import annotations

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
INLINE void dot(vi& sum, vi w, vi x) {  // += four unsigned bytes times signed ones, exactly
  const vi w_even = _mm256_and_si256(w, _mm256_set1_epi16(255)), w_odd = _mm256_srli_epi16(w, 8);
  const vi x_even = _mm256_srai_epi16(_mm256_slli_epi16(x, 8), 8), x_odd = _mm256_srai_epi16(x, 8);
  const vi pairs = add(_mm256_madd_epi16(w_even, x_even), _mm256_madd_epi16(w_odd, x_odd));
  sum = add(sum, pairs);
}
INLINE void dot(vi& sum, vi w, const uint32_t* x) { dot(sum, w, spread(*x)); }
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
    return _DOT_FLOAT_AVX512 if isa.vectors == "avx512" else _DOT_FLOAT
