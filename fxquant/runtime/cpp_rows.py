"""Calls C++ kernels that make rows of an activation and round them to int8.

What a printed kernel exports is told in `fxquant.codegen.cpp`. Like `fxquant.runtime.cpp`, this is
on the path of a call.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from fxquant import errors
from fxquant.codegen.quantize import QuantizeSpec
from fxquant.runtime.cpp import as_rows, exported, loaded, usable_threads
from fxquant.runtime.cpp_quantize import checked_limit, count

_POINTER, _INT64, _INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int


class CppRows:
    """A built kernel.

    Args:
        library: The shared object.
        spec: What it computes; with a prologue.
        openmp: Whether it was built with OpenMP.

    Raises:
        CompilerError: The library cannot be loaded.
    """

    def __init__(self, library: Path, spec: QuantizeSpec, *, openmp: bool) -> None:
        assert spec.prologue is not None, "others are run by CppQuantizer"
        self.library, self.spec, self._openmp = library, spec, openmp
        operands, k = spec.prologue.operands, spec.k
        self._k, self._has_limit = k, spec.has_limit
        self._expected = [
            (number, operand.dims, k if operand.dims == "k" else 1, getattr(torch, operand.dtype))
            for number, operand in enumerate(operands)
        ]
        self._first = [operand.dims for operand in operands].index("mk")
        self._more = [getattr(torch, result.dtype) for result in spec.prologue.more]
        self._operands = _POINTER * len(operands)
        self._steps = _INT64 * len(operands)
        self._dense = self._steps(*[k] * len(operands))
        self._results = _POINTER * max(1, len(self._more))
        self._run = exported(
            loaded(library, spec.name),
            "rows",
            [_POINTER, _POINTER, _INT64, *[_POINTER] * 4, _INT],
            _INT64,
        )

    def run(self, operands: Sequence[Tensor], extra: Sequence[Tensor]) -> list[Tensor]:
        """Makes and rounds rows on the CPU; elements beyond a limit are counted for the limit.

        Args:
            operands: The prologue's: ``[.., k]`` for ``"mk"``, all with the same leading sizes;
                any strides.
            extra: The limit, float32 of one element, where the spec has one.

        Returns:
            int8 codes ``[.., k]``, float32 amax ``[..]`` and the further results ``[.., k]``,
            contiguous.

        Raises:
            KernelError: An operand has another dtype, size or device than the spec says.
        """
        if len(operands) != len(self._expected):
            what = "the number of operands"
            raise errors.kernel_operand(self.spec.name, what, len(self._expected), len(operands))
        limit = checked_limit(self.spec, extra) if self._has_limit or extra else None
        k, first = self._k, operands[self._first]
        shape, elements = first.shape, first.numel()
        rows, steps, kept = elements // k, self._dense, list(operands)
        for number, dims, size, dtype in self._expected:
            operand = operands[number]
            found = operand.numel()
            if "m" not in dims:
                fits = found == size
            elif dims == "m":
                fits = found == rows
            else:
                fits = found == elements and operand.shape[-1:] == (k,)
            if not fits or operand.dtype is not dtype or not operand.is_cpu:
                raise self._misfit(number, operand)
            if not operand.is_contiguous():
                if steps is self._dense:
                    steps = self._steps(*steps)
                kept[number], steps[number] = _laid_out(operand, k if dims == "mk" else 0)
        codes = first.new_empty(shape, dtype=torch.int8)
        amax = first.new_empty(shape[:-1], dtype=torch.float32)
        more = [first.new_empty(shape, dtype=dtype) for dtype in self._more]
        saturated = self._run(
            self._operands(*[operand.data_ptr() for operand in kept]),
            steps,
            rows,
            limit.data_ptr() if limit is not None else None,
            codes.data_ptr(),
            amax.data_ptr(),
            self._results(*[result.data_ptr() for result in more]),
            usable_threads(openmp=self._openmp),
        )
        if limit is not None:
            count(limit, saturated)
        return [codes, amax, *more]

    def _misfit(self, number: int, got: Tensor) -> errors.KernelError:
        _, dims, _, dtype = self._expected[number]
        axes = {"mk": f"[.., {self._k}]", "k": f"[{self._k}]", "m": "one number a row", "": "one"}
        found = f"{got.dtype} {list(got.shape)} on {got.device}"
        what = f"operand {number}"
        return errors.kernel_operand(self.spec.name, what, f"{dtype}, {axes[dims]}", found)


def _laid_out(operand: Tensor, k: int) -> tuple[Tensor, int]:
    """An operand as a kernel reads it, and the step from row to row: inputs lie side by side."""
    if k:
        found, step, column = as_rows(operand)
        if column == 1 or k == 1:
            return found, step
    return operand.contiguous(), k
