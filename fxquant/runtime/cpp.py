"""Calls C++ kernels: a shared object, repacked weights, and the way from torch to it.

What a printed kernel exports is told in `fxquant.codegen.cpp`. Everything that can be known before
a call is: this file is on the path of every product.
"""

from __future__ import annotations

import ctypes
import math
import os
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fxquant import errors
from fxquant.codegen.spec import KernelSpec
from fxquant.formats.check import misfit
from fxquant.formats.codes import stored
from fxquant.runtime import repacked
from fxquant.runtime.entry import Entry, contiguous_strides, empty
from fxquant.runtime.memory import Block, Scratch
from fxquant.runtime.repacked import Repacked, Several

_POINTER, _INT64, _INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
_SCRATCH = Scratch()
_FEW, _MANY = 0, 1
_MOST_SHAPES = 256


class _Shape(NamedTuple):
    """What the shape of an activation says about a call.

    Attributes:
        rows: Of each matrix.
        out: The results' shape.
        strides: Theirs.
        scratch: Bytes of scratch memory by the number of threads.
    """

    rows: int
    out: tuple[int, ...]
    strides: tuple[int, ...]
    scratch: dict[int, int]


class _Process:
    """What a fork changes.

    Attributes:
        forked: OpenMP's threads stay with the parent: a parallel region of the child would wait
            for them forever.
    """

    forked = False


def _after_fork() -> None:
    _Process.forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


class CppKernel:
    """A built kernel.

    Args:
        library: The shared object.
        spec: What it computes.
        openmp: Whether it was built with OpenMP.
        few_rows: Up to how many rows the skeleton for few rows runs.
        form: Of the repacked weight: kernels of one form share what they repack
            (`fxquant.codegen.cpp.layout.form`). None shares nothing.
        restore: Gives the stored codes from a repacked weight and the last byte of them, where
            that can be done (`fxquant.codegen.cpp.restore`).

    Attributes:
        library: The shared object.
        few_rows: As given, until it is set.
        restore: As given.

    Raises:
        CompilerError: The library cannot be loaded.
    """

    def __init__(
        self,
        library: Path,
        spec: KernelSpec,
        *,
        openmp: bool,
        few_rows: int,
        form: Hashable = None,
        restore: Callable[[Tensor, Tensor], Tensor] | None = None,
    ) -> None:
        self.library = library
        self.few_rows = few_rows
        self.restore = restore
        found = loaded(library, spec.name)
        self._size_of_prepared = exported(found, "prepared_bytes", [], _INT64)
        self._prepare = exported(found, "prepare", [_POINTER, _POINTER, _INT])
        self._size_of_scratch = exported(found, "scratch_bytes", [_INT64, _INT], _INT64)

        weight = spec.weight
        self.spec = spec
        self._is_single, self._is_grouped = not openmp, spec.grouped
        self._n, self._k, self._batch = weight.n, weight.k, spec.batch
        self._x_dtype = getattr(torch, spec.x_dtype)
        self._out_dtype = getattr(torch, spec.out_dtype)
        self._more = [getattr(torch, result.dtype) for result in spec.epilogue.more]
        self._extra = _operands(spec)
        self._listed = 1 + len(self._more) if self._more else 0
        self._entry = Entry(found, "run", 11 + self._listed + len(self._extra))
        self._shapes: dict[torch.Size, _Shape] = {}
        self._store = repacked.store(form)
        self._joined = repacked.Store() if spec.weights > 1 else self._store
        self._prepared = self._joined.found

    def run(
        self, x: Tensor, weight: Sequence[Tensor], extra: Sequence[Tensor]
    ) -> Tensor | list[Tensor]:
        """Computes the product on CPU tensors.

        Args:
            x: ``[.., k]``, or ``[batch, m, k]`` with a batch, any strides.
            weight: The stored tensors, in the order of ``Encoding.parts``, weight by weight.
            extra: The epilogue's operands, then the outliers', or the amax of an int8 x.

        Returns:
            ``[.., n]``, or ``[batch, m, n]``, contiguous; a list, the main result first, where the
            epilogue has more.

        Raises:
            KernelError: An operand has another dtype, size or device than the spec says.
        """
        prepared = self._prepared.get(id(weight[0]))
        if prepared is None or not prepared.is_current(weight):
            prepared = self._prepare_once(weight)
        shape = self._shapes.get(x.shape)
        if shape is None:
            shape = self._shape_of(x)
        if x.dtype is not self._x_dtype or not x.is_cpu:
            raise self._misfit("x", f"{self.spec.x_dtype} [.., {self._k}]", x)
        x_e, x_row, x_col = 0, self._k, 1
        if self._batch is not None:
            x_e, x_row, x_col = x.stride()
        elif not x.is_contiguous():
            x, x_row, x_col = as_rows(x)
        main = empty(shape.out, shape.strides, self._out_dtype)
        out: Tensor | list[Tensor] = main
        listed: list[int] = []
        if self._more:
            out = [main, *[empty(shape.out, shape.strides, dtype) for dtype in self._more]]
            listed = [result.data_ptr() for result in out]
        rows = shape.rows
        if rows == 0:
            return out
        kept, pointers = self._checked(extra, rows)
        threads = 1 if self._is_single or _Process.forked else torch.get_num_threads()
        size = shape.scratch.get(threads)
        if size is None:
            size = shape.scratch[threads] = self._size_of_scratch(rows, threads)
        if self._is_grouped:
            # It chooses for the rows of each matrix.
            variant = min(self.few_rows, rows)
        else:
            variant = _FEW if rows <= self.few_rows else _MANY
        entry = self._entry
        entry.call(
            entry.pack(
                entry.address,
                prepared.address,
                x.data_ptr(),
                x_e,
                x_row,
                x_col,
                rows,
                main.data_ptr(),
                _SCRATCH.at_least(size),
                threads,
                variant,
                self._listed,
                *listed,
                *pointers,
            )
        )
        del kept  # until here what the pointers lead to had to be there
        return out

    def operands(self, rows: int) -> list[Tensor]:
        """Further operands, all zero, as a call with this many rows takes them."""
        return [
            torch.zeros(size * rows if per_row else size, dtype=dtype)
            for dtype, size, per_row in self._extra
        ]

    def outlier_counts(self, codes: Tensor) -> tuple[int, int]:
        """How many calls a weight had, by its codes, and how many outliers were found in them.

        Of specs that have a threshold; each element e of a batch has outliers of its own.
        """
        prepared = self._store.found.get(id(codes))
        if prepared is None:
            return 0, 0
        calls, columns = (_INT64 * 2).from_address(prepared.address)
        return calls, columns

    def take(self, weight: Sequence[Tensor], stand_in: Sequence[Tensor]) -> Block:
        """Repacks one weight for calls that will pass other codes.

        Args:
            weight: The stored tensors.
            stand_in: What will be passed.

        Raises:
            KernelError: The weight is another than the spec says.
        """
        block = self._store.weight(weight, self._repack).block
        self._store.keep(stand_in[:1], Repacked(stand_in, block))
        return block

    def _prepare_once(self, weight: Sequence[Tensor]) -> Repacked | Several:
        """What the kernel reads of its weights."""
        spec = self.spec
        if spec.weights == 1:
            return self._store.weight(weight, self._repack)
        count = len(spec.weight.encoding.parts)
        if len(weight) != count * spec.weights:
            expected = f"{spec.weights} of {count} tensors"
            raise errors.kernel_operand(spec.name, "weights", expected, f"{len(weight)} tensors")
        firsts = range(0, len(weight), count)
        parts = [self._store.weight(weight[at : at + count], self._repack) for at in firsts]
        found = Several(weight, parts)
        self._joined.keep(weight[::count], found)
        return found

    def _repack(self, weight: Sequence[Tensor]) -> Block:
        weight, operand = stored(weight), self.spec.weight
        wrong = misfit(weight, operand.encoding, operand.shape)
        if wrong or not all(tensor.is_cpu for tensor in weight):
            raise errors.kernel_operand(
                self.spec.name, "weight", "as its encoding says", wrong or "another device"
            )
        block = Block(self._size_of_prepared())
        parts = [tensor.contiguous() for tensor in weight]
        pointers = (_POINTER * len(parts))(*[part.data_ptr() for part in parts])
        self._prepare(pointers, block.address, usable_threads(openmp=not self._is_single))
        return block

    def _shape_of(self, x: Tensor) -> _Shape:
        *leading, k = x.shape or (0,)
        if k != self._k:
            raise self._misfit("x", f"{self.spec.x_dtype} [.., {self._k}]", x)
        rows = x.numel() // k
        if self._batch is not None:
            if len(leading) != 2 or leading[0] != self._batch:
                raise self._misfit("x", f"[{self._batch}, m, {self._k}]", x)
            rows = leading[1]
        if len(self._shapes) >= _MOST_SHAPES:
            self._shapes.clear()
        out = (*leading, self._n)
        shape = self._shapes[x.shape] = _Shape(rows, out, contiguous_strides(out), {})
        return shape

    def _checked(self, extra: Sequence[Tensor], rows: int) -> tuple[list[Tensor], list[int]]:
        """The further operands and where they lie, each as large as the kernel will read."""
        if len(extra) != len(self._extra):
            raise errors.kernel_operand(
                self.spec.name, "the number of operands", len(self._extra), len(extra)
            )
        kept: list[Tensor] = []
        pointers: list[int] = []
        for tensor, (dtype, size, per_row) in zip(extra, self._extra, strict=True):
            wanted = size * rows if per_row else size
            if tensor.numel() != wanted or tensor.dtype is not dtype or not tensor.is_cpu:
                what, expected = f"operand {len(kept)}", f"{wanted} elements of {dtype}"
                raise self._misfit(what, expected, tensor)
            laid_out = tensor if tensor.is_contiguous() else tensor.contiguous()
            kept.append(laid_out)
            pointers.append(laid_out.data_ptr())
        return kept, pointers

    def _misfit(self, what: str, expected: str, tensor: Tensor) -> errors.KernelError:
        got = f"{tensor.dtype} {list(tensor.shape)} on {tensor.device}"
        return errors.kernel_operand(self.spec.name, what, expected, got)


def usable_threads(*, openmp: bool) -> int:
    """How many threads a kernel may use now: torch's number, one alone after a fork."""
    return 1 if not openmp or _Process.forked else torch.get_num_threads()


def as_rows(x: Tensor) -> tuple[Tensor, int, int]:
    """An activation whose leading dimensions can be counted as one, with its two strides."""
    step, expected = None, 0
    *leading, columns = zip(x.shape, x.stride(), strict=True)
    for size, stride in reversed(leading):
        if size == 1:
            continue
        if step is None:
            step = stride
        elif stride != expected:
            return x.contiguous(), columns[0], 1
        expected = size * stride
    return x, step or 0, columns[1]


def _operands(spec: KernelSpec) -> list[tuple[torch.dtype, int, bool]]:
    """Dtype and size of each further operand, and whether the size is that of one row."""
    weight = spec.weight
    sizes = {"e": spec.batch or 1, "n": weight.n, "m": 1}
    found = [
        (getattr(torch, o.dtype), math.prod(sizes[axis] for axis in o.dims), "m" in o.dims)
        for o in spec.epilogue.operands
    ]
    if spec.is_quantized:  # amax
        found.append((torch.float32, sizes["e"], True))
    outliers = spec.outliers
    if outliers is not None and outliers.columns is not None:
        dense = (weight.batch or 1) * weight.n * outliers.columns
        found.append((torch.int32, outliers.columns, False))
        found += [(getattr(torch, outliers.dtype), dense, False)] * spec.weights
    if spec.grouped:  # where the rows of each matrix end
        found.append((torch.int32, weight.batch or 1, False))
    return found


def loaded(library: Path, name: str) -> ctypes.CDLL:
    """A kernel's shared object, after torch, whose OpenMP library then serves both: one pool.

    Raises:
        CompilerError: The library cannot be loaded.
    """
    try:
        return ctypes.CDLL(str(library))
    except OSError as error:
        raise errors.unloadable_kernel(name, library, error) from error


def exported(library: Any, name: str, arguments: list[Any], result: Any = None) -> Any:
    """A function of a printed kernel, ready to be called."""
    function = library[f"fxquant_{name}"]
    function.argtypes, function.restype = arguments, result
    return function
