"""Calls C++ kernels that round rows of an activation to int8.

What a printed kernel exports is told in `fxquant.codegen.cpp`. Like `fxquant.runtime.cpp`, this is
on the path of a call.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from fxquant import errors
from fxquant.codegen.quantize import QuantizeSpec
from fxquant.runtime import counters
from fxquant.runtime.cpp import as_rows, loaded, usable_threads
from fxquant.runtime.entry import Entry, contiguous_strides, empty

_COUNTING = threading.Lock()


class CppQuantizer:
    """A built kernel.

    Args:
        library: The shared object.
        spec: What it computes.
        openmp: Whether it was built with OpenMP.

    Raises:
        CompilerError: The library cannot be loaded.
    """

    def __init__(self, library: Path, spec: QuantizeSpec, *, openmp: bool) -> None:
        self.library, self.spec, self._openmp = library, spec, openmp
        self._x_dtype = getattr(torch, spec.x_dtype)
        self._entry = Entry(loaded(library, spec.name), "quantize", 8)

    def run(self, x: Tensor, extra: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Rounds an activation on the CPU; elements beyond a limit are counted for the limit.

        Args:
            x: ``[.., k]``, any strides.
            extra: The limit, float32 of one element, where the spec has one.

        Returns:
            int8 codes ``[.., k]`` and float32 amax ``[..]``, contiguous.

        Raises:
            KernelError: An operand has another dtype, size or device than the spec says.
        """
        shape, k = tuple(x.shape), self.spec.k
        if shape[-1:] != (k,) or x.dtype is not self._x_dtype or not x.is_cpu:
            raise _misfit(self.spec, "x", f"{self.spec.x_dtype} [.., {k}]", x)
        limit = checked_limit(self.spec, extra)
        rows, x_row, x_col = x.numel() // k, k, 1
        if not x.is_contiguous():
            x, x_row, x_col = as_rows(x)
        codes = empty(shape, contiguous_strides(shape), torch.int8)
        amax = empty(shape[:-1], contiguous_strides(shape[:-1]), torch.float32)
        saturated = self._entry.call(
            self._entry.pack(
                self._entry.address,
                x.data_ptr(),
                x_row,
                x_col,
                rows,
                limit.data_ptr() if limit is not None else 0,
                codes.data_ptr(),
                amax.data_ptr(),
                usable_threads(openmp=self._openmp),
            )
        )
        if limit is not None:
            count(limit, saturated)
        return codes, amax


def checked_limit(spec: QuantizeSpec, extra: Sequence[Tensor]) -> Tensor | None:
    """The limit of a spec that has one.

    Raises:
        KernelError: There is one too many or none, or it is no float32 number on the CPU.
    """
    if len(extra) != spec.has_limit:
        what = "the number of operands"
        raise errors.kernel_operand(spec.name, what, int(spec.has_limit), len(extra))
    if not extra:
        return None
    limit = extra[0]
    if limit.numel() != 1 or limit.dtype is not torch.float32 or not limit.is_cpu:
        raise _misfit(spec, "operand 0", "1 element of torch.float32", limit)
    return limit


def count(limit: Tensor, saturated: int) -> None:
    """Counts for a limit what lay beyond it."""
    counter = counters.of(limit, 1)
    if saturated:
        # Not as a tensor: one that inference mode made cannot be changed outside of it.
        with _COUNTING:
            ctypes.c_int64.from_address(counter.data_ptr()).value += saturated


def _misfit(spec: QuantizeSpec, what: str, expected: str, tensor: Tensor) -> errors.KernelError:
    got = f"{tensor.dtype} {list(tensor.shape)} on {tensor.device}"
    return errors.kernel_operand(spec.name, what, expected, got)
