"""Where the results of a compiled model lie: its graph in interval arithmetic, weights decoded.

The model is traced to ATen with its values in place, and run node by node on intervals in float64:
pointwise ops by `fxquant.codegen.intervals`, products and reductions here, with the bounds of
`fxquant.codegen.bounds`. What a graph rounds to 16 bits a compiler may keep in float32 up to the
next op, and the other way around: intervals hold both.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._inductor.decomposition import select_decomp_table
from torch.func import functional_call, functionalize
from torch.fx.experimental.proxy_tensor import make_fx

import fxquant
from fxquant.codegen import bounds, intervals
from fxquant.codegen.epilogue import EpilogueNode
from fxquant.codegen.intervals import UNIT, Interval
from fxquant.formats import decode
from fxquant.runtime.store import STORE

aten, prims = torch.ops.aten, torch.ops.prims
SIXTEEN = (torch.float16, torch.bfloat16)
LEAST_AMAX = bounds.LEAST_AMAX


@dataclass(frozen=True)
class Weight:
    """A parameter as it is multiplied with.

    Attributes:
        value: float64, decoded where it is quantized.
        activation: Whether what it is multiplied with is rounded to int8 a row.
        threshold: From which magnitude on columns stay floats, or None.
    """

    value: Tensor
    activation: bool = False
    threshold: float | None = None


def weights_of(model: nn.Module) -> dict[str, Weight]:
    """The parameters of a model that was compiled and called."""
    found = {}
    quantized = {row.parameter: row for row in fxquant.report(model).quantized}
    for name, parameter in model.named_parameters():
        packed = STORE.packed_from(parameter) if name in quantized else None
        if packed is None:
            found[name] = Weight(parameter.detach().double())
            continue
        dense = decode(packed.tensors(), packed.encoding, packed.shape, torch.float32).double()
        how = quantized[name].activation
        found[name] = Weight(dense, bool(how), 6.0 if "columns from" in how else None)
    return found


def enclose(model: nn.Module, weights: Mapping[str, Weight], x: Tensor) -> list[Interval]:
    """Where the results of a model lie, for one input.

    Args:
        model: Gives tensors; buffers that it writes to are left as they were.
        weights: Its parameters.
        x: Its input.
    """
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    names = list(tensors)

    def call(values: list[Tensor], given: Tensor) -> Any:
        return functional_call(model, dict(zip(names, values, strict=True)), (given,))

    plain = [tensors[name].detach().clone() for name in names]
    given: list[Any] = []
    for name, value in zip(names, plain, strict=True):
        if name in weights:
            given.append(_Known(_point(weights[name].value), weights[name]))
        else:
            given.append(_Known(_point(value)))
    # Inductor makes sums of small products; here they stay products.
    table = {op: how for op, how in select_decomp_table().items() if op not in _PRODUCTS}
    with torch.no_grad():
        traced = make_fx(functionalize(call), decomposition_table=table)(plain, x)
    return [value.interval for value in _Enclosing(traced).run(*given, _Known(_point(x)))]


@dataclass(frozen=True)
class _Known:
    """An interval, and the parameter that it is a view of."""

    interval: Interval
    weight: Weight | None = None


def _point(value: Tensor) -> Interval:
    value = value if value.dtype == torch.bool else value.double()
    return Interval(value, value)


class _Enclosing(fx.Interpreter):
    """Runs a traced graph on intervals."""

    def run_node(self, n: fx.Node) -> Any:
        self.node = n
        return super().run_node(n)

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        flat, _ = torch.utils._pytree.tree_flatten((args, kwargs))
        if not any(isinstance(value, _Known) for value in flat):
            made = target(*args, **kwargs)
            return _Known(_point(made)) if isinstance(made, Tensor) else made
        if target in _VIEWS:
            return _viewed(target, args, kwargs)
        if target is operator.getitem:
            return args[0][args[1]]
        value = self.node.meta.get("val")
        dtype = value.dtype if isinstance(value, Tensor) else None
        if target in _PRODUCTS:
            found = _PRODUCTS[target](dtype, *args, **kwargs)
        else:
            rule = _REDUCTIONS.get(target)
            found = rule(*args, **kwargs) if rule else _pointwise(target, args, kwargs)
        if isinstance(found, Interval):
            found = _either_way(found, dtype)
        return _Known(found) if isinstance(found, Interval) else found


def _either_way(value: Interval, dtype: torch.dtype | None) -> Interval:
    """A value that is rounded to 16 bits, or is not."""
    if dtype not in SIXTEEN:
        return value
    down = intervals.rounded(value, dtype)
    return Interval(torch.minimum(value.low, down.low), torch.maximum(value.high, down.high))


def _pointwise(target: Any, args: Any, kwargs: Any) -> Interval:
    names: dict[str, Interval] = {}

    def written(value: Any) -> Any:
        if isinstance(value, _Known):
            names[f"%in{len(names)}"] = value.interval
            return f"%in{len(names) - 1}"
        return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value

    if target in (prims.convert_element_type.default, aten._to_copy.default):
        value = args[0].interval
        is_flag = kwargs.get("dtype", args[-1]) is torch.bool
        if value.low.dtype != torch.bool or is_flag:
            return value
        return Interval(value.low.double(), value.high.double())
    if target in (aten.clone.default, aten.copy.default, aten.lift_fresh_copy.default):
        return args[-1 if target is aten.copy.default else 0].interval
    if target is aten.copy_.default:
        return args[1].interval
    node = EpilogueNode(
        str(target),
        tuple(map(written, args)),
        tuple((key, written(value)) for key, value in kwargs.items() if value is not None),
    )
    found = intervals.call(node, names)
    if target is aten.erf.default:
        # Vectors of torch take formula 7.1.26 of Abramowitz and Stegun: 1.5e-7 off at most.
        found = Interval(found.low - 8 * UNIT, found.high + 8 * UNIT)
    return found


# --- views ------------------------------------------------------------------------------------

_NAMES = (
    *("view", "_unsafe_view", "reshape", "permute", "t", "expand", "squeeze", "unsqueeze"),
    *("alias", "detach", "cat", "stack", "flip", "as_strided", "split_with_sizes", "repeat"),
    *("slice_scatter", "select_scatter"),
)
_VIEWS = {getattr(aten, name).default for name in _NAMES}
_VIEWS |= {aten.slice.Tensor, aten.select.int, aten.transpose.int, aten.split.Tensor}
_VIEWS |= {aten.squeeze.dim, aten.squeeze.dims}


def _viewed(target: Any, args: Any, kwargs: Any) -> Any:
    if target in (aten.view.default, aten._unsafe_view.default):
        target = aten.reshape.default  # memory may lie otherwise here

    def ends(end: str) -> Any:
        def value(known: Any) -> Any:
            return getattr(known.interval, end) if isinstance(known, _Known) else known

        return target(*torch.utils._pytree.tree_map(value, args), **kwargs)

    flat, _ = torch.utils._pytree.tree_flatten(args)
    known = [value for value in flat if isinstance(value, _Known)]
    weight = known[0].weight if len(known) == 1 else None
    is_point = all(value.interval.low is value.interval.high for value in known)
    low = ends("low")
    high = low if is_point else ends("high")
    if isinstance(low, Tensor):
        return _Known(Interval(low, high), weight)
    return [_Known(Interval(*pair), weight) for pair in zip(low, high, strict=True)]


# --- reductions -------------------------------------------------------------------------------


def _over(value: Interval, dim: Any, *, keepdim: bool, mean: bool) -> Interval:
    dims = list(range(value.low.ndim)) if not dim else [dim] if isinstance(dim, int) else list(dim)
    count = math.prod(value.low.shape[d] for d in dims)
    low, high = (end.sum(dims, keepdim) for end in (value.low, value.high))
    reach = torch.maximum(value.low.abs(), value.high.abs()).sum(dims, keepdim)
    slack = (count + 4) * UNIT * reach
    share = count if mean else 1
    return Interval((low - slack) / share, (high + slack) / share)


def _sum(x: _Known, dim: Any = None, keepdim: bool = False, dtype: Any = None) -> Interval:
    return _over(x.interval, dim, keepdim=keepdim, mean=False)


def _mean(x: _Known, dim: Any = None, keepdim: bool = False, dtype: Any = None) -> Interval:
    return _over(x.interval, dim, keepdim=keepdim, mean=True)


def _amax(x: _Known, dim: Any = (), keepdim: bool = False) -> Interval:
    return Interval(x.interval.low.amax(dim, keepdim), x.interval.high.amax(dim, keepdim))


def _var_mean(
    x: _Known, dim: Any = None, *, correction: float | None = None, keepdim: bool = False
) -> list[_Known]:
    mean = _over(x.interval, dim, keepdim=True, mean=True)
    apart = Interval(x.interval.low - mean.high, x.interval.high - mean.low)
    largest = torch.maximum(apart.low.abs(), apart.high.abs())
    least = torch.maximum(apart.low, -apart.high).clamp_min(0.0)
    spread = _over(Interval(least.square(), largest.square()), dim, keepdim=keepdim, mean=True)
    dims = [dim] if isinstance(dim, int) else list(dim)
    count = math.prod(x.interval.low.shape[d] for d in dims)
    factor = count / (count - (1.0 if correction is None else correction))
    # Welford's method and that of two passes: a few roundings of what they add.
    wide = 1 + (count + 16) * UNIT
    found = Interval(spread.low * factor / wide, spread.high * factor * wide)
    mean = _over(x.interval, dim, keepdim=keepdim, mean=True)
    return [_Known(found), _Known(mean)]


_REDUCTIONS: dict[Any, Callable[..., Any]] = {
    aten.sum.dim_IntList: _sum,
    aten.mean.dim: _mean,
    aten.amax.default: _amax,
    aten.var_mean.correction: _var_mean,
    aten.var.correction: lambda *args, **kwargs: _var_mean(*args, **kwargs)[0].interval,
}


# --- products ---------------------------------------------------------------------------------


def _mm(dtype: Any, x: _Known, y: _Known) -> Interval:
    """``x @ y``: of two values, or of a value and a parameter on either side."""
    if y.weight is None and x.weight is not None:
        turned = _mm(dtype, _turned(y), _turned(x))
        return Interval(turned.low.transpose(-1, -2), turned.high.transpose(-1, -2))
    dense = y.interval.low.transpose(-1, -2)
    own, outliers = x.interval, torch.zeros_like(x.interval.low)
    if y.weight is not None and y.weight.activation:
        own, outliers = _int8(own, y.weight.threshold)
    reach = torch.maximum(own.low.abs(), own.high.abs())
    if y.weight is None:
        wide = torch.maximum(y.interval.low.abs(), y.interval.high.abs()).transpose(-1, -2)
        middle = (y.interval.low + y.interval.high).transpose(-1, -2) / 2
        moved = reach @ ((y.interval.high - y.interval.low) / 2)
    else:
        wide, middle, moved = dense.abs(), dense, 0.0
    centre, radius = (own.low + own.high) / 2, (own.high - own.low) / 2
    exact = centre @ middle.transpose(-1, -2)
    moved = moved + radius @ wide.transpose(-1, -2)
    k = reach.shape[-1]
    if y.weight is not None and y.weight.activation:
        # Bytes are biased by 128, and scales of absmax are a 127th of the largest weight or more.
        biased = wide + 2.1 * wide.amax(-1, keepdim=True)
        error = (k + 64) * UNIT * (reach @ biased.transpose(-1, -2)) + 2.0**-126
        # Outliers are multiplied in 16 bits, of float32 in float16.
        half = torch.finfo(dtype if dtype in SIXTEEN else torch.float16).eps / 2
        error = error + (2 * half + 8 * UNIT) * (outliers @ wide.transpose(-1, -2))
    else:
        error = bounds.float_sums(reach, wide, None, dtype).error
    return intervals.around(exact, error + moved)


def _turned(value: _Known) -> _Known:
    own = value.interval
    low = own.low.transpose(-1, -2)
    high = low if own.low is own.high else own.high.transpose(-1, -2)
    return _Known(Interval(low, high), value.weight)


def _int8(x: Interval, threshold: float | None) -> tuple[Interval, Tensor]:
    """What rows are after they were rounded to int8, and the magnitudes of outliers.

    Columns of outliers stay as they are.
    """
    size = Interval(
        torch.maximum(torch.maximum(x.low, -x.high), torch.zeros_like(x.low)),
        torch.maximum(x.low.abs(), x.high.abs()),
    )
    surely = maybe = torch.zeros_like(x.low, dtype=torch.bool)
    if threshold is not None:
        surely = (size.low >= threshold).any(-2, keepdim=True)
        maybe = (size.high >= threshold * (1 - 2 * UNIT)).any(-2, keepdim=True)
    least = torch.where(maybe, 0.0, size.low).amax(-1, keepdim=True).clamp_min(LEAST_AMAX)
    most = torch.where(surely, 0.0, size.high).amax(-1, keepdim=True).clamp_min(LEAST_AMAX)
    slack = 1 + 4 * UNIT
    corners = [end * 127 / amax for end in (x.low, x.high) for amax in (least, most)]
    low = torch.stack(corners).amin(0)
    high = torch.stack(corners).amax(0)
    low, high = (low - (slack - 1) * low.abs()).round(), (high + (slack - 1) * high.abs()).round()
    corners = [
        q * amax / 127
        for q in (low.clamp(-127, 127), high.clamp(-127, 127))
        for amax in (least, most)
    ]
    low, high = torch.stack(corners).amin(0), torch.stack(corners).amax(0)
    low = torch.where(surely, x.low, torch.where(maybe, torch.minimum(low, x.low), low))
    high = torch.where(surely, x.high, torch.where(maybe, torch.maximum(high, x.high), high))
    return Interval(low, high), torch.where(maybe, size.high, 0.0)


def _added(bias: _Known, product: Interval, beta: float = 1, alpha: float = 1) -> Interval:
    names = {"%in0": bias.interval, "%acc": product}
    product = intervals.call(EpilogueNode("aten.mul.Tensor", ("%acc", alpha)), names)
    biased = intervals.call(EpilogueNode("aten.mul.Tensor", ("%in0", beta)), names)
    values = {"%in0": biased, "%acc": product}
    return intervals.call(EpilogueNode("aten.add.Tensor", ("%acc", "%in0")), values)


def _addmm(dtype: Any, bias: _Known, x: _Known, y: _Known, **scale: float) -> Interval:
    return _added(bias, _either_way(_mm(dtype, x, y), dtype), **scale)


def _convolution(dtype: Any, x: _Known, w: _Known, bias: _Known | None, *_: Any) -> Interval:
    """Of size 1: a product of every position's channels."""
    flat = _Known(_point(w.interval.low[..., 0]), w.weight)
    out = _mm(dtype, _turned(x), _turned(flat))
    out = out if bias is None else _added(bias, out)
    return Interval(out.low.transpose(-1, -2), out.high.transpose(-1, -2))


_PRODUCTS: dict[Any, Callable[..., Interval]] = {
    aten.mm.default: _mm,
    aten.bmm.default: _mm,
    aten.addmm.default: _addmm,
    aten.baddbmm.default: _addmm,
    aten.convolution.default: _convolution,
}
