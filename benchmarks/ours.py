"""Our contenders: `torch.ops.fxquant.linear` with the specs that the compiler would make."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.contenders import THRESHOLD, Contender, Prepared, outlier_columns
from fxquant.codegen.epilogue import Epilogue, EpilogueNode, EpilogueOperand
from fxquant.codegen.spec import KernelSpec, Outliers, WeightOperand
from fxquant.formats import Encoding, pack
from fxquant.runtime import ops as _registered  # noqa: F401 - torch.ops.fxquant
from fxquant.runtime import targets
from fxquant.schemes import get_scheme

NF4, INT8 = (get_scheme(name).recipe.weight for name in ("nf4", "int8"))
BIAS_GELU = Epilogue(
    (EpilogueOperand("n", "float32"),),
    (
        EpilogueNode("aten.add.Tensor", ("%acc", "%in0")),
        EpilogueNode("aten.gelu.default", ("%0",)),
    ),
)
FOUND = Outliers("bfloat16", threshold=THRESHOLD)
# What a result may be off: rounding x to int8 adds little to rounding the weight to 4 bits.
TOLERANCES = {NF4: 0.15, INT8: 0.03}
INT8_NAME = "int8 x int8"


def ours() -> list[Contender]:
    """All of them."""
    known, found = f"{INT8_NAME}, 1% outliers, known", f"{INT8_NAME}, 1% outliers"
    return [
        _contender("nf4 x bf16", NF4, "bfloat16", "bfloat16"),
        _contender("nf4 x fp32", NF4, "float32", "float32"),
        _contender("nf4 x int8", NF4, "bfloat16", "int8"),
        _contender(INT8_NAME, INT8, "float32", "int8"),
        _contender(f"{INT8_NAME} + bias + gelu", INT8, "float32", "int8", epilogue=BIAS_GELU),
        _contender(found, INT8, "bfloat16", "int8", outliers="found"),
        _contender(known, INT8, "bfloat16", "int8", outliers="known"),
    ]


def require_kernels() -> None:
    """Stops where our kernels would not run: timing the fallback under their name is no result.

    Raises:
        SystemExit: The C++ target does not serve CPU tensors here.
    """
    choice = targets.choose("auto", torch.device("cpu"))
    if choice.runs != "cpp":
        because = choice.note or "it is not the target of CPU tensors"
        raise SystemExit(
            f"The kernels of target 'cpp' do not run here ({because}), so fxquant cannot be timed. "
            "To time the others alone: --contenders 'torch*' 'bitsandbytes*'."
        )


def _bias(n: int) -> Tensor:
    return torch.linspace(-1.0, 1.0, n)


def _contender(
    name: str,
    encoding: Encoding,
    x_dtype: str,
    compute_dtype: str,
    *,
    epilogue: Epilogue = Epilogue(),  # noqa: B008 - frozen
    outliers: str = "",
) -> Contender:
    """A contender; `outliers` is ``"found"`` (in each call) or ``"known"`` (set apart before)."""

    def prepare(weight: Tensor) -> Prepared:
        n, k = weight.shape
        parts = pack(weight, encoding).tensors()
        extra = [_bias(n)] if epilogue.operands else []
        apart = FOUND if outliers else None
        if outliers == "known":
            columns = outlier_columns(k)
            apart = Outliers("bfloat16", columns=len(columns))
            extra += [columns, weight[:, columns.long()].bfloat16()]
        operand = WeightOperand.whole(encoding, (n, k), transposed=False)
        kind = encoding.levels if encoding.bits < 8 else "int8"
        spec = KernelSpec(
            operand,
            x_dtype,
            compute_dtype,
            x_dtype,
            epilogue,
            f"{kind}_linear_{n}x{k}",
            apart,
        ).to_json()
        size = sum(tensor.nbytes for tensor in (*parts, *extra))
        return Prepared(lambda x: torch.ops.fxquant.linear(x, parts, extra, spec, -1), size)

    def finish(exact: Tensor) -> Tensor:
        if not epilogue.operands:
            return exact
        return torch.nn.functional.gelu(exact + _bias(exact.shape[-1]))

    dtype: torch.dtype = getattr(torch, x_dtype)
    return Contender(
        f"fxquant {name}",
        prepare,
        dtype,
        compute_dtype,
        TOLERANCES[encoding],
        bool(outliers),
        finish,
    )
