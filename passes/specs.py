"""From a site to the text of its kernel: what is multiplied, in which dtypes, under which name."""

from __future__ import annotations

import dataclasses

import torch

from fxquant.codegen.spec import Epilogue, KernelSpec, Outliers
from fxquant.passes.context import LinearSite
from fxquant.schemes import OutlierColumns


def spec_of(
    site: LinearSite,
    x_dtype: torch.dtype,
    out_dtype: torch.dtype,
    *,
    biased: bool,
    compute: str | None,
) -> KernelSpec:
    """The kernel of a site.

    Args:
        site: Says the operand and the recipe.
        x_dtype: Of the activation as the kernel gets it; int8 when it arrives quantized.
        out_dtype: Of the result.
        biased: Whether a bias is added.
        compute: Dtype of the products that the options ask for.
    """
    x, out = name_of(x_dtype), name_of(out_dtype)
    recipe = site.recipe
    assert recipe is not None, "the plan pass ran"
    outliers = _outliers(recipe.outliers, x) if recipe.outliers is not None else None
    spec = KernelSpec(
        weight=site.operand,
        x_dtype=x,
        compute_dtype="int8" if recipe.activation is not None else compute or x,
        out_dtype=out,
        epilogue=Epilogue.bias(out) if biased else Epilogue(),
        outliers=outliers,
    )
    return dataclasses.replace(spec, name=_kernel_name(spec))


def _outliers(rule: OutlierColumns, x_dtype: str) -> Outliers:
    """The columns in 16 bits; those of float32 activations in float16, as in the paper."""
    return Outliers("float16" if x_dtype == "float32" else x_dtype, threshold=rule.threshold)


def name_of(dtype: torch.dtype) -> str:
    """A dtype's name, as in ``"bfloat16"``."""
    return str(dtype).removeprefix("torch.")


def _kernel_name(spec: KernelSpec) -> str:
    """A name that says what a kernel does, as in ``nf4_linear_1536x384_bias``.

    With activations in int8: ``nf4xint8_linear_1536x384_bias``.
    """
    weight = spec.weight
    encoding = weight.encoding
    if encoding.is_uniform:
        kind = f"int{encoding.bits}"
    else:
        kind = encoding.levels if isinstance(encoding.levels, str) else f"codebook{encoding.bits}"
    kind += "xint8" if spec.compute_dtype == "int8" else ""
    batch = "" if weight.batch is None else f"{weight.batch}x"
    words = [kind, "linear" if weight.batch is None else "bmm", f"{batch}{weight.n}x{weight.k}"]
    words += ["outliers"] if spec.outliers is not None else []
    return "_".join([*words, *(["bias"] if spec.epilogue.operands else [])])
