"""A spec executed with torch: its definition, and the oracle of every test.

`source` prints a spec as torch code and `run` executes exactly that text, so a dump shows what
ran. The code is plain functional torch: it traces with `make_fx` under fake tensors with a
symbolic number of rows, and Inductor fuses decode and epilogue.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fxquant.codegen.epilogue import FLOAT_DTYPES, OPERAND_DTYPES, EpilogueNode
from fxquant.codegen.header import Header
from fxquant.codegen.pointwise import boxed
from fxquant.codegen.spec import KernelSpec, WeightOperand
from fxquant.formats import decode

Step = tuple[str, tuple[Any, ...]]


def run(
    spec: KernelSpec, x: Tensor, weight: Sequence[Tensor], extra: Sequence[Tensor]
) -> Tensor | tuple[Tensor, ...]:
    """Computes one product.

    Args:
        spec: The product.
        x: Activation ``[.., k]``, or ``[batch, m, k]`` with a batch; `spec.x_dtype`.
        weight: The stored tensors, in the order of ``spec.weight.encoding.parts``, of one weight
            after the other.
        extra: The epilogue's operands, those of static outliers or of a quantized x, and the ends
            of groups.

    Returns:
        ``[.., n]``, or ``[batch, m, n]``, in `spec.out_dtype`; a tuple with `spec.epilogue.more`.
    """
    return _compiled(spec)(x, weight, extra)


def operand(weight: WeightOperand, tensors: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """The logical weight ``[n, k]`` (``[batch, n, k]`` with a batch) in `dtype`."""
    out = decode(tensors, weight.encoding, weight.shape, dtype)
    for method, args in view_steps(weight):
        out = getattr(out, method)(*args)
    return out


def source(spec: KernelSpec) -> str:
    """The torch code of a spec, as an importable module."""
    return render(spec, Header())


def render(spec: KernelSpec, header: Header) -> str:
    """The torch code that `run` executes, with what the header says on top."""
    stored = spec.weight
    batched = spec.batch is not None
    lines = ["rows = x"]
    if not batched:
        lines = [f"rows = x.reshape(math.prod(x.shape[:-1]), {stored.k})"]
    if spec.compute_dtype == "int8":
        lines += [*_int8_lines(spec), *_epilogue_lines(spec)]
    else:
        lines += _float_lines(spec)
    results = ["out", *(f"out{number}" for number in range(1, 1 + len(spec.epilogue.more)))]
    if not batched:
        results = [f"{name}.reshape(*x.shape[:-1], {stored.n})" for name in results]
    lines.append(f"return {', '.join(results)}")
    used = [name for name in ("decode", "decode_int8") if any(f"{name}(" in t for t in lines)]
    head = [
        *header.comment(spec).splitlines(),
        "",
        *([] if batched else ["import math", ""]),
        "import torch",
        "",
        *(["from fxquant.codegen.groups import grouped_product"] if spec.grouped else []),
        f"from fxquant.formats import {', '.join(['Encoding', *used])}",
        "",
        f"ENCODING = Encoding.from_json({stored.encoding.to_json()!r})",
        f"SHAPE = {stored.shape}",
        "",
        "",
        "def run(x, weight, extra):",
    ]
    return "\n".join([*head, *(f"    {line}" for line in lines)]) + "\n"


def view_steps(operand: WeightOperand) -> tuple[Step, ...]:
    """Tensor methods that take the stored tensor to ``[n, k]`` or ``[batch, n, k]``.

    A reshape, slices and a permutation where the strides nest (every stride divides the next
    larger one, and no row of the slice runs over the end of its dimension); `as_strided` else.
    """
    sizes, strides = operand.sizes, operand.strides
    axes = [axis for axis in range(3) if sizes[axis] > 1]
    axes.sort(key=lambda axis: -strides[axis])
    radix = [*(strides[axis] for axis in axes), 1]
    nested = all(s > 0 and big % s == 0 for big, s in itertools.pairwise([operand.numel, *radix]))
    if not nested:
        return _strided(operand)

    shape = [big // small for big, small in itertools.pairwise([operand.numel, *radix])]
    lengths = [*(sizes[axis] for axis in axes), 1]
    rest, starts = operand.offset, []
    for stride in radix:
        starts.append(rest // stride)
        rest %= stride
    if any(a + b > c for a, b, c in zip(starts, lengths, shape, strict=True)):
        return _strided(operand)

    steps: list[Step] = [("reshape", tuple(shape))]
    for dim, (start, length, size) in enumerate(zip(starts, lengths, shape, strict=True)):
        if length != size:
            steps.append(("narrow", (dim, start, length)))
    order = [axes.index(axis) for axis in range(3) if axis in axes]
    if order != sorted(order):
        steps.append(("permute", (*order, len(axes))))
    steps.append(("reshape", _logical_shape(operand)))
    return _tidy(operand, steps)


def _tidy(operand: WeightOperand, steps: list[Step]) -> tuple[Step, ...]:
    """Drops what does nothing, and says a plain transpose as one."""
    logical = _logical_shape(operand)
    if [method for method, _ in steps] == ["reshape", "reshape"]:
        return () if operand.shape == logical else (("reshape", logical),)
    swapped = (*logical[:-2], logical[-1], logical[-2])
    moved = (0, 2, 1, 3) if operand.batch else (1, 0, 2)
    if [method for method, _ in steps] == ["reshape", "permute", "reshape"] and (
        steps[1][1] == moved and operand.shape == swapped
    ):
        return (("transpose", (-2, -1)),)
    return tuple(steps)


def _strided(operand: WeightOperand) -> tuple[Step, ...]:
    strides = operand.strides if operand.batch else operand.strides[1:]
    return (("as_strided", (_logical_shape(operand), strides, operand.offset)),)


def _logical_shape(operand: WeightOperand) -> tuple[int, ...]:
    return operand.sizes if operand.batch else operand.sizes[1:]


def _float_lines(spec: KernelSpec) -> list[str]:
    dtype = spec.compute_dtype
    lines = _decoded(spec, "decode", f", torch.{dtype}")
    if spec.x_dtype != dtype:
        lines.append(f"rows = rows.to(torch.{dtype})")
    return lines + (_fused_lines(spec) or _exact_lines(spec))


def _fused_lines(spec: KernelSpec) -> list[str]:
    """The product and at most a bias in one call of torch, where that is the same sum.

    Torch sums products of 16-bit floats in float32 and rounds once, so the float32 detour of
    `_exact_lines` is spared.
    """
    nodes, operands = spec.epilogue.nodes, spec.epilogue.operands
    dtype = spec.compute_dtype
    if spec.out_dtype != dtype or spec.weights > 1 or spec.epilogue.more:
        return []
    batched = spec.weight.batch is not None
    turned = f"w.{_turned(spec)}"
    if not nodes:
        return [f"out = {_product(spec, 'rows', 'w')}"]
    is_bias = nodes == (EpilogueNode("aten.add.Tensor", ("%acc", "%in0")),)
    if not is_bias or operands[0].dtype != dtype or operands[0].dims not in ("n", "en"):
        return []
    if spec.grouped:
        return []
    if batched:
        sizes = [spec.weight.batch if "e" in operands[0].dims else 1, 1, spec.weight.n]
        return [f"out = torch.baddbmm(extra[0].reshape({sizes}), rows, {turned})"]
    return [f"out = torch.addmm(extra[0].reshape({spec.weight.n}), rows, {turned})"]


def _exact_lines(spec: KernelSpec) -> list[str]:
    lift = "" if spec.compute_dtype == "float32" else ".float()"
    products = [
        f"acc{mark} = {_product(spec, f'rows{lift}', f'w{mark}{lift}')}" for mark in _marks(spec)
    ]
    return [*products, *_epilogue_lines(spec)]


def _int8_lines(spec: KernelSpec) -> list[str]:
    """The sums of an int8 product.

    In float64, where sums of integers times a float32 scale are as good as exact at any size (of
    float32 that is true up to 1040 inputs) and NaN goes through by itself; torch's int8 product
    is not on every device and takes no scales inside of a row. Inductor leaves out the rounding of
    outliers to 16 bits, which is undone at once, and so keeps more of them.
    """
    weight, outliers = spec.weight, spec.outliers
    operands = len(spec.epilogue.operands)
    if spec.is_quantized:
        return [
            f"amax = extra[{operands}].reshape(*rows.shape[:-1], 1)",
            *_decoded(spec, "decode_int8"),
            *_int8_products(spec, "rows"),
        ]
    lines, inner = ["rows = rows.float()"], "rows"
    if outliers is not None:
        inner = "inner"
        if outliers.columns is None:
            lines.append(f"outlier = (rows.abs() >= {outliers.threshold}).any(-2, keepdim=True)")
        else:
            lines += [
                f"columns = extra[{operands}]",
                f"outlier = torch.zeros({weight.k}, dtype=torch.bool, device=x.device)",
                "outlier = outlier.index_fill(0, columns.long(), True)",
            ]
        lines.append("inner = torch.where(outlier, 0.0, rows)")
    lines += [
        f"amax = {inner}.abs().amax(-1, keepdim=True).clamp_min(2.0**-100)",
        # A number over a tensor would be torch's reciprocal and a product: two roundings.
        f"q = torch.round({inner} * (torch.full_like(amax, 127.0) / amax))",
        *_decoded(spec, "decode_int8"),
        *_int8_products(spec, "q"),
    ]
    if outliers is None:
        return lines
    dtype = f"torch.{outliers.dtype}"
    if outliers.columns is None:
        lines += [
            "rows = torch.where(outlier, rows, 0.0)",
            *_decoded(spec, "decode", f", {dtype}"),
            *(f"apart{mark} = torch.where(outlier, w{mark}, 0.0)" for mark in _marks(spec)),
        ]
    else:
        lines.append("rows = rows.index_select(-1, columns)")
        first = operands + 1
        lines += [f"apart{mark} = extra[{first + i}]" for i, mark in enumerate(_marks(spec))]
    for mark in _marks(spec):
        product = _product(spec, f"rows.to({dtype}).float()", f"apart{mark}.float()")
        lines.append(f"acc{mark} = acc{mark} + {product}")
    return lines


def _marks(spec: KernelSpec) -> list[str]:
    """What tells the names of several weights and their sums apart."""
    return [str(number) if number else "" for number in range(spec.weights)]


def _int8_products(spec: KernelSpec, codes: str) -> list[str]:
    lines = []
    for mark in _marks(spec):
        product = _product(spec, f"{codes}.double()", f"w{mark}")
        lines.append(f"acc{mark} = (({product}) * (amax / 127.0)).float()")
    return lines


def _decoded(spec: KernelSpec, function: str, dtype: str = "") -> list[str]:
    """Each weight, decoded and viewed as ``[n, k]``."""
    steps = "".join(
        f".{method}({', '.join(map(str, args))})" for method, args in view_steps(spec.weight)
    )
    parts = len(spec.weight.encoding.parts)
    lines = []
    for number, mark in enumerate(_marks(spec)):
        stored = (
            f"weight[{number * parts}:{(number + 1) * parts}]" if spec.weights > 1 else "weight"
        )
        lines.append(f"w{mark} = {function}({stored}, ENCODING, SHAPE{dtype}){steps}")
    return lines


def _product(spec: KernelSpec, rows: str, weight: str) -> str:
    if spec.grouped:
        return f"grouped_product({rows}, {weight}.{_turned(spec)}, extra[-1])"
    return f"{rows} @ {weight}.{_turned(spec)}"


def _turned(spec: KernelSpec) -> str:
    return "t()" if spec.weight.batch is None else "transpose(1, 2)"


def _epilogue_lines(spec: KernelSpec) -> list[str]:
    batched = spec.batch is not None
    lines = []
    names = {f"%acc{mark}": f"acc{mark}" for mark in _marks(spec)}
    sizes = {
        "e": str(spec.weight.batch),
        "m": "rows.shape[-2]",
        "n": str(spec.weight.n),
    }
    for number, operand in enumerate(spec.epilogue.operands):
        axes = "emn" if batched else "mn"
        shape = ", ".join(sizes[axis] if axis in operand.dims else "1" for axis in axes)
        to_float = ".float()" if operand.dtype in ("float16", "bfloat16") else ""
        lines.append(f"in{number} = extra[{number}].reshape({shape}){to_float}")
        names[f"%in{number}"] = f"in{number}"
    for number, node in enumerate(spec.epilogue.nodes):
        lines.append(f"v{number} = {call_text(node, names)}")
        names[f"%{number}"] = f"v{number}"
    lines.append(f"out = {names[spec.epilogue.result]}.to(torch.{spec.out_dtype})")
    for number, result in enumerate(spec.epilogue.more, start=1):
        lines.append(f"out{number} = {names[result.value]}.to(torch.{result.dtype})")
    return lines


def call_text(node: EpilogueNode, names: Mapping[str, str]) -> str:
    """The torch code of a pointwise node, of which `names` says what its references are called."""
    tensors = boxed(node.op)
    args = [_argument(value, names, i in tensors) for i, value in enumerate(node.args)]
    args += [f"{key}={_argument(value, names, key in tensors)}" for key, value in node.kwargs]
    to_float = ".float()" if _rounds(node) else ""
    return f"torch.ops.{node.op}({', '.join(args)}){to_float}"


def _rounds(node: EpilogueNode) -> bool:
    """Whether a node is a cast to 16 bits: it rounds, and the work goes on in float32."""
    return any(value in FLOAT_DTYPES[:2] for value in node.values if isinstance(value, str))


def _argument(value: Any, names: Mapping[str, str], is_tensor: bool) -> str:
    if is_tensor and isinstance(value, float):
        return f"torch.full((), {_argument(value, names, False)}, dtype=torch.float32)"
    if isinstance(value, str):
        if value in OPERAND_DTYPES:
            return f"torch.{value}"
        return names.get(value, repr(value))
    if isinstance(value, float) and not math.isfinite(value):
        return f'float("{value}")'
    return repr(value)


@functools.lru_cache(maxsize=4096)
def _compiled(spec: KernelSpec) -> Callable[..., Tensor]:
    namespace: dict[str, Any] = {}
    code = compile(source(spec), f"<fxquant reference {spec.name}>", "exec")
    exec(code, namespace)  # noqa: S102 - text that `source` just printed
    return namespace["run"]
