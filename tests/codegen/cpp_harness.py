"""Builds printed C++ kernels for every instruction set that runs here, and calls them."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Container
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import torch
from hypothesis import Phase, given, settings
from hypothesis.strategies import SearchStrategy
from torch import Tensor

from fxquant.codegen import Header, KernelSpec, cpp
from fxquant.codegen.cpp.isa import ISAS, Isa
from fxquant.codegen.cpp.plan import Plan
from fxquant.codegen.cpp.restore import can_restore, restore
from fxquant.runtime import toolchain
from fxquant.runtime.memory import Block
from tests.codegen import harness

FEW, MANY = 0, 1
GUARD = 64
"""Elements behind a result that nothing may write to."""


OF_OTHERS = ("avx512vbmi", "avx512vnni", "avx2vnni")
"""Instruction sets whose kernels are made of the texts of others: see ``test_cpp_isa.py``."""


def isas() -> list[str]:
    """Names of the instruction sets that this process can use, the best first."""
    return [i.name for i in ISAS.values() if i.name not in OF_OTHERS and toolchain.runs(i)]


def vector_isas() -> list[str]:
    """Those of them that differ in vectors: kernels without products are made of nothing else."""
    return [name for name in isas() if not ISAS[name].has_tiles]


def with_few_heights(isa: Isa) -> Isa:
    """With panels of one row, and of more."""
    return replace(isa, few_heights=(4, 1), many_heights=(2,))


class Kernel:
    """A built kernel, called below the checks of `fxquant.runtime.cpp`."""

    def __init__(self, spec: KernelSpec, isa: Isa, *, openmp: bool = True) -> None:
        compiler = toolchain.compiler()
        assert compiler is not None
        chain = toolchain.Toolchain(compiler, isa, openmp)
        library = toolchain.build(chain, spec.name, cpp.render(spec, Header(), isa))
        self.spec, self.isa, self._library = spec, isa, ctypes.CDLL(str(library))
        pointer, long, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
        self._library.fxquant_prepared_bytes.restype = long
        self._library.fxquant_scratch_bytes.restype = long
        self._library.fxquant_scratch_bytes.argtypes = [long, number]
        self._library.fxquant_prepare.argtypes = [pointer, pointer, number]
        self._library.fxquant_prepare.restype = None
        run = [*[pointer] * 2, *[long] * 4, pointer, pointer, pointer, number, number]
        self._library.fxquant_run.argtypes, self._library.fxquant_run.restype = run, None

    def prepare(
        self, tensors: list[Tensor], threads: int = 1, *, restores: bool = True
    ) -> list[Block]:
        """The repacked weights, in memory that held something else.

        Args:
            tensors: The stored ones, weight by weight.
            threads: How many repack.
            restores: Whether to see that each gives its codes again. Not in a forked child, where
                torch's threads are not.
        """
        plan, parts = Plan(self.spec, self.isa), len(self.spec.weight.encoding.parts)
        blocks: list[Block] = []
        for first in range(0, len(tensors), parts):
            block = _filled(self._library.fxquant_prepared_bytes())
            pointers = _pointers(tensors[first : first + parts])
            self._library.fxquant_prepare(pointers, block.address, threads)
            blocks.append(block)
            if restores and can_restore(plan):
                codes = tensors[first]
                assert torch.equal(restore(plan, block.tensor(), codes[-1:]), codes)
        return blocks

    def run(
        self,
        prepared: list[Block],
        x: Tensor,
        extra: list[Tensor],
        variant: int = FEW,
        threads: int = 1,
    ) -> Any:
        """The result, or a list of them; scratch memory and results held NaN before.

        Args:
            prepared: The repacked weights.
            x: ``[m, k]`` or ``[batch, m, k]``, any strides.
            extra: Further operands, contiguous.
            variant: Which skeleton.
            threads: How many run.
        """
        spec, rows = self.spec, x.shape[-2]
        shape = (*x.shape[:-1], spec.weight.n)
        dtypes = [getattr(torch, dtype) for dtype in Plan(spec, self.isa).result_dtypes]
        count = functools.reduce(int.__mul__, shape)
        outs = [torch.full((count + GUARD,), torch.nan, dtype=dtype) for dtype in dtypes]
        x_e = x.stride(0) if spec.batch else 0
        if spec.grouped:  # the most rows of a matrix that are few
            variant = rows if variant == FEW else 0
        weights = _addresses([block.address for block in prepared])
        scratch = _filled(self._library.fxquant_scratch_bytes(rows, threads))
        self._library.fxquant_run(
            weights if spec.weights > 1 else prepared[0].address,
            *(x.data_ptr(), x_e, x.stride(-2), x.stride(-1), rows),
            _pointers(outs) if spec.epilogue.more else outs[0].data_ptr(),
            *(_pointers(extra), scratch.address, threads, variant),
        )
        for out in outs:
            assert out[count:].isnan().all(), "written behind the result"
        results = [out[:count].view(shape) for out in outs]
        return results if spec.epilogue.more else results[0]


def _filled(size: int) -> Block:
    block = Block(size)
    ctypes.memset(block.address, 0xFF, size)
    return block


def _pointers(tensors: list[Tensor]) -> Any:
    assert all(tensor.is_contiguous() for tensor in tensors)
    return _addresses([tensor.data_ptr() for tensor in tensors])


def _addresses(found: list[int]) -> Any:
    return (ctypes.c_void_p * len(found))(*found)


class Builder:
    """Builds side by side; a kernel that was asked for before is waited for.

    Args:
        whole: Specs and instruction sets whose kernels have panels of all heights. Compilers take
            less than half as long for the others, which have some: of one row, and of more.
    """

    def __init__(self, whole: Container[tuple[KernelSpec, str]] = ()) -> None:
        self._pool, self._whole = ThreadPoolExecutor(2), whole
        self._asked: dict[tuple[KernelSpec, str, bool], Future[Kernel]] = {}

    def start(self, spec: KernelSpec, isa: str, *, openmp: bool = True) -> Future[Kernel]:
        """Begins to build."""
        key = (spec, isa, openmp)
        if key not in self._asked:
            made_for = ISAS[isa]
            if (spec, isa) not in self._whole:
                made_for = with_few_heights(made_for)
            self._asked[key] = self._pool.submit(Kernel, spec, made_for, openmp=openmp)
        return self._asked[key]

    def kernel(self, spec: KernelSpec, isa: str, *, openmp: bool = True) -> Kernel:
        """What was built."""
        return self.start(spec, isa, openmp=openmp).result()

    def close(self) -> None:
        """Leaves what was not begun."""
        self._pool.shutdown(cancel_futures=True)


def drawn(strategy: SearchStrategy[KernelSpec], count: int) -> list[KernelSpec]:
    """Specs to build all at once: new ones at each run, the same ones in CI."""
    found: list[KernelSpec] = []

    @settings(max_examples=count, phases=[Phase.generate], database=None, deadline=None)
    @given(strategy)
    def collect(spec: KernelSpec) -> None:
        found.append(spec)

    collect()
    return found


def rows_of(
    spec: KernelSpec, count: int, *, outliers: tuple[int, ...] = (), seed: int = 1
) -> Tensor:
    """An activation whose rows 1, 2 .. pick one input each, and that is random behind and before.

    A row that picks an input gives the weights of that input with hardly a rounding, which tells
    any two codes and scales apart. Row 0 is large in columns of `outliers`, which makes them such
    for any number of rows.
    """
    x, k = harness.activation(spec, count, seed), spec.weight.k
    last = min(count, k + 1)
    x = x if spec.is_quantized else x.clamp(-3, 3)
    x[..., 1:last, :] = 0
    x[..., range(1, last), range(last - 1)] = 127 if spec.is_quantized else 1
    x[..., 0, list(outliers)] = 40
    return x
