"""The entry of a kernel: scratch memory, packing in parallel, the choice of a skeleton."""

from __future__ import annotations

from fxquant.codegen.cpp import groups
from fxquant.codegen.cpp.plan import CTYPES, Plan
from fxquant.codegen.cpp.quantize import signature
from fxquant.codegen.cpp.rows import Member, members, shared_members


def helpers(plan: Plan) -> str:
    """The text of ``pack`` and of what it needs, to be printed before the skeletons."""
    direct, outliers, parts = plan.reads_directly, plan.spec.outliers, _panels(plan)
    text = ""
    if outliers is not None:
        text = _MARK_GIVEN if outliers.columns is not None else _MARK
        parts["@FLAGS@"] = "  const bits_t* flags = call.flags + e * K;\n"
        parts["@APART@"] = "  pack_outliers(call, e, x, call.apart + (e * rows + row) * K);\n"
    # Codes have scales, and mostly sums, even where they are lines as they are.
    if direct and not plan.is_int8:
        parts["@NOTHING@"] = "  if (call.is_line && is_single) return;\n"
        parts["@UNLESS@"] = "!call.is_line && "
        parts["@MADE_UNLESS@"] = "if (!call.is_line) "
    if direct:
        parts["@IN_PLACE@"] = _IN_PLACE
        parts["@LINE@"] = _LINE_IN_PLACE
    else:
        parts["@LINE@"] = "const x_t* line = own;"
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
        made = f"if (call.is_line)\n    sum_blocks(x, sums, height);\n  else\n    {made}"
    parts["@MAKE@"] = f"  {made}"
    text += _MAKE_LINE + _PACK + (_PACK_TILES if plan.uses_tiles else "")
    for name in _HOLES:
        text = text.replace(name, parts.get(name, ""))
    return text


def _panels(plan: Plan) -> dict[str, str]:
    """What panels are made of, and whether a line is one."""
    step = "lines[row][step]"
    if not plan.panels_are_lines:
        return {"@PANEL@": plan.panel_type, "@STEP@": f"words_of({step})"}
    # Behind others, one row is a panel: what it is read from holds those.
    rows = "rows" if plan.spec.grouped else "call.m"
    return {
        "@PANEL@": plan.panel_type,
        "@STEP@": step,
        "@SINGLE@": f"  const bool is_single = {rows} == 1 && height_of(1, heights) == 1;\n",
        "@NO_PANEL@": "  if (is_single) return;\n",
    }


_HOLES = (
    *("@NOTHING@", "@UNLESS@", "@MADE_UNLESS@", "@FLAGS@", "@SUMS@", "@SCALE@", "@MAKE@"),
    *("@APART@", "@IN_PLACE@", "@LINE@", "@SINGLE@", "@NO_PANEL@", "@PANEL@", "@STEP@"),
)


def memory(plan: Plan) -> str:
    """The text of what a call keeps in scratch memory, and how its rows are split."""
    text = _TAKE.replace("@TAKEN_SHARED@", _taken(shared_members(plan)))
    text = text.replace("@TAKEN@", _taken(members(plan)))
    return text.replace("@SPLIT@", "" if plan.spec.grouped else _SPLIT)


def entry(plan: Plan) -> str:
    """The text of the exported functions, to be printed last."""
    several, more = plan.spec.weights > 1, plan.result_dtypes[1:]
    results = ["  call.out = static_cast<out_t*>(out);"]
    if more:
        results = ["  call.out = static_cast<out_t*>(outs[0]);"]
    for number, dtype in enumerate(more, start=1):
        results.append(f"  call.out{number} = static_cast<{CTYPES[dtype]}*>(outs[{number}]);")
    has_outliers = plan.spec.outliers is not None
    run = _RUN_EITHER if plan.is_regular else _RUN_MANY
    if plan.reads_directly:
        k = plan.spec.weight.k
        batch = "" if plan.matrices == 1 else f" && (m > 1 || x_e == {k})"
        results.append(_DIRECT.replace("@BATCH@", batch).rstrip())
    text = (
        _ENTRY.replace("@HEAD@", signature('extern "C" void fxquant_run', _parameters(plan)))
        .replace("@WEIGHTS@", _WEIGHTS if several else _WEIGHT)
        .replace("@RESULTS@", "\n".join(results))
    )
    if plan.spec.grouped:
        text = text.replace("@COUNT@", groups.COUNT)
        text = text.replace("@LOOP@", groups.loop(plan, run))
    else:
        text = text.replace("@COUNT@", _COUNT)
        text = text.replace("@LOOP@", _LOOP.replace("@RUN@", run))
        text = text.replace("@CHOICE@", _CHOICE if plan.is_regular else "")
        text = text.replace("@LINE@", _LINE if plan.few_take_lines else "")
    text = text.replace("@DIRECT@", _LINES if plan.reads_directly else "")
    team = "of" if plan.spec.grouped else "all"
    return text.replace("@MARK@", f"    mark_outliers(call, {team});\n" if has_outliers else "")


def _taken(found: list[Member]) -> str:
    """What makes members of scratch memory."""
    return "\n".join(f"  call.{one.name} = memory.take<{one.ctype}>({one.count});" for one in found)


def _parameters(plan: Plan) -> list[str]:
    """Of `fxquant_run`: several weights and several results come as arrays of pointers."""
    return [
        "const void* prepared" if plan.spec.weights == 1 else "void* const* prepared",
        *("const void* x", "int64_t x_e", "int64_t x_row", "int64_t x_col", "int64_t m"),
        "void* const* outs" if plan.spec.epilogue.more else "void* out",
        *("const void* const* extra", "void* scratch", "int threads"),
        "int" if not plan.is_regular else "int most_few" if plan.spec.grouped else "int variant",
    ]


_MARK = """\
// Finds the outliers of all rows: every thread looks at some.
void mark_outliers(const Call& call, const Share& of) {
  const int64_t parts = std::max<int64_t>(1, std::min(of.threads, call.m / 16));
  if (of.thread < parts) {
    const auto rows = Share(of.thread, parts).part(call.m);
    for (int64_t e = 0; e < E; ++e)
      find_outliers(call, e, rows.first, rows.last, call.flags + (of.thread * E + e) * K);
  }
  of.wait();
  for (int64_t e = of.thread; e < E; e += of.threads) list_outliers(call, e, parts);
  of.wait();
}

"""

_MARK_GIVEN = """\
void mark_outliers(const Call& call, const Share& of) {
  for (int64_t e = of.thread; e < E; e += of.threads) list_outliers(call, e);
  of.wait();
}

"""

_ROW_SUMS = """\
  const int64_t panel_row = row / heights[0] * heights[0];
  xsum_t* sums = call.sums + (e * padded(rows, heights) + panel_row) * BLOCKS + (row - panel_row);
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

_LINE_IN_PLACE = """\
const stored_t* x = call.x + e * call.x_e + (super_first + row) * call.x_row;
    const x_t* line = call.is_line ? reinterpret_cast<const x_t*>(x) : own;"""

_MAKE_LINE = """\
// Makes the line of a row under work, the item-th of all matrices, and what else is kept of it.
template <int COUNT>
INLINE void make_line(const Call& call, int64_t super_first, int64_t rows, int64_t item,
                      const int (&heights)[COUNT], bool is_last, x_t* line) {
  const int64_t e = item / rows, row = item % rows;
  const stored_t* x = call.x + e * call.x_e + (super_first + row) * call.x_row;
  if (call.x_col == 1 && !is_last) ask_ahead(x + call.x_row);
@FLAGS@@SUMS@@SCALE@@MAKE@@APART@}

"""

_PACK = """\
// Panels of the rows that are under work; every thread makes some.
template <int COUNT>
void pack(const Call& call, int64_t super_first, int64_t rows, const int (&heights)[COUNT],
          const Share& of) {
@SINGLE@@NOTHING@  const auto mine = of.part(E * rows);
  for (int64_t item = mine.first; @UNLESS@item < mine.last; ++item)
    make_line(call, super_first, rows, item, heights, item + 1 == mine.last,
              call.lines + item * ALL_STEPS);
  of.wait();
@NO_PANEL@  const int64_t all = padded(rows, heights), panels = panels_of(rows, heights);
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
    @PANEL@* panel = call.panels + (e * all + panel_row) * ALL_STEPS;
    // A cache line of a row at a time: rows are often apart by what evicts each other.
    for (int64_t first = part.first * 16; first < part.last * 16; first += 16)
      for (int row = 0; row < height; ++row)
        for (int64_t step = first; step < first + 16; ++step)
          panel[step * height + row] = @STEP@;
  }
  of.wait();
}

"""

_PACK_TILES = """\
// The same for the tile unit: 16 steps of one row lie behind those of another, as it loads them.
void pack_tiles(const Call& call, int64_t super_first, int64_t rows, const Share& of) {
  const auto mine = of.part(E * rows);
  x_t* own = call.lines + mine.first * ALL_STEPS;  // stays near from row to row
  for (int64_t item = mine.first; item < mine.last; ++item) {
    const int64_t e = item / rows, row = item % rows, panel_row = row / 16 * 16;
    const bool is_last = item + 1 == mine.last;
    @MADE_UNLESS@make_line(call, super_first, rows, item, MANY_HEIGHTS, is_last, own);
    @LINE@
    const int64_t height = std::min<int64_t>(rows - panel_row, 16);
    x_t* panel = call.panels + (e * rows + panel_row) * ALL_STEPS + (row - panel_row) * 16;
    for (int64_t step = 0; step < ALL_STEPS; step += 16)
      std::memcpy(panel + step * height, line + step, 64);
  }
  of.wait();
}

"""

_DIRECT = """\
  const uint64_t places = reinterpret_cast<uint64_t>(x) | x_e * sizeof(stored_t) |
                          x_row * sizeof(stored_t);
  call.is_line = x_col == 1 && places % sizeof(x_t) == 0@BATCH@;
"""

_LINES = """\
    if (call.is_line) own.lines = const_cast<x_t*>(reinterpret_cast<const x_t*>(x));
"""

_CHOICE = """\
  const bool is_few = variant == 0;
"""

_RUN_EITHER = """\
      if (is_few)
        run_few(own, first, rows, of, part);
      else
        run_many(own, first, rows, of, part);
"""

_RUN_MANY = """\
      run_many(own, first, rows, of, part);
"""

_WEIGHT = """\
  call.weight.base = static_cast<unsigned char*>(const_cast<void*>(prepared));
"""

_WEIGHTS = """\
  for (int i = 0; i < WEIGHTS; ++i)
    call.weights[i].base = static_cast<unsigned char*>(prepared[i]);
"""

_TAKE = """\
// What is kept of all rows.
void take_shared(Call& call, Memory& memory, int64_t threads) {
@TAKEN_SHARED@
}

// What is kept of the rows under work.
void take_own(Call& call, Memory& memory, int64_t rows, int64_t threads) {
  const int64_t all = std::max(padded(rows, FEW_HEIGHTS), padded(rows, MANY_HEIGHTS));
@TAKEN@
}

@SPLIT@"""

_ENTRY = """\
extern "C" int64_t fxquant_scratch_bytes(int64_t m, int threads) {
  Memory memory{nullptr};
  Call call{};
  take_shared(call, memory, threads);
@COUNT@  return memory.used;
}

@HEAD@
  Call call{};
@WEIGHTS@  call.x = static_cast<const stored_t*>(x);
  call.x_e = x_e, call.x_row = x_row, call.x_col = x_col, call.m = m;
@RESULTS@
  call.extra = extra;
  Memory memory{static_cast<unsigned char*>(scratch)};
  take_shared(call, memory, threads);
  for (int thread = 0; thread < threads; ++thread) call.turns[thread] = {};
@LOOP@}
"""

_SPLIT = """\
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
"""

_COUNT = """\
  const Split split(m, threads);
  for (int64_t thread = 0; thread < (split.is_apart ? threads : 1); ++thread)
    take_own(call, memory, split.rows, split.is_apart ? 1 : threads);
"""

_LOOP = """\
@CHOICE@  const Split split(m, threads);
#pragma omp parallel num_threads(threads)
  {
    const Share all(omp_get_thread_num(), omp_get_num_threads(), call.turns);
    Share of = split.is_apart ? Share(0, 1) : all;
@MARK@    Call own = call;
    Memory mine = memory;
    for (int64_t thread = 0; thread < (split.is_apart ? all.thread + 1 : 1); ++thread)
      take_own(own, mine, split.rows, split.is_apart ? 1 : threads);
@DIRECT@@LINE@    const int64_t blocks = m ? (m + split.rows - 1) / split.rows : 0;
    const auto work_off = [&](int64_t block, const Part& part) {
      const int64_t first = block * split.rows, rows = std::min(split.rows, m - first);
@RUN@    };
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
"""

_LINE = """\
    if (is_few && m == 1) own.panels = own.lines;  // a panel of one row is a line
"""
