"""Match: products against a parameter become `LinearSite`s, and what is left gets a `Refusal`."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, fx

from fxquant.codegen.spec import WeightOperand
from fxquant.formats import Encoding, PackedWeight
from fxquant.passes import products, views
from fxquant.passes.bind import is_foreign, path_of
from fxquant.passes.context import (
    NOT_A_PARAMETER,
    BoundParameter,
    Context,
    LinearSite,
    PassReport,
    Refusal,
)
from fxquant.passes.groups import Picked
from fxquant.passes.normalize import GRAD_ENABLED, TRANSFORMED
from fxquant.passes.products import Form
from fxquant.passes.regions import Region, body_names
from fxquant.passes.views import View
from fxquant.passes.writes import Written

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
_FRAME = re.compile(r'File "(.+?)", line (\d+)')
_UNPLANNED = Encoding(bits=8)


def match(ctx: Context) -> PassReport:
    """Fills `Context.sites` and `Context.refusals`."""
    written = _written(ctx)
    for region in ctx.regions:
        for node in region.graph.nodes:
            if products.is_product(node):
                _look_at(ctx, region, node, written)
            elif _has_opaque_bodies(node):
                _look_into(ctx, region, node)
    count = len(ctx.sites)
    return PassReport("match", f"{count} products found, {len(ctx.refusals)} left alone")


def _look_at(ctx: Context, region: Region, node: fx.Node, written: set[fx.Node]) -> None:
    factors = enumerate(products.factors(node))
    seen = [(i, views.resolve_factor(ctx, region, n)) for i, n in factors]
    found = [(i, view) for i, view in seen if view is not None]
    if not found:
        nodes = node.all_input_nodes
        others = [view for n in nodes if (view := views.resolve_factor(ctx, region, n))]
        matrices = [v for v in others if not isinstance(v.layout, Tensor) or v.layout.ndim > 1]
        if matrices:
            reason = f"{products.name(node)} has no quantized form"
            lost = {view.parameter.node: view.parameter for view in matrices}
            ctx.refusals += [_refusal(node, reason, parameter) for parameter in lost.values()]
        else:
            ctx.refusals.append(_refusal(node, "no operand is a parameter"))
        return
    side, view = found[0]
    both = len(found) > 1
    result = _site(ctx, region, node, side, view, both=both, written=written)
    if isinstance(result, LinearSite):
        ctx.sites.append(result)
    else:
        ctx.refusals.append(_refusal(node, result, view.parameter))


def _site(
    ctx: Context,
    region: Region,
    node: fx.Node,
    side: int,
    view: View,
    *,
    both: bool,
    written: set[fx.Node],
) -> LinearSite | str:
    """The site of a product, or why it is left alone."""
    if view.layout is None:
        return "its view or cast of the parameter is more than other strides on the same elements"
    reason = _objection(node, view.parameter, both=both, written=written)
    if reason is not None:
        return reason
    picked = None
    if view.ids is not None:
        key = view.ids, view.layout.shape[0]
        if key not in ctx.picked and view.ids in Written(ctx.regions):
            return "the numbers that pick its matrices are written to"
        picked = ctx.picked.setdefault(key, Picked(*key))
    form = products.form(node, side, view.layout, picked)
    if isinstance(form, str):
        return form
    if not isinstance(form.x, fx.Node):
        return "its activation is no tensor of the graph"
    operand = _operand(view, form)
    if isinstance(operand, str):
        return operand
    shape = operand.shape
    return LinearSite(
        node=node,
        x=form.x,
        parameter=view.parameter,
        operand=operand,
        n_dims=_dims(shape, operand.n, operand.strides[1]),
        k_dims=_dims(shape, operand.k, operand.strides[2]),
        bias=form.bias,
        module=module_of(node) or view.parameter.name.rpartition(".")[0],
        where=where(node),
        region=region,
        to_x=form.to_x,
        from_out=form.from_out,
        ends=form.ends,
    )


def _objection(
    node: fx.Node, bound: BoundParameter, *, both: bool, written: set[fx.Node]
) -> str | None:
    """Why a product cannot be quantized whatever its form, or None."""
    value, out = bound.value, node.meta.get("val")
    dtypes = {value.dtype}
    if isinstance(out, Tensor):
        dtypes.add(out.dtype)
    reason = None
    if both:
        reason = "both operands are parameters"
    elif is_foreign(value):
        reason = f"the parameter is a {type(value).__name__}, which has its own products"
    elif not value.dtype.is_floating_point:
        reason = f"the dtype {value.dtype} is not a real floating-point one"
    elif torch.float64 in dtypes or not isinstance(out, Tensor) or out.dtype not in FLOATS:
        wrong = next((dtype for dtype in dtypes if dtype not in FLOATS), None)
        reason = f"products in {wrong} are not supported"
    elif value.numel() == 0:
        reason = "the parameter is empty"
    elif node.meta.get(TRANSFORMED):
        reason = "it is inside a functorch transform"
    elif bound.node in written:
        reason = "the parameter is written to in the graph"
    elif (
        value.requires_grad and node.meta.get(GRAD_ENABLED) and not isinstance(value, PackedWeight)
    ):
        reason = (
            "the parameter is trainable: call the model under torch.no_grad(), or freeze the "
            "parameter with requires_grad_(False)"
        )
    return reason


def _operand(view: View, form: Form) -> WeightOperand | str:
    layout = view.layout if form.layout is None else form.layout
    batch_dim, n_dim, k_dim = form.dims
    sizes, strides = layout.shape, layout.stride()
    batch = sizes[batch_dim] if batch_dim is not None else None
    outer = strides[batch_dim] if batch_dim is not None else 0
    n, k = sizes[n_dim], sizes[k_dim]
    if 0 in (n, k, batch):
        return "its view of the parameter is empty"
    if (strides[n_dim] == 0 and n > 1) or (strides[k_dim] == 0 and k > 1):
        return "the parameter is broadcast along its outputs or inputs"
    return WeightOperand(
        encoding=_UNPLANNED,
        shape=tuple(view.parameter.value.shape),
        batch=batch,
        n=n,
        k=k,
        strides=(outer, strides[n_dim], strides[k_dim]),
        offset=int(layout.storage_offset()),
    )


def _dims(shape: tuple[int, ...], size: int, stride: int) -> tuple[int, ...]:
    """Dimensions of a row-major tensor that an axis of that size and stride runs over."""
    out, step = [], 1
    for dim in reversed(range(len(shape))):
        if shape[dim] > 1 and stride <= step < stride * size:
            out.append(dim)
        step *= shape[dim]
    return tuple(reversed(out))


def _written(ctx: Context) -> set[fx.Node]:
    """Parameters (their placeholders) that some call in the graph writes to."""
    out = set()
    for region in ctx.regions:
        for node in region.graph.nodes:
            for target in _targets_of_writes(node):
                view = views.resolve(ctx, region, target)
                if view is not None:
                    out.add(view.parameter.node)
    return out


def _targets_of_writes(node: fx.Node) -> list[Any]:
    if node.op == "call_method" and str(node.target).endswith("_") and node.args:
        return [] if str(node.target).endswith("__") else [node.args[0]]
    schema = getattr(node.target, "_schema", None)
    if node.op != "call_function" or schema is None:
        return [node.kwargs["out"]] if node.kwargs.get("out") is not None else []
    out = []
    for position, argument in enumerate(schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            given = node.args[position] if position < len(node.args) else None
            out.append(node.kwargs.get(argument.name, given))
    return out


def _has_opaque_bodies(node: fx.Node) -> bool:
    """Whether a call runs graphs that passes leave as they are."""
    return isinstance(node.target, torch._ops.HigherOrderOperator) and not body_names(node)


def _look_into(ctx: Context, region: Region, node: fx.Node) -> None:
    """Refuses the products inside a higher-order op whose bodies are left as they are."""
    bodies = [
        getattr(region.gm, str(given.target), None)
        for given in node.all_input_nodes
        if given.op == "get_attr"
    ]
    inside = [
        inner
        for body in bodies
        if isinstance(body, fx.GraphModule)
        for inner in body.graph.nodes
        if products.is_product(inner)
    ]
    bound = [v.parameter for n in node.all_input_nodes if (v := views.resolve(ctx, region, n))]
    if inside and bound:
        reason = f"it is inside {products.name(node)}, which is left as it is written"
        ctx.refusals += [_refusal(inside[0], reason, parameter) for parameter in bound]


def _refusal(node: fx.Node, reason: str, bound: BoundParameter | None = None) -> Refusal:
    return Refusal(
        reason=reason,
        where=where(node),
        module=module_of(node) or (bound.name.rpartition(".")[0] if bound else ""),
        op=products.name(node),
        shape=tuple(bound.value.shape) if bound else (),
        parameter=bound.name if bound else "",
        **({} if bound else {"kind": NOT_A_PARAMETER}),
    )


def where(node: fx.Node) -> str:
    """``file:line`` of the user's source."""
    frames = _FRAME.findall(node.meta.get("stack_trace") or "")
    return ":".join(frames[-1]) if frames else ""


def module_of(node: fx.Node) -> str:
    """Path of the innermost module that a call belongs to."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    path = next(reversed(stack.values()))[0]
    return "" if re.fullmatch(r"L\[[^\]]*\]", path) else path_of(path)
