"""The `torch.compile` entry. `fxquant` below reads top to bottom as the pipeline of one compile."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._functorch._aot_autograd.utils import make_boxed_func
from torch._functorch.aot_autograd import aot_module_simplified
from torch._inductor import config as inductor_config
from torch._inductor import list_mode_options
from torch._inductor.compile_fx import compile_fx

from fxquant import codegen, formats, passes, runtime
from fxquant.codegen import Header
from fxquant.config import Config
from fxquant.ledger import Ledger
from fxquant.passes import run_pipeline
from fxquant.passes.context import Context, LinearSite
from fxquant.passes.fuse import Fuse
from fxquant.runtime import cache, dump, launch, ops, targets
from fxquant.runtime.graph import CompiledGraph, Slot, Source
from fxquant.runtime.store import STORE

LOG = logging.getLogger("fxquant.backend")

assert ops  # imported for its registrations


def fxquant(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """Compiles one of Dynamo's graphs with its products quantized.

    Args:
        gm: The captured graph; not changed.
        example_inputs: Its inputs, parameters among them.
        options: The fields of `Config`.
        mode: Inductor's mode, as in ``"reduce-overhead"``.

    Returns:
        A callable that takes the graph's inputs.

    Raises:
        OptionError: An option is unknown or ill-typed.
        WeightError: A weight holds NaN or Inf, is empty, or cannot be encoded.
        CoverageError: `strict` or `min_coverage` is not met.
        FolderError: The dump folder or the kernel cache cannot be written.
    """
    config = Config.from_options(options)
    ctx = Context(gm, list(example_inputs), config, STORE.pack)
    run_pipeline(ctx)
    device = _device_of(ctx)
    target = targets.choose(config.target, device)
    kernels = _print_kernels(ctx, target)
    ledger = Ledger(ctx, target)
    ledger.file()
    compiled = _lower(ctx, target, device, mode)
    return CompiledGraph(compiled, *_sources(ctx), kernels, ledger.meet)


def _device_of(ctx: Context) -> torch.device:
    """Where the graph's weights live."""
    for value in (*(site.parameter.value for site in ctx.sites), *ctx.inputs):
        if isinstance(value, Tensor):
            return value.device
    return torch.device("cpu")


def _print_kernels(ctx: Context, target: targets.Choice) -> list[launch.Kernel]:
    """Prints the kernel of every distinct spec, and dumps them if a folder is named."""
    modules: dict[str, list[LinearSite]] = {}
    for site in ctx.sites:
        modules.setdefault(site.spec_json, []).append(site)
    kernels = []
    for text, sites in modules.items():
        spec = launch.parse_spec(text)
        header = Header(tuple(site.module for site in sites), sites[0].scheme)
        kernels.append(launch.make_kernel(spec, target.asked, header, target.note))
        if target.runs != target.asked:
            kernels.append(launch.make_kernel(spec, target.runs, header))
        elif target.runs == "triton":
            launch.prepare(text, header, _device_of(ctx))
    where = dump.folder(ctx.config.dump)
    if where is not None:
        dump.write(where, kernels)
    return kernels


def _sources(ctx: Context) -> tuple[list[Source], list[Slot]]:
    """The rewritten graph's inputs, as positions among Dynamo's and as parts of packed slots."""
    slots: dict[Slot, int] = {}
    sources: list[Source] = []
    for source in ctx.sources:
        if isinstance(source, int):
            sources.append(source)
        else:
            slot = Slot(source.index, source.encoding, source.name)
            sources.append((slots.setdefault(slot, len(slots)), source.part))
    return sources, list(slots)


def _lower(
    ctx: Context, target: targets.Choice, device: torch.device, mode: str | None
) -> Callable[..., Any]:
    """Hands the rewritten graph to Inductor, or runs it op by op where Inductor cannot work."""
    missing = targets.inductor_missing(device)
    if missing:
        LOG.warning("%s: the graph runs op by op, without Inductor", missing)
        return aot_module_simplified(ctx.gm, ctx.inputs, fw_compiler=_op_by_op)
    patches = {**(list_mode_options(mode) if mode else {}), **ctx.config.inductor}
    users = patches.get("post_grad_custom_post_pass", inductor_config.post_grad_custom_post_pass)
    version = cache.fingerprint(codegen, formats, passes, runtime)
    fuse = Fuse(version, inline=target.runs == "torch", before=users)
    patches["post_grad_custom_post_pass"] = fuse
    compiled: Any = compile_fx(ctx.gm, ctx.inputs, config_patches=patches)
    return compiled


def _op_by_op(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:  # noqa: ARG001
    return make_boxed_func(gm.forward)
