"""Prints what quantizes an activation from Python: allocations and launches, no host sync."""

from __future__ import annotations

from collections.abc import Sequence

from fxquant.codegen.spec import KernelSpec
from fxquant.codegen.triton import outliers
from fxquant.codegen.triton.printer import Lines, call, wrap_items
from fxquant.codegen.triton.quantize import MOST_PARTS, Rows

TYPES = {
    "q": "int8",
    "amax": "float32",
    "limit": "float32",
    "peaks": "int32",
    "outlier": "uint8",
    "columns": "int32",
    "count": "int32",
    "counter": "int64",
    "ends": "int32",
}
"""What the pointers are that only kernels around int8 know."""

_FIND = {
    "find": {"BLOCK_M": 32, "BLOCK_K": 64, "STEP_M": 32},
    "find_many": {"BLOCK_M": 64, "BLOCK_K": 512, "STEP_M": 16},
}
_FEW_TO_FIND = 512
"""Rows that are looked at in small tiles, of more programs; there are enough of larger ones above.

On an H100, 8192 columns: 128 rows in 6 us and 2048 in 25, with the larger tiles in 13 and 18.
"""

_MARK_TILE = {"BLOCK_K": 128}


def rows_of(spec: KernelSpec) -> Rows:
    """The rows that a product quantizes itself."""
    weight = spec.weight
    kind, counters = outliers.kind(spec), tuple(outliers.counters(spec))
    lists = outliers.lists(weight.k) if kind == "found" else 0
    return Rows(spec.name, weight.k, spec.batch, outliers=kind, counters=counters, lists=lists)


Step = tuple[str, dict[str, int], int]
"""A kernel before a product: its name, constants and warps."""


def print_steps(out: Lines, rows: Rows, last: Sequence[Step] = ()) -> None:
    """``STEPS``: the kernels before a product, `last` behind those that quantize."""
    tile = {"BLOCK_M": rows.tile[0], "BLOCK_K": rows.tile[1]}
    entries = [("quantize", tile, rows.warps)]
    if rows.scope == "tensor":
        entries.insert(0, ("peaks", tile, rows.warps))
    if rows.outliers == "found":
        entries = [*((step, tile, 4) for step, tile in _FIND.items()), *entries]
    elif rows.outliers == "given":
        entries.insert(0, ("mark", _MARK_TILE, 4))
    entries += last
    out.add("", "# Step -> the kernel that does it, its constants, launch options.", "STEPS = {")
    for step, constants, warps in entries:
        written = ", ".join(f'"{name}": {size}' for name, size in constants.items())
        out.add(
            f'    "{step}": (',
            f"        {rows.name}_{step.removesuffix('_many')},",
            f"        {{{written}}},",
            f'        {{"num_warps": {warps}}},',
            "    ),",
        )
    out.add("}")


def arguments(params: list[str], *, batched: bool) -> list[str]:
    """What a kernel's parameters are given in ``run``."""
    strides = {"x_stride_e": "x.stride(0)", "x_stride_m": f"x.stride({int(batched)})"}
    return [strides.get(name, name) for name in params]


def call_quantize(rows: Rows) -> str:
    """The line of ``run`` that quantizes the activation."""
    found = ", columns, count" if rows.outliers == "found" else ""
    return f"q, amax{found} = {call('quantize', ['x', *_taken(rows)])}"


def _taken(rows: Rows) -> list[str]:
    """What ``quantize`` takes from ``run``."""
    limit = ["limit"] if rows.limited else []
    columns = {"": [], "found": [*rows.counters], "given": ["columns"]}[rows.outliers]
    return [*limit, *columns, *(["counter"] if rows.limited else [])]


def print_quantize(out: Lines, rows: Rows) -> None:
    """The function ``quantize``: x with contiguous inputs to integers and scales."""
    batched = rows.batch is not None
    shape = f"{rows.batch}, {rows.k}" if batched else f"{rows.k}"
    out.add("", "")
    with out.block(f"def {call('quantize', ['x', *_taken(rows)])}:"):
        out.add('"""Rows of an activation in int8, and the magnitudes that are 127 in them."""')
        out.add(
            "rows = x.shape[-2]",
            "q = torch.empty(x.shape, dtype=torch.int8, device=x.device)",
            "amax = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)",
        )
        if not rows.outliers:
            with out.block("if rows == 0:"):
                out.add("return q, amax")
        if rows.outliers == "found":
            _print_find(out, rows, shape)
        elif rows.outliers == "given":
            out.add(
                f"outlier = torch.empty({rows.k}, dtype=torch.uint8, device=x.device)",
                'kernel, tile, options = STEPS["mark"]',
                f'grid = (-(-{rows.k} // tile["BLOCK_K"]),)',
                "kernel[grid](columns, outlier, **tile, **options)",
            )
        if rows.scope == "tensor":
            _print_peaks(out, rows)
        _print_launch(out, rows)


def _print_find(out: Lines, rows: Rows, shape: str) -> None:
    counts = rows.batch or 1
    out.add(
        f'kernel, tile, options = STEPS["find" if rows <= {_FEW_TO_FIND} else "find_many"]',
        'make = torch.empty if rows <= tile["BLOCK_M"] else torch.zeros',
        f"outlier = make({shape}, dtype=torch.uint8, device=x.device)",
        f"columns = torch.empty({shape}, dtype=torch.int32, device=x.device)",
        f"count = torch.empty({counts}, dtype=torch.int32, device=x.device)",
        f'grid = (-(-{rows.k} // tile["BLOCK_K"]), -(-rows // tile["BLOCK_M"]), {counts})',
    )
    args = arguments(["x", "outlier", "rows", *rows.strides], batched=rows.batch is not None)
    out.add(call("kernel[grid]", [*args, "**tile", "**options"]))


def _print_peaks(out: Lines, rows: Rows) -> None:
    out.add(
        'kernel, tile, options = STEPS["peaks"]',
        f'parts = min(-(-rows // tile["BLOCK_M"]), {MOST_PARTS})',
        "peaks = torch.empty(parts, dtype=torch.int32, device=x.device)",
    )
    args = arguments(["x", "peaks", "rows", *rows.strides], batched=False)
    out.add(call("kernel[parts,]", [*args, "**tile", "**options"]))


def _print_launch(out: Lines, rows: Rows) -> None:
    found = rows.outliers == "found"
    parts = ["parts"] if rows.scope == "tensor" else []
    batched = rows.batch is not None
    programs = '-(-rows // tile["BLOCK_M"])' + (f" + {rows.lists}" if rows.lists else "")
    out.add(
        'kernel, tile, options = STEPS["quantize"]',
        f"grid = ({programs}, {rows.batch or 1})",
    )
    params = [*rows.pointers, "rows", *parts, *rows.strides]
    args = arguments(params, batched=batched)
    out.add("kernel[grid](", *wrap_items([*args, "**tile", "**options"], 4, 92), ")")
    out.add(f"return q, amax{', columns, count' if found else ''}")


def print_run(out: Lines, rows: Rows) -> None:
    """``run`` of a module that does nothing else."""
    counter = ", counter=None" if rows.limited else ""
    out.add("", "")
    with out.block(f"def run(x, extra{counter}):"):
        out.add('"""Codes and scales: x [.., k] to int8 [.., k] and float32 [..]."""')
        out.add("shape = x.shape", f"x = x.reshape(math.prod(shape[:-1]), {rows.k})")
        with out.block("if x.stride(-1) != 1:"):
            out.add("x = x.contiguous()")
        if rows.limited:
            out.add("limit = extra[0].contiguous()")
        with out.block("with torch.cuda.device_of(x):"):
            out.add(call_quantize(rows))
        out.add("return q.reshape(shape), amax.reshape(shape[:-1])")
