"""The Triton target: for one spec a Python module with its kernels and a launcher.

`tiles` chooses the variants, `decode` prints how codes become numbers, `kernels` the skeletons and
the epilogue, `launch` the function ``run``, `ops` spells pointwise work. Printing needs no Triton.
"""

from __future__ import annotations

from fxquant import errors
from fxquant.codegen.header import Header
from fxquant.codegen.indexing import WeightIndex
from fxquant.codegen.spec import KernelSpec
from fxquant.codegen.triton import decode, kernels, launch
from fxquant.codegen.triton.printer import Lines
from fxquant.codegen.triton.tiles import plan


def render(spec: KernelSpec, header: Header) -> str:
    """The kernels of a spec, as an importable Python module.

    The module has ``run(x, weight, extra, out=None)``; ``prepare(device)`` when levels are read
    from a table; and for `fxquant.runtime.cubin` ``TYPES``, ``VARIANTS`` and ``REDUCTIONS``.

    Raises:
        KernelError: The epilogue holds an op that the target cannot spell.
        NotPrintedError: The spec rounds activations to int8.
    """
    if spec.compute_dtype == "int8":
        beside = "" if spec.outliers is None else " and outliers"
        raise errors.not_printed("triton", f"compute_dtype 'int8'{beside}")
    index = WeightIndex.of(spec.weight)
    variants = plan(spec, index)
    out = Lines()
    out.add(*header.comment(spec).splitlines(), "")
    if decode.tables(spec.weight.encoding):
        out.add("import functools")
    out.add(*(["import math", ""] if spec.weight.batch is None else [""]))
    out.add("import torch", "import triton", "import triton.language as tl")
    decode.print_imports(out, spec.weight.encoding)
    decode.print_constants(out, spec.weight.encoding)
    decode.print_decode(out, spec.weight, index, variants, spec.compute_dtype)
    kernels.print_finish(out, spec, variants)
    kernels.print_gemv(out, spec, variants)
    kernels.print_gemm(out, spec, variants)
    if variants.splits:
        kernels.print_reduce(out, spec)
    launch.print_types(out, spec)
    launch.print_variants(out, spec, variants)
    launch.print_reductions(out, spec, variants)
    launch.print_run(out, spec, variants)
    return out.text()
