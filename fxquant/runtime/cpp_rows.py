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
        operands = spec.prologue.operands
        self._dims = [operand.dims for operand in operands]
        self._dtypes = [getattr(torch, operand.dtype) for operand in operands]
        self._first = self._dims.index("mk")
        self._more = [getattr(torch, result.dtype) for result in spec.prologue.more]
        self._operands = _POINTER * len(operands)
        self._steps = _INT64 * len(operands)
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
        if len(operands) != len(self._dims):
            what = "the number of operands"
            raise errors.kernel_operand(self.spec.name, what, len(self._dims), len(operands))
        limit = checked_limit(self.spec, extra)
        k, first = self.spec.k, operands[self._first]
        rows = first.numel() // k
        sizes = {"mk": rows * k, "k": k, "m": rows, "": 1}
        steps, kept = self._steps(), []
        for number, (operand, dims) in enumerate(zip(operands, self._dims, strict=True)):
            wrong = dims == "mk" and (operand.dim() == 0 or operand.shape[-1] != k)
            if (
                wrong
                or operand.numel() != sizes[dims]
                or operand.dtype is not self._dtypes[number]
                or not operand.is_cpu
            ):
                raise self._misfit(number, sizes[dims], operand)
            if dims == "mk":
                operand, steps[number], column = as_rows(operand)  # noqa: PLW2901
                if column != 1 and k > 1:
                    operand, steps[number] = operand.contiguous(), k  # noqa: PLW2901
            elif not operand.is_contiguous():
                operand = operand.contiguous()  # noqa: PLW2901
            kept.append(operand)
        codes = first.new_empty(first.shape, dtype=torch.int8)
        amax = first.new_empty(first.shape[:-1], dtype=torch.float32)
        more = [first.new_empty(first.shape, dtype=dtype) for dtype in self._more]
        saturated = self._run(
            self._operands(*(operand.data_ptr() for operand in kept)),
            steps,
            rows,
            limit.data_ptr() if limit is not None else None,
            codes.data_ptr(),
            amax.data_ptr(),
            self._results(*(result.data_ptr() for result in more)),
            usable_threads(openmp=self._openmp),
        )
        if limit is not None:
            count(limit, saturated)
        return [codes, amax, *more]

    def _misfit(self, number: int, size: int, got: Tensor) -> errors.KernelError:
        expected = f"{size} elements of {self._dtypes[number]} with axes {self._dims[number]!r}"
        found = f"{got.dtype} {list(got.shape)} on {got.device}"
        return errors.kernel_operand(self.spec.name, f"operand {number}", expected, found)
