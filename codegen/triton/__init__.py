"""The Triton target: for one spec a Python module with its kernels and a launcher.

`tiles` chooses the variants, `decode` prints how codes become numbers (`words` eight at a time, and
the products that take them so, `scaled` those of many rows, `pairs` of few), `kernels` the
skeletons and the epilogue, `launch` the function ``run``, `ops` spells pointwise work. Of products
in int8, `int8_decode` and `int8` print the same, `outliers` what is left to floats (`columns` the
weight there), `quantize` the kernels that take rows to int8, `steps` their launches, and `prologue`
the one that makes the rows, too. Printing needs no Triton.
"""

from __future__ import annotations

from fxquant.codegen.header import Header
from fxquant.codegen.indexing import WeightIndex
from fxquant.codegen.quantize import QuantizeSpec
from fxquant.codegen.spec import KernelSpec
from fxquant.codegen.triton import (
    columns,
    decode,
    dequantize,
    int8,
    kernels,
    launch,
    outliers,
    pairs,
    prologue,
    quantize,
    scaled,
    steps,
    words,
)
from fxquant.codegen.triton.gpu import ANY, Gpu
from fxquant.codegen.triton.int8_decode import Int8Decode
from fxquant.codegen.triton.plan import Plan, plan_for
from fxquant.codegen.triton.printer import Lines

_IMPORTS = ("import torch", "import triton", "import triton.language as tl")


def render(spec: KernelSpec | QuantizeSpec, header: Header, gpu: Gpu = ANY) -> str:
    """The kernels of a spec, as an importable Python module.

    `gpu` is what they are for: its tiles and its vendor's assembly. Those for `ANY` run anywhere,
    also in Triton's interpreter.

    That of a product has ``run(x, weight, extra, out=None)``, to which outliers that are found at
    run time add ``counter=None`` (int64 ``[2]`` on the device: calls and columns, counted up; of
    several weights ``counters=None``, one for each), and ``prepare(device)`` when levels are read
    from a table. That of a `QuantizeSpec` has ``run(x, extra)``, with a prologue ``run(operands,
    extra)``, to which a limit adds ``counter=None`` (int64 ``[1]``: what was beyond it).
    For `fxquant.runtime.cubin` there are ``TYPES``, ``VARIANTS``, ``REDUCTIONS`` and ``STEPS``.

    Raises:
        KernelError: The epilogue holds an op that the target cannot spell.
    """
    out = Lines()
    out.add(*header.comment(spec).splitlines(), "")
    if isinstance(spec, QuantizeSpec):
        _print_quantize(out, spec)
        return out.text()
    index = WeightIndex.of(spec.weight)
    variants = plan_for(spec, index, gpu)
    if launch.tables(spec, variants):
        out.add("import functools")
    out.add(*(["import math", ""] if spec.batch is None else [""]), *_IMPORTS)
    if spec.compute_dtype == "int8":
        _print_int8(out, spec, index, variants)
    elif variants.form.words:
        _print_words(out, spec, index, variants)
    else:
        decode.print_constants(out, decode.tables(spec.weight.encoding).values())
        whole = None
        if variants.form.scaling == "output":
            whole = Int8Decode(out, spec.weight, index, variants, "int8")
            whole.print()
        else:
            decode.print_decode(out, spec.weight, index, variants, spec.compute_dtype)
        kernels.print_finish(out, spec, variants)
        kernels.print_gemv(out, spec, variants, whole)
        kernels.print_gemm(out, spec, variants, whole)
    if variants.decodes:
        dequantize.print_kernel(out, spec, index, variants)
    if variants.splits:
        kernels.print_reduce(out, spec)
    launch.print_types(out, spec, variants)
    launch.print_variants(out, spec, variants)
    launch.print_reductions(out, spec, variants)
    if spec.compute_dtype == "int8" and not spec.is_quantized:
        steps.print_steps(out, steps.rows_of(spec), columns.steps(spec, variants))
        steps.print_quantize(out, steps.rows_of(spec))
        columns.print_run(out, spec)
    launch.print_run(out, spec, variants)
    return out.text()


def _print_quantize(out: Lines, spec: QuantizeSpec) -> None:
    if spec.prologue is not None:
        out.add("import math", "", *_IMPORTS)
        prologue.print_rows(out, spec, spec.prologue)
        return
    rows = quantize.Rows(spec.name, spec.k, scope=spec.scope, clipped=spec.clipped)
    body = Lines()
    quantize.print_kernels(body, rows)
    out.add("import math", "", *_IMPORTS)
    kernels.print_combine(out, body)
    out.add(*body.lines())
    parts = ["parts"] if spec.scope == "tensor" else []
    types = {"x": spec.x_dtype, **{name: steps.TYPES[name] for name in rows.pointers[1:]}}
    launch.print_type_table(out, types, ["rows", *parts, *rows.strides])
    steps.print_steps(out, rows)
    steps.print_quantize(out, rows)
    steps.print_run(out, rows)


def _print_words(out: Lines, spec: KernelSpec, index: WeightIndex, variants: Plan) -> None:
    decode.print_constants(out, decode.tables(spec.weight.encoding).values())
    words.print_constants(out, spec, variants)
    if variants.has("gemv"):
        pairs.print_constants(out, spec)
    kernels.print_finish(out, spec, variants)
    words.print_gemm(out, spec, index, variants)
    if variants.has("scaled"):
        scaled.print_gemm(out, spec, index, variants)
    if variants.has("gemv"):
        pairs.print_gemv(out, spec, index, variants)


def _print_int8(out: Lines, spec: KernelSpec, index: WeightIndex, variants: Plan) -> None:
    decode.print_constants(out, int8.tables(spec))
    body = Lines()
    if not spec.is_quantized:
        outliers.print_find(body, spec)
        quantize.print_kernels(body, steps.rows_of(spec))
    kernels.print_finish(body, spec, variants)
    int8.print_gemm(body, spec, index, variants)
    kernels.print_combine(out, body)
    out.add(*body.lines())
