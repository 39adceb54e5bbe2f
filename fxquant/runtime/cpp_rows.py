"""Calls C++ kernels that make rows of an activation and round them to int8.

What a printed kernel exports is told in `fxquant.codegen.cpp`. Like `fxquant.runtime.cpp`, this is
on the path of a call.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from fxquant import errors
from fxquant.codegen.quantize import QuantizeSpec
from fxquant.runtime.cpp import as_rows, loaded, usable_threads
from fxquant.runtime.cpp_quantize import checked_limit, count
from fxquant.runtime.entry import Entry, contiguous_strides, empty


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
        words = 6 + 2 * len(operands) + len(self._more)
        self._entry = Entry(loaded(library, spec.name), "rows", words)

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
        shape, elements = tuple(first.shape), first.numel()
        rows, steps, kept = elements // k, [k] * len(operands), list(operands)
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
                kept[number], steps[number] = _laid_out(operand, k if dims == "mk" else 0)
        strides = contiguous_strides(shape)
        codes = empty(shape, strides, torch.int8)
        amax = empty(shape[:-1], contiguous_strides(shape[:-1]), torch.float32)
        more = [empty(shape, strides, dtype) for dtype in self._more]
        saturated = self._entry.call(
            self._entry.pack(
                self._entry.address,
                rows,
                limit.data_ptr() if limit is not None else 0,
                codes.data_ptr(),
                amax.data_ptr(),
                usable_threads(openmp=self._openmp),
                len(kept),
                *[operand.data_ptr() for operand in kept],
                *steps,
                *[result.data_ptr() for result in more],
            )
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
