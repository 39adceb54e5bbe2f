"""Prints the skeletons: GEMV, GEMM and the sum over a split, and their common epilogue."""

from __future__ import annotations

import re

from fxquant.codegen.pointwise import bare
from fxquant.codegen.spec import KernelSpec
from fxquant.codegen.triton import decode
from fxquant.codegen.triton.int8_decode import Int8Decode
from fxquant.codegen.triton.ops import PRELUDE, TritonOps
from fxquant.codegen.triton.plan import Plan
from fxquant.codegen.triton.printer import Lines, call, statement, wrap_items

JIT = '(do_not_specialize=["rows"])'
_CONSTEXPRS = ("BLOCK_M", "BLOCK_N", "BLOCK_K", "SPLIT")
REDUCE_BLOCK = 128
GEMV_STAGES = 3

COMBINE = {
    "add": '''
@triton.jit
def add(x, y):
    """What sums are made of."""
    return x + y
''',
    "most": '''
@triton.jit
def most(x, y):
    """What the largest is found with."""
    return tl.maximum(x, y)
''',
}
"""Functions that reductions take. Those of Triton are not interpreted beside compiled kernels."""


def print_combine(out: Lines, body: Lines) -> None:
    """The functions of `COMBINE` that a text uses."""
    for name, text in COMBINE.items():
        if any(re.search(rf", {name}\b", line) for line in body.lines()):
            out.add("", *text.splitlines())


def operand_names(spec: KernelSpec) -> list[str]:
    """The epilogue's pointers."""
    return [f"in{number}" for number in range(len(spec.epilogue.operands))]


def result_names(spec: KernelSpec) -> list[str]:
    """The pointers of results, the main one first."""
    return ["out", *(f"out{number + 1}" for number in range(len(spec.epilogue.more)))]


def marks(spec: KernelSpec) -> list[str]:
    """What tells the names of several weights and their sums apart."""
    return [str(number) if number else "" for number in range(spec.weights)]


def print_finish(out: Lines, spec: KernelSpec, plan: Plan) -> None:
    """The function ``finish``: the epilogue, and the store."""
    n = spec.weight.n
    whole_n = plan.whole_n and (n % REDUCE_BLOCK == 0 or not plan.splits)
    tests = {"m": "(m < rows)", "n": "" if whole_n else f"(n < {n})"}
    operands = enumerate(spec.epilogue.operands)
    ops = TritonOps(f"value{number}" for number, operand in operands if operand.dtype == "bool")
    names = {f"%acc{mark}": f"acc{mark}" for mark in marks(spec)}
    body = Lines()
    for number, operand in enumerate(spec.epilogue.operands):
        names[f"%in{number}"] = f"value{number}"
        where = _operand_index(operand.dims, n)
        found = " & ".join(tests[axis] for axis in operand.dims if tests.get(axis))
        mask = f", mask={found}, other=0" if found else ""
        kind = "" if operand.dtype in ("float32", "bool") else ".to(tl.float32)"
        kind = ".to(tl.int1)" if operand.dtype == "bool" else kind
        body.add(f"value{number} = tl.load(in{number}{where}{mask}){kind}")
    for number, node in enumerate(spec.epilogue.nodes):
        name = names[f"%{number}"] = f"{node.word}_{number}"
        body.add(*statement(name, bare(ops.call(node, names, name))))
    for helper in sorted(ops.prelude):
        out.add("", *PRELUDE[helper].splitlines())

    params = _finish_args(spec)
    doc = "The epilogue on the sums of rows m and outputs n, rounded and stored."
    with out.function("finish", params, doc):
        out.add(*body.lines())
        mask = " & ".join(test for test in tests.values() if test)
        row = "(e * rows + m)" if spec.batch else "m"
        out.add(f"where = {row} * {n} + n")
        values = [spec.epilogue.result, *(result.value for result in spec.epilogue.more)]
        for name, value in zip(result_names(spec), values, strict=True):
            rounded = f"{names[value]}.to({name}.dtype.element_ty)"
            out.add(f"tl.store({name} + where, {rounded}, mask={mask})")


def _finish_args(spec: KernelSpec) -> list[str]:
    sums = [f"acc{mark}" for mark in marks(spec)]
    place = [*(["e"] if spec.batch else []), "m", "n", "rows"]
    return [*sums, *operand_names(spec), *result_names(spec), *place]


def _share_index(spec: KernelSpec, number: int, rows: str = "rows") -> str:
    """Where a partial sum of a weight lies, in [shares, (weights,) (batch,) rows, outputs]."""
    batch, matrix = spec.batch, "share"
    if spec.weights > 1:
        matrix = f"(share * {spec.weights} + {number})" if number else f"share * {spec.weights}"
    matrix = f"({matrix} * {batch} + e)" if batch else matrix
    return f"where = ({matrix} * {rows} + m) * {spec.weight.n} + n"


def _operand_index(dims: str, n: int) -> str:
    """The offset of an operand's element, as text behind its pointer."""
    row = {"e": "e", "m": "m", "em": "(e * rows + m)"}.get(dims.removesuffix("n"), "")
    if not dims.endswith("n"):
        return f" + {row}" if row else ""
    return f" + ({row} * {n} + n)" if row else " + n"


def print_gemv(out: Lines, spec: KernelSpec, plan: Plan, whole: Int8Decode | None = None) -> None:
    """Few rows: products in registers, summed over the inputs at the end.

    `whole` is what prints levels that are whole numbers, whose sums are scaled.
    """
    out.add("", *COMBINE["add"].splitlines())
    doc = "Few rows: every program streams its share of BLOCK_N outputs' weights once."
    with out.function(f"{spec.name}_gemv", with_constants(parameters(spec)), doc, JIT):
        print_start(out, spec)
        out.add(
            f"x_rows = {_matrix(spec)} + m[:, None, None] * x_stride_m",
            *(
                f"sums{mark} = tl.full((BLOCK_M, BLOCK_N, BLOCK_K), 0.0, tl.float32)"
                for mark in marks(spec)
            ),
        )
        # Triton issues loads ahead by itself only where they go into a dot.
        with out.block(loop(spec, stages=GEMV_STAGES)):
            out.add("k = k0 + tl.arange(0, BLOCK_K)[None, None, :]")
            mask = "(m < rows)[:, None, None]" + (
                "" if plan.whole_k else f" & (k < {spec.weight.k})"
            )
            out.add(f"x_tile = tl.load(x_rows + k, mask={mask}, other=0.0)")
            if round_x(spec):
                out.add(f"x_tile = x_tile{round_x(spec)}")
            lift = "" if spec.compute_dtype == "float32" else ".to(tl.float32)"
            raised = lift if whole is None else ".to(tl.float32)"
            for mark in marks(spec):
                _print_decode_call(out, spec, mark, whole)
                out.add(f"sums{mark} += x_tile{lift} * w[None, :, :]{raised}")
        out.add(*(f"acc{mark} = tl.reduce(sums{mark}, 2, add)" for mark in marks(spec)))
        _print_end(out, spec, plan, ("m[:, None]", "n[None, :]"), whole)


def print_gemm(out: Lines, spec: KernelSpec, plan: Plan, whole: Int8Decode | None = None) -> None:
    """Many rows: the transposed product, so that the decoded weight stays in registers."""
    print_arrived(out, plan)
    doc = "Many rows: weight tile by activation tile on tensor cores, acc is [outputs, rows]."
    with out.function(f"{spec.name}_gemm", with_constants(parameters(spec)), doc, JIT):
        print_start(out, spec)
        out.add(
            f"x_rows = {_matrix(spec)} + m[None, :] * x_stride_m",
            *(f"acc{mark} = tl.full((BLOCK_N, BLOCK_M), 0.0, tl.float32)" for mark in marks(spec)),
        )
        with out.block(loop(spec)):
            out.add("k = k0 + tl.arange(0, BLOCK_K)[:, None]")
            mask = "(m < rows)[None, :]" + ("" if plan.whole_k else f" & (k < {spec.weight.k})")
            out.add(f"x_tile = tl.load(x_rows + k, mask={mask}, other=0.0){round_x(spec)}")
            exact = ', input_precision="ieee"' if spec.compute_dtype == "float32" else ""
            w = "w" if whole is None else f"w.to(tl.{spec.compute_dtype})"
            for mark in marks(spec):
                _print_decode_call(out, spec, mark, whole)
                product = f"tl.dot({w}, x_tile, acc{mark}{exact})"
                out.add("# dot", f"acc{mark} = {arrived(product, plan)}")
        _print_end(out, spec, plan, ("m[None, :]", "n[:, None]"), whole)


def arrived(product: str, plan: Plan) -> str:
    """A product's sums as text; of a plan that waits, once they are there."""
    return f"arrived({product})" if plan.waits else product


def print_arrived(out: Lines, plan: Plan) -> None:
    """The function ``arrived``, for a plan that waits."""
    if not plan.waits:
        return
    doc = "Sums as they are: what uses them waits for the product that makes them."
    with out.function("arrived", ["acc"], doc):
        out.add(
            "return tl.inline_asm_elementwise(",
            '    "// $0", "=f,0", [acc], dtype=tl.float32, is_pure=True, pack=1',
            ")",
        )


def print_reduce(out: Lines, spec: KernelSpec) -> None:
    """The sum over a split, always in the same order, and the epilogue."""
    params = ["partial", *operand_names(spec), *result_names(spec), "rows"]
    params += ["BLOCK_N: tl.constexpr", "SPLIT: tl.constexpr"]
    n = spec.weight.n
    mask = f", mask=n < {n}, other=0.0" if n % REDUCE_BLOCK else ""
    with out.function(f"{spec.name}_reduce", params, "Adds the shares of a split.", JIT):
        if spec.batch:
            out.add("e = tl.program_id(2).to(tl.int64)")
        out.add(
            "m = tl.program_id(0).to(tl.int64)",
            "n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]",
            *(f"acc{mark} = tl.full((1, BLOCK_N), 0.0, tl.float32)" for mark in marks(spec)),
        )
        with out.block("for share in range(SPLIT):"):
            for number, mark in enumerate(marks(spec)):
                out.add(
                    _share_index(spec, number),
                    f"acc{mark} += tl.load(partial + where{mask})",
                )
        out.add(call("finish", _finish_args(spec)))


def print_reduce_call(out: Lines, spec: KernelSpec, partial: str, split: str) -> None:
    """What launches ``reduce``."""
    out.add(
        f"add_shares, tile, options = REDUCTIONS[{split}]",
        f'grid = (rows, -(-{spec.weight.n} // tile["BLOCK_N"]), {spec.batch or 1})',
    )
    args = [partial, *operand_names(spec), *result_names(spec), "rows", "**tile", "**options"]
    out.add("add_shares[grid](", *wrap_items(args, 4, 88), ")")


def parameters(spec: KernelSpec) -> list[str]:
    """The pointers, sizes and strides of a product of floats."""
    pointers = ["x", *decode.parameters(spec.weight.encoding, marks(spec)), *operand_names(spec)]
    strides = ["x_stride_e", "x_stride_m"] if spec.batch else ["x_stride_m"]
    return [*pointers, *ends(spec), *result_names(spec), "partial", "rows", *strides]


def ends(spec: KernelSpec) -> list[str]:
    """The pointer that says where the rows of each matrix end."""
    return ["ends"] if spec.grouped else []


def with_constants(params: list[str]) -> list[str]:
    """Parameters, and behind them the constants of a product."""
    return [*params, *(f"{name}: tl.constexpr" for name in _CONSTEXPRS)]


def print_start(out: Lines, spec: KernelSpec) -> None:
    """Which rows, outputs, share of the inputs and matrix of a batch a program has."""
    out.add(
        "m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)",
        "n0 = tl.program_id(1) * BLOCK_N",
    )
    if spec.weight.batch:
        out.add("share, e = tl.program_id(2) % SPLIT, (tl.program_id(2) // SPLIT).to(tl.int64)")
    else:
        out.add("share = tl.program_id(2)")
    k = spec.weight.k
    out.add(
        f"SHARE: tl.constexpr = ({k} + BLOCK_K * SPLIT - 1) // (BLOCK_K * SPLIT) * BLOCK_K",
        "first_k = share * SHARE",
    )
    if spec.grouped:
        _print_group(out, spec)


def _print_group(out: Lines, spec: KernelSpec) -> None:
    """The rows of matrix e, where all that follows takes `rows` for the end of them.

    Behind the last matrix come the rows that belong to none. The host does not know how many there
    are of each: programs beyond their number have nothing to do.
    """
    last = (spec.weight.batch or 1) - 1
    out.add(
        "all_rows = rows",
        "first = tl.load(ends + e - 1, mask=e > 0, other=0)",
        f"rows = tl.load(ends + e, mask=e <= {last}, other=rows)",
        "m += first",
    )
    with out.block("if first + tl.program_id(0) * BLOCK_M >= rows:"):
        out.add("return")
    out.add(f"has_none = e > {last}", f"e = tl.minimum(e, {last})")


def _matrix(spec: KernelSpec) -> str:
    return "x + e * x_stride_e" if spec.batch else "x"


def loop(spec: KernelSpec, stages: int = 0) -> str:
    """The head of the loop over a share's inputs, which lie side by side.

    Args:
        spec: The product.
        stages: Depth of a pipeline that the loop asks for itself.
    """
    steps = f"first_k, tl.minimum(first_k + SHARE, {spec.weight.k}), BLOCK_K"
    return (
        f"for k0 in tl.range({steps}, num_stages={stages}):"
        if stages
        else f"for k0 in range({steps}):"
    )


def _print_decode_call(out: Lines, spec: KernelSpec, mark: str, whole: Int8Decode | None) -> None:
    if whole is not None:
        out.add("# load and decode", f"w = {whole.call_tile(mark)}")
        return
    args = [*decode.parameters(spec.weight.encoding, [mark]), *decode.batch_index(spec.weight)]
    args += ["n0", "k0", "BLOCK_N", "BLOCK_K"]
    out.add("# load and decode", f"w = {call('decode', args)}")


def round_x(spec: KernelSpec) -> str:
    """The cast of the activation to the dtype of the product, where it is another."""
    return "" if spec.x_dtype == spec.compute_dtype else f".to(tl.{spec.compute_dtype})"


def _print_end(
    out: Lines, spec: KernelSpec, plan: Plan, place: tuple[str, str], whole: Int8Decode | None
) -> None:
    """Makes rows and outputs broadcast, as the sums lie, and prints `print_store`."""
    out.add("n = n0 + tl.arange(0, BLOCK_N)", f"m, n = {', '.join(place)}")
    if whole is not None:
        out.add("# scale", *(f"acc{mark} *= {whole.call_scale(mark)}" for mark in marks(spec)))
    out.add("# epilogue")
    print_store(out, spec, plan)


def print_store(out: Lines, spec: KernelSpec, plan: Plan) -> None:
    """The epilogue on the sums, or a share of them to memory."""
    mask = "(m < rows)" + ("" if plan.whole_n else f" & (n < {spec.weight.n})")
    if spec.grouped:
        out.add(*(f"acc{mark} = tl.where(has_none, 0.0, acc{mark})" for mark in marks(spec)))
    rows = "all_rows" if spec.grouped else "rows"
    with out.block("if SPLIT == 1:"):
        out.add(call("finish", _finish_args(spec)))
    with out.block("else:"):
        for number, mark in enumerate(marks(spec)):
            out.add(
                _share_index(spec, number, rows),
                f"tl.store(partial + where, acc{mark}, mask={mask})",
            )
