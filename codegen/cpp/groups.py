"""Rows that belong to one matrix of a batch each: the skeletons run for one matrix after another.

The activation is one matrix, so ``E`` is 1 in a grouped kernel, and ``EXPERTS`` counts the matrices
of the weight. One without rows costs nothing.
"""

from __future__ import annotations

import textwrap

from fxquant.codegen.cpp.plan import Plan


def loop(plan: Plan, run: str) -> str:
    """The end of ``fxquant_run``: its rows, matrix by matrix, and those that belong to none.

    Args:
        plan: Of a grouped kernel.
        run: Works off some of the rows.
    """
    given = ["sums"] * plan.spec.weights
    given += ["1.0f"] if plan.is_int8 else []
    line = "own.lines"
    if plan.reads_directly:
        # What is a line as it is lies where it was given.
        here = "call.x + first * call.x_row"
        line = f"call.is_line ? const_cast<x_t*>(reinterpret_cast<const x_t*>({here})) : own.lines"
    choice = _CHOICE if plan.is_regular else ""
    choice += _SINGLE.replace("@LINE@", line) if plan.few_take_lines else ""
    panels = "    x_t* const panels = own.panels;\n" if plan.few_take_lines else ""
    return (
        _LOOP.replace("@PANELS@", panels)
        .replace("@CHOICE@", choice)
        .replace("@RUN@", textwrap.indent(run, "  "))
        .replace("@GIVEN@", ", ".join(given))
    )


COUNT = """\
  take_own(call, memory, std::min(m, SUPER_ROWS), threads);
"""
"""Scratch memory of a call: its rows are worked off by all threads, some at a time."""

_CHOICE = """\
        const bool is_few = end - start <= most_few;
"""

_SINGLE = """\
        const bool is_line = is_few && rows == 1;
        own.panels = panels;  // a panel of one row is a line
        if (is_line) own.panels = @LINE@;
"""

_LOOP = """\
  const int32_t* ends = static_cast<const int32_t*>(extra[ENDS]);
#pragma omp parallel num_threads(threads)
  {
    Share of(omp_get_thread_num(), omp_get_num_threads(), call.turns);
    const Part part;  // all outputs
@MARK@    Call own = call;
    Memory mine = memory;
    take_own(own, mine, std::min(m, SUPER_ROWS), threads);
@DIRECT@@PANELS@    int64_t start = 0;
    for (int64_t expert = 0; expert < EXPERTS; ++expert) {
      const int64_t end = std::min(std::max<int64_t>(ends[expert], start), m);
      own.first_tile = expert * N_TILES;
      for (int64_t first = start; first < end; first += SUPER_ROWS) {
        const int64_t rows = std::min(SUPER_ROWS, end - first);
@CHOICE@@RUN@        of.wait(), of.go_on();  // for those who still read what is made anew
      }
      start = end;
    }
    const float sums[TILE] = {};
    if (of.thread == 0)
      for (int64_t row = start; row < m; ++row)
        for (int64_t n0 = 0; n0 < N; n0 += TILE)
          finish_row(call, 0, row, n0, std::min(TILE, N - n0), @GIVEN@);
  }
"""
