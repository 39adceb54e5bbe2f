"""What kernels are made of whatever they compute: functions of floats, vectors, threads, memory."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from fxquant.codegen.cpp import vectors
from fxquant.codegen.cpp.isa import ISAS, Isa
from fxquant.codegen.cpp.math import INCLUDES, PRELUDE, prelude_text
from fxquant.codegen.cpp.share import SHARE
from fxquant.codegen.cpp.unit import UNIT

FLOATS = "floats"
NAMES = (FLOATS, *ISAS)
"""Of the sections: functions of floats, and what there is of each instruction set."""


def paths(isa: Isa) -> tuple[str, ...]:
    """What is multiplied on an instruction set."""
    return ("bf16", "int8", "f32") if isa.dot_bf16 else ("int8", "f32")


def text(isa: Isa | None = None) -> str:
    """All that there is of a section: that of an instruction set, else functions of floats."""
    if isa is None:
        return floats(PRELUDE)
    return for_isa(isa, paths(isa))


def floats(names: Collection[str]) -> str:
    """Functions of floats, and what every file starts with.

    Args:
        names: Keys of `fxquant.codegen.cpp.math.PRELUDE`.
    """
    start = "\n".join([*_included(INCLUDES), _INLINE])
    return f"{start}\nnamespace {{\n\n{prelude_text(names)}\n}}  // namespace\n"


def for_isa(isa: Isa, used: Collection[str]) -> str:
    """What there is of an instruction set.

    Args:
        isa: Which one.
        used: What is multiplied: some of `paths`.
    """
    parts = [vectors.vectors(isa.vectors), vectors.pair(isa) if "bf16" in used else ""]
    parts += [vectors.dot(isa, path) for path in used]
    parts += [_SUMS, vectors.products(isa, used), SHARE, _PANELS, _MEMORY]
    parts.append(UNIT if isa.has_tiles else "")
    inner = "\n\n".join(part.strip("\n") for part in parts if part)
    head = "\n".join([*_headers(isa), _OPENMP])
    return f"{head}\nnamespace {{\n\n{inner}\n\n}}  // namespace\n"


def headers(isa: Isa) -> list[str]:
    """Lines that include what every file needs."""
    return [*_included(INCLUDES), *_headers(isa)]


def _headers(isa: Isa) -> list[str]:
    intrinsics = [] if isa.vectors == "portable" else ["immintrin.h"]
    return _included(("algorithm", "type_traits", "utility", *intrinsics))


def _included(names: Iterable[str]) -> list[str]:
    return [f"#include <{name}>" for name in names]


_INLINE = """
#define INLINE [[gnu::always_inline]] inline
"""

_OPENMP = """\
#ifdef _OPENMP
#include <omp.h>
#else
inline int omp_get_thread_num() { return 0; }
inline int omp_get_num_threads() { return 1; }
#endif

#pragma GCC diagnostic ignored "-Wignored-attributes"  // of vectors in templates
#define INLINE_LAMBDA __attribute__((always_inline))
#define ALONE [[gnu::noinline]]  // inlined, GCC would keep sums in memory
"""

_SUMS = """\
// Codes on their way to the second-level cache; what lies behind the weight does no harm.
INLINE void prefetch(const uint32_t* codes) { __builtin_prefetch(codes, 0, 2); }

// The same from there to the first-level cache.
INLINE void bring_near(const uint32_t* codes) { __builtin_prefetch(codes, 0, 3); }

// Calls f with 0, 1 .. COUNT - 1 as constants.
template <typename F, int... I> INLINE void each(F&& f, std::integer_sequence<int, I...>) {
  (f(std::integral_constant<int, I>{}), ...);
}
template <int COUNT, typename F> INLINE void each(F&& f) {
  each(f, std::make_integer_sequence<int, COUNT>{});
}

// Sums that stay in registers: members, for GCC would keep an array in memory.
template <int COUNT, typename T> struct Sums {
  T first;
  Sums<COUNT - 1, T> rest;
};
template <typename T> struct Sums<0, T> {};

template <int I, int COUNT, typename T> INLINE T& at(Sums<COUNT, T>& sums) {
  if constexpr (I == 0)
    return sums.first;
  else
    return at<I - 1>(sums.rest);
}
"""

_PANELS = """\
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

_MEMORY = """\
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
"""
