"""What kernels counted: elements beyond limits, columns of outliers."""

from __future__ import annotations

from torch import Tensor

from fxquant.runtime import counters, launch
from fxquant.runtime.cpp import CppKernel


def saturated(limit: Tensor) -> int:
    """How many elements were beyond a limit, by the tensor that quantize kernels are given.

    Waits for the device. NaN and Inf, whose rows are lost, are not counted.
    """
    found = counters.read(limit)
    return found[0] if found is not None else 0


def outlier_counts(spec: str, codes: Tensor) -> tuple[int, int] | None:
    """The calls of a weight, and the outlier columns that were found in them, summed.

    Waits for the device.

    Args:
        spec: A product whose outliers have a threshold, as JSON.
        codes: The weight's.

    Returns:
        None if nothing counted: the product was not called, or torch code computed it.
    """
    kernel = launch.kernel_of(spec, "cpp", codes)
    if isinstance(kernel, CppKernel):
        calls, columns = kernel.outlier_counts(codes)
    else:
        calls, columns = counters.read(codes) or (0, 0)
    return (calls, columns) if calls else None
