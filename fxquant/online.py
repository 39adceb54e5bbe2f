"""Calibration online: the first calls run in full precision and are observed.

Dynamo's graph is kept until then, and what Dynamo knew when it made it: lowered later, it gives
what it would have given at once. Dynamo reuses one graph for many blocks and models, so the calls
are counted for the weights that arrive: each set of them is observed before it runs quantized.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._guards import CompileContext, TracingContext, compile_context, tracing

from fxquant import errors
from fxquant.calibrate import observed
from fxquant.calibration import Calibration
from fxquant.config import Config
from fxquant.formats import PackedWeight, anchor_of
from fxquant.passes.regions import copied
from fxquant.runtime.observe import Collector, ObservedGraph

LOG = logging.getLogger("fxquant.online")

Lower = Callable[[fx.GraphModule, Sequence[Any], Config], Callable[..., Any]]


def online(
    gm: fx.GraphModule, inputs: Sequence[Any], config: Config, lower: Lower
) -> Callable[..., Any]:
    """A graph that is observed in the first ``config.calibration_steps`` calls, and then lowered.

    Args:
        gm: Dynamo's graph; not changed.
        inputs: Its example inputs.
        config: The options.
        lower: Compiles a graph: now, if it has no products, else after the last of these calls.
    """
    graph = observed(gm, inputs)
    if not graph.sites:
        return lower(gm, inputs, config)
    return OnlineGraph(graph, Later(gm, inputs), config, lower)


class OnlineGraph:
    """See `online`.

    Args:
        graph: In full precision.
        later: What lowering needs.
        config: The options.
        lower: Compiles a graph.
    """

    def __init__(self, graph: ObservedGraph, later: Later, config: Config, lower: Lower) -> None:
        self.graph = graph
        self.later: Later | None = later
        self.lower = lower
        self.steps = config.calibration_steps
        # Grows with each set of weights: what is made of a weight is looked up as it arrives.
        self.calibration = Calibration({})
        self.config = dataclasses.replace(config, calibration=self.calibration, calibration_steps=0)
        self.indices = tuple(dict.fromkeys(site.index for site in graph.sites))
        self.met: dict[tuple[int, ...], _Met] = {}
        self.lowered: Callable[..., Any] | None = None
        self.fits: Callable[[Sequence[Any]], bool] = lambda _: True
        self.lock = threading.RLock()

    def __call__(self, *args: Any) -> Any:
        """Runs the graph.

        Raises:
            CalibrationError: The activations of the calls that were observed hold NaN or Inf.
            FxquantError: Whatever a compile raises, in the first call after these.
        """
        met = self._met([args[index] for index in self.indices])
        if met.left <= 0:
            lowered = self.lowered or self._lowered(args)
            return lowered(*args) if self.fits(args) else self.graph(None, args)
        out = self.graph(met.collector, args)
        with self.lock:
            self._count(met)
        return out

    def _met(self, weights: Sequence[Tensor]) -> _Met:
        anchors = [anchor_of(weight) for weight in weights]
        key = tuple(map(id, anchors))
        found = self.met.get(key)
        if found is not None:
            return found
        with self.lock:
            if key not in self.met:
                # Once a weight is gone its identity may be that of another.
                mine = weakref.ref(self)
                held = [weakref.ref(anchor, lambda _: _drop(mine, key)) for anchor in anchors]
                self.met[key] = _Met(self.steps, held)
            return self.met[key]

    def _count(self, met: _Met) -> None:
        """Notes that a call was observed; other threads may have made the last one meanwhile."""
        name = met.collector.not_finite()
        if name:
            number = self.steps - met.left
            met.left, met.collector = self.steps, Collector()
            raise errors.not_finite(name, number)
        met.left -= 1
        if met.left == 0:
            self.calibration.update(met.collector.calibration())
            met.collector = Collector()

    def _lowered(self, args: Sequence[Any]) -> Callable[..., Any]:
        with self.lock:
            if self.lowered is None:
                assert self.later is not None
                LOG.info("%d calls observed: the graph is lowered", self.steps)
                with _compiling():
                    self.lowered, self.fits = self.later.lowered(args, self.config, self.lower)
                self.later = None
            return self.lowered


@contextlib.contextmanager
def _compiling() -> Iterator[None]:
    """Says, as Dynamo does while it compiles, that torch is at it.

    Torch knows for the whole process whether something is traced. Unless it is for a compile, calls
    of compiled models in other threads raise meanwhile.
    """
    before = torch.compiler._is_compiling_flag
    torch.compiler._is_compiling_flag = True
    try:
        yield
    finally:
        torch.compiler._is_compiling_flag = before


@dataclass
class _Met:
    """A set of weights that has arrived, and how many calls of it are left to observe."""

    left: int
    weights: list[weakref.ref[Any]]
    collector: Collector = field(default_factory=Collector)


def _drop(graph: weakref.ref[OnlineGraph], key: tuple[int, ...]) -> None:
    alive = graph()
    if alive is not None:
        alive.met.pop(key, None)


class Later:
    """A graph of Dynamo's, put by to be lowered when Dynamo has finished.

    It holds no weights: those that arrive with the call that has it lowered take their place. Of
    other inputs it keeps what AOTAutograd would have made of them, fake tensors of symbolic sizes.

    Args:
        gm: The graph; not changed.
        inputs: Its example inputs.
    """

    def __init__(self, gm: fx.GraphModule, inputs: Sequence[Any]) -> None:
        self.gm = copied(gm)[0].gm
        self.tracing = TracingContext.get()
        self.compiling = CompileContext.get()
        contexts = self.tracing.tensor_to_context
        self.contexts = {
            index: contexts.get(given) for index, given in enumerate(inputs) if _is_weight(given)
        }
        self.inputs = [None if _is_weight(given) else self._fake(given) for given in inputs]

    def _fake(self, given: Any) -> Any:
        if not isinstance(given, Tensor):
            return given
        mode, context = self.tracing.fake_mode, self.tracing.tensor_to_context.get(given)
        assert mode is not None
        source = None if context is None else context.tensor_source
        return mode.from_tensor(given, symbolic_context=context, source=source)

    def lowered(
        self, args: Sequence[Any], config: Config, lower: Lower
    ) -> tuple[Callable[..., Any], Callable[[Sequence[Any]], bool]]:
        """The compiled graph, and whether it computes the graph for some inputs.

        Dynamo's guards are made by now. Where lowering makes others about sizes, which it hardly
        ever does, they have to be asked at every call.
        """
        inputs = list(self.inputs)
        for index, context in self.contexts.items():
            inputs[index] = args[index]
            if context is not None:
                self.tracing.tensor_to_context[args[index]] = context
        mode = self.tracing.fake_mode
        sizes: Any = mode.shape_env if mode is not None else None
        if sizes is None:
            with tracing(self.tracing), compile_context(self.compiling):
                return lower(self.gm, inputs, config), lambda _: True
        known, frozen = len(sizes.guards), sizes.frozen
        # Frozen, it would drop the new ones.
        sizes.frozen = False
        try:
            with tracing(self.tracing), compile_context(self.compiling):
                compiled = lower(self.gm, inputs, config)
        finally:
            sizes.frozen = frozen
        if len(sizes.guards) == known:
            return compiled, lambda _: True
        return compiled, self._guard(sizes)

    def _guard(self, sizes: Any) -> Callable[[Sequence[Any]], bool]:
        """Asks all guards about sizes of the inputs of a call."""
        places = [index for index in range(len(self.inputs)) if index not in self.contexts]
        code = sizes.produce_guards_expression([self.inputs[index] for index in places])
        if not code:
            return lambda _: True
        LOG.warning(
            "lowered after calibration, a graph serves fewer sizes than before, and runs in full "
            "precision for the others: %s",
            code,
        )
        return lambda args: sizes.evaluate_guards_expression(code, [args[i] for i in places])


def _is_weight(given: Any) -> bool:
    return isinstance(given, (nn.Parameter, PackedWeight))
