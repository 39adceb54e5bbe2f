"""Functions of floats that Triton has not, printed into the kernels that call them.

Libraries of devices have most of them, but Triton's interpreter has no such library. Coefficients
are minimax fits by Lawson's iteration in float64, rounded to float32, as those of
`fxquant.codegen.cpp.math`; what is fitted and its error stand in each function.
"""

from __future__ import annotations

import re

PRELUDE = {
    "tanh": '''
@triton.jit
def tanh(x):
    """Hyperbolic tangent; a series where the quotient would cancel."""
    decay = tl.exp(-2.0 * tl.abs(x))
    quotient = (1.0 - decay) / (1.0 + decay)
    square = x * x
    series = x * (1.0 + square * (-1.0 / 3.0 + square * (2.0 / 15.0)))
    return tl.where(tl.abs(x) < 0.05, series, tl.where(x < 0.0, -quotient, quotient))
''',
    "power": '''
@triton.jit
def power(x, y):
    """``x ** y`` as C defines it: signs for whole exponents, NaN for roots of negatives."""
    x, y = tl.broadcast(x, y)
    zero = tl.where(y > 0.0, 0.0, tl.where(y < 0.0, float("inf"), y))
    known = (x == 0.0) | (tl.abs(x) == 1.0)
    size = tl.exp2(tl.where(known, 0.0, y) * tl.log2(tl.where(known, 1.0, tl.abs(x))))
    size = tl.where(x == 0.0, zero, size)
    whole, odd = tl.floor(y) == y, tl.floor(y * 0.5) * 2.0 != y
    no_root = (x < 0.0) & (x > float("-inf"))
    turned = tl.where(whole, tl.where(odd, -size, size), tl.where(no_root, float("nan"), size))
    value = tl.where(is_negative(x), turned, size)
    value = tl.where((x == x) & (y == y), value, x + y)
    return tl.where((y == 0.0) | (x == 1.0), 1.0, value)
''',
    "exp_minus_one": '''
@triton.jit
def exp_minus_one(x):
    """``exp(x) - 1``; errors of the exponential go out of the quotient (Kahan)."""
    grown = tl.exp(x)
    less, is_one = grown - 1.0, grown == 1.0
    known = (less == -1.0) | (grown == float("inf"))
    quotient = less / tl.log(tl.where(is_one | known, 2.0, grown))
    return tl.where(is_one, x, tl.where(known, less, quotient * x))
''',
    "log_one_plus": '''
@triton.jit
def log_one_plus(x):
    """``log(1 + x)``; the rounding of ``1 + x`` goes out of the quotient (Kahan)."""
    grown = 1.0 + x
    known = (grown == 1.0) | (x == float("inf"))
    return tl.where(known, x, tl.log(grown) * (x / tl.where(known, 1.0, grown - 1.0)))
''',
    "erfc": '''
@triton.jit
def erfc(x):
    """``1 - erf(x)``; beyond 1/2 ``exp(-x * x) * s * p(s)``, s = 2 / (2 + x), error 5e-8."""
    a = tl.minimum(tl.abs(x), 11.0)
    s = 2.0 / (2.0 + a)
    p = -0.06124538
    p = p * s + 0.29632527
    p = p * s - 0.51217675
    p = p * s + 0.3060135
    p = p * s - 0.044812027
    p = p * s + 0.20976616
    p = p * s + 0.24149136
    p = p * s + 0.2825719
    p = p * s + 0.2820766
    square = a * a
    lost = tl.fma(a, a, -square)
    tail = tl.exp(-square) * (1.0 - lost) * s * p
    value = tl.where(a < 0.5, 1.0 - tl.erf(x), tl.where(x < 0.0, 2.0 - tail, tail))
    return tl.where(x == x, value, x)
''',
    "sign": '''
@triton.jit
def sign(x):
    """1, -1, or 0, of NaN too."""
    return tl.where(x > 0.0, 1.0, tl.where(x < 0.0, -1.0, 0.0))
''',
    "is_negative": '''
@triton.jit
def is_negative(x):
    """Whether the sign bit is set: -0.0 has it."""
    return x.to(tl.int32, bitcast=True) < 0
''',
    "copysign": '''
@triton.jit
def copysign(x, y):
    """The magnitude of x with the sign bit of y."""
    size, sign = x.to(tl.int32, bitcast=True), y.to(tl.int32, bitcast=True)
    return ((size & 0x7FFFFFFF) | (sign & -0x80000000)).to(tl.float32, bitcast=True)
''',
    "trunc": '''
@triton.jit
def trunc(x):
    """The next integer towards zero."""
    return tl.where(x < 0.0, tl.ceil(x), tl.floor(x))
''',
    "round_to_even": '''
@triton.jit
def round_to_even(x):
    """The nearest integer; adding 1.5 * 2 ** 23 rounds what has a fraction."""
    return tl.where(tl.abs(x) < 4194304.0, (x + 12582912.0) - 12582912.0, x)
''',
    "hypot": '''
@triton.jit
def hypot(x, y):
    """Length of a vector, whose squares may not be floats."""
    x, y = tl.abs(x), tl.abs(y)
    large, small = tl.maximum(x, y), tl.minimum(x, y)
    known = (large == 0.0) | (large == float("inf"))
    ratio = small / tl.where(known, 1.0, large)
    length = tl.where(known, large, large * tl.sqrt_rn(1.0 + ratio * ratio))
    length = tl.where((x == x) & (y == y), length, x + y)
    return tl.where((x == float("inf")) | (y == float("inf")), float("inf"), length)
''',
    "angle": '''
@triton.jit
def angle(y, x):
    """Of the point (x, y); atan(t) = t + t ** 3 * p(t * t) up to tan(pi / 8), error 1e-8."""
    up, along = tl.abs(y), tl.abs(x)
    large, small = tl.maximum(up, along), tl.minimum(up, along)
    known = (small == large) | (large == 0.0)
    ratio = small / tl.where(known, 1.0, large)
    ratio = tl.where(known, tl.where(large == 0.0, 0.0, 1.0), ratio)
    turned = ratio > 0.41421357
    t = tl.where(turned, (ratio - 1.0) / (ratio + 1.0), ratio)
    square = t * t
    p = -0.06455072
    p = p * square + 0.10744762
    p = p * square - 0.14264056
    p = p * square + 0.19999543
    p = p * square - 0.3333333
    value = t + t * square * p + tl.where(turned, 0.7853982, 0.0)
    value = tl.where(up > along, 1.5707964 - value, value)
    value = copysign(tl.where(is_negative(x), 3.1415927 - value, value), y)
    return tl.where((x == x) & (y == y), value, x + y)
''',
    "arctangent": '''
@triton.jit
def arctangent(x):
    """Of any number."""
    return angle(x, tl.full(x.shape, 1.0, tl.float32))
''',
    "arcsine": '''
@triton.jit
def arcsine(x):
    """NaN outside of [-1, 1]."""
    return angle(x, tl.sqrt_rn((1.0 - x) * (1.0 + x)))
''',
    "arccosine": '''
@triton.jit
def arccosine(x):
    """NaN outside of [-1, 1]."""
    return 2.0 * angle(tl.sqrt_rn(1.0 - x), tl.sqrt_rn(1.0 + x))
''',
    "tangent": '''
@triton.jit
def tangent(x):
    """Sine over cosine."""
    return tl.sin(x) / tl.cos(x)
''',
    "sinh": '''
@triton.jit
def sinh(x):
    """Hyperbolic sine; of large numbers by the square of ``exp(x / 2)``, which is a float."""
    a = tl.abs(x)
    less = exp_minus_one(a)
    half = tl.exp(0.5 * a)
    value = tl.where(a < 80.0, 0.5 * (less + less / (less + 1.0)), 0.5 * half * half)
    return tl.where(x < 0.0, -value, value)
''',
    "cosh": '''
@triton.jit
def cosh(x):
    """Hyperbolic cosine, by the square of ``exp(x / 2)``, which is a float."""
    half = tl.exp(0.5 * tl.abs(x))
    return 0.5 * half * half + 0.5 / half / half
''',
    "arsinh": '''
@triton.jit
def arsinh(x):
    """``log(x + sqrt(x * x + 1))``, without the square of large numbers."""
    a = tl.abs(x)
    small = log_one_plus(a + a * a / (1.0 + tl.sqrt_rn(1.0 + a * a)))
    value = tl.where(a > 1e9, tl.log(tl.maximum(a, 1.0)) + 0.6931472, small)
    return tl.where(x < 0.0, -value, value)
''',
    "arcosh": '''
@triton.jit
def arcosh(x):
    """``log(x + sqrt(x * x - 1))``, without the square of large numbers."""
    over = x - 1.0
    small = log_one_plus(over + tl.sqrt_rn(over) * tl.sqrt_rn(over + 2.0))
    return tl.where(x > 1e9, tl.log(tl.maximum(x, 1.0)) + 0.6931472, small)
''',
    "artanh": '''
@triton.jit
def artanh(x):
    """NaN outside of [-1, 1]; by magnitudes, whose quotient does not cancel."""
    a = tl.abs(x)
    value = 0.5 * log_one_plus(2.0 * a / (1.0 - a))
    return tl.where(x < 0.0, -value, value)
''',
}
"""Their texts, by name."""
_WORD = re.compile(r"\b\w+(?=\()")


def needed(name: str) -> set[str]:
    """A function and those that it calls."""
    called = PRELUDE.keys() & set(_WORD.findall(PRELUDE[name])) - {name}
    return {name}.union(*map(needed, called))
