"""The entry of a kernel: scratch memory, packing in parallel, the choice of a skeleton."""

from __future__ import annotations

from fxquant.codegen.cpp import groups
from fxquant.codegen.cpp.plan import CTYPES, Plan
from fxquant.codegen.cpp.quantize import signature
from fxquant.codegen.cpp.rows import members


def helpers(plan: Plan) -> str:
    """The text of ``pack`` and of what it needs, to be printed before the skeletons."""
    spec, direct, parts = plan.spec, plan.reads_directly, {}
    outliers = spec.outliers
    if outliers is not None:
        parts["@OUTLIERS@"] = _STATIC if outliers.columns is not None else _RUN_TIME
        parts["@FLAGS@"] = "    const uint8_t* flags = call.flags + e * K;\n"
        parts["@APART@"] = "    pack_outliers(call, e, x, call.apart + (e * rows + row) * K);\n"
    # Codes have scales, and mostly sums, even where they are lines as they are.
    if direct and not plan.is_int8:
        parts["@NOTHING@"] = "  if (call.is_line && is_single) return;\n"
        parts["@UNLESS@"] = "!call.is_line && "
    if direct:
        parts["@IN_PLACE@"] = _IN_PLACE
    given = ["call", "x", "line"]
    if outliers is not None:
        given.insert(1, "flags")
    if plan.keeps_sums:
        parts["@SUMS@"] = _ROW_SUMS
        given += ["sums", "height"]
    made = f"line_of({', '.join(given)});\n"
    if plan.quantizes_x:
        made = f"call.row_scales[item] = {made}"
    if plan.reads_codes:
        unit = " * LEVEL_UNIT" if plan.level_unit != 1 else ""
        parts["@SCALE@"] = _GIVEN_SCALE.replace("@UNIT@", unit)
    if direct and plan.is_int8:
        made = f"if (call.is_line)\n      sum_blocks(x, sums, height);\n    else\n      {made}"
    parts["@MAKE@"] = f"    {made}"
    text = _pack(plan)
    for name in _HOLES:
        text = text.replace(name, parts.get(name, ""))
    return _HELPERS + text


def _pack(plan: Plan) -> str:
    """``pack`` with the holes that `helpers` fills."""
    template, single, tiled = "template <int COUNT>", "", ""
    if plan.uses_tiles:
        template, single = "template <bool IN_TILES = false, int COUNT>", "!IN_TILES && "
        tiled = _TILED
    return (
        _PACK.replace("template <int COUNT>", template)
        .replace("@UNTILED@", single)
        .replace("@TILED@", tiled)
        # Behind others, one row is a panel: what it is read from holds those.
        .replace("@ALL@", "rows" if plan.spec.grouped else "call.m")
    )


_HOLES = (
    *("@OUTLIERS@", "@NOTHING@", "@UNLESS@", "@FLAGS@", "@SUMS@", "@SCALE@"),
    *("@MAKE@", "@APART@", "@IN_PLACE@"),
)


def entry(plan: Plan) -> str:
    """The text of the exported functions, to be printed last."""
    k = plan.spec.weight.k
    direct = ""
    if plan.reads_directly:
        direct = _DIRECT.replace(
            "@BATCH@", "" if plan.matrices == 1 else f" && (m > 1 || x_e == {k})"
        )
    several, more = plan.spec.weights > 1, plan.result_dtypes[1:]
    results = ["  call.out = static_cast<out_t*>(out);"]
    if more:
        results = ["  call.out = static_cast<out_t*>(outs[0]);"]
    for number, dtype in enumerate(more, start=1):
        results.append(f"  call.out{number} = static_cast<{CTYPES[dtype]}*>(outs[{number}]);")
    taken = "\n".join(
        f"  call.{one.name} = memory.take<{one.ctype}>({one.count});" for one in members(plan)
    )
    run = _RUN_EITHER if plan.is_regular else "    run_many(call, first, rows, threads);\n"
    return (
        _ENTRY.replace("@TAKEN@", taken)
        .replace("@HEAD@", signature('extern "C" void fxquant_run', _parameters(plan)))
        .replace("@WEIGHTS@", _WEIGHTS if several else _WEIGHT)
        .replace("@RESULTS@", "\n".join(results))
        .replace("@DIRECT@", direct)
        .replace("@LOOP@", groups.loop(plan, run) if plan.spec.grouped else _loop(plan, run))
    )


def _loop(plan: Plan, run: str) -> str:
    return _LOOP.replace("@CHOICE@", _CHOICE if plan.is_regular else "").replace("@RUN@", run)


def _parameters(plan: Plan) -> list[str]:
    """Of `fxquant_run`: several weights and several results come as arrays of pointers."""
    return [
        "const void* prepared" if plan.spec.weights == 1 else "void* const* prepared",
        *("const void* x", "int64_t x_e", "int64_t x_row", "int64_t x_col", "int64_t m"),
        "void* const* outs" if plan.spec.epilogue.more else "void* out",
        *("const void* const* extra", "void* scratch", "int threads"),
        "int" if not plan.is_regular else "int most_few" if plan.spec.grouped else "int variant",
    ]


_HELPERS = """\
// What a thread takes of some work.
struct Share {
  const int64_t thread, threads;
  struct Range {
    int64_t first, last;
  };

  Share(int64_t thread, int64_t threads) : thread(thread), threads(threads) {}
  Range part(int64_t count) const {
    return {count * thread / threads, count * (thread + 1) / threads};
  }
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

"""

_RUN_TIME = """\
  if (super_first == 0) {
    const auto columns = of.part(K);
    for (int64_t e = 0; e < E; ++e) find_outliers(call, e, columns.first, columns.last);
#pragma omp barrier
    for (int64_t e = of.thread; e < E; e += of.threads) list_outliers(call, e);
#pragma omp barrier
  }
"""

_STATIC = """\
  if (super_first == 0) {
    for (int64_t e = of.thread; e < E; e += of.threads) list_outliers(call, e);
#pragma omp barrier
  }
"""

_ROW_SUMS = """\
    const int64_t panel_row = row / heights[0] * heights[0];
    xsum_t* sums = call.sums + (e * all + panel_row) * BLOCKS + (row - panel_row);
    const int height = height_of(rows - panel_row, heights);
"""

_GIVEN_SCALE = """\
    const float* amax = static_cast<const float*>(call.extra[OPERANDS]);
    call.row_scales[item] = amax[e * call.m + super_first + row] / 127.0f@UNIT@;
"""

_IN_PLACE = """\
      if (call.is_line)
        lines[row] = reinterpret_cast<const x_t*>(call.x + e * call.x_e +
                                                  (super_first + line) * call.x_row);
"""

_PACK = """\
// Panels of the rows that are under work; every thread makes some.
template <int COUNT>
void pack(const Call& call, int64_t super_first, int64_t rows, const int (&heights)[COUNT],
          const Share& of) {
  const bool is_single = @UNTILED@@ALL@ == 1 && height_of(1, heights) == 1;
@NOTHING@@OUTLIERS@  const int64_t all = padded(rows, heights), panels = panels_of(rows, heights);
  for (int64_t item = of.thread; @UNLESS@item < E * rows; item += of.threads) {
    const int64_t e = item / rows, row = item % rows;
    const stored_t* x = call.x + e * call.x_e + (super_first + row) * call.x_row;
    x_t* line = call.lines + item * ALL_STEPS;
@FLAGS@@SUMS@@SCALE@@MAKE@@APART@  }
#pragma omp barrier
  if (is_single) return;
  const int64_t parts = panels < of.threads ? of.threads : 1;
  for (int64_t item = of.thread; item < E * panels * parts; item += of.threads) {
    const int64_t e = item / parts / panels, panel_row = item / parts % panels * heights[0];
    const auto part = Share(item % parts, parts).part(ALL_STEPS / 16);
    const int height = height_of(rows - panel_row, heights);
    const x_t* lines[MOST_ROWS];
    for (int row = 0; row < height; ++row) {
      const int64_t line = std::min<int64_t>(panel_row + row, rows - 1);
      lines[row] = call.lines + (e * rows + line) * ALL_STEPS;
@IN_PLACE@    }
    x_t* panel = call.panels + (e * all + panel_row) * ALL_STEPS;
    // A cache line of a row at a time: rows are often apart by what evicts each other.
    for (int64_t first = part.first * 16; first < part.last * 16; first += 16) {
@TILED@      for (int row = 0; row < height; ++row)
        for (int64_t step = first; step < first + 16; ++step)
          panel[step * height + row] = lines[row][step];
    }
  }
#pragma omp barrier
}

"""

_TILED = """\
      if (IN_TILES) {  // the 16 steps of one row behind those of another, as the unit loads them
        for (int row = 0; row < height; ++row)
          std::memcpy(panel + first * height + row * 16, lines[row] + first, 64);
        continue;
      }
"""

_DIRECT = """\
  const uint64_t places = reinterpret_cast<uint64_t>(x) | x_e * sizeof(stored_t) |
                          x_row * sizeof(stored_t);
  call.is_line = x_col == 1 && places % sizeof(x_t) == 0@BATCH@;
  if (call.is_line) call.lines = const_cast<x_t*>(reinterpret_cast<const x_t*>(x));
"""

_CHOICE = """\
  const bool is_few = variant == 0;
  if (is_few && m == 1) call.panels = call.lines;  // a panel of one row is a line
"""

_RUN_EITHER = """\
    if (is_few)
      run_few(call, first, rows, threads);
    else
      run_many(call, first, rows, threads);
"""

_WEIGHT = """\
  call.weight.base = static_cast<unsigned char*>(const_cast<void*>(prepared));
"""

_WEIGHTS = """\
  for (int i = 0; i < WEIGHTS; ++i)
    call.weights[i].base = static_cast<unsigned char*>(prepared[i]);
"""

_ENTRY = """\
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

int64_t set_up(Call& call, unsigned char* base, int64_t m, int threads) {
  Memory memory{base};
  const int64_t rows = std::min(m, SUPER_ROWS);
  const int64_t all = std::max(padded(rows, FEW_HEIGHTS), padded(rows, MANY_HEIGHTS));
@TAKEN@
  return memory.used;
}

extern "C" int64_t fxquant_scratch_bytes(int64_t m, int threads) {
  Call call{};
  return set_up(call, nullptr, m, threads);
}

@HEAD@
  Call call{};
@WEIGHTS@  call.x = static_cast<const stored_t*>(x);
  call.x_e = x_e, call.x_row = x_row, call.x_col = x_col, call.m = m;
@RESULTS@
  call.extra = extra;
  set_up(call, static_cast<unsigned char*>(scratch), m, threads);
@DIRECT@@LOOP@}
"""

_LOOP = """\
@CHOICE@  for (int64_t first = 0; first < m; first += SUPER_ROWS) {
    const int64_t rows = std::min(SUPER_ROWS, m - first);
@RUN@  }
"""
