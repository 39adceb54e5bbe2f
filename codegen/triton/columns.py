"""Prints the weight at columns that are found at run time, and what gathers outlier columns.

A program of a product that takes single columns of the weight loads a sector of memory for every
number, and so do all other programs of the same outputs. For many rows a kernel does that once:
``gather`` writes the first columns of the weight and of the activation side by side, and the
product's programs load tiles. Columns beyond are still taken one by one, so their number has no
limit. Given columns have dense weights: those of the activation are gathered, all of them. A batch
and few rows, where another launch takes longer, have their columns one by one.
"""

from __future__ import annotations

import dataclasses

from fxquant.codegen.indexing import WeightIndex
from fxquant.codegen.spec import KernelSpec, WeightOperand
from fxquant.codegen.triton import decode
from fxquant.codegen.triton.kernels import JIT, marks
from fxquant.codegen.triton.plan import Plan
from fxquant.codegen.triton.printer import Lines, call, wrap_items
from fxquant.codegen.triton.tiles import AT_ONCE, gathered, gathers

_BLOCK = 32
_SHARES = 8
"""Programs among which the columns of the same rows are shared out."""


class ColumnsDecode(decode.Decode):
    """The weight at some outputs and any inputs, as a number: its levels and scales."""

    def print(self) -> None:
        """``decode_columns``."""
        params = [*decode_pointers(self.weight), "n", "k"]
        params += ["BLOCK_N: tl.constexpr", "BLOCK_K: tl.constexpr"]
        doc = f"The weight at outputs n and inputs k, [BLOCK_N, BLOCK_K] in {self.dtype}."
        with self.out.function("decode_columns", params, doc):
            if decode.is_wide(self.weight):
                self.out.add("n, k = n.to(tl.int64), k.to(tl.int64)")
            self.out.add("# load")
            self._print_single_codes()
            self._print_level()
            self._print_scale()
            self.out.add(f"return (level * scale).to(tl.{self.dtype})")

    def _print_lookup(self) -> None:
        self.out.add("level = tl.load(float_levels + code.to(tl.int32))")


def decode_pointers(weight: WeightOperand, mark: str = "") -> list[str]:
    """What ``decode_columns`` takes; `mark` says of which weight."""
    encoding = weight.encoding
    parts = [name for name in decode.parameters(encoding, [mark]) if name != "levels"]
    table = [] if encoding.is_uniform else ["float_levels"]
    return [*parts, *table, *decode.batch_index(weight)]


def print_decode(out: Lines, spec: KernelSpec, index: WeightIndex, plan: Plan) -> None:
    """``decode_columns``."""
    assert spec.outliers is not None, "columns are found by a threshold"
    form = dataclasses.replace(plan.form, axis=None)
    single = dataclasses.replace(plan, form=form, whole_k=True, run=1)
    ColumnsDecode(out, spec.weight, index, single, spec.outliers.dtype).print()


def _given(spec: KernelSpec) -> int | None:
    """The number of columns that are given, whose weights are dense already."""
    return spec.outliers.columns if spec.outliers is not None else None


def dense(spec: KernelSpec) -> list[str]:
    """The gathered columns of every weight that has none by itself, and of the activation."""
    if not gathers(spec):
        return []
    weights = marks(spec) if _given(spec) is None else []
    return [*(f"apart{mark}" for mark in weights), "x_apart"]


def constants(spec: KernelSpec) -> list[str]:
    """What a product is to know: columns that are gathered before it, 0 for none."""
    return ["GATHERED: tl.constexpr"] if gathers(spec) else []


def _pointers(spec: KernelSpec) -> list[str]:
    """What ``gather`` takes beside the activation."""
    if _given(spec) is not None:
        return ["columns"]
    parts = [name for mark in marks(spec) for name in decode_pointers(spec.weight, mark)]
    return [*dict.fromkeys(parts), "columns", "count"]


def print_gather(out: Lines, spec: KernelSpec, plan: Plan) -> None:
    """The kernel ``gather``, where a product has it."""
    if not gathers(spec):
        return
    n, given = spec.weight.n, _given(spec)
    params = ["x", *_pointers(spec), *dense(spec), "rows", "x_stride_m"]
    params += ["BLOCK: tl.constexpr", "GATHERED: tl.constexpr"]
    whose = "the weight's and those of x" if given is None else "those of x"
    doc = f"Outlier columns side by side, {whose}, and zeros up to the next tile."
    with out.function(f"{spec.name}_gather", params, doc, JIT):
        if given is None:
            out.add(
                "found = tl.minimum(tl.load(count), GATHERED)",
                f"OUTPUTS: tl.constexpr = ({n} + BLOCK - 1) // BLOCK * BLOCK",
                "n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[:, None]",
                "m = (n - OUTPUTS).to(tl.int64)",
            )
        else:
            out.add("m = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)[:, None]")
        found = "found" if given is None else str(given)
        first, step = (f"{AT_ONCE} * tl.{name}(1)" for name in ("program_id", "num_programs"))
        with out.block(f"for c0 in range({first}, {found}, {step}):"):
            out.add(
                f"c = c0 + tl.arange(0, {AT_ONCE})[None, :]",
                f"k = tl.load(columns + c, mask=c < {found}, other=0)",
            )
            if given is not None:
                _print_x(out, spec, found)
                return
            with out.block("if tl.program_id(0) * BLOCK < OUTPUTS:"):
                for mark in marks(spec):
                    _print_columns(out, spec, plan, mark)
            with out.block("else:"):
                _print_x(out, spec, found)


def _print_x(out: Lines, spec: KernelSpec, found: str) -> None:
    assert spec.outliers is not None, "there are columns to gather"
    dtype = spec.outliers.dtype
    x_tile = "x_tile" if spec.x_dtype == dtype else f"x_tile.to(tl.{dtype})"
    out.add(
        f"mask = (m < rows) & (c < {found})",
        "x_tile = tl.load(x + (m * x_stride_m + k), mask=mask, other=0.0)",
        f"tl.store(x_apart + (m * GATHERED + c), {x_tile}, mask=m < rows)",
    )


def _print_columns(out: Lines, spec: KernelSpec, plan: Plan, mark: str) -> None:
    inside = "" if plan.whole_n else f", mask=n < {spec.weight.n}"
    arguments = [*decode_pointers(spec.weight, mark), "n", "k", "BLOCK", str(AT_ONCE)]
    out.add(
        f"w = {call('decode_columns', arguments)}",
        "w = tl.where(c < found, w, 0.0)",
        f"tl.store(apart{mark} + (n * GATHERED + c), w{inside})",
    )


def print_products(out: Lines, spec: KernelSpec, plan: Plan) -> None:
    """Adds the products of gathered columns to the sums, ``acc`` .., [outputs, rows]."""
    if not gathers(spec):
        return
    assert spec.outliers is not None, "there are columns to gather"
    given = _given(spec)
    exact = ', input_precision="ieee"' if spec.outliers.dtype == "float32" else ""
    tests = [] if given is None else [f"(c[None, :] < {given})"]
    tests += [] if plan.whole_n else [f"(n < {spec.weight.n})"]
    inside = f", mask={' & '.join(tests)}, other=0.0" if tests else ""
    width = "GATHERED" if given is None else str(given)
    last = "tl.minimum(found, GATHERED)" if given is None else str(given)
    steps = f"share * {AT_ONCE}, {last}, {AT_ONCE} * SPLIT"
    with out.block("if GATHERED > 0:"), out.block(f"for c0 in range({steps}):"):
        out.add(
            f"c = c0 + tl.arange(0, {AT_ONCE})",
            "x_tile = tl.load(x_apart + (m * GATHERED + c[:, None]), mask=m < rows, other=0.0)",
        )
        for mark in marks(spec):
            out.add(
                f"w = tl.load(apart{mark} + (n * {width} + c[None, :]){inside})",
                f"acc{mark} = tl.dot(w, x_tile, acc{mark}{exact})",
            )


def steps(spec: KernelSpec, plan: Plan) -> list[tuple[str, dict[str, int], int]]:
    """The step ``gather``: its name, constants and warps."""
    if not gathers(spec):
        return []
    # Whole tiles have no masks, so a block is no larger than one.
    block = min(_BLOCK, *(tile.n for tile in plan.tiles))
    return [("gather", {"BLOCK": block, "GATHERED": gathered(spec)}, 4)]


def print_run(out: Lines, spec: KernelSpec) -> None:
    """The function ``gather``: allocates and launches."""
    if not gathers(spec):
        return
    assert spec.outliers is not None, "there are columns to gather"
    outputs = f"-(-{spec.weight.n} // block) + " if _given(spec) is None else ""
    out.add("", "")
    with out.block(f"def {call('gather', ['x', *_pointers(spec)])}:"):
        out.add(
            '"""Outlier columns as matrices, as many as have room: [.., GATHERED]."""',
            'kernel, tile, options = STEPS["gather"]',
            'rows, block, width = x.shape[-2], tile["BLOCK"], tile["GATHERED"]',
        )
        for name in dense(spec):
            size = "rows" if name == "x_apart" else str(spec.weight.n)
            kind = f"dtype=torch.{spec.outliers.dtype}, device=x.device"
            out.add(f"{name} = torch.empty(({size}, width), {kind})")
        out.add(f"grid = ({outputs}-(-rows // block), {_SHARES})")
        args = ["x", *_pointers(spec), *dense(spec), "rows", "x.stride(0)", "**tile", "**options"]
        out.add("kernel[grid](", *wrap_items(args, 4, 92), ")")
        out.add(f"return {', '.join(dense(spec))}")


def print_call(out: Lines, spec: KernelSpec) -> None:
    """The lines of ``run`` that gather columns, for tiles that want it."""
    if not gathers(spec):
        return
    out.add(f"{' = '.join(dense(spec))} = None")
    with out.block('if tile["GATHERED"]:'):
        out.add(f"{', '.join(dense(spec))} = {call('gather', ['x', *_pointers(spec)])}")
