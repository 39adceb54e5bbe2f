"""From sums to results: row scales, outliers, the epilogue, rounding."""

from __future__ import annotations

import itertools

from fxquant.codegen.cpp.decode import float_table
from fxquant.codegen.cpp.ops import epilogue_lines
from fxquant.codegen.cpp.plan import CTYPES, Plan
from fxquant.codegen.cpp.quantize import ROW_HELPERS, signature
from fxquant.codegen.cpp.rows import rounded
from fxquant.codegen.epilogue import EpilogueOperand

_FROM = {"float16": "from_fp16", "bfloat16": "from_bf16"}
_TO = {"float16": "to_fp16", "bfloat16": "to_bf16"}


def finish(plan: Plan) -> str:
    """The text of ``finish``, which gives rows of sums to ``finish_row``."""
    has_outliers, several = plan.spec.outliers is not None, plan.sum_marks[1:]
    outliers = _outliers(plan) if has_outliers else ""
    added = _ADD_OUTLIERS_TO_EACH if several else _ADD_OUTLIERS
    each = itertools.pairwise(plan.sum_marks)
    sums = f"const float{' *' if several else '* '}sums = totals + row * TILE"
    sums += "".join(f", *sums{mark} = sums{before} + apart" for before, mark in each)
    given = ["sums", *(f"sums{mark}" for mark in several)]
    if plan.is_int8:
        given.append("is_scaled ? 1.0f : row_scales[row]" if has_outliers else "row_scales[row]")
    text = (
        _FINISH.replace("@APART@", ", int64_t apart" if several else "")
        .replace("@LIE@", " The\n// totals of each further weight lie apart." if several else "")
        .replace("@SCALES@", _ROW_SCALES if plan.is_int8 else "")
        .replace("@OUTLIERS@", added if has_outliers else "")
        .replace("@SUMS@", sums)
        .replace("@GIVEN@", ", ".join(given))
    )
    return plan.placed("\n".join(part for part in (outliers, text) if part))


def prelude(plan: Plan) -> set[str]:
    """Helpers that the epilogue and the conversions call."""
    spec = plan.spec
    names = [f"in{number}" for number in range(len(spec.epilogue.operands))]
    used = set(epilogue_lines(spec.epilogue, names)[2])
    dtypes = [spec.x_dtype, spec.compute_dtype, *plan.result_dtypes]
    dtypes += [operand.dtype for operand in spec.epilogue.operands]
    dtypes += [spec.outliers.dtype] if spec.outliers else []
    for dtype, short in (("bfloat16", "bf16"), ("float16", "fp16")):
        if dtype in dtypes:
            used |= {f"from_{short}", f"to_{short}"}
    used |= {"bits_of"} if plan.has_thirds else set()
    return used | (ROW_HELPERS if plan.quantizes_x else set())


def row(plan: Plan) -> str:
    """The text of ``finish_row``, the epilogue; ``Call`` may be defined behind it."""
    spec = plan.spec
    pointers, names = [], []
    scale = " * scale" if plan.is_int8 else ""
    loads = [f"const float acc{mark} = sums{mark}[i]{scale};" for mark in plan.sum_marks]
    for number, operand in enumerate(spec.epilogue.operands):
        ctype, name = CTYPES[operand.dtype], f"in{number}"
        start, step = _address(operand)
        pointers.append(
            f"const {ctype}* p{number} = static_cast<const {ctype}*>(call.extra[{number}]){start};"
        )
        value = f"p{number}[{step}]"
        if operand.dtype in _FROM:
            value = f"{_FROM[operand.dtype]}({value})"
        kind = "bool" if operand.dtype == "bool" else "float"
        value += " != 0" if kind == "bool" else ""
        loads.append(f"const {kind} {name} = {value};")
        names.append(name)
    lines, results, _ = epilogue_lines(spec.epilogue, names)
    for number, (result, dtype) in enumerate(zip(results, plan.result_dtypes, strict=True)):
        out = f"out{number or ''}"
        pointers.insert(number, f"{CTYPES[dtype]}* {out} = call.{out} + at;")
        lines.append(f"{out}[i] = {f'{_TO[dtype]}({result})' if dtype in _TO else result};")
    taken = ["const Call& call", "int64_t e", "int64_t row", "int64_t n0", "int64_t count"]
    taken += [f"const float* sums{mark}" for mark in plan.sum_marks]
    taken += ["float scale"] if plan.is_int8 else []
    return (
        _ROW.replace("@HEAD@", signature("INLINE void finish_row", taken))
        .replace("@POINTERS@", "".join(f"  {line}\n" for line in pointers))
        .replace("@LINES@", "".join(f"    {line}\n" for line in [*loads, *lines]))
    )


def _address(operand: EpilogueOperand) -> tuple[str, str]:
    """Where an operand's row starts, and the index inside it."""
    sizes = {"e": "E", "m": "call.m", "n": "N"}
    terms, stride = [], ""
    for axis in reversed(operand.dims):
        variable = {"e": "e", "m": "row", "n": "n0"}[axis]
        terms.append(f"{variable}{stride}")
        stride = f" * {sizes[axis]}{stride}" if stride else f" * {sizes[axis]}"
    start = "".join(f" + {term}" for term in reversed(terms))
    return start, "i" if "n" in operand.dims else "0"


def _outliers(plan: Plan) -> str:
    several = plan.spec.weights > 1
    return (
        _outlier_part(plan)
        .replace("@WHICH@", ", int which" if several else "")
        .replace("@GIVEN@", ", which" if several else "")
        .replace("@WEIGHT@", "call.weights[which]" if several else "call.weight")
        .replace("@APART@", "OPERANDS + 1 + which" if several else "OPERANDS + 1")
    )


def _outlier_part(plan: Plan) -> str:
    outliers = plan.spec.outliers
    assert outliers is not None
    if outliers.columns is not None:
        ctype = CTYPES[outliers.dtype]
        taken = f"{_FROM.get(outliers.dtype, '')}(weights[column])"
        return _GIVEN.replace("@TYPE@", ctype).replace("@TAKEN@", taken) + _APART
    scale = "scales.at(k / BLOCK)" if plan.is_regular else "gathered"
    gather = "" if plan.is_regular else _GATHER
    zero = table = ""
    if plan.encoding.zero_point:
        zero = " - scales.zeros_at(k / BLOCK)[i]" if plan.is_regular else " - zeros[i]"
        gather += "" if plan.is_regular else _GATHER_ZEROS
    if plan.encoding.is_uniform and plan.encoding.bits == 8 and plan.path == "int8":
        level = "float(int32_t(code & 255u) - BYTE_BIAS)"
    elif plan.encoding.is_uniform and plan.encoding.bits == 8:
        signed = not plan.encoding.zero_point
        level = "static_cast<float>(int8_t(code))" if signed else "float(code & 255u)"
    else:
        level = f"TRUE_LEVELS[code & {2**plan.encoding.bits - 1}u]"
        table = float_table("TRUE_LEVELS", plan.levels) + "\n\n"
    value = rounded(outliers.dtype, f"({level}{zero}) * scale[i]")
    first, enter = ("  int64_t block = 0;\n", _ENTER) if plan.keeps_scale_codes else ("", "")
    text = table + _DECODED.replace("@FIRST@", first).replace("@ENTER@", enter)
    text = text.replace("@GATHER@", gather).replace("@SCALE@", scale)
    return text.replace("@VALUE@", value) + _APART


_GATHER = """\
    float gathered[TILE];
    for (int v = 0; v < TILE; v += LANES) store(gathered + v, scales.at(v, k));
"""
_GATHER_ZEROS = """\
    float zeros[TILE];
    for (int v = 0; v < TILE; v += LANES) store(zeros + v, scales.zeros_at(v, k));
"""

_ENTER = """\
    for (; block < k / BLOCK; ++block) scales.enter(block);
"""

_DECODED = """\
// The weight in some outlier columns of a tile, decoded: out[column][64].
void outlier_weights(const Call& call@WHICH@, int64_t tile, int64_t first, int64_t last,
                     float* out) {
  Scales scales(@WEIGHT@, tile);
@FIRST@  for (int64_t column = first; column < last; ++column, out += TILE) {
    const int64_t k = call.columns[@MATRIX@ * K + column];
@ENTER@    const uint32_t* words = @WEIGHT@.codes() + (tile * GROUPS + k / PER_DWORD) * TILE;
    int place = 0;
    while (PLACES[place] != k % PER_DWORD) ++place;
@GATHER@    const float* scale = @SCALE@;
#pragma omp simd
    for (int i = 0; i < TILE; ++i) {
      const uint32_t code = words[i] >> (BITS * place);
      out[i] = @VALUE@;
    }
  }
}
"""

_GIVEN = """\
// The weight in some outlier columns of a tile, as given: out[column][64].
void outlier_weights(const Call& call@WHICH@, int64_t tile, int64_t first, int64_t last,
                     float* out) {
  const int64_t e = tile / N_TILES, n0 = tile % N_TILES * TILE;
  for (int i = 0; i < TILE; ++i) {
    const int64_t n = std::min(n0 + i, N - 1);
    const @TYPE@* weights = static_cast<const @TYPE@*>(call.extra[@APART@]);
    weights += (e * N + n) * OUTLIERS;
    for (int64_t column = first; column < last; ++column)
      out[(column - first) * TILE + i] = @TAKEN@;
  }
}
"""

_APART = """\

// Scales the sums of integers and adds the products that are left to floats.
void add_outliers(const Call& call@WHICH@, int64_t tile, const float* x, const float* row_scales,
                  int64_t rows, float* totals) {
  constexpr int64_t SOME = 64;
  constexpr int ALL = TILE / LANES;
  alignas(64) float weights[SOME * TILE];
  const int64_t count = call.outliers[@MATRIX@];
  for (int64_t first = 0; first < count; first += SOME) {
    const int64_t last = std::min(first + SOME, count);
    outlier_weights(call@GIVEN@, tile, first, last, weights);
    for (int64_t row = 0; row < rows; ++row) {
      const vf scale = spread(first ? 1.0f : row_scales[row]);
      vf sum[ALL];
#pragma GCC unroll 8
      for (int v = 0; v < ALL; ++v) sum[v] = mul(load(totals + row * TILE + v * LANES), scale);
      for (int64_t column = first; column < last; ++column) {
        const vf factor = spread(x[row * K + column]);
#pragma GCC unroll 8
        for (int v = 0; v < ALL; ++v)
          sum[v] = fma(load(weights + (column - first) * TILE + v * LANES), factor, sum[v]);
      }
#pragma GCC unroll 8
      for (int v = 0; v < ALL; ++v) store(totals + row * TILE + v * LANES, sum[v]);
    }
  }
}
"""

_ROW = """\
// One row of a tile: epilogue and rounding.
template <typename Call>
@HEAD@
  const int64_t at = (e * call.m + row) * N + n0;
@POINTERS@#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
@LINES@  }
}
"""

_ROW_SCALES = """\
  const float* row_scales = call.row_scales + e * all_rows + panel_row;
"""

_ADD_OUTLIERS = """\
  const float* apart_x = call.apart + (e * all_rows + panel_row) * K;
  const bool is_scaled = call.outliers[e] > 0;
  if (is_scaled) add_outliers(call, tile, apart_x, row_scales, rows, totals);
"""

_ADD_OUTLIERS_TO_EACH = """\
  const float* apart_x = call.apart + (e * all_rows + panel_row) * K;
  const bool is_scaled = call.outliers[e] > 0;
  for (int i = 0; is_scaled && i < WEIGHTS; ++i)
    add_outliers(call, i, tile, apart_x, row_scales, rows, totals + i * apart);
"""

_FINISH = """\
// The rows from panel_row on of the rows that are under work, which start at super_first.@LIE@
void finish(const Call& call, int64_t tile, int64_t super_first, int64_t panel_row, int64_t rows,
            int64_t all_rows, float* totals@APART@) {
  const int64_t e = @MATRIX@, n0 = tile % N_TILES * TILE;
@SCALES@@OUTLIERS@  for (int64_t row = 0; row < rows; ++row) {
    const int64_t at = super_first + panel_row + row;
    @SUMS@;
    if (N - n0 >= TILE)
      finish_row(call, e, at, n0, TILE, @GIVEN@);
    else
      finish_row(call, e, at, n0, N - n0, @GIVEN@);
  }
}
"""
