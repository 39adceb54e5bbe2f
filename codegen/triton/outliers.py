"""Prints what an int8 product does with the columns that it leaves to floats (LLM.int8()).

Columns that are found at run time never leave the device: ``find`` marks them, more programs of
``quantize`` list them, for many rows ``gather`` (`columns`) copies them, and the product loops up
to a number that it reads from memory. So nothing waits for the host, no shape depends on data, and
a CUDA graph can hold all of it.
"""

from __future__ import annotations

import contextlib

from fxquant.codegen.spec import KernelSpec
from fxquant.codegen.triton import columns, decode
from fxquant.codegen.triton.kernels import JIT, marks
from fxquant.codegen.triton.plan import Plan
from fxquant.codegen.triton.printer import Lines, call
from fxquant.codegen.triton.tiles import AT_ONCE, fit

_LISTED, _COUNTED = 2048, 8192
"""Columns that one program lists, and marks before them that it counts at a time."""


def kind(spec: KernelSpec) -> str:
    """How a spec's columns come about: ``""`` for none, ``"found"`` or ``"given"``."""
    if spec.outliers is None:
        return ""
    return "found" if spec.outliers.columns is None else "given"


def tables(spec: KernelSpec) -> list[decode.Table]:
    """The codebook that found columns are decoded with; its integers take registers enough."""
    if kind(spec) != "found":
        return []
    subject = "the weight, for columns in floats,"
    return decode.table_of("float_levels", spec.weight.encoding, subject, registers=0)


def pointers(spec: KernelSpec) -> list[str]:
    """What the product takes for its outliers."""
    listed = ["x", "columns", "count", *(table.name for table in tables(spec))]
    found = [*listed, *columns.dense(spec)]
    given = ["x", "columns", *aparts(spec), *columns.dense(spec)]
    return {"": [], "found": found, "given": given}[kind(spec)]


def aparts(spec: KernelSpec) -> list[str]:
    """The weights of given columns."""
    return [f"apart{mark}" for mark in marks(spec)] if kind(spec) == "given" else []


def counters(spec: KernelSpec) -> list[str]:
    """What counts the columns that are found, one for each weight."""
    return [f"counter{mark}" for mark in marks(spec)] if kind(spec) == "found" else []


def strides(spec: KernelSpec) -> list[str]:
    """The activation's strides, where the product reads it."""
    if not spec.outliers:
        return []
    return ["x_stride_e", "x_stride_m"] if spec.batch else ["x_stride_m"]


def print_find(out: Lines, spec: KernelSpec) -> None:
    """``find`` and ``list_columns``, or ``mark`` for given columns."""
    if kind(spec) == "found":
        _print_find(out, spec)
        _print_list(out, spec)
    elif kind(spec) == "given":
        _print_mark(out, spec)


def _print_find(out: Lines, spec: KernelSpec) -> None:
    assert spec.outliers is not None, "columns are found by a threshold"
    k = spec.weight.k
    params = ["x", "outlier", "rows", *strides(spec)]
    params += ["BLOCK_M: tl.constexpr", "BLOCK_K: tl.constexpr", "STEP_M: tl.constexpr"]
    doc = f"Marks the columns with a magnitude of {spec.outliers.threshold} or more."
    with out.function(f"{spec.name}_find", params, doc, JIT):
        matrix = "x"
        if spec.batch:
            out.add("e = tl.program_id(2).to(tl.int64)", f"outlier += e * {k}")
            matrix = "x + e * x_stride_e"
        out.add(
            "k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]",
            "first_m = tl.program_id(1).to(tl.int64) * BLOCK_M",
            "large = tl.full((STEP_M, BLOCK_K), 0, tl.int1)",
        )
        with out.block("for m0 in range(0, BLOCK_M, STEP_M):"):
            out.add(
                "m = first_m + m0 + tl.arange(0, STEP_M)[:, None]",
                f"mask = (m < rows) & (k < {k})",
                f"tile = tl.load({matrix} + (m * x_stride_m + k), mask=mask, other=0.0)",
                f"large |= tl.abs(tile.to(tl.float32)) >= {spec.outliers.threshold}",
            )
        out.add(
            "hit = tl.reduce(large.to(tl.int32), 0, most, keep_dims=True)",
            "# With more rows than one program's, all marks are 0 beforehand.",
            f"mask = (k < {k}) & ((hit > 0) | (tl.num_programs(1) == 1))",
            "tl.store(outlier + k, hit.to(tl.uint8), mask=mask)",
        )


def lists(k: int) -> int:
    """Programs that list the columns of k inputs: a call with few rows waits for them."""
    return -(-k // _LISTED)


def _print_list(out: Lines, spec: KernelSpec) -> None:
    k = spec.weight.k
    parts, step = lists(k), min(_LISTED, fit(k, 16))
    doc = "The marked columns in order, and their number; counts calls and columns."
    if parts > 1:
        doc = f"The marked columns of one part of {parts} in order; the last counts them all."
    params = [*(["part"] if parts > 1 else []), "outlier", "columns", "count", *counters(spec)]
    with out.function("list_columns", params, doc):
        if parts > 1:
            _print_count_before(out, min(_COUNTED, fit(k, 16)))
        out.add(
            f"k = {'first + ' if parts > 1 else ''}tl.arange(0, {step})",
            f"mark = tl.load(outlier + k, mask=k < {k}, other=0).to(tl.int32)",
            f"place = {'before + ' if parts > 1 else ''}tl.associative_scan(mark, 0, add) - 1",
            "tl.store(columns + place, k, mask=mark > 0)",
            f"found = {'before + ' if parts > 1 else ''}tl.reduce(mark, 0, add)",
        )
        if parts == 1:
            _print_counts(out, spec)
            return
        with out.block(f"if part == {parts - 1}:"):
            _print_counts(out, spec)


def _print_count_before(out: Lines, step: int) -> None:
    """Every part counts the marks before it: none waits for another."""
    out.add(f"first, before = part * {_LISTED}, 0")
    with out.block(f"for k0 in range(0, first, {step}):"):
        out.add(
            f"k = k0 + tl.arange(0, {step})",
            "mark = tl.load(outlier + k, mask=k < first, other=0).to(tl.int32)",
            "before += tl.reduce(mark, 0, add)",
        )


def _print_counts(out: Lines, spec: KernelSpec) -> None:
    out.add("tl.store(count, found)")
    once = ", mask=tl.program_id(1) == 0" if spec.batch else ""
    for counter in counters(spec):
        with out.block(f"if {counter} is not None:"):
            out.add(
                f'tl.atomic_add({counter}, 1{once}, sem="relaxed")',
                f'tl.atomic_add({counter} + 1, found.to(tl.int64), sem="relaxed")',
            )


def _print_mark(out: Lines, spec: KernelSpec) -> None:
    assert spec.outliers is not None, "columns are given by a number"
    k, count = spec.weight.k, spec.outliers.columns
    params = ["columns", "outlier", "BLOCK_K: tl.constexpr"]
    with out.function(f"{spec.name}_mark", params, "Marks the given columns."):
        out.add(
            "k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)[:, None]",
            "hit = tl.full((BLOCK_K, 1), 0, tl.int32)",
        )
        with out.block(f"for c0 in range(0, {count}, {AT_ONCE}):"):
            out.add(
                f"c = c0 + tl.arange(0, {AT_ONCE})[None, :]",
                f"column = tl.load(columns + c, mask=c < {count}, other=-1)",
                "same = (k == column).to(tl.int32)",
                "hit = tl.maximum(hit, tl.reduce(same, 1, most, keep_dims=True))",
            )
        out.add(f"tl.store(outlier + k, hit.to(tl.uint8), mask=k < {k})")


def print_products(out: Lines, spec: KernelSpec, plan: Plan) -> None:
    """Adds the products of the columns to the sums, ``acc`` .., [outputs, rows]."""
    assert spec.outliers is not None, "a spec without outliers has no such products"
    weight, dtype = spec.weight, spec.outliers.dtype
    given = spec.outliers.columns
    out.add("# outliers")
    listed = "columns"
    if given is None:
        if spec.batch:
            listed = f"columns + e * {weight.k}"
        out.add(f"found = tl.load(count{' + e' if spec.batch else ''})")
    most = "found" if given is None else str(given)
    matrix = "x + e * x_stride_e" if spec.batch else "x"
    gathers = bool(columns.dense(spec))
    # Loads at places that are loaded cannot be issued ahead, and the attempt takes registers.
    start = f"{'GATHERED + ' if gathers and given is None else ''}share * {AT_ONCE}"
    steps = f"{start}, {most}, {AT_ONCE} * SPLIT, num_stages=1"
    # All of given columns are gathered where any are.
    rest = out.block("if GATHERED == 0:") if gathers and given else contextlib.nullcontext()
    with rest, out.block(f"for c0 in tl.range({steps}):"):
        out.add(
            f"c = c0 + tl.arange(0, {AT_ONCE})",
            f"k = tl.load({listed} + c, mask=c < {most}, other=0)",
        )
        out.add(
            f"mask = (m < rows) & (c[:, None] < {most})",
            f"x_tile = tl.load({matrix} + (m * x_stride_m + k[:, None]), mask=mask, other=0.0)",
        )
        exact = ', input_precision="ieee"' if dtype == "float32" else ""
        cast = "" if spec.x_dtype == dtype else f".to(tl.{dtype})"
        for mark in marks(spec):
            _print_columns(out, spec, plan, most, mark)
            out.add(f"acc{mark} = tl.dot(w, x_tile{cast}, acc{mark}{exact})")
    columns.print_products(out, spec, plan)


def _print_columns(out: Lines, spec: KernelSpec, plan: Plan, most: str, mark: str) -> None:
    """Prints ``w``: a weight at columns c."""
    weight = spec.weight
    if kind(spec) == "found":
        pointers = columns.decode_pointers(weight, mark)
        arguments = [*pointers, "n", "k[None, :]", "BLOCK_N", str(AT_ONCE)]
        out.add(
            f"w = {call('decode_columns', arguments)}",
            f"w = tl.where(c[None, :] < {most}, w, 0.0)",
        )
        return
    inside = "" if plan.whole_n else f" & (n < {weight.n})"
    row = f"(e * {weight.n} + n)" if weight.batch else "n"
    where = f"apart{mark} + ({row} * {most} + c[None, :])"
    out.add(f"w = tl.load({where}, mask=(c[None, :] < {most}){inside}, other=0.0)")
