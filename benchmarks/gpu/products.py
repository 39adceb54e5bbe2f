"""Our products on a GPU: the specs that a compile makes, by scheme."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.contenders import THRESHOLD
from fxquant.codegen import Header
from fxquant.codegen.quantize import QuantizeSpec
from fxquant.codegen.spec import KernelSpec, Outliers, WeightOperand
from fxquant.formats import Encoding, pack
from fxquant.formats.check import expected_parts
from fxquant.runtime import launch
from fxquant.runtime import ops as _registered  # noqa: F401 - torch.ops.fxquant
from fxquant.schemes import get_scheme

Call = Callable[..., Any]


@dataclass(frozen=True)
class Prepared:
    """A weight made ready, once, ahead of the calls.

    Attributes:
        call: The product; takes what `given` makes of the activation.
        weight_bytes: What a call has to read of the weight.
        given: From the bfloat16 activation ``[m, k]``; not timed.
    """

    call: Call
    weight_bytes: int
    given: Callable[[Tensor], tuple[Tensor, ...]] = lambda x: (x,)


@dataclass(frozen=True)
class Contender:
    """One way to compute a product.

    Attributes:
        name: In tables and files.
        prepare: From a bfloat16 weight ``[n, k]`` on the device.
        unit: What its dot products multiply.
        tolerance: Error of its result, relative to the exact product (Frobenius norms), above which
            it computes something else.
        outliers: The activation has outlier columns.
        least_rows: It takes no fewer.
    """

    name: str
    prepare: Callable[[Tensor], Prepared]
    unit: str = "bfloat16"
    tolerance: float = 0.02
    outliers: bool = False
    least_rows: int = 1


@dataclass(frozen=True)
class Scheme:
    """What a scheme multiplies with.

    Attributes:
        encoding: Of the weight.
        compute: Dtype of the product.
        outliers: Columns that stay in floats.
        coded: The activation comes as codes, which the norm before has made.
        tolerance: As in `Contender`.
    """

    encoding: Encoding
    compute: str = "bfloat16"
    outliers: Outliers | None = None
    coded: bool = False
    tolerance: float = 0.03

    def spec(self, n: int, k: int, name: str) -> KernelSpec:
        """The product with a weight ``[n, k]``."""
        operand = WeightOperand.whole(self.encoding, (n, k), transposed=False)
        return KernelSpec(
            operand,
            "int8" if self.coded else "bfloat16",
            self.compute,
            "bfloat16",
            name=f"{name}_{n}x{k}",
            outliers=self.outliers,
        )


def _encoding(name: str) -> Encoding:
    return get_scheme(name).recipe.weight


@functools.cache
def schemes() -> dict[str, Scheme]:
    """What is measured; the kernel behind ``smoothquant`` is given codes, that of ``w8a8`` not."""
    int8 = _encoding("int8")
    found = Outliers("bfloat16", threshold=THRESHOLD)
    return {
        "nf4": Scheme(_encoding("nf4"), tolerance=0.15),
        "int8": Scheme(int8),
        "w8a8": Scheme(int8, "int8"),
        "smoothquant": Scheme(int8, "int8", coded=True),
        "llm_int8": Scheme(int8, "int8", found),
    }


def ours(target: str) -> list[Contender]:
    """All schemes on a target."""
    return [
        Contender(
            f"fxquant {name}",
            functools.partial(_prepare, name, target),
            "int8" if scheme.compute == "int8" else "bfloat16",
            scheme.tolerance,
            scheme.outliers is not None,
        )
        for name, scheme in schemes().items()
    ]


def _prepare(name: str, target: str, weight: Tensor) -> Prepared:
    return bound(
        name,
        target,
        weight.shape[0],
        weight.shape[1],
        pack(weight, schemes()[name].encoding).tensors(),
    )


def bound(name: str, target: str, n: int, k: int, parts: list[Tensor]) -> Prepared:
    """A product with a weight that is stored already."""
    scheme, device = schemes()[name], parts[0].device
    text = spec_text(name, n, k)
    launch.prepare(text, target, Header(), device)
    size = sum(part.nbytes for part in parts)
    if not scheme.coded:
        return Prepared(lambda x: torch.ops.fxquant.launch(x, parts, [], text, target), size)
    rows = QuantizeSpec(k, "bfloat16").to_json()

    def given(x: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.ops.fxquant.quantize(x, [], rows))

    def call(codes: Tensor, amax: Tensor) -> Tensor:
        return torch.ops.fxquant.launch(codes, parts, [amax], text, target)

    return Prepared(call, size, given)


def compile_all(name: str, shape: tuple[int, int], rows: int, *, candidates: bool = False) -> None:
    """Compiles what runs for some rows, into Triton's cache on the disk, by running it.

    Args:
        name: Of the scheme.
        shape: Of the weight.
        rows: Of the activation.
        candidates: All tiles that tuning would try, too.
    """
    n, k = shape
    encoding = schemes()[name].encoding
    sizes = expected_parts(encoding, shape)
    parts = [torch.ones(size, dtype=dtype, device="cuda") for size, dtype in sizes.values()]
    prepared = bound(name, "triton", n, k, parts)
    given = prepared.given(torch.ones(rows, k, dtype=torch.bfloat16, device="cuda"))
    prepared.call(*given)
    if candidates:
        launch.each_tile(spec_text(name, n, k), rows, lambda: prepared.call(*given))
    torch.cuda.synchronize()


def spec_text(name: str, n: int, k: int) -> str:
    """A product's spec as JSON."""
    return schemes()[name].spec(n, k, name).to_json()


def tune(name: str, shape: tuple[int, int]) -> None:
    """Chooses the tiles of a scheme for a shape by timing them."""
    text, device = spec_text(name, *shape), torch.device("cuda")
    launch.prepare(text, "triton", Header(), device)
    launch.tune(text, "triton", device)
