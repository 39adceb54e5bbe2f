"""The way from Python into C++ kernels: one argument for ctypes to convert instead of a dozen.

ctypes takes longer over a dozen arguments than over the rest of a call. So a call is packed into
bytes, 64-bit words of the machine, and a function that is built once hands them on to the kernel,
whose address is the first word. Bytes belong to one call: any number of threads may call at once.
"""

from __future__ import annotations

import ctypes
import functools
import struct
from collections.abc import Callable
from typing import Any

import torch

from fxquant import errors
from fxquant.runtime import toolchain

SOURCE = """\
// Kernels called with their arguments as words of 64 bits; lists of pointers lie behind these.
#include <cstdint>

namespace {
template <typename T> T* at(int64_t address) { return reinterpret_cast<T*>(address); }
const void* const* inputs(const int64_t* words) {
  return reinterpret_cast<const void* const*>(words);
}
void* const* outputs(const int64_t* words) { return reinterpret_cast<void* const*>(words); }
}  // namespace

// The kernel; prepared, x, x_e, x_row, x_col, m, out, scratch, threads, variant; the number of
// results that are a list, these; further operands.
extern "C" void fxquant_call_run(const int64_t* a) {
  using Run = void (*)(const void*, const void*, int64_t, int64_t, int64_t, int64_t, const void*,
                       const void* const*, void*, int, int);
  const void* out = a[11] ? static_cast<const void*>(outputs(a + 12)) : at<void>(a[7]);
  reinterpret_cast<Run>(a[0])(at<void>(a[1]), at<void>(a[2]), a[3], a[4], a[5], a[6], out,
                              inputs(a + 12 + a[11]), at<void>(a[8]), int(a[9]), int(a[10]));
}

// The kernel; x, x_row, x_col, m, limit, codes, amax, threads.
extern "C" int64_t fxquant_call_quantize(const int64_t* a) {
  using Run = int64_t (*)(const void*, int64_t, int64_t, int64_t, const float*, void*, float*, int);
  return reinterpret_cast<Run>(a[0])(at<void>(a[1]), a[2], a[3], a[4], at<float>(a[5]),
                                     at<void>(a[6]), at<float>(a[7]), int(a[8]));
}

// The kernel; m, limit, codes, amax, threads; the number of operands; these, their steps, further
// results.
extern "C" int64_t fxquant_call_rows(const int64_t* a) {
  using Run = int64_t (*)(const void* const*, const int64_t*, int64_t, const float*, void*, float*,
                          void* const*, int);
  return reinterpret_cast<Run>(a[0])(inputs(a + 7), a + 7 + a[6], a[1], at<float>(a[2]),
                                     at<void>(a[3]), at<float>(a[4]), outputs(a + 7 + 2 * a[6]),
                                     int(a[5]));
}
"""
VARIANT = 10
"""The word that says which skeleton a product takes."""

_empty_strided_cpu = getattr(torch._C._dynamo.guards, "_empty_strided_cpu", None)


def empty(shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """A new tensor on the CPU, in a third of the time of `torch.empty`: as Inductor's code does."""
    if _empty_strided_cpu is None:
        return torch.empty_strided(shape, strides, dtype=dtype)
    made: torch.Tensor = _empty_strided_cpu(shape, strides, dtype)
    return made


@functools.lru_cache(maxsize=1024)
def contiguous_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Those of a tensor whose elements lie in order; kept, as calls ask for the same ones."""
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))


class Entry:
    """Calls one function of a kernel's library.

    Args:
        library: The shared object.
        name: ``"run"``, ``"quantize"`` or ``"rows"``.
        words: How many a call has, the kernel's address apart.

    Attributes:
        address: The first word.
        pack: Makes bytes of the words.
        call: Takes them.

    Raises:
        CompilerError: There is no compiler, or it fails.
    """

    __slots__ = ("address", "call", "pack")

    def __init__(self, library: ctypes.CDLL, name: str, words: int) -> None:
        function = library[f"fxquant_{name}"]
        self.address = ctypes.cast(function, ctypes.c_void_p).value
        self.pack = struct.Struct(f"{1 + words}q").pack
        self.call: Callable[[bytes], Any] = _caller(name)


@functools.lru_cache(maxsize=3)
def _caller(name: str) -> Callable[[bytes], Any]:
    chain = toolchain.toolchain()
    if chain is None:
        raise errors.no_compiler(toolchain.obstacle())
    function = ctypes.CDLL(str(toolchain.build(chain, "calls", SOURCE)))[f"fxquant_call_{name}"]
    function.argtypes = [ctypes.c_char_p]
    function.restype = None if name == "run" else ctypes.c_int64
    return function
