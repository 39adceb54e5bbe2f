"""Inductor's code calls our launches as functions of Python, without torch's dispatcher.

There an op of ours is a call like any other, but the dispatcher takes longer to bring lists of
tensors and the text of a spec to it and back than a small kernel runs. Nothing is lost: compiled
code has no gradient, no mode and no device left to choose by. Under the profiler ops are ops, so
that it sees them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from fxquant.runtime import launch, ops

assert ops  # imported for its registrations

_is_profiled = torch._C._autograd._profiler_enabled


def _function(run: Callable[..., Any], op: Any) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        return op(*args) if _is_profiled() else run(*args)

    return call


_ops = torch.ops.fxquant
FUNCTIONS: dict[str, Callable[..., Any]] = {
    "launch": _function(launch.run, _ops.launch.default),
    "launch_several": _function(launch.run_several, _ops.launch_several.default),
    "launch_quantize": _function(launch.run_quantize, _ops.launch_quantize.default),
    "launch_rows": _function(launch.run_rows, _ops.launch_rows.default),
}
"""What stands for each op; they are this module's attributes, too."""
globals().update(FUNCTIONS)


def register() -> None:
    """Tells Inductor; versions of torch that cannot be told call the ops."""
    try:
        from torch._inductor.codegen import custom_extern_kernel_codegen as custom
    except ImportError:
        return
    for name in FUNCTIONS:
        made = custom.CustomCodegen(python=functools.partial(_print_call, name))
        custom.CUSTOM_EXTERN_KERNEL_CODEGEN[f"torch.ops.fxquant.{name}.default"] = made


def _print_call(name: str, node: Any, writeline: Callable[[str], None]) -> None:
    from torch._inductor.virtualized import V

    wrapper = V.graph.wrapper_code
    while hasattr(wrapper, "parent_wrapper"):  # whoever writes imports
        wrapper = wrapper.parent_wrapper
    wrapper.add_import_once("from fxquant.runtime import direct as fxquant_direct")
    for result in node.outputs:
        # Whoever launches allocates results, by a shape that it has checked.
        result.codegen_size_asserts = lambda _: None
    args = ", ".join([*node.codegen_args(), *node.codegen_kwargs()])
    writeline(f"{node.get_name()} = fxquant_direct.{name}({args})")
