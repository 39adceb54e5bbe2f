"""The `torch.compile` entry. `fxquant` below reads top to bottom as the pipeline of one compile."""

from __future__ import annotations

import functools
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

from fxquant import codegen, errors, formats, passes, runtime
from fxquant.codegen import Header
from fxquant.config import Config
from fxquant.ledger import Ledger
from fxquant.online import online
from fxquant.passes import run_pipeline
from fxquant.passes.context import Context, LinearSite
from fxquant.passes.fuse import Fuse, launch_as, products_and_rows
from fxquant.passes.sources import DerivedPart, PackedPart, Tools, evaluate
from fxquant.runtime import cache, dump, launch, ops, targets, verify
from fxquant.runtime.graph import CompiledGraph, Derived, Slot, Source
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
    compile_ = functools.partial(_compile, mode=mode)
    if config.calibration_steps:
        return online(gm, example_inputs, config, compile_)
    return compile_(gm, example_inputs, config)


def _compile(
    gm: fx.GraphModule, example_inputs: Sequence[Any], config: Config, mode: str | None
) -> CompiledGraph:
    ctx = Context(gm, list(example_inputs), config, STORE.pack, remember=STORE.remember)
    run_pipeline(ctx)
    device = _device_of(ctx)
    headers = _headers(ctx)
    choices = targets.build(targets.choose(config.target, device), headers, device)
    kernels = _print_kernels(headers, choices)
    where = dump.folder(config.dump)
    if where is not None:
        dump.write(where, kernels)
        verify.write_to(where, headers)
    ledger = Ledger(ctx, choices)
    ledger.file()
    compiled = _lower(ctx, choices, device, mode)
    return CompiledGraph(compiled, *_sources(ctx, ledger), kernels, ledger.meet)


def _device_of(ctx: Context) -> torch.device:
    """Where the graph's weights live."""
    for value in (*(site.parameter.value for site in ctx.sites), *ctx.inputs):
        if isinstance(value, Tensor):
            return value.device
    return torch.device("cpu")


def _headers(ctx: Context) -> dict[str, Header]:
    """Every distinct spec, with the products that it computes."""
    sites: dict[str, list[LinearSite]] = {}
    for site in ctx.sites:
        sites.setdefault(site.spec_json, []).append(site)
        if site.quantize_json:
            sites.setdefault(site.quantize_json, []).append(site)
    return {
        text: Header(tuple(site.module for site in found), found[0].scheme)
        for text, found in sites.items()
    }


def _print_kernels(
    headers: Mapping[str, Header], choices: Mapping[str, targets.Choice]
) -> list[launch.Kernel]:
    """The kernels that run, and those that were asked for and do not."""
    kernels = []
    for text, header in headers.items():
        spec, choice = launch.parse(text), choices[text]
        if choice.asked != choice.runs:
            try:
                kernels.append(launch.make_kernel(spec, choice.asked, header, choice.note))
            except errors.NotPrintedError as error:
                LOG.info("%s", error)
        kernels.append(launch.make_kernel(spec, choice.runs, header))
    return kernels


def _sources(ctx: Context, ledger: Ledger) -> tuple[list[Source], list[Slot | Derived]]:
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
            made.append(_slot(source, ctx.tools, ledger))
        sources.append((slots[key], source.part))
    return sources, made


def _slot(source: PackedPart | DerivedPart, tools: Tools, ledger: Ledger) -> Slot | Derived:
    if isinstance(source, PackedPart):
        return Slot(source.index, source.encoding, source.name)
    rule = source.rule
    weight = None if source.packs is None else Slot(*source.packs)

    def compute(inputs: Sequence[Any]) -> Any:
        result = evaluate(rule, inputs, tools)
        ledger.made(rule, inputs, result)
        return result

    return Derived(rule.indices, compute, weight)


def _lower(
    ctx: Context,
    choices: Mapping[str, targets.Choice],
    device: torch.device,
    mode: str | None,
) -> Callable[..., Any]:
    """Hands the rewritten graph to Inductor, or runs it op by op where Inductor cannot work."""
    wanted = ctx.config.verify
    runs = {text: verify.named(choice.runs, wanted=wanted) for text, choice in choices.items()}
    missing = targets.inductor_missing(device)
    if missing:
        told = any(choice.note == missing for choice in choices.values())
        level = logging.INFO if told else logging.WARNING
        LOG.log(level, "%s: the graph runs op by op, without Inductor", missing)
        compiler = functools.partial(_op_by_op, runs)
        return aot_module_simplified(ctx.gm, ctx.inputs, fw_compiler=compiler)
    patches = {
        **targets.inductor_patches(),
        **(list_mode_options(mode) if mode else {}),
        **ctx.config.inductor,
    }
    users = patches.get("post_grad_custom_post_pass", inductor_config.post_grad_custom_post_pass)
    version = cache.fingerprint(codegen, formats, passes, runtime)
    patches["post_grad_custom_post_pass"] = Fuse(version, runs, before=users)
    compiled: Any = compile_fx(ctx.gm, ctx.inputs, config_patches=patches)
    return compiled


def _op_by_op(
    runs: Mapping[str, str],
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],  # noqa: ARG001
) -> Callable[..., Any]:
    for node in products_and_rows(gm.graph):
        launch_as(node, runs.get(str(node.args[-1]), "auto"))
    gm.recompile()
    return make_boxed_func(gm.forward)
