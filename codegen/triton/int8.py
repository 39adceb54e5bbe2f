"""Prints int8 products: integers times integers, summed in int32 and scaled afterwards."""

from __future__ import annotations

from fxquant.codegen.indexing import WeightIndex
from fxquant.codegen.spec import KernelSpec
from fxquant.codegen.triton import columns, decode, outliers
from fxquant.codegen.triton.decode import Table
from fxquant.codegen.triton.int8_decode import Int8Decode, ScaledDecode
from fxquant.codegen.triton.kernels import (
    JIT,
    ends,
    loop,
    marks,
    operand_names,
    print_start,
    print_store,
    result_names,
    with_constants,
)
from fxquant.codegen.triton.plan import Plan
from fxquant.codegen.triton.printer import Lines
from fxquant.formats import int8_levels


def tables(spec: KernelSpec) -> list[Table]:
    """The tables of a product: the weight's levels as integers, and what outliers need."""
    found = decode.tables(spec.weight.encoding)
    integers, _ = int8_levels(spec.weight.encoding)
    if "levels" in found and integers is not None:
        subject = "the weight, in 127ths of the largest,"
        found["levels"] = Table("levels", integers, "", subject)
    return [*found.values(), *outliers.tables(spec)]


def parameters(spec: KernelSpec) -> list[str]:
    """The product's pointers, sizes and strides."""
    weights = decode.parameters(spec.weight.encoding, marks(spec))
    pointers = ["q", "amax", *weights, *operand_names(spec), *outliers.pointers(spec)]
    pointers += [*ends(spec), *result_names(spec)]
    return [*pointers, "partial", "rows", *outliers.strides(spec)]


def print_gemm(out: Lines, spec: KernelSpec, index: WeightIndex, plan: Plan) -> None:
    """The kernel ``gemm``, and before it the functions that it takes its weight from."""
    if plan.form.scaling == "elements":
        tiles = ScaledDecode(out, spec.weight, index, plan, "float32")
    else:
        tiles = Int8Decode(out, spec.weight, index, plan, "int8")
    tiles.print()
    if outliers.kind(spec) == "found":
        columns.print_decode(out, spec, index, plan)
    columns.print_gather(out, spec, plan)

    doc = "Weight tile by activation tile on tensor cores, acc is [outputs, rows]."
    if plan.form.scaling == "elements":
        doc = "Weight tile by activation tile, acc is [outputs, rows]."
    params = [*with_constants(parameters(spec)), *columns.constants(spec)]
    with out.function(f"{spec.name}_gemm", params, doc, JIT):
        print_start(out, spec)
        row = "(e * rows + m)" if spec.batch else "m"
        out.add(
            "n = n0 + tl.arange(0, BLOCK_N)",
            "m, n = m[None, :], n[:, None]",
            f"q_rows = q + {row} * {spec.weight.k}",
        )
        if isinstance(tiles, Int8Decode) and plan.form.scaling == "output":
            _print_output_sums(out, spec, plan, tiles)
        elif isinstance(tiles, Int8Decode):
            _print_tile_sums(out, spec, plan, tiles)
        else:
            _print_element_sums(out, spec, plan, tiles)
        out.add(
            f"peak = tl.load(amax + {row}, mask=m < rows, other=0.0)",
            *(f"acc{mark} *= tl.div_rn(peak, 127.0)" for mark in marks(spec)),
        )
        if spec.outliers is not None:
            outliers.print_products(out, spec, plan)
        out.add("# epilogue")
        print_store(out, spec, plan)


def _print_load(out: Lines, spec: KernelSpec, plan: Plan) -> None:
    """A tile of the activation's integers."""
    mask = "m < rows" if plan.whole_k else f"(m < rows) & (k < {spec.weight.k})"
    out.add(
        "k = k0 + tl.arange(0, BLOCK_K)[:, None]",
        f"q_tile = tl.load(q_rows + k, mask={mask}, other=0)",
    )


def _print_tile(out: Lines, tiles: ScaledDecode, mark: str) -> None:
    """A tile of a weight."""
    out.add("# load and decode", f"w = {tiles.call_tile(mark)}", "# dot")


def _print_output_sums(out: Lines, spec: KernelSpec, plan: Plan, tiles: Int8Decode) -> None:
    """One scale an output: integers to the end."""
    shifted = spec.weight.encoding.zero_point
    out.add(*(f"sums{mark} = tl.full((BLOCK_N, BLOCK_M), 0, tl.int32)" for mark in marks(spec)))
    if shifted:
        out.add("total = tl.full((BLOCK_M,), 0, tl.int32)")
    with out.block(loop(spec)):
        _print_load(out, spec, plan)
        for mark in marks(spec):
            _print_tile(out, tiles, mark)
            out.add(f"sums{mark} = tl.dot(w, q_tile, sums{mark}, out_dtype=tl.int32)")
        if shifted:
            out.add("total += tl.reduce(q_tile.to(tl.int32), 0, add)")
    out.add("# scale")
    for mark in marks(spec):
        if shifted:
            out.add(f"sums{mark} += {tiles.call_shift(mark)} * total[None, :]")
        out.add(f"acc{mark} = sums{mark}.to(tl.float32) * {tiles.call_scale(mark)}")


def _print_tile_sums(out: Lines, spec: KernelSpec, plan: Plan, tiles: Int8Decode) -> None:
    """One scale a tile and output: integers inside of a tile."""
    shifted = spec.weight.encoding.zero_point
    out.add(*(f"acc{mark} = tl.full((BLOCK_N, BLOCK_M), 0.0, tl.float32)" for mark in marks(spec)))
    with out.block(loop(spec)):
        _print_load(out, spec, plan)
        if shifted:
            out.add("total = tl.reduce(q_tile.to(tl.int32), 0, add)[None, :]")
        for mark in marks(spec):
            _print_tile(out, tiles, mark)
            out.add("sums = tl.dot(w, q_tile, out_dtype=tl.int32)")
            if shifted:
                out.add(f"sums += {tiles.call_shift(mark)} * total")
            out.add("# scale", f"acc{mark} += sums.to(tl.float32) * {tiles.call_scale(mark)}")


def _print_element_sums(out: Lines, spec: KernelSpec, plan: Plan, tiles: ScaledDecode) -> None:
    """Scales that change inside of a tile: products of float32 numbers."""
    out.add(*(f"acc{mark} = tl.full((BLOCK_N, BLOCK_M), 0.0, tl.float32)" for mark in marks(spec)))
    with out.block(loop(spec)):
        _print_load(out, spec, plan)
        for mark in marks(spec):
            _print_tile(out, tiles, mark)
            product = f'tl.dot(w, q_tile.to(tl.float32), acc{mark}, input_precision="ieee")'
            out.add(f"acc{mark} = {product}")
