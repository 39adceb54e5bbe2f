"""What tests and the curious need: which kernels did a call run?"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fxquant.runtime.launch import Kernel
from fxquant.runtime.recorded import recording

__all__ = ["Kernel", "run_and_get_kernels"]


def run_and_get_kernels(
    fn: Callable[..., Any], *args: Any, **kwargs: Any
) -> tuple[Any, list[Kernel]]:
    """Calls `fn` and collects the kernels of the compiled graphs that ran in it.

    Returns:
        The result, and each kernel once, in the order of the first graph that has it. A kernel
        that was printed but could not run on this machine says why in its `note`.
    """
    with recording() as seen:
        result = fn(*args, **kwargs)
    return result, list(seen.values())
