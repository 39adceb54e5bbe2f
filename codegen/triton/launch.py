"""Prints ``run`` of a product: picks a variant by the number of rows, allocates and launches."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from fxquant.codegen.spec import KernelSpec
from fxquant.codegen.triton import columns, decode, dequantize, int8, outliers, steps, words
from fxquant.codegen.triton.kernels import (
    REDUCE_BLOCK,
    ends,
    marks,
    operand_names,
    parameters,
    print_reduce_call,
    result_names,
)
from fxquant.codegen.triton.plan import Plan
from fxquant.codegen.triton.printer import Lines, wrap_items
from fxquant.codegen.triton.tiles import CHUNKED

_POINTERS = {
    "float16": "*fp16",
    "bfloat16": "*bf16",
    "float32": "*fp32",
    "uint8": "*u8",
    "int8": "*i8",
    "int32": "*i32",
    "int64": "*i64",
    "bool": "*i1",
}


def tables(spec: KernelSpec, plan: Plan) -> dict[str, str]:
    """The tables that lie on the device, and their dtypes."""
    found = [*decode.tables(spec.weight.encoding), *(t.name for t in outliers.tables(spec))]
    return {**dict.fromkeys(found, "float32"), **words.tables(plan)}


def print_types(out: Lines, spec: KernelSpec, plan: Plan) -> None:
    """``TYPES``: what the arguments are, for compiling on a machine without the device."""
    encoding = spec.weight.encoding
    signed = encoding.is_uniform and encoding.bits == 8 and not encoding.zero_point
    types = {} if spec.is_quantized else {"x": spec.x_dtype}
    types |= dict(zip(result_names(spec), _result_dtypes(spec), strict=True))
    types["partial"] = "float32"
    parts = {
        "codes": "int8" if signed else "uint8",
        "scales": "float32" if encoding.scale is None else "uint8",
        "nested": "float32",
        "offset": "float32",
        "zeros": "uint8",
    }
    types |= {part + mark: parts[part] for mark in marks(spec) for part in encoding.parts}
    types |= tables(spec, plan)
    types |= dict(zip(operand_names(spec), (o.dtype for o in spec.epilogue.operands), strict=True))
    if spec.compute_dtype == "int8":
        types |= _int8_types(spec)
    types |= dict.fromkeys(ends(spec), "int32")
    scalars = ["x_stride_e", "x_stride_m"] if spec.batch else ["x_stride_m"]
    scalars = ["rows", *([] if spec.is_quantized else scalars)]
    if plan.decodes:
        types["dense"] = spec.compute_dtype
        scalars.append("first")
    print_type_table(out, types, scalars)


def _result_dtypes(spec: KernelSpec) -> list[str]:
    return [spec.out_dtype, *(result.dtype for result in spec.epilogue.more)]


def _int8_types(spec: KernelSpec) -> dict[str, str]:
    taken = {*int8.parameters(spec)}
    if not spec.is_quantized:
        taken |= {*steps.rows_of(spec).pointers}
    types = {name: dtype for name, dtype in steps.TYPES.items() if name in taken}
    types |= dict.fromkeys(outliers.counters(spec), steps.TYPES["counter"])
    if spec.outliers is not None:
        apart = [*outliers.aparts(spec), *columns.dense(spec)]
        types |= dict.fromkeys(apart, spec.outliers.dtype)
    return types


def print_type_table(out: Lines, types: Mapping[str, str], scalars: Iterable[str]) -> None:
    """``TYPES``, of pointers and of integers."""
    entries = [f'"{name}": "{_POINTERS[dtype]}"' for name, dtype in types.items()]
    entries += [f'"{name}": "i32"' for name in scalars]
    out.add("", "", "# What the kernels take; everything in capitals is a constant.")
    out.add("TYPES = {", *wrap_items(entries, 4), "}")


def print_variants(out: Lines, spec: KernelSpec, plan: Plan) -> None:
    """``VARIANTS``: the kernel and its constants, by the most rows that it is picked for."""
    out.add("", "# Most rows -> kernel, constants, launch options; the last serves all above too.")
    out.add("VARIANTS = {")
    for most, tile in plan.best.items():
        constants, options = (
            ", ".join(f'"{name}": {size}' for name, size in found.items())
            for found in (tile.constants(), tile.options())
        )
        out.add(
            f"    {most}: (",
            f"        {spec.name}_{tile.kernel},",
            f"        {{{constants}}},",
            f"        {{{options}}},",
            "    ),",
        )
    out.add("}")


def print_reductions(out: Lines, spec: KernelSpec, plan: Plan) -> None:
    """``REDUCTIONS``: the constants of the kernels that add the shares of a split."""
    if plan.splits:
        out.add(
            "",
            "# Shares -> the kernel that adds them.",
            "REDUCTIONS = {",
            "    split: (",
            f"        {spec.name}_reduce,",
            f'        {{"BLOCK_N": {REDUCE_BLOCK}, "SPLIT": split}},',
            '        {"num_warps": 4},',
            "    )",
            f"    for split in {plan.splits}",
            "}",
        )


def print_run(out: Lines, spec: KernelSpec, plan: Plan) -> None:
    """``prepare`` (tables of levels on a device) and ``run``."""
    found = tables(spec, plan)
    if found:
        _print_prepare(out, found)
    counters = outliers.counters(spec)
    counter = f", {'counter' if len(counters) == 1 else 'counters'}=None" if counters else ""
    given = "" if spec.epilogue.more else ", out=None"
    what = "products" if spec.weights > 1 else "product"
    if plan.decodes:
        dequantize.print_run(out, spec)
    out.add("", "")
    with out.block(f"def run(x, weight, extra{given}{counter}):"):
        out.add(f'"""The {what}: x [.., k] to [.., n] ([e, m, k] to [e, m, n] with a batch)."""')
        if len(counters) > 1:
            out.add(f"{', '.join(counters)} = counters or [None] * {len(counters)}")
        _print_views(out, spec)
        _print_arguments(out, spec, list(found))
        _print_launch(out, spec, plan)
        out.add(f"return {_results(spec)}")


def _results(spec: KernelSpec) -> str:
    """What ``run`` gives: a tensor, or a list of them."""
    names = ", ".join(result_names(spec))
    return f"[{names}]" if spec.epilogue.more else names


def _print_prepare(out: Lines, tables: Mapping[str, str]) -> None:
    made = [
        f"torch.tensor({name.upper()}, dtype=torch.{dtype}, device=device)"
        for name, dtype in tables.items()
    ]
    out.add("", "", "@functools.cache")
    with out.block("def prepare(device):"):
        out.add(
            '"""The tables of levels on a device: make them before a CUDA graph is captured."""',
            "return [",
            *(f"    {line}," for line in made),
            "]",
        )


def _print_views(out: Lines, spec: KernelSpec) -> None:
    """The activation as rows whose inputs are contiguous, and a contiguous result."""
    weight = spec.weight
    out.add(f"shape = (*x.shape[:-1], {weight.n})")
    made = [
        f"{name} = torch.empty(shape, dtype=torch.{dtype}, device=x.device)"
        for name, dtype in zip(result_names(spec), _result_dtypes(spec), strict=True)
    ]
    if spec.epilogue.more:
        out.add(*made)
    else:
        with out.block("if out is None:"):
            out.add(*made)
        with out.block("if not out.is_contiguous():"):
            counter = ", None, counter" if outliers.kind(spec) == "found" else ""
            out.add(f"return out.copy_(run(x, weight, extra{counter}))")
    if spec.batch is None:
        out.add(f"x = x.reshape(math.prod(x.shape[:-1]), {weight.k})")
    if spec.is_quantized:
        out.add("q = x.contiguous()")
    else:
        with out.block("if x.stride(-1) != 1:"):
            out.add("x = x.contiguous()")
    out.add("rows = x.shape[-2]")
    with out.block("if rows == 0:"):
        out.add(f"return {_results(spec)}")


def _print_arguments(out: Lines, spec: KernelSpec, tables: list[str]) -> None:
    parts = [part + mark for mark in marks(spec) for part in spec.weight.encoding.parts]
    line = f"{', '.join(parts)} = weight"
    if len(line) <= 90:
        out.add(line)
    else:
        out.add("(", *wrap_items(parts, 4, 92), ") = weight")
    if tables:
        out.add(f"{', '.join(tables)}{',' if len(tables) == 1 else ''} = prepare(x.device)")
    names = operand_names(spec)
    if spec.is_quantized:
        names.append("amax")
    elif outliers.kind(spec) == "given":
        names += ["columns", *outliers.aparts(spec)]
    names += ends(spec)
    for number, name in enumerate(names):
        out.add(f"{name} = extra[{number}].contiguous()")


def _parameters(spec: KernelSpec, plan: Plan) -> list[str]:
    if spec.compute_dtype == "int8":
        return int8.parameters(spec)
    return words.product_parameters(spec, plan) if plan.form.words else parameters(spec)


def _print_launch(out: Lines, spec: KernelSpec, plan: Plan) -> None:
    weight, splits = spec.weight, any(split > 1 for split in plan.splits)
    batch = spec.batch or 1
    # Those that a matrix has on average, if rows are grouped.
    each = f"-(-rows // {weight.batch})" if spec.grouped else "rows"
    sizes = [f"{size}, " for size in (spec.weights, batch) if size > 1]
    out.add(
        "",
        f"most = next((most for most in VARIANTS if {each} <= most), max(VARIANTS))",
        "kernel, tile, options = VARIANTS[most]",
    )
    if plan.decodes:
        with out.block(f'if "{CHUNKED}" in tile:'):
            with out.block("with torch.cuda.device_of(x):"):
                out.add("run_decoded(", *wrap_items(dequantize.arguments(spec), 4, 88), ")")
            out.add(f"return {_results(spec)}")
    out.add('split = tile["SPLIT"]', "partial = out")
    if splits:
        with out.block("if split > 1:"):
            out.add(
                f"sums = (split, {''.join(sizes)}rows, {weight.n})",
                "partial = torch.empty(sums, dtype=torch.float32, device=x.device)",
            )
    matrices = (weight.batch or 1) + 1 if spec.grouped else batch
    shares = f"{matrices} * split" if weight.batch else "split"
    out.add(f'grid = (-(-rows // tile["BLOCK_M"]), -(-{weight.n} // tile["BLOCK_N"]), {shares})')
    args = steps.arguments(_parameters(spec, plan), batched=spec.batch is not None)
    with out.block("with torch.cuda.device_of(x):"):
        if spec.compute_dtype == "int8" and not spec.is_quantized:
            out.add(steps.call_quantize(steps.rows_of(spec)))
            columns.print_call(out, spec)
        out.add("kernel[grid](", *wrap_items([*args, "**tile", "**options"], 4, 88), ")")
        if splits:
            with out.block("if split > 1:"):
                print_reduce_call(out, spec, "partial", "split")
