"""From a site to the text of its kernel: what is multiplied, in which dtypes, under which name."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch

from fxquant.codegen.epilogue import Epilogue
from fxquant.codegen.spec import KernelSpec, Outliers
from fxquant.passes.context import LinearSite


@dataclass(frozen=True)
class Asked:
    """What a kernel has to do beyond its site.

    Attributes:
        out_dtype: Of the result.
        biased: Whether a bias is added.
        compute: Dtype of the products that the options ask for, or None.
        columns: Outliers that are known beforehand.
    """

    out_dtype: torch.dtype
    biased: bool
    compute: str | None = None
    columns: int = 0


def spec_of(site: LinearSite, x_dtype: torch.dtype, asked: Asked) -> KernelSpec:
    """The kernel of a site.

    Args:
        site: Says the operand and the recipe.
        x_dtype: Of the activation as the kernel gets it; int8 when it arrives quantized.
        asked: The rest.
    """
    x, out = name_of(x_dtype), name_of(asked.out_dtype)
    recipe = site.recipe
    assert recipe is not None, "the plan pass ran"
    outliers = None
    if asked.columns:
        outliers = Outliers(name_of(outliers_dtype(x_dtype)), columns=asked.columns)
    elif recipe.outliers is not None and not recipe.outliers.static:
        outliers = Outliers(name_of(outliers_dtype(x_dtype)), threshold=recipe.outliers.threshold)
    spec = KernelSpec(
        weight=site.operand,
        x_dtype=x,
        compute_dtype="int8" if recipe.activation is not None else asked.compute or x,
        out_dtype=out,
        epilogue=Epilogue.bias(out) if asked.biased else Epilogue(),
        outliers=outliers,
        grouped=site.ends is not None,
    )
    return dataclasses.replace(spec, name=_kernel_name(spec))


def outliers_dtype(x_dtype: torch.dtype) -> torch.dtype:
    """In which the outliers of an activation are; of float32 in float16, as in the paper."""
    return torch.float16 if x_dtype == torch.float32 else x_dtype


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
    product = "grouped" if spec.grouped else "linear" if weight.batch is None else "bmm"
    words = [kind, product, f"{batch}{weight.n}x{weight.k}"]
    if spec.outliers is not None:
        words.append(f"{spec.outliers.columns or ''}outliers")
    return "_".join([*words, *(["bias"] if spec.epilogue.operands else [])])
