"""Prints int8 products: integers times integers, summed in int32 and scaled afterwards."""

from __future__ import annotations

from fxquant.codegen.indexing import WeightIndex
from fxquant.codegen.spec import KernelSpec
from fxquant.codegen.triton import decode, outliers
from fxquant.codegen.triton.decode import Table
from fxquant.codegen.triton.int8_decode import Int8Decode, ScaledDecode
from fxquant.codegen.triton.kernels import (
    JIT,
    loop,
    operand_names,
    print_start,
    print_store,
    with_constants,
)
from fxquant.codegen.triton.printer import Lines
from fxquant.codegen.triton.tiles import Plan
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
    pointers = ["q", "amax", *decode.parameters(spec.weight.encoding), *operand_names(spec)]
    pointers += outliers.pointers(spec)
    return [*pointers, "out", "partial", "rows", *outliers.strides(spec)]


def print_gemm(out: Lines, spec: KernelSpec, index: WeightIndex, plan: Plan) -> None:
    """The kernel ``gemm``, and before it the functions that it takes its weight from."""
    if plan.scaling == "elements":
        tiles = ScaledDecode(out, spec.weight, index, plan, "float32")
    else:
        tiles = Int8Decode(out, spec.weight, index, plan, "int8")
    tiles.print()
    outliers.print_decode(out, spec, index, plan)

    doc = "Weight tile by activation tile on tensor cores, acc is [outputs, rows]."
    if plan.scaling == "elements":
        doc = "Weight tile by activation tile, acc is [outputs, rows]."
    with out.function(f"{spec.name}_gemm", with_constants(parameters(spec)), doc, JIT):
        print_start(out, spec)
        row = "(e * rows + m)" if spec.weight.batch else "m"
        out.add(
            "n = n0 + tl.arange(0, BLOCK_N)",
            "m, n = m[None, :], n[:, None]",
            f"q_rows = q + {row} * {spec.weight.k}",
        )
        if isinstance(tiles, Int8Decode) and plan.scaling == "output":
            _print_output_sums(out, spec, plan, tiles)
        elif isinstance(tiles, Int8Decode):
            _print_tile_sums(out, spec, plan, tiles)
        else:
            _print_element_sums(out, spec, plan, tiles)
        out.add(
            f"peak = tl.load(amax + {row}, mask=m < rows, other=0.0)",
            "acc *= tl.div_rn(peak, 127.0)",
        )
        if spec.outliers is not None:
            outliers.print_products(out, spec, plan)
        out.add("# epilogue")
        print_store(out, spec, plan)


def _print_load(out: Lines, spec: KernelSpec, plan: Plan, tiles: ScaledDecode) -> None:
    """A tile of the weight, and one of the activation's integers."""
    mask = "m < rows" if plan.whole_k else f"(m < rows) & (k < {spec.weight.k})"
    out.add(
        "# load and decode",
        f"w = {tiles.call_tile()}",
        "k = k0 + tl.arange(0, BLOCK_K)[:, None]",
        f"q_tile = tl.load(q_rows + k, mask={mask}, other=0)",
        "# dot",
    )


def _print_output_sums(out: Lines, spec: KernelSpec, plan: Plan, tiles: Int8Decode) -> None:
    """One scale an output: integers to the end."""
    shift = tiles.call_shift()
    out.add("sums = tl.full((BLOCK_N, BLOCK_M), 0, tl.int32)")
    if shift:
        out.add("total = tl.full((BLOCK_M,), 0, tl.int32)")
    with out.block(loop(spec)):
        _print_load(out, spec, plan, tiles)
        out.add("sums = tl.dot(w, q_tile, sums, out_dtype=tl.int32)")
        if shift:
            out.add("total += tl.reduce(q_tile.to(tl.int32), 0, add)")
    out.add("# scale")
    if shift:
        out.add(f"sums += {shift} * total[None, :]")
    out.add(f"acc = sums.to(tl.float32) * {tiles.call_scale()}")


def _print_tile_sums(out: Lines, spec: KernelSpec, plan: Plan, tiles: Int8Decode) -> None:
    """One scale a tile and output: integers inside of a tile."""
    shift = tiles.call_shift()
    out.add("acc = tl.full((BLOCK_N, BLOCK_M), 0.0, tl.float32)")
    with out.block(loop(spec)):
        _print_load(out, spec, plan, tiles)
        out.add("sums = tl.dot(w, q_tile, out_dtype=tl.int32)")
        if shift:
            out.add(f"sums += {shift} * tl.reduce(q_tile.to(tl.int32), 0, add)[None, :]")
        out.add("# scale", f"acc += sums.to(tl.float32) * {tiles.call_scale()}")


def _print_element_sums(out: Lines, spec: KernelSpec, plan: Plan, tiles: ScaledDecode) -> None:
    """Scales that change inside of a tile: products of float32 numbers."""
    out.add("acc = tl.full((BLOCK_N, BLOCK_M), 0.0, tl.float32)")
    with out.block(loop(spec)):
        _print_load(out, spec, plan, tiles)
        out.add('acc = tl.dot(w, q_tile.to(tl.float32), acc, input_precision="ieee")')
