"""What is timed: a product that someone computes in few bits, and what it is asked to compute."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Product = Callable[[Tensor], Tensor]

OUTLIER_SHARE = 0.01
THRESHOLD = 6.0
"""Of LLM.int8(): larger activations are outliers."""


@dataclass(frozen=True)
class Prepared:
    """A weight made ready, once, ahead of the calls.

    Attributes:
        product: From an activation ``[m, k]`` to ``[m, n]``.
        weight_bytes: What a call has to read of the weight.
    """

    product: Product
    weight_bytes: int


@dataclass(frozen=True)
class Contender:
    """One way to compute a product.

    Attributes:
        name: In tables and files.
        prepare: From a float32 weight ``[n, k]``.
        x_dtype: Of the activation that it gets.
        unit: What its dot products multiply, for the roofline (`benchmarks.machine.UNITS`).
        tolerance: Error of its result, relative to the exact product (Frobenius norms), above which
            it computes something else.
        outliers: The activation has outlier columns.
        finish: What its result is of the exact product.
    """

    name: str
    prepare: Callable[[Tensor], Prepared]
    x_dtype: torch.dtype
    unit: str
    tolerance: float
    outliers: bool = False
    finish: Product = lambda exact: exact


def make_weight(n: int, k: int) -> Tensor:
    """A float32 weight ``[n, k]`` with the spread of a trained one."""
    return torch.randn(n, k, generator=torch.Generator().manual_seed(0)) * k**-0.5


def make_activation(m: int, k: int, *, outliers: bool) -> Tensor:
    """A float32 activation ``[m, k]``, below `THRESHOLD` but for its outlier columns."""
    x = torch.randn(m, k, generator=torch.Generator().manual_seed(1)).clamp(-5.0, 5.0)
    if outliers:
        columns = outlier_columns(k).long()
        values = x[:, columns]
        x[:, columns] = torch.where(values < 0, values - 8.0, values + 8.0)
    return x


def outlier_columns(k: int) -> Tensor:
    """The numbers (int32) of the outlier columns out of k, `OUTLIER_SHARE` of them."""
    count = max(1, round(k * OUTLIER_SHARE))
    drawn = torch.randperm(k, generator=torch.Generator().manual_seed(2))[:count]
    return drawn.sort().values.int()


def relative_error(result: Tensor, exact: Tensor) -> float:
    """Frobenius norm of the difference, over that of the exact result."""
    return float((result.float() - exact).norm() / exact.norm())


def chosen(known: Sequence[Contender], patterns: Iterable[str]) -> list[Contender]:
    """The contenders whose names match one of the patterns (fnmatch).

    Raises:
        SystemExit: A pattern matches none.
    """
    names = [contender.name for contender in known]
    found: set[str] = set()
    for pattern in patterns:
        matching = fnmatch.filter(names, pattern)
        if not matching:
            raise SystemExit(f"No contender is called {pattern!r}. There are: {'; '.join(names)}.")
        found.update(matching)
    return [contender for contender in known if contender.name in found]
