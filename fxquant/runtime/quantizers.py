"""What runs a `QuantizeSpec` on each target: with a prologue or without, counting or not."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

from torch import Tensor

from fxquant.codegen import quantize
from fxquant.codegen.epilogue import EpilogueResult
from fxquant.codegen.quantize import QuantizeSpec
from fxquant.runtime import counters

Runner = Callable[..., Any]
"""Takes the activation, or the operands of a prologue, and the limit, where there is one."""


def torch_runner(spec: QuantizeSpec) -> Runner:
    """The reference; what lies beyond a limit is counted."""
    if not spec.has_limit:
        run = quantize.run if spec.prologue is None else quantize.run_rows
        return functools.partial(run, spec)
    return functools.partial(_count if spec.prologue is None else _count_made, spec)


def triton_runner(spec: QuantizeSpec, module: ModuleType) -> Runner:
    """A printed module's ``run``."""
    run = module.run
    if not spec.has_limit:
        return run
    return lambda x, extra: run(x, extra, counter=counters.of(extra[0], 1))


def _count(spec: QuantizeSpec, x: Tensor, extra: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    codes, amax = quantize.run(spec, x, extra)
    counters.of(extra[0], 1).add_((x.abs() > amax.unsqueeze(-1)).sum())
    return codes, amax


def _count_made(
    spec: QuantizeSpec, operands: Sequence[Tensor], extra: Sequence[Tensor]
) -> list[Tensor]:
    prologue = spec.prologue
    assert prologue is not None, "others are counted by _count"
    made = EpilogueResult(prologue.result, spec.x_dtype)
    prologue = dataclasses.replace(prologue, more=(*prologue.more, made))
    found = quantize.run_rows(dataclasses.replace(spec, prologue=prologue), operands, extra)
    x = found.pop()
    counters.of(extra[0], 1).add_((x.abs() > found[1].unsqueeze(-1)).sum())
    return found
