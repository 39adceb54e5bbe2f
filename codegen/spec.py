"""`KernelSpec`: one product to print a kernel for. Frozen, hashable, JSON.

`fxquant.codegen.reference` executes a spec with torch and is thereby its definition.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from fxquant.formats import Encoding

AXES = ("e", "m", "n")


@dataclass(frozen=True)
class WeightOperand:
    """A matrix, or a batch of them, inside an encoded tensor.

    Element ``(e, n, k)`` of the logical weight ``[batch, n, k]`` is the element number
    ``offset + e * strides[0] + n * strides[1] + k * strides[2]`` of the flattened row-major stored
    tensor, so transposes, slices and views of a parameter need no second packing.

    Attributes:
        encoding: How the stored tensor is encoded.
        shape: Shape of the stored tensor (the parameter).
        batch: Number of matrices, None for a product against one matrix.
        n: Outputs.
        k: Inputs (the contracted dimension).
        strides: Of e, n and k, in elements of the stored tensor; the first is 0 without a batch.
        offset: First element.
    """

    encoding: Encoding
    shape: tuple[int, ...]
    batch: int | None
    n: int
    k: int
    strides: tuple[int, int, int]
    offset: int = 0

    @classmethod
    def whole(cls, encoding: Encoding, shape: tuple[int, ...], *, transposed: bool) -> WeightOperand:
        """The operand that is all of a 2-D or 3-D parameter.

        Args:
            encoding: How it is stored.
            shape: ``[n, k]`` or ``[batch, n, k]``; with `transposed`, ``[.., k, n]``.
            transposed: The last dimension is the outputs.
        """
        batch = shape[0] if len(shape) == 3 else None
        rows, cols = shape[-2:]
        outer = rows * cols if batch is not None else 0
        if transposed:
            return cls(encoding, shape, batch, cols, rows, (outer, 1, cols))
        return cls(encoding, shape, batch, rows, cols, (outer, cols, 1))


@dataclass(frozen=True)
class EpilogueOperand:
    """A further tensor that an epilogue reads.

    Attributes:
        dims: The axes it has, in order, out of ``e`` (batch), ``m`` (rows), ``n`` (outputs): a
            bias is ``"n"``, a residual ``"mn"`` or ``"emn"``, a scalar ``""``.
        dtype: Its dtype, as in ``"float32"``.
    """

    dims: str
    dtype: str


@dataclass(frozen=True)
class EpilogueNode:
    """One call of an FX epilogue graph, in a form that can be hashed and written down.

    Attributes:
        op: An ATen overload, as in ``"aten.add.Tensor"``.
        args: Each a number, None, a dtype name, or a reference: ``"%acc"`` (the accumulator,
            float32), ``"%in0"`` (operand 0), ``"%0"`` (the result of node 0).
        kwargs: Sorted pairs, with values like `args`.
    """

    op: str
    args: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...] = ()


@dataclass(frozen=True)
class Epilogue:
    """Pointwise work on the accumulator: an FX graph of ATen ops, written down.

    The result is the last node (the accumulator when there is none), rounded to the spec's
    `out_dtype`. `fxquant.codegen.pointwise` turns it into an `fx.Graph` and back.
    """

    operands: tuple[EpilogueOperand, ...] = ()
    nodes: tuple[EpilogueNode, ...] = ()

    @classmethod
    def bias(cls, dtype: str, dims: str = "n") -> Epilogue:
        """Adds operand 0."""
        return cls(
            (EpilogueOperand(dims, dtype),), (EpilogueNode("aten.add.Tensor", ("%acc", "%in0")),)
        )


@dataclass(frozen=True)
class KernelSpec:
    """One product: ``out[e, m, n] = epilogue(sum_k x[e, m, k] * weight[e, n, k])``.

    The decoded weight and x are rounded to `compute_dtype`, products are summed in float32, the
    epilogue works in float32, and the result is rounded to `out_dtype`. The number of rows m is
    not part of a spec: one kernel serves them all.

    Attributes:
        weight: The encoded operand.
        x_dtype: Dtype of the activation, ``"float16"``, ``"bfloat16"`` or ``"float32"``.
        compute_dtype: Dtype of both operands of the dot product.
        out_dtype: Dtype of the result.
        epilogue: What is done to the sums.
        name: What the kernel does, as an identifier; not part of its meaning.
    """

    weight: WeightOperand
    x_dtype: str
    compute_dtype: str
    out_dtype: str
    epilogue: Epilogue = Epilogue()
    name: str = "linear"

    def to_json(self) -> str:
        """Canonical JSON text: equal specs give equal text."""
        raise NotImplementedError

    @classmethod
    def from_json(cls, text: str) -> KernelSpec:
        """The spec that `to_json` wrote."""
        raise NotImplementedError
