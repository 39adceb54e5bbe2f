"""The operators that compiled graphs carry.

They are plain library ops with fake and autograd rules, so they pass through AOTAutograd, dynamic
shapes and CUDA graphs like any ATen op. What they compute is defined by
`fxquant.codegen.reference`; what runs is a kernel that `fxquant.runtime.launch` finds.

``linear(Tensor x, Tensor[] weight, Tensor[] extra, str spec, int site) -> Tensor``
    x is ``[.., k]``, or ``[e, m, k]`` for batched weights; `weight` holds the tensors named by
    `Encoding.parts`; `extra` the epilogue's operands, those of static outliers and the ends of
    groups; `spec` is a `KernelSpec` as JSON; `site` the product's number in its graph for reports,
    or -1.
``launch(Tensor x, Tensor[] weight, Tensor[] extra, str spec, str target) -> Tensor``
    What `linear` becomes after autograd (`fxquant.passes.fuse`): the kernel of one target, without
    gradient, and with half of the overhead.
``launch_several(Tensor x, Tensor[] weight, Tensor[] extra, str spec, str target) -> Tensor[]``
    The same for a spec with more than one result, the main one first.
``quantize(Tensor x, Tensor[] extra, str spec) -> (Tensor codes, Tensor amax)``
    Rows of an activation ``[.., k]`` to int8 ``[.., k]``, with one float32 amax ``[..]`` each;
    `extra` is the limit, where the `QuantizeSpec` has one. Without gradient.
``launch_quantize(Tensor x, Tensor[] extra, str spec, str target) -> (Tensor codes, Tensor amax)``
    What `quantize` becomes after autograd: the kernel of one target.
``launch_rows(Tensor[] operands, Tensor[] limit, str spec, str target) -> Tensor[]``
    What `quantize` becomes with what makes its activation (`fxquant.passes.fuse.prologue`): codes,
    amax and the prologue's further results.
``dequantize(Tensor[] weight, str encoding, int[] shape, ScalarType dtype) -> Tensor``
    The stored tensor in full.
``table(float[] values, int[] shape, Device device) -> Tensor``
    A float32 constant, such as a codebook. Inductor takes no constants inside the bodies of
    higher-order ops (``cond``); an op that yields one is fine everywhere.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fxquant import errors
from fxquant.codegen import reference
from fxquant.codegen.epilogue import EpilogueOperand
from fxquant.codegen.groups import grouped_product
from fxquant.codegen.spec import KernelSpec
from fxquant.formats import Encoding, decode
from fxquant.formats.codes import stored
from fxquant.runtime import launch

_LIBRARY = torch.library.Library("fxquant", "DEF")
_LIBRARY.define(
    "linear(Tensor x, Tensor[] weight, Tensor[] extra, str spec, int site) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_LIBRARY.define(
    "launch(Tensor x, Tensor[] weight, Tensor[] extra, str spec, str target) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_LIBRARY.define(
    "launch_several(Tensor x, Tensor[] weight, Tensor[] extra, str spec, str target) -> Tensor[]",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_LIBRARY.define(
    "quantize(Tensor x, Tensor[] extra, str spec) -> (Tensor codes, Tensor amax)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_LIBRARY.define(
    "launch_quantize(Tensor x, Tensor[] extra, str spec, str target) "
    "-> (Tensor codes, Tensor amax)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_LIBRARY.define(
    "launch_rows(Tensor[] operands, Tensor[] limit, str spec, str target) -> Tensor[]",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_LIBRARY.define(
    "dequantize(Tensor[] weight, str encoding, int[] shape, ScalarType dtype) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_LIBRARY.define(
    "table(float[] values, int[] shape, Device device) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


@functools.lru_cache(maxsize=1024)
def parse_encoding(text: str) -> Encoding:
    """The encoding behind an op's argument."""
    return Encoding.from_text(text)


def _linear(
    x: Tensor,
    weight: list[Tensor],
    extra: list[Tensor],
    spec: str,
    site: int,  # noqa: ARG001
) -> Any:
    return launch.run(x, weight, extra, spec)


def _linear_fake(
    x: Tensor,
    weight: list[Tensor],  # noqa: ARG001
    extra: list[Tensor],  # noqa: ARG001
    spec: str,
    site: int,  # noqa: ARG001
) -> Tensor:
    parsed = launch.parse_spec(spec)
    return x.new_empty((*x.shape[:-1], parsed.weight.n), dtype=getattr(torch, parsed.out_dtype))


def _launch_fake(
    x: Tensor,
    weight: list[Tensor],
    extra: list[Tensor],
    spec: str,
    target: str,  # noqa: ARG001
) -> Tensor:
    return _linear_fake(x, weight, extra, spec, -1)


def _launch_several_fake(
    x: Tensor,
    weight: list[Tensor],  # noqa: ARG001
    extra: list[Tensor],  # noqa: ARG001
    spec: str,
    target: str,  # noqa: ARG001
) -> list[Tensor]:
    parsed = launch.parse_spec(spec)
    shape = (*x.shape[:-1], parsed.weight.n)
    dtypes = [parsed.out_dtype, *(result.dtype for result in parsed.epilogue.more)]
    return [x.new_empty(shape, dtype=getattr(torch, dtype)) for dtype in dtypes]


def _quantize_fake(
    x: Tensor,
    extra: list[Tensor],  # noqa: ARG001
    spec: str,  # noqa: ARG001
    target: str = "",  # noqa: ARG001
) -> tuple[Tensor, Tensor]:
    codes = x.new_empty(x.shape, dtype=torch.int8)
    return codes, x.new_empty(x.shape[:-1], dtype=torch.float32)


def _rows_fake(
    operands: list[Tensor],
    limit: list[Tensor],  # noqa: ARG001
    spec: str,
    target: str,  # noqa: ARG001
) -> list[Tensor]:
    prologue = launch.parse_quantize(spec).prologue
    assert prologue is not None, "a spec without one is for launch_quantize"
    x = operands[[operand.dims for operand in prologue.operands].index("mk")]
    more = [x.new_empty(x.shape, dtype=getattr(torch, r.dtype)) for r in prologue.more]
    return [
        x.new_empty(x.shape, dtype=torch.int8),
        x.new_empty(x.shape[:-1], dtype=torch.float32),
        *more,
    ]


def _quantize_backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:  # noqa: ARG001
    raise errors.no_gradient_of_codes()


def _dequantize(
    weight: list[Tensor], encoding: str, shape: list[int], dtype: torch.dtype
) -> Tensor:
    return decode(stored(weight), parse_encoding(encoding), tuple(shape), dtype)


def _table(values: list[float], shape: list[int], device: torch.device) -> Tensor:
    # A copy: an op's result must not alias between calls.
    return _cached_table(tuple(values), tuple(shape), device).clone()


@functools.lru_cache(maxsize=256)
def _cached_table(
    values: tuple[float, ...], shape: tuple[int, ...], device: torch.device
) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=device).view(shape)


def _table_fake(values: list[float], shape: list[int], device: torch.device) -> Tensor:  # noqa: ARG001
    return torch.empty(shape, dtype=torch.float32, device=device)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
    _, weight, extra, spec, _ = inputs
    ctx.save_for_backward(*weight, *extra[len(launch.parse_spec(spec).epilogue.operands) :])
    ctx.spec = spec
    ctx.extra_meta = [(t.shape, t.dtype) for t in extra]


def _sum_to_operand(grad: Tensor, operand: EpilogueOperand, axes: str) -> Tensor:
    """Sums `grad` (axes named by `axes`) over the axes that an added operand does not have."""
    drop = [i for i, axis in enumerate(axes) if axis not in operand.dims]
    return grad.sum(drop) if drop else grad


def _decoded(spec: KernelSpec, saved: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """The weight in full, with static outliers in their columns."""
    count = len(spec.weight.encoding.parts)
    dense = reference.operand(spec.weight, saved[:count], dtype)
    if spec.outliers is None or spec.outliers.columns is None:
        return dense
    columns, apart = saved[count : count + 2]
    return dense.index_copy(-1, columns.long(), apart.to(dtype))


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    """Gradients of the product and of an added bias.

    Before autograd an epilogue is empty or adds a bias: other pointwise work is fused afterwards.
    The gradient of x is a fallback on every target: the weight is decoded in full, then multiplied.
    Rounding x to int8 is passed straight through (Bengio et al., 2013, arXiv:1308.3432): its
    gradient is that of the product with the decoded weight, in the dtype of x. The weight of
    static outliers is a constant, like codes and scales.
    """
    spec = launch.parse_spec(ctx.spec)
    needs_x, needs_extra = ctx.needs_input_grad[0], ctx.needs_input_grad[2]
    grad_x = None
    if needs_x:
        rounds = spec.compute_dtype == "int8"
        compute = getattr(torch, spec.x_dtype if rounds else spec.compute_dtype)
        dense = _decoded(spec, ctx.saved_tensors, compute)
        if spec.grouped:
            grad_x = grouped_product(grad.to(compute), dense, ctx.saved_tensors[-1])
        else:
            grad_x = torch.matmul(grad.to(compute), dense)
        grad_x = grad_x.to(getattr(torch, spec.x_dtype))
    axes = "emn" if spec.batch is not None else "mn"
    rows = grad if spec.batch is not None else grad.reshape(-1, spec.weight.n)
    wanted = (
        needs_extra
        if isinstance(needs_extra, (list, tuple))
        else [needs_extra] * len(ctx.extra_meta)
    )
    grad_extra: list[Tensor | None] = [None] * len(ctx.extra_meta)
    for number, operand in enumerate(spec.epilogue.operands):
        if wanted[number]:
            shape, dtype = ctx.extra_meta[number]
            summed = _sum_to_operand(rows, operand, axes)
            grad_extra[number] = summed.to(dtype).reshape(shape)
    return grad_x, [None] * len(spec.weight.encoding.parts), grad_extra, None, None


_LIBRARY.impl("linear", _linear, "CompositeExplicitAutograd")
_LIBRARY.impl("launch", launch.run, "CompositeExplicitAutograd")
_LIBRARY.impl("launch", torch.library.fallthrough_kernel, "Autograd")
_LIBRARY.impl("launch_several", launch.run_several, "CompositeExplicitAutograd")
_LIBRARY.impl("launch_several", torch.library.fallthrough_kernel, "Autograd")
_LIBRARY.impl("quantize", launch.run_quantize, "CompositeExplicitAutograd")
_LIBRARY.impl("launch_quantize", launch.run_quantize, "CompositeExplicitAutograd")
_LIBRARY.impl("launch_quantize", torch.library.fallthrough_kernel, "Autograd")
_LIBRARY.impl("launch_rows", launch.run_rows, "CompositeExplicitAutograd")
_LIBRARY.impl("launch_rows", torch.library.fallthrough_kernel, "Autograd")
_LIBRARY.impl("dequantize", _dequantize, "CompositeExplicitAutograd")
_LIBRARY.impl("table", _table, "CompositeExplicitAutograd")
torch.library.register_fake("fxquant::linear", _linear_fake, lib=_LIBRARY)
torch.library.register_fake("fxquant::launch", _launch_fake, lib=_LIBRARY)
torch.library.register_fake("fxquant::launch_several", _launch_several_fake, lib=_LIBRARY)
torch.library.register_fake("fxquant::quantize", _quantize_fake, lib=_LIBRARY)
torch.library.register_fake("fxquant::launch_quantize", _quantize_fake, lib=_LIBRARY)
torch.library.register_fake("fxquant::launch_rows", _rows_fake, lib=_LIBRARY)
torch.library.register_fake("fxquant::table", _table_fake, lib=_LIBRARY)
torch.library.register_autograd(
    "fxquant::linear", _backward, setup_context=_setup_context, lib=_LIBRARY
)
torch.library.register_autograd("fxquant::quantize", _quantize_backward, lib=_LIBRARY)


@functools.partial(torch.library.register_fake, "fxquant::dequantize", lib=_LIBRARY)
def _dequantize_fake(
    weight: list[Tensor],
    encoding: str,  # noqa: ARG001
    shape: list[int],
    dtype: torch.dtype,
) -> Tensor:
    return weight[0].new_empty(shape, dtype=dtype)
