"""Prints products of 4-bit weights with many rows: scales are multiplied into the weight tile.

With few rows a scale costs least on the sums of its block (`words`). With more of them there are
more sums than weights, and a second set of them would take the registers of a larger tile: here the
product adds to one set. Inputs keep their order, so x comes 16 bytes at a time; a byte's two codes
are decoded where they lie, and the tile goes through shared memory to where the product takes it.
"""

from __future__ import annotations

from fxquant.codegen.indexing import E, K, N, WeightIndex, index_text
from fxquant.codegen.spec import KernelSpec
from fxquant.codegen.triton import decode
from fxquant.codegen.triton.kernels import (
    JIT,
    arrived,
    loop,
    marks,
    print_start,
    print_store,
    round_x,
    with_constants,
)
from fxquant.codegen.triton.plan import Plan
from fxquant.codegen.triton.printer import Lines, call
from fxquant.codegen.triton.word_bytes import LEGEND, byte_assembly, byte_constraints
from fxquant.codegen.triton.words import WordDecode, book_of, product_parameters

_LARGEST = {"bfloat16": "3.389e38", "float16": "65504.0"}


def print_gemm(out: Lines, spec: KernelSpec, index: WeightIndex, plan: Plan) -> None:
    """The kernel ``scaled``, and before it the functions that it takes its weight from.

    ``scale_of``, ``arrived``, and where there is no assembly ``level_of``, come with `words`.
    """
    is_scaled = plan.form.scaling == "tile"
    tiles = WordDecode(Lines(), spec.weight, index, plan, spec.compute_dtype)
    _print_decode(out, spec, plan, is_scaled=is_scaled)
    doc = "Many rows: the weight tile with its scales by activation tile, acc is [outputs, rows]."
    taken = with_constants(product_parameters(spec, plan))
    with out.function(f"{spec.name}_scaled", taken, doc, JIT):
        print_start(out, spec)
        wide = ".to(tl.int64)" if decode.is_wide(spec.weight) else ""
        matrix = "x + e * x_stride_e" if spec.batch else "x"
        out.add(
            "n = n0 + tl.arange(0, BLOCK_N)",
            f"m, n = m[None, :], n[:, None]{wide}",
            f"x_rows = {matrix} + m * x_stride_m",
            *(f"acc{mark} = tl.full((BLOCK_N, BLOCK_M), 0.0, tl.float32)" for mark in marks(spec)),
        )
        if is_scaled:
            for mark in marks(spec):
                out.add(f"scale{mark} = {tiles.call_scale(mark, k0='first_k')}")
        with out.block(loop(spec)):
            out.add("# load", "k = k0 + tl.arange(0, BLOCK_K)[:, None]")
            out.add(f"x_tile = tl.load(x_rows + k, mask=m < rows, other=0.0){round_x(spec)}")
            for mark in marks(spec):
                _print_step(out, spec, tiles, mark)
        if not is_scaled:
            out.add("# scale")
            out.add(*(f"acc{mark} *= {tiles.call_scale(mark)}" for mark in marks(spec)))
        out.add("# epilogue")
        print_store(out, spec, plan)


def _print_step(out: Lines, spec: KernelSpec, tiles: WordDecode, mark: str) -> None:
    """One step's product with one weight."""
    plan = tiles.plan
    is_scaled = plan.form.scaling == "tile"
    inside = "" if plan.whole_n else f", mask=n < {spec.weight.n}, other=0"
    where = tiles.index.per_run(tiles.index.byte, K, 2)
    assert where is not None, "the plan has seen to it that words, and so bytes, are whole"
    text = index_text(where, {E: "e", N: "n", K: "byte"})
    out.add("byte = k0 // 2 + tl.arange(0, BLOCK_K // 2)[None, :]")
    out.add(f"code = tl.load(codes{mark} + ({text}){inside})")
    if is_scaled:
        last = spec.weight.k - min(tile.k for tile in plan.tiles)
        ahead = tiles.call_scale(mark, k0="next_k0")
        out.add(f"next_k0 = tl.minimum(k0 + BLOCK_K, {last})", f"ahead = {ahead}")
    scale = [f"scale{mark}"] if is_scaled else []
    w = call("decode_bytes", ["code", *scale, "BLOCK_N", "BLOCK_K"])
    out.add("# decode", f"w = {w}", "# dot")
    product = f"tl.dot(w, x_tile, acc{mark})"
    out.add(f"acc{mark} = {arrived(product, plan)}")
    if is_scaled:
        out.add(f"scale{mark} = ahead")


def _print_decode(out: Lines, spec: KernelSpec, plan: Plan, *, is_scaled: bool) -> None:
    """The function ``decode_bytes``."""
    dtype, book = spec.compute_dtype, book_of(spec.weight.encoding)
    params = ["code", *(["scale"] if is_scaled else [])]
    params += ["BLOCK_N: tl.constexpr", "BLOCK_K: tl.constexpr"]
    doc = f"A tile's levels{' times their scales' if is_scaled else ''}, in {dtype}."
    with out.function("decode_bytes", params, doc):
        if plan.form.words == "prmt":
            _print_assembly(out, book, dtype, is_scaled=is_scaled)
        else:
            tail = f".to(tl.float32) * scale).to(tl.{dtype})" if is_scaled else ")"
            out.add(f"first = (level_of(code >> 4){tail}", f"second = (level_of(code & 15){tail}")
        out.add("return tl.join(first, second).reshape(BLOCK_N, BLOCK_K)")


def _print_assembly(out: Lines, book: tuple[float, ...], dtype: str, *, is_scaled: bool) -> None:
    inputs = "code"
    if is_scaled:
        inputs = "code, whole, rest"
        most, shape = _LARGEST[dtype], "(BLOCK_N, BLOCK_K // 2)"
        out.add(
            f"# A scale as the sum of two numbers in {dtype}: products are rounded once.",
            f"whole = tl.minimum(tl.maximum(scale, -{most}), {most}).to(tl.{dtype})",
            f"rest = tl.broadcast_to((scale - whole.to(tl.float32)).to(tl.{dtype}), {shape})",
            f"whole = tl.broadcast_to(whole, {shape})",
        )
    out.add(*LEGEND, "first, second = tl.inline_asm_elementwise(", '    """')
    out.add(*(f"    {line}" for line in byte_assembly(book, dtype, scaled=is_scaled)))
    out.add(
        '    """,',
        f'    "{byte_constraints(scaled=is_scaled)}",',
        f"    [{inputs}],",
        f"    dtype=(tl.{dtype},) * 2,",
        "    is_pure=True,",
        "    pack=4,",
        ")",
    )
