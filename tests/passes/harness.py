"""A tiny backend that runs the pipeline and then the rewritten graph with eager reference ops."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from functorch.compile import make_boxed_func
from torch import Tensor, nn
from torch._functorch.aot_autograd import aot_module_simplified

from fxquant.config import Config
from fxquant.formats import PackedWeight, pack
from fxquant.passes import run_pipeline
from fxquant.passes.context import Context
from fxquant.passes.sources import DerivedPart, evaluate
from fxquant.runtime import launch, ops

assert ops  # imported for its registrations


class Captured:
    """What the pipeline did to each graph of a model, and how often it packed."""

    def __init__(self, *, autograd: bool = False, **options: Any) -> None:
        self.autograd = autograd
        self.config = Config.from_options(options)
        self.contexts: list[Context] = []
        self.packed: dict[tuple[int, Any], PackedWeight] = {}
        self.dense: dict[int, tuple[Tensor, Tensor]] = {}
        self.compiles = 0

    def pack(self, tensor: Tensor, encoding: Any, name: str) -> PackedWeight:
        if isinstance(tensor, PackedWeight):
            return tensor
        key = (id(tensor), encoding)
        if key not in self.packed:
            self.packed[key] = pack(tensor.detach(), encoding, name=name)
            self.dense[id(tensor)] = (tensor, self.packed[key].dequantize())
        return self.packed[key]

    def backend(self, gm: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        before = str(gm.graph)
        ctx = Context(gm, list(inputs), self.config, self.pack)
        run_pipeline(ctx)
        assert str(gm.graph) == before, "Dynamo's graph was edited"
        self.contexts.append(ctx)
        if self.autograd:
            # As Inductor gets it: checkpointing and gradients are settled by AOTAutograd.
            compiled = aot_module_simplified(ctx.gm, ctx.inputs, fw_compiler=_op_by_op)
            return lambda *a: _by_reference(compiled, self.gather(ctx, a))
        return lambda *a: _by_reference(ctx.gm, self.gather(ctx, a))

    def gather(self, ctx: Context, args: tuple[Any, ...]) -> list[Any]:
        return [self._input(ctx, source, args) for source in ctx.sources]

    def _input(self, ctx: Context, source: Any, args: tuple[Any, ...]) -> Any:
        if isinstance(source, int):
            return args[source]
        if isinstance(source, DerivedPart):
            made = evaluate(source.rule, args, ctx.tools)
            return made.tensors()[source.part] if isinstance(made, PackedWeight) else made
        return self.pack(args[source.index], source.encoding, source.name).tensors()[source.part]

    @property
    def sites(self) -> list[Any]:
        return [site for ctx in self.contexts for site in ctx.sites]

    @property
    def refusals(self) -> list[Any]:
        return [refusal for ctx in self.contexts for refusal in ctx.refusals]

    @property
    def losses(self) -> list[Any]:
        return [refusal for refusal in self.refusals if refusal.is_loss]

    @contextmanager
    def decoded(self):
        """While entered, the packed parameters hold their decoded values."""
        kept = [(t, t.detach().clone()) for t, _ in self.dense.values()]
        with torch.no_grad():
            for tensor, dense in self.dense.values():
                tensor.data.copy_(dense)
            try:
                yield
            finally:
                for tensor, value in kept:
                    tensor.data.copy_(value)


def _by_reference(graph: Callable[..., Any], inputs: list[Any]) -> Any:
    """Runs a graph whose products are those of the reference, whatever has kernels here."""
    usual = mock.patch.object(launch, "usual_target", return_value="torch")
    with usual, mock.patch.object(launch, "_runners", {}):
        return graph(*inputs)


def _op_by_op(gm: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
    return make_boxed_func(gm.forward)


def tolerance(dtype: torch.dtype, k: int) -> float:
    """Relative bound on a chain of a few products in `dtype`.

    Both sides round every result to `dtype` (eps / 2 each), and sum k float32 products in an
    order of their own (k * 2**-24); 8 covers the handful of products that a case chains.
    """
    return 8 * (torch.finfo(dtype).eps + k * 2**-24)


def run(
    model: nn.Module | Callable[..., Any],
    *args: Any,
    dynamic: bool | None = None,
    grad: bool = False,
    tol: float | None = None,
    **options: Any,
) -> Captured:
    """Compiles, runs, and compares with eager on the decoded weights."""
    torch._dynamo.reset()
    captured = Captured(**options)
    compiled = torch.compile(model, backend=captured.backend, dynamic=dynamic, fullgraph=True)
    mode = torch.enable_grad if grad else torch.no_grad
    with mode():
        got = compiled(*copy.deepcopy(args))
        with captured.decoded():
            wanted = model(*copy.deepcopy(args))
    compare(got, wanted, tol)
    return captured


def compare(got: Any, wanted: Any, tol: float | None = None) -> None:
    """Values within the bound, and dtypes, shapes and strides equal."""
    if isinstance(wanted, (tuple, list)):
        for a, b in zip(got, wanted, strict=True):
            compare(a, b, tol)
        return
    if wanted is None:
        assert got is None
        return
    assert got.dtype == wanted.dtype
    assert got.shape == wanted.shape
    if wanted.numel():
        sizes = zip(wanted.shape, got.stride(), wanted.stride(), strict=True)
        assert all(a == b for size, a, b in sizes if size > 1), (got.stride(), wanted.stride())
    bound = tolerance(wanted.dtype, 256) if tol is None else tol
    scale = max(float(wanted.detach().float().abs().amax()) if wanted.numel() else 0.0, 1e-6)
    error = float((got.float() - wanted.float()).detach().abs().amax()) if wanted.numel() else 0.0
    assert error <= bound * scale, f"{error} > {bound} * {scale}"
