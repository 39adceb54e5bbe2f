"""Runs printed Triton modules in Triton's interpreter, beside compiled ones in one process."""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
import triton
import triton.language
from torch import Tensor
from triton.runtime.interpreter import InterpreterBuilder

from fxquant.codegen import Header, KernelSpec
from fxquant.codegen.quantize import QuantizeSpec
from fxquant.codegen.spec import WeightOperand
from fxquant.codegen.triton import render
from fxquant.codegen.triton.gpu import ANY, Gpu
from fxquant.formats import Encoding, pack
from fxquant.runtime.cubin import Build
from tests.codegen import plain_int8

_COUNT = itertools.count()

# Of a number and NaN GPUs take the number, and so does the interpreter from Triton 3.8 on.
InterpreterBuilder.create_maxnumf = lambda self, x, y: self.binary_op(x, y, np.fmax)
InterpreterBuilder.create_minnumf = lambda self, x, y: self.binary_op(x, y, np.fmin)


@contextlib.contextmanager
def interpretation(*, wanted: bool) -> Iterator[None]:
    before = triton.knobs.runtime.interpret
    triton.knobs.runtime.interpret = wanted
    try:
        yield
    finally:
        triton.knobs.runtime.interpret = before


def load(
    spec: KernelSpec | QuantizeSpec, folder: Path, *, interpreted: bool, gpu: Gpu = ANY
) -> ModuleType:
    """Prints and imports a spec's module; Triton decides at import whether to interpret."""
    name = f"printed_{next(_COUNT)}"
    path = folder / f"{name}.py"
    path.write_text(render(spec, Header(), gpu), encoding="utf-8")
    found = importlib.util.spec_from_file_location(name, path)
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    sys.modules[name] = module
    with interpretation(wanted=interpreted):
        found.loader.exec_module(module)
    if interpreted:
        # The interpreter leaves the reductions that it knows to NumPy; others take it long.
        for ours, known in (("add", "_sum_combine"), ("most", "_elementwise_max")):
            if hasattr(module, ours):
                setattr(module, ours, getattr(triton.language.standard, known))
    return module


def build_for(module: ModuleType, rows: int) -> Build:
    """The kernel of a product that runs for so many rows."""
    most = next((most for most in module.VARIANTS if rows <= most), max(module.VARIANTS))
    kernel, constants, options = module.VARIANTS[most]
    return Build(f"{kernel.__name__}_{most}", kernel, constants, options)


def split(module: ModuleType) -> None:
    """Makes programs of all tiles share their inputs, whatever the cost model says."""
    shares = min(count for count in module.REDUCTIONS if count > 1)
    for most, (kernel, constants, options) in list(module.VARIANTS.items()):
        if "SPLIT" in constants:
            module.VARIANTS[most] = kernel, {**constants, "SPLIT": shares}, options


def stored(encoding: Encoding, shape: tuple[int, ...], seed: int = 0) -> list[Tensor]:
    """A packed random weight."""
    generator = torch.Generator().manual_seed(seed)
    return pack(torch.randn(shape, generator=generator), encoding).tensors()


def activation(spec: KernelSpec, rows: int, seed: int = 1) -> Tensor:
    """A random activation with that many rows."""
    weight = spec.weight
    shape = (rows, weight.k) if spec.batch is None else (spec.batch, rows, weight.k)
    generator = torch.Generator().manual_seed(seed)
    if spec.is_quantized:
        return torch.randint(-127, 128, shape, generator=generator, dtype=torch.int8)
    return torch.randn(shape, generator=generator).to(getattr(torch, spec.x_dtype))


def operands(spec: KernelSpec, rows: int, seed: int = 2) -> list[Tensor]:
    """Random operands of the epilogue, with the sizes of their axes, and of what goes with x."""
    sizes = {"e": spec.weight.batch or 1, "m": rows, "n": spec.weight.n}
    generator = torch.Generator().manual_seed(seed)
    made = []
    for operand in spec.epilogue.operands:
        value = torch.randn([sizes[axis] for axis in operand.dims], generator=generator)
        made.append(
            value > 0 if operand.dtype == "bool" else value.to(getattr(torch, operand.dtype))
        )
    if spec.outliers is not None and spec.outliers.columns is not None:
        weight, count = spec.weight, spec.outliers.columns
        columns = torch.randperm(weight.k, generator=generator)[:count].to(torch.int32)
        shape = (weight.n, count) if weight.batch is None else (weight.batch, weight.n, count)
        made.append(columns)
        for _ in range(spec.weights):
            apart = torch.randn(shape, generator=generator)
            made.append(apart.to(getattr(torch, spec.outliers.dtype)))
    if spec.is_quantized:
        shape = (rows,) if spec.batch is None else (spec.batch, rows)
        made.append(torch.rand(shape, generator=generator) * 4 + 0.1)  # amax
    if spec.grouped:
        ends = torch.randint(0, rows + 1, (spec.weight.batch or 1,), generator=generator)
        made.append(ends.sort().values.to(torch.int32))
    return made


def plain_epilogue(spec: KernelSpec, acc: Tensor, extra: list[Tensor]) -> Tensor:
    """The epilogues of `tests.codegen.specs.epilogues`, written by hand."""
    extra = extra[: len(spec.epilogue.operands)]
    if not extra:
        return acc
    first = extra[0].unsqueeze(-2) if spec.epilogue.operands[0].dims == "en" else extra[0]
    if len(extra) == 1:
        return acc + first
    return torch.sigmoid(acc * first) + 2 * extra[1]


def bound(
    spec: KernelSpec, x: Tensor, weight: Tensor, extra: list[Tensor], *, decoded_apart: bool = False
) -> Tensor:
    """How far a result may be from the exact one, element by element.

    A float32 sum of k products errs by at most ``k u sum|x||w|`` (Higham, Accuracy and Stability
    of Numerical Algorithms, section 3.1, u = 2^-24); with `decoded_apart` the weights may be apart
    by the three roundings of a decode in float32, which can move one to the neighbour in the dtype
    of the product. Through ``sigmoid(acc * gate)`` an error grows by at most gate / 4; every
    operation of the epilogue rounds once; the result is rounded to its dtype.
    """
    magnitude = x.double().abs() @ weight.double().abs().transpose(-1, -2)
    unit = 2.0**-24
    moved = 0.0
    if decoded_apart:
        dtype = getattr(torch, spec.compute_dtype)
        moved = 4 * unit + (0.0 if dtype == torch.float32 else torch.finfo(dtype).eps)
    return through_epilogue(spec, magnitude, magnitude * (spec.weight.k * unit + moved), extra)


def int8_bound(
    spec: KernelSpec,
    x: Tensor,
    tensors: list[Tensor],
    extra: list[Tensor],
    *,
    decoded_apart: bool = False,
) -> Tensor:
    """The same for a spec with `compute_dtype` int8; `plain_int8.sums` says how it comes about.

    Args:
        spec: The product.
        x: The activation.
        tensors: The stored weight.
        extra: The operands of the epilogue and of outliers.
        decoded_apart: See `bound`; of the outliers' weights.
    """
    found = plain_int8.sums(spec, x, tensors, extra, decoded_apart=decoded_apart)
    return through_epilogue(spec, found.magnitude, found.bound, extra)


def through_epilogue(
    spec: KernelSpec, magnitude: Tensor, error: Tensor, extra: list[Tensor]
) -> Tensor:
    """The error of a result whose sums are off by `error` and are of `magnitude`."""
    unit = 2.0**-24
    extra = extra[: len(spec.epilogue.operands)]
    reach = magnitude
    for number, value in enumerate(extra):
        dims = spec.epilogue.operands[number].dims
        axes = "emn" if spec.weight.batch else "mn"
        sizes = zip(axes, magnitude.shape, strict=True)
        shape = [size if axis in dims else 1 for axis, size in sizes]
        reach = reach + 2 * value.double().abs().reshape(shape)
    if len(extra) == 2:
        error = error * extra[0].double().abs() / 4 + magnitude * extra[0].double().abs() * unit
    rounding = torch.finfo(getattr(torch, spec.out_dtype)).eps + 8 * unit
    return error + (reach + 2) * rounding


def whole(encoding: Encoding, *shape: int, transposed: bool = False) -> WeightOperand:
    """All of a parameter."""
    return WeightOperand.whole(encoding, shape, transposed=transposed)
