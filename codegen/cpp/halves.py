"""16-bit floats in printed C++: conversions of one lane that compilers turn into vectors.

They work on the bits, without branches. Compilers have no vector form of `_Float16` conversions
short of AVX512-FP16, and none of bfloat16 conversions.
"""

from __future__ import annotations

SHORT = {"float16": "fp16", "bfloat16": "bf16"}
"""What helpers call a dtype of 16 bits."""

PRELUDE = {
    "from_bf16": """
// The upper half of a float32.
[[gnu::always_inline]] static inline float from_bf16(uint16_t half) {
    return float_of(uint32_t(half) << 16);
}
""",
    "to_bf16": """
// To nearest, ties to even: adds just under half of the last place, more if it is odd. A NaN keeps
// its sign and becomes quiet.
[[gnu::always_inline]] static inline uint16_t to_bf16(float x) {
    const uint32_t bits = bits_of(x);
    const uint32_t nearest = bits + 0x7fffu + ((bits >> 16) & 1u);
    const uint32_t kept = (bits & 0x7fffffffu) > 0x7f800000u ? bits | 0x400000u : nearest;
    return uint16_t(kept >> 16);
}
""",
    "from_fp16": """
// Exponent and fraction moved to their places; the product sets the exponent's offset right and
// makes subnormals normal. Infinities and NaN get the largest exponent.
[[gnu::always_inline]] static inline float from_fp16(uint16_t half) {
    const uint32_t size = (uint32_t(half) & 0x7fffu) << 13;
    const uint32_t bits = bits_of(float_of(size) * 0x1p112f);
    const uint32_t most = size >= 0x0f800000u ? 0x7f800000u : 0u;
    return float_of(bits | most | (uint32_t(half) & 0x8000u) << 16);
}
""",
    "to_fp16": """
// To nearest, ties to even. Below 2^-14 the sum with 0.5 rounds, whose last place is the smallest
// float16; above, as in `to_bf16`. A NaN becomes the quiet one of its sign.
[[gnu::always_inline]] static inline uint16_t to_fp16(float x) {
    const uint32_t bits = bits_of(x);
    const uint32_t size = bits & 0x7fffffffu;
    const uint32_t small = bits_of(float_of(size) + 0.5f) - 0x3f000000u;
    const uint32_t normal = (size - 0x38000000u + 0xfffu + ((size >> 13) & 1u)) >> 13;
    uint32_t half = size < 0x38800000u ? small : normal;
    half = size >= 0x477ff000u ? 0x7c00u : half;
    half = size > 0x7f800000u ? 0x7e00u : half;
    return uint16_t(half | (bits & 0x80000000u) >> 16);
}
""",
}
"""Helper functions by name; `fxquant.codegen.cpp.math.prelude_text` prints them."""
