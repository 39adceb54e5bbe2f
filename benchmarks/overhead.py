"""Microseconds from a Python call to the first instruction of a C++ kernel.

``python -m benchmarks.overhead``. The kernel does nothing but read the clock. ``launch`` is the
operator in compiled graphs, ``linear`` the one with gradient that eager code calls, ``run`` the
function behind both.
"""

from __future__ import annotations

import ctypes
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from fxquant.codegen.epilogue import Epilogue
from fxquant.codegen.spec import KernelSpec, WeightOperand
from fxquant.formats import pack
from fxquant.runtime import launch, ops, toolchain
from fxquant.runtime.cpp import CppKernel
from fxquant.schemes import get_scheme

assert ops  # imported for its registrations
SIZE, CALLS = 64, 20_000
SOURCE = """
#include <cstdint>
#include <ctime>
extern "C" {
int64_t fxquant_prepared_bytes(void) { return 64; }
void fxquant_prepare(const void* const*, void*, int) {}
int64_t fxquant_scratch_bytes(int64_t, int) { return 64; }
int64_t entered;
void fxquant_run(const void*, const void*, int64_t, int64_t, int64_t, int64_t, void*,
                 const void* const*, void*, int, int) {
    timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    entered = now.tv_sec * 1000000000LL + now.tv_nsec;
}
}
"""


def main() -> None:
    """Prints medians in microseconds."""
    chain = toolchain.toolchain()
    assert chain is not None, toolchain.obstacle()
    library = toolchain.build(chain, "nothing", SOURCE)
    entered = ctypes.c_int64.in_dll(ctypes.CDLL(str(library)), "entered")
    encoding = get_scheme("nf4").recipe.weight
    weight = pack(torch.randn(SIZE, SIZE), encoding).tensors()
    operand = WeightOperand.whole(encoding, (SIZE, SIZE), transposed=False)
    spec = KernelSpec(operand, *["float32"] * 3, Epilogue.bias("float32"), "nothing")
    text, x, bias = spec.to_json(), torch.randn(1, SIZE), torch.randn(SIZE)
    kernel = CppKernel(library, spec, openmp=chain.openmp, few_rows=48)
    for target in ("auto", "cpp"):
        launch._runners[text, target, True] = kernel.run

    linear, launched = torch.ops.fxquant.linear.default, torch.ops.fxquant.launch.default
    calls: dict[str, Callable[[], Tensor]] = {
        "run": lambda: launch.run(x, weight, [bias], text, "cpp"),
        "launch": lambda: launched(x, weight, [bias], text, "cpp"),
        "linear": lambda: linear(x, weight, [bias], text, -1),
    }
    print(f"{'':8}{'to the kernel':>16}{'whole call':>16}   (us, medians of {CALLS} calls)")
    for name, call in calls.items():
        to_kernel, whole = [], []
        for _ in range(CALLS):
            start = time.monotonic_ns()
            call()
            end = time.monotonic_ns()
            to_kernel.append(entered.value - start)
            whole.append(end - start)
        row = (statistics.median(to_kernel) / 1e3, statistics.median(whole) / 1e3)
        print(f"{name:8}{row[0]:16.1f}{row[1]:16.1f}")


if __name__ == "__main__":
    main()
