"""Calibration: the model runs in full precision, and what goes into its products is counted.

It is compiled for that with a backend of its own, which finds the products as a quantizing compile
does. Whatever the model was compiled with before is put aside meanwhile and in its place after.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import logging
import threading
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, fx, nn
from torch._C._dynamo.eval_frame import _debug_get_cache_entry_list, reset_code
from torch._dynamo import config as dynamo_config
from torch._dynamo import convert_frame, pgo
from torch._dynamo.guards import DeletedGuardManagerWrapper
from torch.utils.weak import WeakIdKeyDictionary

from fxquant import errors
from fxquant.calibration import Calibration, plain_name
from fxquant.config import Config
from fxquant.formats import anchor_of
from fxquant.passes import OBSERVATION, run_pipeline
from fxquant.passes.context import Context
from fxquant.progress import bar
from fxquant.runtime import observe
from fxquant.runtime.observe import Collector, ObservedGraph, Site
from fxquant.runtime.store import STORE

LOG = logging.getLogger("fxquant.calibrate")

# What is put aside is so for the whole process: one calibration at a time.
_TURN = threading.RLock()
# A model of many shapes may be compiled as often as it likes: what runs without being compiled
# would not be counted.
_COMPILES = 1 << 20


def calibrate(
    model: Callable[..., Any],
    batches: Iterable[Any],
    *,
    moments: bool = False,
    progress: bool = True,
) -> Calibration:
    """Runs a model on batches and collects statistics of what goes into each of its products.

    It runs without gradients, in full precision, and in the mode (train or eval) that it is in.
    Padding counts like everything else.

    Args:
        model: Compiled or not; afterwards it is as it was. A function works as well.
        batches: Each a tensor, a tuple or list of positional arguments, a dict of keyword
            arguments, or a function that is called with the model, as in
            ``lambda model: model.generate(prompt)``.
        moments: Whether to sum second moments too: ``[k, k]`` for a product of k channels.
        progress: Whether to show a progress bar.

    Returns:
        The statistics, by the names of the weights.

    Raises:
        CalibrationError: There are no batches, the model does not take one of them, or its
            activations hold NaN or Inf.
    """
    if isinstance(batches, (Tensor, Mapping)):
        raise errors.single_batch(type(batches).__name__)
    plain = getattr(model, "_orig_mod", model)
    if isinstance(plain, nn.Module) and any(module.training for module in plain.modules()):
        LOG.warning("calibrating a model in train mode, dropout and all: eval() it if not meant")
    console = Console(stderr=True)
    shows = progress and (console.is_terminal or console.is_jupyter)
    collector = Collector(moments=moments, names=_names(plain))
    total = len(batches) if isinstance(batches, Sized) else None
    number = -1
    with (
        _TURN,
        torch.no_grad(),
        _compiled(plain) as compiled,
        bar(console, disable=not shows) as shown,
    ):
        step = shown.add_task("calibrating", total=total)
        for number, batch in enumerate(batches):
            with observe.collecting(collector):
                _run(plain, compiled, batch, number)
            name = collector.not_finite()
            if name:
                raise errors.not_finite(name, number)
            shown.advance(step)
    if number < 0:
        raise errors.no_batches()
    found = collector.calibration()
    if not found.stats:
        LOG.warning("calibration met no product against a parameter in %d batches", number + 1)
    return found


def observed(gm: fx.GraphModule, inputs: Sequence[Any]) -> ObservedGraph:
    """One of Dynamo's graphs in full precision, its products observed.

    Args:
        gm: The graph; not changed.
        inputs: Its example inputs.
    """
    ctx = Context(gm, list(inputs), Config(), STORE.pack)
    run_pipeline(ctx, OBSERVATION)
    sites = [Site(site.parameter.index, site.parameter.name) for site in ctx.sites]
    return ObservedGraph(ctx.gm, sites)


def _observing(gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
    """The backend."""
    graph = observed(gm, inputs)
    return lambda *args: graph(observe.active(), args)


def _run(plain: Any, compiled: Callable[..., Any], batch: Any, number: int) -> None:
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}
    if isinstance(batch, Tensor):
        args = (batch,)
    elif isinstance(batch, Mapping):
        kwargs = {**batch}
    elif isinstance(batch, (tuple, list)):
        args = tuple(batch)
    elif callable(batch):
        batch(plain if isinstance(plain, nn.Module) else compiled)
        return
    else:
        raise errors.bad_batch(number, f"it is a {type(batch).__name__}")
    try:
        compiled(*args, **kwargs)
    except Exception as cause:
        misfit = _misfit(plain, args, kwargs)
        if misfit is None:
            raise
        raise errors.bad_batch(number, f"the model does not take it ({misfit})") from cause


def _misfit(plain: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> TypeError | None:
    """What is wrong with the number or names of some arguments, or None."""
    try:
        inspect.signature(getattr(plain, "forward", plain)).bind(*args, **kwargs)
    except TypeError as problem:
        return problem
    return None


def _names(plain: Any) -> Callable[[Any, str], Sequence[str]]:
    """All names of a weight: tied ones have several, and one outside of the model that it met."""
    names: WeakIdKeyDictionary = WeakIdKeyDictionary()
    if isinstance(plain, nn.Module):
        for name, parameter in plain.named_parameters(remove_duplicate=False):
            names.setdefault(anchor_of(parameter), []).append(plain_name(name))
    return lambda anchor, met: names.get(anchor) or [plain_name(met)]


@contextlib.contextmanager
def _compiled(plain: Any) -> Iterator[Callable[..., Any]]:
    """While entered, all that `torch.compile` compiles is observed; gives the model so compiled.

    Calls of a module reach the compiled form however they are made: `generate` calls the module
    itself. Code that the user compiled, or compiles later, gets back Dynamo's memory of it: no
    entries of ours count against its recompile limit, and no shapes of ours make its own dynamic.
    """
    codes: list[types.CodeType] = []
    hook = convert_frame.register_bytecode_hook(lambda code, _: codes.append(code))
    shapes = copy.deepcopy(pgo._CODE_STATE)
    limits = dynamo_config.patch(recompile_limit=_COMPILES, accumulated_recompile_limit=_COMPILES)
    try:
        with (
            limits,
            torch.compiler.set_stance(force_backend=_observing),
            _called(plain) as compiled,
        ):
            yield compiled
    finally:
        hook.remove()
        pgo._CODE_STATE = shapes
        for code in codes:
            _forget(code)


@contextlib.contextmanager
def _called(plain: Any) -> Iterator[Callable[..., Any]]:
    """Has the calls of a module compiled while entered."""
    # Where it can, Dynamo keeps what it compiles for us apart from what it compiles for the user.
    apart = "isolate_recompiles" in inspect.signature(torch.compile).parameters
    compile_ = functools.partial(
        torch.compile, backend=_observing, **({"isolate_recompiles": True} if apart else {})
    )
    if not isinstance(plain, nn.Module):
        yield compile_(plain)
        return
    before = plain.__dict__.get("_compiled_call_impl")
    plain._compiled_call_impl = compile_(_whole(plain._call_impl))
    try:
        yield plain
    finally:
        del plain._compiled_call_impl
        if before is not None:
            plain._compiled_call_impl = before


def _whole(call: Callable[..., Any]) -> Callable[..., Any]:
    """A call in code of our own, which Dynamo's entries are kept by where no graph breaks."""

    def run(*args: Any, **kwargs: Any) -> Any:
        return call(*args, **kwargs)

    return run


def _forget(code: types.CodeType) -> None:
    """Removes our entries from Dynamo's for a piece of code."""
    entries = _debug_get_cache_entry_list(code)
    ours = [entry for entry in entries if entry.backend is _observing]
    if len(ours) == len(entries):
        reset_code(code)
        return
    for entry in ours:
        state: Any = entry.guard_manager.extra_state
        state.invalidate(entry, DeletedGuardManagerWrapper("calibration is over"))
