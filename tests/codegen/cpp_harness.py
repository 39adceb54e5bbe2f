"""Builds printed C++ kernels for every instruction set that runs here, and calls them."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Container
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import torch
from hypothesis import Phase, given, settings
from hypothesis.strategies import SearchStrategy
from torch import Tensor

from fxquant.codegen import Header, KernelSpec, cpp, reference
from fxquant.codegen.cpp.isa import ISAS, Isa
from fxquant.codegen.cpp.plan import Plan
from fxquant.runtime import toolchain
from fxquant.runtime.memory import Block
from tests.codegen import harness, plain_int8

UNIT = 2.0**-24
SMALLEST_NORMAL = 2.0**-126
FEW, MANY = 0, 1
GUARD = 64
"""Elements behind a result that nothing may write to."""


def isas() -> list[str]:
    """Names of the instruction sets that this processor runs, the best first."""
    found = toolchain.cpu_features()
    return [isa.name for isa in ISAS.values() if found.issuperset(isa.features)]


class Kernel:
    """A built kernel, called below the checks of `fxquant.runtime.cpp`."""

    def __init__(self, spec: KernelSpec, isa: Isa, *, openmp: bool = True) -> None:
        compiler = toolchain.compiler()
        assert compiler is not None
        chain = toolchain.Toolchain(compiler, isa, openmp)
        library = toolchain.build(chain, spec.name, cpp.render(spec, Header(), isa))
        self.spec, self.isa, self._library = spec, isa, ctypes.CDLL(str(library))
        pointer, long, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
        self._library.fxquant_prepared_bytes.restype = long
        self._library.fxquant_scratch_bytes.restype = long
        self._library.fxquant_scratch_bytes.argtypes = [long, number]
        self._library.fxquant_prepare.argtypes = [pointer, pointer, number]
        self._library.fxquant_prepare.restype = None
        run = [*[pointer] * 2, *[long] * 4, pointer, pointer, pointer, number, number]
        self._library.fxquant_run.argtypes, self._library.fxquant_run.restype = run, None

    def prepare(self, tensors: list[Tensor], threads: int = 1) -> Block:
        """The repacked weight, in memory that held something else."""
        block = _filled(self._library.fxquant_prepared_bytes())
        self._library.fxquant_prepare(_pointers(tensors), block.address, threads)
        return block

    def run(
        self,
        prepared: Block,
        x: Tensor,
        extra: list[Tensor],
        variant: int = FEW,
        threads: int = 1,
    ) -> Tensor:
        """The result; scratch memory and the result's held NaN before.

        Args:
            prepared: The repacked weight.
            x: ``[m, k]`` or ``[batch, m, k]``, any strides.
            extra: Further operands, contiguous.
            variant: Which skeleton.
            threads: How many run.
        """
        spec, rows = self.spec, x.shape[-2]
        shape = (*x.shape[:-1], spec.weight.n)
        if rows == 0:
            return torch.empty(shape, dtype=getattr(torch, spec.out_dtype))
        x_e = x.stride(0) if spec.weight.batch else 0
        count = functools.reduce(int.__mul__, shape)
        out = torch.full((count + GUARD,), torch.nan, dtype=getattr(torch, spec.out_dtype))
        scratch = _filled(self._library.fxquant_scratch_bytes(rows, threads))
        place = (x.data_ptr(), x_e, x.stride(-2), x.stride(-1), rows)
        last = (_pointers(extra), scratch.address, threads, variant)
        self._library.fxquant_run(prepared.address, *place, out.data_ptr(), *last)
        assert out[count:].isnan().all(), "written behind the result"
        return out[:count].view(shape)


def _filled(size: int) -> Block:
    block = Block(size)
    ctypes.memset(block.address, 0xFF, size)
    return block


def _pointers(tensors: list[Tensor]) -> Any:
    assert all(tensor.is_contiguous() for tensor in tensors)
    return (ctypes.c_void_p * len(tensors))(*[tensor.data_ptr() for tensor in tensors])


class Builder:
    """Builds side by side; a kernel that was asked for before is waited for.

    Args:
        whole: Specs and instruction sets whose kernels have panels of all heights. Compilers take
            less than half as long for the others, which have some: of one row, and of more.
    """

    def __init__(self, whole: Container[tuple[KernelSpec, str]] = ()) -> None:
        self._pool, self._whole = ThreadPoolExecutor(2), whole
        self._asked: dict[tuple[KernelSpec, str, bool], Future[Kernel]] = {}

    def start(self, spec: KernelSpec, isa: str, *, openmp: bool = True) -> Future[Kernel]:
        """Begins to build."""
        key = (spec, isa, openmp)
        if key not in self._asked:
            made_for = ISAS[isa]
            if (spec, isa) not in self._whole:
                made_for = replace(made_for, few_heights=(4, 1), many_heights=(2,))
            self._asked[key] = self._pool.submit(Kernel, spec, made_for, openmp=openmp)
        return self._asked[key]

    def kernel(self, spec: KernelSpec, isa: str, *, openmp: bool = True) -> Kernel:
        """What was built."""
        return self.start(spec, isa, openmp=openmp).result()

    def close(self) -> None:
        """Leaves what was not begun."""
        self._pool.shutdown(cancel_futures=True)


def drawn(strategy: SearchStrategy[KernelSpec], count: int) -> list[KernelSpec]:
    """Specs to build all at once: new ones at each run, the same ones in CI."""
    found: list[KernelSpec] = []

    @settings(max_examples=count, phases=[Phase.generate], database=None, deadline=None)
    @given(strategy)
    def collect(spec: KernelSpec) -> None:
        found.append(spec)

    collect()
    return found


def rows_of(
    spec: KernelSpec, count: int, *, outliers: tuple[int, ...] = (), seed: int = 1
) -> Tensor:
    """An activation whose rows 1, 2 .. pick one input each, and that is random behind and before.

    A row that picks an input gives the weights of that input with hardly a rounding, which tells
    any two codes and scales apart. Row 0 is large in columns of `outliers`, which makes them such
    for any number of rows.
    """
    x, k = harness.activation(spec, count, seed), spec.weight.k
    last = min(count, k + 1)
    x = x if spec.is_quantized else x.clamp(-3, 3)
    x[..., 1:last, :] = 0
    x[..., range(1, last), range(last - 1)] = 127 if spec.is_quantized else 1
    x[..., 0, list(outliers)] = 40
    return x


def allowed(
    spec: KernelSpec, isa: str, x: Tensor, tensors: list[Tensor], extra: list[Tensor]
) -> Tensor:
    """How far a kernel may be from `reference.run`: the errors of both, element by element.

    Over what `harness.bound` and `plain_int8.sums` say of sums in float32 and of the reference:

    - a kernel rounds levels to the dtype of the product and scales sums in float32, or rounds
      scaled levels: each weight is off by half a unit in its last place and four roundings, and
      the reference's by half a unit (of float16 also below the smallest normal number);
    - with zero points it may sum ``x * code`` and ``x * zero`` apart: roundings are relative to
      both magnitudes, not to that of the difference;
    - weights whose scales change from input to input are scaled one by one under int8, too;
    - vdpbf16ps takes subnormal numbers, read and written, for zeros.
    """
    plan, k = Plan(spec, ISAS[isa]), spec.weight.k
    zeros = zeros_apart(spec, tensors).transpose(-1, -2)
    if spec.compute_dtype == "int8":
        own = plain_int8.sums(spec, x, tensors, extra, decoded_apart=True)
        exact = plain_int8.sums(spec, x, tensors, extra)
        outliers = torch.from_numpy(own.outliers[:, None]).reshape(*x.shape[:-2], 1, k)
        inner = torch.where(outliers, 0, x.double().abs()).nan_to_num(0, 0)
        # A rounded number is larger than itself by half a step at most.
        inner = inner + inner.amax(-1, keepdim=True) / 254
        if spec.is_quantized:
            inner = x.double().abs() * extra[-1].double().unsqueeze(-1).nan_to_num(0) / 127
        size = exact.magnitude + 2 * inner @ zeros
        roundings = k + 8 if plan.path == "f32" else 4 if spec.weight.encoding.zero_point else 0
        errors = (own.bound + roundings * UNIT * size, exact.bound)
        return sum(harness.through_epilogue(spec, exact.magnitude, e, extra) for e in errors)
    dtype = getattr(torch, spec.compute_dtype)
    eps = 0.0 if dtype == torch.float32 else torch.finfo(dtype).eps / 2
    size = x.to(dtype).double().abs()
    weight = reference.operand(spec.weight, tensors, torch.float32).double().abs()
    magnitude = size @ weight.transpose(-1, -2)
    sums = k * UNIT * magnitude
    lost = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps / 2 if eps else 0.0
    lost = size.sum(-1, keepdim=True) * lost
    if plan.path == "bf16":
        lost = lost + SMALLEST_NORMAL * (weight.sum(-1) + 2 * k).unsqueeze(-2)
    own = (k + 6) * UNIT * (magnitude + 2 * size @ zeros) + (eps + 4 * UNIT) * magnitude + lost
    errors = (own, sums + eps * magnitude + lost)
    return sum(harness.through_epilogue(spec, magnitude, e, extra) for e in errors)


def zeros_apart(spec: KernelSpec, tensors: list[Tensor]) -> Tensor:
    """Magnitudes of ``zero * scale``, as the logical weight: 0 without zero points."""
    weight = reference.operand(spec.weight, tensors, torch.float32).double()
    if not spec.weight.encoding.zero_point:
        return torch.zeros_like(weight)
    without = [*tensors[:-1], torch.zeros_like(tensors[-1])]
    return (reference.operand(spec.weight, without, torch.float32).double() - weight).abs()
