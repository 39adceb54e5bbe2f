"""Runs printed Triton modules in Triton's interpreter, beside compiled ones in one process."""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import torch
import triton
import triton.language
from torch import Tensor

from fxquant.codegen import RENDERERS, Header, KernelSpec
from fxquant.codegen.spec import WeightOperand
from fxquant.formats import Encoding, pack

_COUNT = itertools.count()


@contextlib.contextmanager
def _interpretation(*, wanted: bool) -> Iterator[None]:
    before = triton.knobs.runtime.interpret
    triton.knobs.runtime.interpret = wanted
    try:
        yield
    finally:
        triton.knobs.runtime.interpret = before


def load(spec: KernelSpec, folder: Path, *, interpreted: bool) -> ModuleType:
    """Prints and imports a spec's module; Triton decides at import whether to interpret."""
    name = f"printed_{next(_COUNT)}"
    path = folder / f"{name}.py"
    path.write_text(RENDERERS["triton"](spec, Header()), encoding="utf-8")
    found = importlib.util.spec_from_file_location(name, path)
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    sys.modules[name] = module
    with _interpretation(wanted=interpreted):
        found.loader.exec_module(module)
    return module


def stored(encoding: Encoding, shape: tuple[int, ...], seed: int = 0) -> list[Tensor]:
    """A packed random weight."""
    generator = torch.Generator().manual_seed(seed)
    return pack(torch.randn(shape, generator=generator), encoding).tensors()


def activation(spec: KernelSpec, rows: int, seed: int = 1) -> Tensor:
    """A random activation with that many rows."""
    weight = spec.weight
    shape = (rows, weight.k) if weight.batch is None else (weight.batch, rows, weight.k)
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(getattr(torch, spec.x_dtype))


def operands(spec: KernelSpec, rows: int, seed: int = 2) -> list[Tensor]:
    """Random operands of the epilogue, with the sizes of their axes."""
    sizes = {"e": spec.weight.batch or 1, "m": rows, "n": spec.weight.n}
    generator = torch.Generator().manual_seed(seed)
    made = []
    for operand in spec.epilogue.operands:
        value = torch.randn([sizes[axis] for axis in operand.dims], generator=generator)
        made.append(
            value > 0 if operand.dtype == "bool" else value.to(getattr(torch, operand.dtype))
        )
    return made


def tolerance(spec: KernelSpec, x: Tensor, weight: Tensor) -> Tensor:
    """How far two right ways to sum may be apart, element by element.

    Two float32 sums of k products differ by at most ``2 k u sum|x||w|`` (Higham, Accuracy and
    Stability of Numerical Algorithms, equation 3.5, u = 2^-24). A float32 weight may differ by
    three roundings (the scale's multiply-add is fused or not), and then round to the neighbour in
    the dtype of the product: one unit in its last place.
    """
    magnitude = (x.double().abs() @ weight.double().abs().transpose(-1, -2)).float()
    ulp = {"float32": 3 * 2.0**-24, "float16": 2.0**-10, "bfloat16": 2.0**-7}[spec.compute_dtype]
    out = torch.finfo(getattr(torch, spec.out_dtype)).eps
    return magnitude * (2 * spec.weight.k * 2.0**-24 + ulp) + (magnitude + 1) * out


def whole(encoding: Encoding, *shape: int, transposed: bool = False) -> WeightOperand:
    """All of a parameter."""
    return WeightOperand.whole(encoding, shape, transposed=transposed)
