"""Rows of an activation to int8: inside of a product, and as a kernel of its own."""

from __future__ import annotations

import textwrap

from fxquant.codegen.cpp import support
from fxquant.codegen.cpp.prologue import Text, prologue_text
from fxquant.codegen.cpp.sections import KERNEL, comment, joined, section
from fxquant.codegen.cpp.unused import without_unused
from fxquant.codegen.header import Header
from fxquant.codegen.quantize import QuantizeSpec

ROW_HELPERS = {"bits_of", "float_of", "at_least", "at_most"}
"""Of `fxquant.codegen.cpp.math`, that the text of a row calls."""

_STORED = {"float32": "float", "float16": "uint16_t", "bfloat16": "uint16_t"}
_FROM = {"float16": "from_fp16", "bfloat16": "from_bf16"}


def row_text(*, flagged: bool = False, scope: str = "token", clipped: bool = False) -> str:
    """The functions that round a row: ``quantize_row`` gives its largest magnitude.

    Args:
        flagged: Columns with a flag, in ``const bits_t* flags``, are taken for zeros.
        scope: Of the largest magnitude, as in `QuantizeSpec`.
        clipped: Whether there is a limit to it.
    """
    plain = "x_of(x[k * x_col])"
    text = _LARGEST + _ROUND + (_ABOVE if clipped or scope == "static" else "")
    if scope == "token":
        text += _CLIPPED_ROW if clipped else _ROW
    elif scope == "static":
        text += _STATIC_ROW
    # Read in any case: what is read on a condition makes no vectors everywhere.
    flagged_value = f"const float x_k = {plain}, value = flags[k] ? 0.0f : x_k;"
    text = text.replace("@VALUE@", flagged_value if flagged else f"const float value = {plain};")
    taken = ["const stored_t* x", "int64_t x_col", "float factor", "int8_t* q"]
    flags = ["const bits_t* flags"] if flagged else []
    text = text.replace("@ROUND_ROW@", signature("INLINE void round_row", flags + taken))
    text = text.replace("@FLAGS@", "const bits_t* flags, " if flagged else "")
    return text.replace("@GIVEN@", "flags, " if flagged else "")


def signature(head: str, parameters: list[str]) -> str:
    """The start of a function, in lines that fit the page."""
    whole = ", ".join(parameter.replace(" ", "\0") for parameter in parameters)
    lines = textwrap.wrap(f"{head}({whole})\0{{", 100, subsequent_indent=" " * (len(head) + 1))
    return "\n".join(lines).replace("\0", " ")


def render_quantize(spec: QuantizeSpec, header: Header) -> str:
    """The C++ source of a kernel that rounds rows: compilers make vectors of it themselves."""
    made = prologue_text(spec.prologue, spec.x_dtype) if spec.prologue is not None else None
    # A prologue leaves floats.
    x_dtype = spec.x_dtype if made is None else "float32"
    read = _FROM.get(x_dtype)
    value = f"{read}(x)" if read else "x"
    used = ROW_HELPERS | ({read} if read else set()) | (made.prelude if made else set())
    entry = _TENSOR if spec.scope == "tensor" else _ROWS
    entry = entry if made is None else _made_rows(made)
    amax = "at_least(float_of(largest), 0x1p-100f)"
    for hole, text, otherwise in (
        ("@LIMIT@", "  const float most = at_least(*limit, 0x1p-100f);\n", ""),
        ("@KNOWN@", " && most == most", ""),
        ("@AMAX@", f"at_most({amax}, most)", amax),
        ("@GIVEN@", "most, saturated, ", ""),
        ("@START@", "  int64_t saturated = 0;\n", ""),
        ("@REDUCED@", " reduction(+ : saturated)", ""),
        ("@COUNTED@", _COUNT_ALL, ""),
        ("@RESULT@", "saturated", "0"),
    ):
        entry = entry.replace(hole, text if spec.has_limit else otherwise)
    stored = f"the activation, in {spec.x_dtype}" if made is None else "the activation, as made"
    own = [
        f"using stored_t = {_STORED[x_dtype]};  // {stored}",
        f"constexpr int64_t K = {spec.k};  // inputs",
        f"INLINE float x_of(stored_t x) {{ return {value}; }}",
        *(() if made is None else (_CALL, _prologue(made))),
    ]
    text = joined(
        comment(header, spec),
        section(support.FLOATS, "functions of floats", support.floats(used)),
        section(KERNEL, "its rows", *own),
        section("rounding", "rows to int8", row_text(scope=spec.scope, clipped=spec.clipped)),
        section("entry", "what is called from outside", exported=entry),
    )
    return without_unused(f"{text}\n")


def _prologue(made: Text) -> str:
    rows = [f"float* {name}" for name in made.buffers]
    head = signature("INLINE void prologue", ["const Call& call", "int64_t row", *rows])
    what = f"// Makes a row of what is quantized in {made.result}, and what else is written of it."
    return f"{what}\n{head}\n{made.body}\n}}"


def _made_rows(made: Text) -> str:
    """What is exported where a prologue makes the rows."""
    text = _MADE_ROWS.replace("@BUFFERS@", ", ".join(f"{name}[K]" for name in made.buffers))
    return text.replace("@ROWS@", ", ".join(made.buffers)).replace("@MADE@", made.result)


_LARGEST = """\
constexpr uint32_t INFINITE = 0x7f800000u;

// The largest magnitude in a row as its bits, which are in the order of magnitudes; those of
// infinity and NaN are the largest.
INLINE uint32_t largest_of(@FLAGS@const stored_t* x, int64_t x_col) {
  uint32_t largest = 0;
#pragma omp simd reduction(max : largest)
  for (int64_t k = 0; k < K; ++k) {
    @VALUE@
    const uint32_t size = bits_of(value) & 0x7fffffffu;
    largest = size > largest ? size : largest;
  }
  return largest;
}

"""

_ROUND = """\
// x * factor to the nearest integers, ties to even, from -127 to 127: what is added leaves them in
// the last bits of the sum. The bounds keep compilers from fusing product and sum, too.
@ROUND_ROW@
#pragma omp simd
  for (int64_t k = 0; k < K; ++k) {
    @VALUE@
    const float bounded = at_most(at_least(value * factor, -127.0f), 127.0f);
    q[k] = int8_t(bits_of(bounded + 12582912.0f));
  }
}

"""

_ABOVE = """\
// How many numbers of a row are larger than a limit.
INLINE int64_t count_above(const stored_t* x, int64_t x_col, float limit) {
  int64_t count = 0;
#pragma omp simd reduction(+ : count)
  for (int64_t k = 0; k < K; ++k) count += std::fabs(x_of(x[k * x_col])) > limit;
  return count;
}

"""

_ROW = """\
// Rounds a row to integers and gives its largest magnitude; zeros and NaN if it is not finite.
INLINE float quantize_row(@FLAGS@const stored_t* x, int64_t x_col, int8_t* q) {
  const uint32_t largest = largest_of(@GIVEN@x, x_col);
  if (largest >= INFINITE) {
    std::memset(q, 0, K);
    return NAN;
  }
  const float amax = at_least(float_of(largest), 0x1p-100f);
  round_row(@GIVEN@x, x_col, 127.0f / amax, q);
  return amax;
}
"""

_CLIPPED_ROW = """\
// Rounds a row to integers and gives its largest magnitude or the limit, whichever is smaller;
// zeros and NaN if it is not finite.
INLINE float quantize_row(const stored_t* x, int64_t x_col, float limit, int64_t& saturated,
                          int8_t* q) {
  const uint32_t largest = largest_of(x, x_col);
  if (largest >= INFINITE || limit != limit) {
    std::memset(q, 0, K);
    return NAN;
  }
  const float amax = at_most(at_least(float_of(largest), 0x1p-100f), limit);
  round_row(x, x_col, 127.0f / amax, q);
  if (float_of(largest) > amax) saturated += count_above(x, x_col, amax);
  return amax;
}
"""

_STATIC_ROW = """\
// Rounds a row to integers, the limit being 127, and gives the limit; zeros and NaN if the row is
// not finite.
INLINE float quantize_row(const stored_t* x, int64_t x_col, float limit, int64_t& saturated,
                          int8_t* q) {
  const uint32_t largest = largest_of(x, x_col);
  if (largest >= INFINITE || limit != limit) {
    std::memset(q, 0, K);
    return NAN;
  }
  round_row(x, x_col, 127.0f / limit, q);
  if (float_of(largest) > limit) saturated += count_above(x, x_col, limit);
  return limit;
}
"""

_ENTRY = """\
// Rounds m rows, x_row elements apart, to codes [m, K]; gives how many numbers were too large.
extern "C" int64_t fxquant_quantize(const void* x, int64_t x_row, int64_t x_col, int64_t m,
                                    const float* limit, void* codes, float* amax, int threads) {
  const stored_t* rows = static_cast<const stored_t*>(x);
  int8_t* q = static_cast<int8_t*>(codes);
  if (m * K < 1 << 14) threads = 1;  // to wake others takes longer
"""

_ROWS = (
    _ENTRY
    + """\
@LIMIT@@START@#pragma omp parallel for num_threads(threads)@REDUCED@
  for (int64_t row = 0; row < m; ++row) {
    const stored_t* from = rows + row * x_row;
    // With the stride a constant the usual case becomes vector instructions.
    amax[row] = x_col == 1 ? quantize_row(from, 1, @GIVEN@q + row * K)
                           : quantize_row(from, x_col, @GIVEN@q + row * K);
  }
  return @RESULT@;
}
"""
)

_TENSOR = (
    _ENTRY
    + """\
  uint32_t largest = 0;
  // With the stride a constant the usual case becomes vector instructions.
#pragma omp parallel for num_threads(threads) reduction(max : largest)
  for (int64_t row = 0; row < m; ++row) {
    const stored_t* from = rows + row * x_row;
    const uint32_t found = x_col == 1 ? largest_of(from, 1) : largest_of(from, x_col);
    largest = found > largest ? found : largest;
  }
@LIMIT@  const bool is_finite = largest < INFINITE@KNOWN@;
  const float scale = is_finite ? @AMAX@ : NAN;
  const float factor = 127.0f / scale;
@START@#pragma omp parallel for num_threads(threads)@REDUCED@
  for (int64_t row = 0; row < m; ++row) {
    const stored_t* from = rows + row * x_row;
    amax[row] = scale;
    if (!is_finite)
      std::memset(q + row * K, 0, K);
    else if (x_col == 1)
      round_row(from, 1, factor, q + row * K);
    else
      round_row(from, x_col, factor, q + row * K);
@COUNTED@  }
  return @RESULT@;
}
"""
)

_CALL = """\
struct Call {  // what is read and written beside the integers
  const void* const* operands;
  const int64_t* steps;  // from row to row of each operand, in elements
  void* const* more;
};
"""

_MADE_ROWS = """\
// Makes m rows and rounds them to codes [m, K]; gives how many numbers were too large.
extern "C" int64_t fxquant_rows(const void* const* operands, const int64_t* steps, int64_t m,
                                const float* limit, void* codes, float* amax, void* const* more,
                                int threads) {
  const Call call{operands, steps, more};
  int8_t* q = static_cast<int8_t*>(codes);
  if (m * K < 1 << 14) threads = 1;  // to wake others takes longer
@LIMIT@@START@#pragma omp parallel for num_threads(threads)@REDUCED@
  for (int64_t row = 0; row < m; ++row) {
    alignas(64) float @BUFFERS@;
    prologue(call, row, @ROWS@);
    amax[row] = quantize_row(@MADE@, 1, @GIVEN@q + row * K);
  }
  return @RESULT@;
}
"""

_COUNT_ALL = """\
    if (is_finite && float_of(largest) > scale) saturated += count_above(from, x_col, scale);
"""
