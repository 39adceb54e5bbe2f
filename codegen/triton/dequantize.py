"""Prints products of many rows by the vendor's library: the weight is decoded to memory for it.

Every row that is multiplied with a decoded tile makes decoding cheaper. From some hundreds on
a library's product is quicker than one that decodes in its loop, the way to memory included; chunks
of outputs that stay in the cache spare that. `cost` and tuning say when.
"""

from __future__ import annotations

from fxquant.codegen.indexing import WeightIndex
from fxquant.codegen.spec import KernelSpec
from fxquant.codegen.triton import decode
from fxquant.codegen.triton.cost import is_direct
from fxquant.codegen.triton.kernels import marks, operand_names, print_reduce_call, result_names
from fxquant.codegen.triton.plan import Plan
from fxquant.codegen.triton.printer import Lines, call, wrap_items
from fxquant.codegen.triton.tiles import CHUNKED

_DECODE = "decode_tile"


def print_kernel(out: Lines, spec: KernelSpec, index: WeightIndex, plan: Plan) -> None:
    """The kernel ``dequantize``, and what it decodes with unless that is there already."""
    weight, name = spec.weight, "decode"
    if plan.form.scaling != "elements":
        name = _DECODE
        decode.Decode(out, weight, index, plan, spec.compute_dtype, name).print()
    pointers = decode.parameters(weight.encoding)
    params = [*pointers, "dense", "first", "BLOCK_N: tl.constexpr", "BLOCK_K: tl.constexpr"]
    doc = "Outputs first .. first + CHUNK of the weight, decoded to memory."
    with out.function(f"{spec.name}_dequantize", [*params, "CHUNK: tl.constexpr"], doc):
        masks = [] if plan.whole_n else ["(row < CHUNK)"]
        masks += [] if plan.whole_k else [f"(k < {weight.k})"]
        mask = f", mask={' & '.join(masks)}" if masks else ""
        out.add(
            "start = tl.program_id(0) * BLOCK_N",
            "n0, k0 = first + start, tl.program_id(1) * BLOCK_K",
            f"w = {call(name, [*pointers, 'n0', 'k0', 'BLOCK_N', 'BLOCK_K'])}",
            "row = (start + tl.arange(0, BLOCK_N)).to(tl.int64)[:, None]",
            "k = k0 + tl.arange(0, BLOCK_K)[None, :]",
            f"tl.store(dense + (row * {weight.k} + k), w{mask})",
        )


def arguments(spec: KernelSpec) -> list[str]:
    """What ``run_decoded`` takes from ``run``."""
    parts = [part + mark for mark in marks(spec) for part in spec.weight.encoding.parts]
    tables = [*decode.tables(spec.weight.encoding)]
    return ["x", *parts, *tables, *operand_names(spec), *result_names(spec), "tile", "options"]


def print_run(out: Lines, spec: KernelSpec) -> None:
    """The function ``run_decoded``: decodes and multiplies, a chunk after the other."""
    weight, dtype = spec.weight, spec.compute_dtype
    direct = is_direct(spec)
    if not direct:
        _print_sums(out)
    out.add("", "")
    out.add("def run_decoded(", *wrap_items(arguments(spec), 4), "):")
    with out.indented():
        cast = "" if spec.x_dtype == dtype else f".to(torch.{dtype})"
        out.add(
            '"""The weight decoded to memory, and torch\'s own product with it."""',
            f'chunk = tile["{CHUNKED}"]',
            f"dense = torch.empty((chunk, {weight.k}), dtype=torch.{dtype}, device=x.device)",
            f'grid = (-(-chunk // tile["BLOCK_N"]), -(-{weight.k} // tile["BLOCK_K"]))',
        )
        if cast:
            out.add(f"x = x{cast}")
        out.add("rows = x.shape[0]")
        if direct:
            out.add(f"sums = [out.view(rows, {weight.n})]")
        else:
            out.add(
                f"sums = torch.empty(({spec.weights}, rows, {weight.n}), "
                "dtype=torch.float32, device=x.device)"
            )
        for number, mark in enumerate(marks(spec)):
            pointers = decode.parameters(weight.encoding, [mark])
            args = wrap_items([*pointers, "dense", "first", "**tile", "**options"], 4, 92)
            with out.block(f"for first in range(0, {weight.n}, chunk):"):
                out.add(f"{spec.name}_dequantize[grid](", *args, ")")
                part = f"sums[{number}][:, first : first + chunk]"
                product = "torch.mm(x, dense.t(), out={})" if direct else "multiply(x, dense, {})"
                out.add(product.format(part))
        if not direct:
            print_reduce_call(out, spec, "sums", "1")


def _print_sums(out: Lines) -> None:
    out.add("", "")
    with out.block("def multiply(x, dense, sums):"):
        out.add('"""The product with float32 sums, for the epilogue."""')
        with out.block("if x.is_cuda:"):
            out.add("torch.mm(x, dense.t(), out_dtype=torch.float32, out=sums)")
        with out.block("else:  # interpreted"):
            out.add("torch.mm(x.float(), dense.float().t(), out=sums)")
