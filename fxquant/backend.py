"""The `torch.compile` entry. `fxquant` below reads top to bottom as the pipeline of one compile."""

from __future__ import annotations

import functools
import logging
import secrets
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, fx
from torch._functorch._aot_autograd.utils import make_boxed_func
from torch._functorch.aot_autograd import aot_module_simplified
from torch._guards import CompileContext
from torch._inductor import config as inductor_config
from torch._inductor import list_mode_options
from torch._inductor.compile_fx import compile_fx

from fxquant import codegen, formats, passes, runtime
from fxquant.config import Config
from fxquant.guards import forget_parts
from fxquant.kernels import Kernels
from fxquant.ledger import Ledger
from fxquant.online import online
from fxquant.passes import run_pipeline
from fxquant.passes.context import Context
from fxquant.passes.fuse import STEPS, Fuse, settle
from fxquant.passes.sources import DerivedPart, PackedPart, Tools, evaluate
from fxquant.readers import Readers, readers
from fxquant.runtime import cache, direct, dump, ops, targets
from fxquant.runtime.cpp import CppKernel
from fxquant.runtime.graph import CompiledGraph, Derived, Slot, Source
from fxquant.runtime.store import STORE

LOG = logging.getLogger("fxquant.backend")

assert ops  # imported for its registrations
direct.register()


def fxquant(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | Config | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """Compiles one of Dynamo's graphs with its products quantized.

    Args:
        gm: The captured graph; not changed.
        example_inputs: Its inputs, parameters among them.
        options: The fields of `Config`, or a `Config`.
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
    forget_parts(gm, example_inputs)
    _warn_of_limit()
    compile_ = functools.partial(_compile, mode=mode)
    if config.calibration_steps:
        return online(gm, example_inputs, config, compile_)
    return compile_(gm, example_inputs, config)


def _warn_of_limit() -> None:
    """Says so when this is the last graph that Dynamo makes of a function.

    It then runs the function without any backend, and warns of that in words of its own only.
    """
    found, limit = CompileContext.current_compile_id(), torch._dynamo.config.recompile_limit
    if found is not None and found.frame_compile_id == limit - 1:
        LOG.warning(
            "this function was compiled %d times, as often as Dynamo does: with other options, "
            "models or shapes than these it may run unquantized from now on; raise "
            "torch._dynamo.config.recompile_limit, or call torch._dynamo.reset() in between",
            limit,
        )


def _compile(
    gm: fx.GraphModule, example_inputs: Sequence[Any], config: Config, mode: str | None
) -> CompiledGraph:
    ctx = Context(gm, list(example_inputs), config, STORE.pack, remember=STORE.remember)
    run_pipeline(ctx)
    device = _device_of(ctx)
    choice = targets.choose(config.target, device)
    kernels = Kernels(ctx.sites, choice, device, config)
    compiled = _lower(ctx, kernels, device, mode)
    where = dump.folder(config.dump)
    if where is not None:
        kernels.dump(where)
    ledger = Ledger(ctx, kernels)
    ledger.file()
    sources, slots = _sources(ctx, ledger, readers(ctx, kernels))
    return CompiledGraph(compiled, sources, slots, kernels.printed(), ledger.meet)


def _device_of(ctx: Context) -> torch.device:
    """Where the graph's weights live."""
    for value in (*(site.parameter.value for site in ctx.sites), *ctx.inputs):
        if isinstance(value, Tensor):
            return value.device
    return torch.device("cpu")


def _sources(
    ctx: Context, ledger: Ledger, readers_of: Readers
) -> tuple[list[Source], list[Slot | Derived]]:
    """The rewritten graph's inputs, as positions among Dynamo's and as parts of slots."""
    slots: dict[object, int] = {}
    made: list[Slot | Derived] = []
    sources: list[Source] = []
    for source in ctx.sources:
        if isinstance(source, int):
            sources.append(source)
            continue
        key = source.rule if isinstance(source, DerivedPart) else (source.index, source.encoding)
        if key not in slots:
            slots[key] = len(made)
            made.append(_slot(source, ctx.tools, ledger, readers_of.get(source, ())))
        sources.append((slots[key], source.part))
    return sources, made


def _slot(
    source: PackedPart | DerivedPart,
    tools: Tools,
    ledger: Ledger,
    readers: tuple[CppKernel, ...],
) -> Slot | Derived:
    if isinstance(source, PackedPart):
        return Slot(source.index, source.encoding, source.name, readers)
    rule = source.rule
    weight = None if source.packs is None else Slot(*source.packs)

    def compute(inputs: Sequence[Any]) -> Any:
        result = evaluate(rule, inputs, tools)
        ledger.made(rule, inputs, result)
        return result

    return Derived(rule.indices, compute, weight, readers)


def _lower(
    ctx: Context, kernels: Kernels, device: torch.device, mode: str | None
) -> Callable[..., Any]:
    """Hands the rewritten graph to Inductor, or runs it op by op where Inductor cannot work."""
    missing = targets.inductor_missing(device)
    if missing:
        level = logging.INFO if kernels.choice.note == missing else logging.WARNING
        LOG.log(level, "%s: the graph runs op by op, without Inductor", missing)
        compiler = functools.partial(_op_by_op, kernels)
        return aot_module_simplified(ctx.gm, ctx.inputs, fw_compiler=compiler)
    patches = {
        **targets.inductor_patches(),
        **(list_mode_options(mode) if mode else {}),
        **ctx.config.inductor,
    }
    if ctx.sites and patches.get("cpp_wrapper", inductor_config.cpp_wrapper):
        LOG.warning("Inductor's cpp_wrapper cannot call fxquant's kernels: this graph does without")
        patches["cpp_wrapper"] = False
    users = patches.get("post_grad_custom_post_pass", inductor_config.post_grad_custom_post_pass)
    version = (cache.fingerprint(codegen, formats, passes, runtime), *kernels.version)
    fuses = ctx.config.fuse and kernels.choice.runs != "torch"
    fuse = Fuse(version, kernels.build, STEPS if fuses else (), before=users)
    patches["post_grad_custom_post_pass"] = fuse
    if not ctx.sites or fuse.uuid() is None:  # nothing to keep, or Inductor keeps nothing
        return cast("Any", compile_fx(ctx.gm, ctx.inputs, config_patches=patches))
    key = _graph_key(ctx, patches, str(fuse.uuid()))
    known = kernels.recall(key)
    fuse.edition = known or secrets.token_hex(8)
    compiled: Any = compile_fx(ctx.gm, ctx.inputs, config_patches=patches)
    if not known:
        kernels.keep(key, fuse.edition)
    return compiled


def _graph_key(ctx: Context, patches: Mapping[str, Any], *parts: str) -> str:
    """Tells a graph with its inputs and options from others."""
    inputs = [
        (str(value.dtype), str(value.shape), str(value.stride()), str(value.device))
        if isinstance(value, Tensor)
        else str(value)
        for value in ctx.inputs
    ]
    options = sorted((name, str(value)) for name, value in patches.items() if not callable(value))
    grad = torch.is_grad_enabled()
    return cache.key_of(*parts, str(ctx.gm.graph), str(inputs), str(options), str(grad))


def _op_by_op(
    kernels: Kernels,
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],  # noqa: ARG001
) -> Callable[..., Any]:
    settle(gm.graph, (), kernels.build, inline=False)
    gm.recompile()
    return make_boxed_func(gm.forward)
