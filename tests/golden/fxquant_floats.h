// Functions of floats.

#include <cmath>
#include <cstdint>
#include <cstring>

#define INLINE [[gnu::always_inline]] inline

namespace {

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

[[gnu::always_inline]] static inline uint64_t bits_of_double(double x) {
    uint64_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits;
}

[[gnu::always_inline]] static inline double double_of(uint64_t bits) {
    double x;
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

// NaN if either is.
[[gnu::always_inline]] static inline float lane_maximum(float x, float y) {
    return (x > y) | (x != x) ? x : y;
}

// NaN if either is.
[[gnu::always_inline]] static inline float lane_minimum(float x, float y) {
    return (x < y) | (x != x) ? x : y;
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

// Exponent and fraction moved to their places; the product sets the exponent's offset right and
// makes subnormals normal. Infinities and NaN get the largest exponent.
[[gnu::always_inline]] static inline float from_fp16(uint16_t half) {
    const uint32_t size = (uint32_t(half) & 0x7fffu) << 13;
    const uint32_t bits = bits_of(float_of(size) * 0x1p112f);
    const uint32_t most = size >= 0x0f800000u ? 0x7f800000u : 0u;
    return float_of(bits | most | (uint32_t(half) & 0x8000u) << 16);
}

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

// p * 2^k for -260 < k < 256, in two steps: results below 2^-126 round once, too large ones are
// infinite. `shifted` is 1.5 * 2^23 + k, which holds k in its last bits.
[[gnu::always_inline]] static inline float scaled(float p, float shifted) {
    const int32_t k = int32_t(bits_of(shifted) - 0x4b400000u);
    const int32_t half = k >> 1;
    const float first = float_of(uint32_t(half + 127) << 23);
    return p * first * float_of(uint32_t(k - half + 127) << 23);
}

// e^x = 2^k e^r, k the integer nearest x / ln(2), ln(2) in two parts of which k times the first
// is exact.
[[gnu::always_inline]] static inline float lane_exp(float x) {
    const float z = at_most(at_least(x, -105.0f), 89.0f);
    const float shifted = madd(z, 1.44269504f, 12582912.0f);
    const float k = shifted - 12582912.0f;
    const float r = madd(k, 2.12194440e-4f, madd(k, -0.693359375f, z));
    return scaled(exp_fraction(r), shifted);
}

// 2^x = 2^k 2^r, |r| <= 1/2, 2^r = 1 + r p(r), relative error 2e-8.
[[gnu::always_inline]] static inline float lane_exp2(float x) {
    const float z = at_most(at_least(x, -151.0f), 129.0f);
    const float shifted = z + 12582912.0f;
    const float r = z - (shifted - 12582912.0f);
    float p = 1.5477765e-4f;
    p = madd(p, r, 0.0013401612f);
    p = madd(p, r, 0.009617999f);
    p = madd(p, r, 0.055503245f);
    p = madd(p, r, 0.2402265f);
    p = madd(p, r, 0.6931472f);
    return scaled(madd(p, r, 1.0f), shifted);
}

// e^x - 1 = 2^k (e^r - 1) + 2^k - 1 with halves of these, of which 2^(k - 1) is normal up to
// k = 128; what e^r is more than 1 comes from the same fit as `exp_fraction`.
[[gnu::always_inline]] static inline float lane_expm1(float x) {
    const float z = at_most(at_least(x, -86.0f), 89.0f);
    const float shifted = madd(z, 1.44269504f, 12582912.0f);
    const float k = shifted - 12582912.0f;
    const float r = madd(k, 2.12194440e-4f, madd(k, -0.693359375f, z));
    float p = 0.0013813145f;
    p = madd(p, r, 0.008369419f);
    p = madd(p, r, 0.041668456f);
    p = madd(p, r, 0.16666515f);
    p = madd(p, r, 0.49999994f);
    const float more = madd(p * r, r, r);
    const float half = float_of((bits_of(shifted) - 0x4b400000u + 126u) << 23);
    const float halved = madd(half, more, half - 0.5f);
    return k == 0.0f ? more : halved + halved;
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

[[gnu::always_inline]] static inline float lane_sigmoid(float x) {
    return 1.0f / one_plus_exp_of_minus(x);
}

[[gnu::always_inline]] static inline float lane_silu(float x) {
    return x / one_plus_exp_of_minus(x);
}

// x = m 2^k with m in [sqrt(1/2), sqrt(2)) for positive finite x; gives m - 1.
[[gnu::always_inline]] static inline float split(float x, float& k) {
    const bool tiny = x < 0x1p-126f;
    const uint32_t bits = bits_of(tiny ? x * 0x1p23f : x) - 0x3f3504f3u;
    k = float(int32_t(bits) >> 23) - (tiny ? 23.0f : 0.0f);
    return float_of((bits & 0x7fffffu) + 0x3f3504f3u) - 1.0f;
}

// What a logarithm is at zero, below it, and at infinity; else y.
[[gnu::always_inline]] static inline float log_edges(float x, float y) {
    y = x < INFINITY ? y : x;
    return x > 0.0f ? y : (x == 0.0f ? -INFINITY : NAN);
}

// log(1 + f) = f - f^2 / 2 + f^3 p(f), relative error 6e-9, and k ln(2) in two parts.
[[gnu::always_inline]] static inline float lane_log(float x) {
    float k;
    const float f = split(x, k);
    float p = -0.076343894f;
    p = madd(p, f, 0.12765428f);
    p = madd(p, f, -0.13162003f);
    p = madd(p, f, 0.14201368f);
    p = madd(p, f, -0.16623144f);
    p = madd(p, f, 0.20001236f);
    p = madd(p, f, -0.25000826f);
    p = madd(p, f, 0.3333333f);
    const float square = f * f;
    const float rest = madd(square, madd(p, f, -0.5f), k * -2.12194440e-4f);
    return log_edges(x, madd(k, 0.693359375f, f + rest));
}

// log(1 + x); the rounding of 1 + x goes out of the quotient (Kahan).
[[gnu::always_inline]] static inline float lane_log1p(float x) {
    const float grown = 1.0f + x;
    const float value = lane_log(grown) * (x / (grown - 1.0f));
    return (grown == 1.0f) | (x == INFINITY) ? x : value;
}

// log2(1 + f) = f p(f), relative error 2e-8.
[[gnu::always_inline]] static inline float lane_log2(float x) {
    float k;
    const float f = split(x, k);
    float p = -0.10994958f;
    p = madd(p, f, 0.18623567f);
    p = madd(p, f, -0.19109237f);
    p = madd(p, f, 0.20459366f);
    p = madd(p, f, -0.23961331f);
    p = madd(p, f, 0.2885676f);
    p = madd(p, f, -0.36069682f);
    p = madd(p, f, 0.48089823f);
    p = madd(p, f, -0.72134733f);
    p = madd(p, f, 1.442695f);
    return log_edges(x, madd(p, f, k));
}

// |x|^y = 2^(y log2|x|) in double, where y times the logarithm keeps enough digits; the signs, and
// NaN for roots of negatives, as C defines them. With s = (m - 1) / (m + 1), log2(m) = s p(s^2),
// error 3e-14; 2^r, |r| <= 1/2, error 4e-11.
[[gnu::always_inline]] static inline float lane_power(float x, float y) {
    const double size = double(std::fabs(x));
    const uint64_t bits = bits_of_double(size) - 0x3fe6a09e667f3bcdu + 0x3ff0000000000000u;
    const double m = double_of((bits & 0x000fffffffffffffu) + 0x3fe6a09e667f3bcdu);
    const double k = double_of(0x4330000000000000u | (bits >> 52)) - 0x1.00000000003ffp52;
    const double s = (m - 1.0) / (m + 1.0);
    const double u = s * s;
    double p = 0.2829200375092595;
    p = p * u + 0.31990438427870377;
    p = p * u + 0.41220928238581167;
    p = p * u + 0.5770779420872588;
    p = p * u + 0.9617966941142486;
    p = p * u + 2.88539008177785;
    double logarithm = k + s * p;
    logarithm = size < INFINITY ? logarithm : size;
    logarithm = size > 0.0 ? logarithm : -INFINITY;
    const float bounded = std::fabs(y) == INFINITY ? std::copysign(0x1p127f, y) : y;
    double t = double(bounded) * logarithm;
    t = t < -200.0 ? -200.0 : t;
    t = t > 200.0 ? 200.0 : t;
    const double shifted = t + 0x1.8p52;
    const double r = t - (shifted - 0x1.8p52);
    double q = 1.5201921736903931e-05;
    q = q * r + 0.00015469291086440048;
    q = q * r + 0.001333392256356631;
    q = q * r + 0.009618027253881634;
    q = q * r + 0.05550410353446717;
    q = q * r + 0.2402265119815538;
    q = q * r + 0.6931471807284478;
    q = q * r + 0.9999999999616822;
    const float power = float(double_of(bits_of_double(q) + (bits_of_double(shifted) << 52)));
    const bool whole = std::floor(y) == y;
    const bool odd = whole & (std::floor(y * 0.5f) * 2.0f != y);
    const float turned = odd ? std::copysign(power, x) : power;
    const float real = (x < 0.0f) & !whole & (x > -INFINITY) ? NAN : turned;
    return (x == 1.0f) | (y == 0.0f) ? 1.0f : ((x != x) | (y != y) ? x + y : real);
}

// 0 of NaN too.
[[gnu::always_inline]] static inline float lane_sign(float x) {
    return float(x > 0.0f) - float(x < 0.0f);
}

// erf(x) = x p(u) / q(u), u = x^2 up to 3.85^2; relative error 1.5e-8. Beyond, the product grows
// with x and is cut at 1.
[[gnu::always_inline]] static inline float lane_erf(float x) {
    const float u = at_most(x * x, 14.8225f);
    float p = 2.195789e-06f;
    p = madd(p, u, 2.975371e-04f);
    p = madd(p, u, 0.0038265593f);
    p = madd(p, u, 0.054658853f);
    p = madd(p, u, 0.1957011f);
    p = madd(p, u, 1.1752272f);
    float q = 4.033984e-05f;
    q = madd(q, u, 0.0011930818f);
    q = madd(q, u, 0.015398922f);
    q = madd(q, u, 0.11782678f);
    q = madd(q, u, 0.52060777f);
    q = madd(q, u, 1.041518f);
    return std::copysign(at_most(std::fabs(x) * (p / q), 1.0f), x);
}

// tanh(x) = x p(u) / q(u), u = x^2 up to 9.02^2; relative error 2e-9. Beyond, the product grows
// with x and is cut at 1.
[[gnu::always_inline]] static inline float lane_tanh(float x) {
    const float u = at_most(x * x, 81.3604f);
    float p = 8.806311e-08f;
    p = madd(p, u, 5.4801043e-05f);
    p = madd(p, u, 0.006953993f);
    p = madd(p, u, 0.2391494f);
    p = madd(p, u, 1.7348063f);
    float q = 1.2793314e-09f;
    q = madd(q, u, 2.8060347e-06f);
    q = madd(q, u, 7.2990486e-04f);
    q = madd(q, u, 0.048119232f);
    q = madd(q, u, 0.81741816f);
    q = madd(q, u, 1.7348063f);
    return std::copysign(at_most(std::fabs(x) * (p / q), 1.0f), x);
}

// x / 2 + |x| b(|x|), b(a) = erf(a / sqrt(2)) / 2 = a p(u) / q(u), u = a^2 up to 5.4^2; absolute
// error 6e-9. Beyond, the product grows with a and is cut at 1/2.
[[gnu::always_inline]] static inline float lane_gelu(float x) {
    const float a = std::fabs(x);
    const float u = at_most(x * x, 29.16f);
    float p = 4.213838e-08f;
    p = madd(p, u, 1.1459543e-05f);
    p = madd(p, u, 2.9607688e-04f);
    p = madd(p, u, 0.008379943f);
    p = madd(p, u, 0.0601304f);
    p = madd(p, u, 0.718817f);
    float q = 2.1920632e-06f;
    q = madd(q, u, 1.3045149e-04f);
    q = madd(q, u, 0.0033495312f);
    q = madd(q, u, 0.05113297f);
    q = madd(q, u, 0.4510247f);
    q = madd(q, u, 1.8018072f);
    return madd(a, at_most(a * (p / q), 0.5f), 0.5f * x);
}

}  // namespace
