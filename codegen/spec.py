"""`KernelSpec`: one product to print a kernel for. Frozen, hashable, JSON.

`fxquant.codegen.reference` executes a spec with torch and is thereby its definition.
"""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from typing import Any

from fxquant import errors
from fxquant.codegen.epilogue import (
    FLOAT_DTYPES,
    Epilogue,
    EpilogueNode,
    EpilogueOperand,
    EpilogueResult,
)
from fxquant.formats import Encoding

COMPUTE_DTYPES = (*FLOAT_DTYPES, "int8")
NO_EPILOGUE = Epilogue()


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

    def __post_init__(self) -> None:
        if not self.shape or min(self.shape) < 1:
            raise errors.bad_spec("weight.shape", self.shape, "positive sizes")
        if min(self.n, self.k, self.batch or 1) < 1 or self.batch == 0:
            raise errors.bad_spec("weight.batch, n, k", (self.batch, self.n, self.k), "at least 1")
        if len(self.strides) != 3 or min(self.strides) < 0 or (not self.batch and self.strides[0]):
            raise errors.bad_spec("weight.strides", self.strides, "3 numbers that are not negative")
        if self.offset < 0 or self.last >= self.numel:
            raise errors.bad_spec(
                "weight.offset", self.offset, f"such that elements lie inside shape {self.shape}"
            )

    @property
    def numel(self) -> int:
        """Elements of the stored tensor."""
        return math.prod(self.shape)

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Sizes of e, n and k; e is 1 without a batch."""
        return (self.batch or 1, self.n, self.k)

    @property
    def last(self) -> int:
        """The highest element number that is read."""
        return self.offset + sum((d - 1) * s for d, s in zip(self.sizes, self.strides, strict=True))

    @classmethod
    def whole(
        cls, encoding: Encoding, shape: tuple[int, ...], *, transposed: bool
    ) -> WeightOperand:
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
class Outliers:
    """The columns of an activation that an int8 product leaves to floats.

    LLM.int8() (Dettmers et al., 2022, arXiv:2208.07339), section 3.2 and equation 8. Exactly one
    of `threshold` and `columns` is given; either way the columns take part neither in a row's
    largest magnitude nor in the int8 product, and the sums of their products are added to it
    before the epilogue. Those products are of x and the weight, both rounded to `dtype`, and are
    summed in float32.

    Attributes:
        dtype: ``"float16"``, ``"bfloat16"`` or ``"float32"``.
        threshold: Above 0: the columns are those in which any row of the call (of one batch
            element e) has ``abs(x) >= threshold``, compared in float32, and NaN is not. The weight
            is the decoded one, ``level * scale``.
        columns: How many columns are set apart beforehand. The last two of the tensors beside x
            and weight, after the epilogue's operands, are their numbers (int32 ``[columns]``,
            distinct, for all e) and their weight in `dtype`, ``[n, columns]`` or
            ``[e, n, columns]``; of several weights, one after the other. What the codes say in
            these columns is not used.
    """

    dtype: str
    threshold: float | None = None
    columns: int | None = None

    def __post_init__(self) -> None:
        if self.dtype not in FLOAT_DTYPES:
            expected = f"one of {', '.join(FLOAT_DTYPES)}"
            raise errors.bad_spec("outliers.dtype", self.dtype, expected)
        if (self.threshold is None) == (self.columns is None):
            found = (self.threshold, self.columns)
            raise errors.bad_spec("outliers.threshold, columns", found, "one number and one None")
        if self.threshold is not None:
            if type(self.threshold) not in (int, float) or not 0 < self.threshold < math.inf:
                raise errors.bad_spec("outliers.threshold", self.threshold, "finite and above 0")
            object.__setattr__(self, "threshold", float(self.threshold))
        elif type(self.columns) is not int or self.columns < 1:
            raise errors.bad_spec("outliers.columns", self.columns, "a whole number, 1 or more")

    def describe(self) -> str:
        """A few words: ``columns with any abs(x) >= 6.0 in bfloat16``."""
        if self.columns is None:
            return f"columns with any abs(x) >= {self.threshold} in {self.dtype}"
        return f"{self.columns} given columns in {self.dtype}"


@dataclass(frozen=True)
class KernelSpec:
    """One product: ``out[e, m, n] = epilogue(sum_k x[e, m, k] * weight[e, n, k])``.

    The decoded weight and x are rounded to `compute_dtype`, products are summed in float32, the
    epilogue works in float32, and the result is rounded to `out_dtype`. A kernel may instead round
    the weight's levels and scale their sums in float32, or multiply in float32 what it would have
    to round: either way each weight is off by half a unit in the last place of `compute_dtype` at
    most. The number of rows m is not part of a spec: one kernel serves them all.

    With `compute_dtype` ``"int8"`` both operands are integers. Those of x are found at run time,
    in float32, from the largest magnitude of each row::

        amax[m]  = max(max_k abs(x[m, k]), 2**-100)
        q[m, k]  = round_half_even(x[m, k] * (127 / amax[m]))        from -127 to 127
        acc[m,n] = amax[m] / 127 * sum_blocks scale[n, block] * sum_{k in block} q[m, k] * w[n, k]

    The integers w are the codes of uniform levels (less the zero point, where there is one), and
    ``round_half_even(127 * level / largest)`` of a codebook whose largest magnitude is `largest`;
    ``largest / 127`` is then a factor of the scale. Sums of integers are exact; how a kernel
    rounds scales and partial sums in float32 is its own affair. A row with NaN, or with Inf
    outside of the outliers, gives NaN. The least amax keeps both quotients normal numbers.

    With `x_dtype` ``"int8"`` x is q itself, from a `QuantizeSpec`, and the tensor that follows the
    epilogue's operands is amax: float32, one for every row, NaN for a row of NaN.

    Attributes:
        weight: The encoded operand.
        x_dtype: Dtype of the activation, ``"float16"``, ``"bfloat16"`` or ``"float32"``; or
            ``"int8"`` when it was quantized before.
        compute_dtype: Dtype of both operands of the dot product, ``"int8"`` or as `x_dtype`.
        out_dtype: Dtype of the result.
        epilogue: What is done to the sums. Operands have the sizes of their axes, m being the
            product of the activation's leading dimensions.
        name: What the kernel does, as an identifier; not part of its meaning.
        outliers: The columns that an int8 product leaves to floats.
        weights: How many weights of this one form x is multiplied with, each with sums of its
            own: ``"%acc"``, ``"%acc1"`` .. in the epilogue. Their stored tensors follow one
            another. Outlier columns are those of x, the same for all.
        grouped: The weight is a batch and x is one matrix ``[m, k]`` all the same, like the result
            ``[m, n]``: every row is multiplied with one matrix of the batch. The last of the
            tensors beside x and weight, `ends`, is int32 ``[batch]`` and does not decrease: rows
            from ``ends[e - 1]`` (0 for the first) up to ``ends[e]`` are those of matrix e. Sums of
            the rows from ``ends[-1]`` on are 0. Outlier columns are those of all rows together.
    """

    weight: WeightOperand
    x_dtype: str
    compute_dtype: str
    out_dtype: str
    epilogue: Epilogue = NO_EPILOGUE
    name: str = "linear"
    outliers: Outliers | None = None
    weights: int = 1
    grouped: bool = False

    def __post_init__(self) -> None:
        for field in ("x_dtype", "compute_dtype", "out_dtype"):
            known = FLOAT_DTYPES if field == "out_dtype" else COMPUTE_DTYPES
            if getattr(self, field) not in known:
                raise errors.bad_spec(field, getattr(self, field), f"one of {', '.join(known)}")
        if self.is_quantized and self.compute_dtype != "int8":
            raise errors.bad_spec("compute_dtype", self.compute_dtype, "int8, as x_dtype is")
        if self.outliers is not None:
            self._check_outliers(self.outliers)
        if type(self.weights) is not int or self.weights < max(1, self.epilogue.sums):
            expected = f"at least {max(1, self.epilogue.sums)}, as the epilogue has sums"
            raise errors.bad_spec("weights", self.weights, expected)
        if not self.name.isidentifier():
            raise errors.bad_spec("name", self.name, "an identifier")
        if self.grouped and self.weight.batch is None:
            raise errors.bad_spec("grouped", self.grouped, "False without a batch")
        if self.batch is None and any("e" in o.dims for o in self.epilogue.operands):
            raise errors.bad_spec("epilogue operand's dims", "e", "absent without a batch")

    def _check_outliers(self, outliers: Outliers) -> None:
        if self.compute_dtype != "int8" or self.is_quantized:
            expected = "None unless compute_dtype is int8 and x_dtype is not"
            raise errors.bad_spec("outliers", outliers, expected)
        if (outliers.columns or 0) > self.weight.k:
            expected = f"no more than the {self.weight.k} inputs"
            raise errors.bad_spec("outliers.columns", outliers.columns, expected)

    @property
    def batch(self) -> int | None:
        """Matrices in the activation and in the result: the weight's, None for one matrix."""
        return None if self.grouped else self.weight.batch

    @property
    def is_quantized(self) -> bool:
        """Whether x arrives as integers, with amax beside it."""
        return self.x_dtype == "int8"

    def describe(self) -> str:
        """One line for people: ``out[m, 384] = x[m, 1536] @ weight.T, then add``."""
        batch = "" if self.batch is None else f"{self.batch}, "
        weight = f"weight[one of {self.weight.batch}]" if self.grouped else "weight"
        text = f"out[{batch}m, {self.weight.n}] = x[{batch}m, {self.weight.k}] @ {weight}.T"
        ops = [node.op.split(".")[1].strip("_") for node in self.epilogue.nodes]
        text += f" for {self.weights} weights" if self.weights > 1 else ""
        text += " in int8" if self.compute_dtype == "int8" else ""
        text += f", {self.outliers.describe()}" if self.outliers else ""
        text += f", then {', '.join(ops)}" if ops else ""
        text += f", {1 + len(self.epilogue.more)} results" if self.epilogue.more else ""
        return f"{text} ({self.x_dtype} to {self.out_dtype})"

    def to_json(self) -> str:
        """Canonical JSON text: equal specs give equal text."""
        weight = self.weight
        data: dict[str, Any] = {
            "name": self.name,
            "weight": {
                "encoding": weight.encoding.to_json(),
                "shape": weight.shape,
                "batch": weight.batch,
                "n": weight.n,
                "k": weight.k,
                "strides": weight.strides,
                "offset": weight.offset,
            },
            "x_dtype": self.x_dtype,
            "compute_dtype": self.compute_dtype,
            "out_dtype": self.out_dtype,
            "epilogue": {
                "operands": [[o.dims, o.dtype] for o in self.epilogue.operands],
                "nodes": [[node.op, node.args, node.kwargs] for node in self.epilogue.nodes],
            },
        }
        if self.outliers is not None:
            data["outliers"] = dataclasses.asdict(self.outliers)
        if self.weights > 1:
            data["weights"] = self.weights
        if self.epilogue.more:
            data["more"] = [[result.value, result.dtype] for result in self.epilogue.more]
        if self.grouped:
            data["grouped"] = True
        return json.dumps(data, sort_keys=True, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> KernelSpec:
        """The spec that `to_json` wrote.

        Raises:
            KernelError: The text is not a spec.
        """
        try:
            data = json.loads(text)
            weight, written = dict(data.pop("weight")), data.pop("epilogue")
            operand = WeightOperand(
                encoding=Encoding.from_json(weight.pop("encoding")),
                shape=tuple(weight.pop("shape")),
                strides=tuple(weight.pop("strides")),
                **weight,
            )
            operands = tuple(EpilogueOperand(dims, dtype) for dims, dtype in written["operands"])
            nodes = tuple(
                EpilogueNode(op, tuple(args), tuple((k, v) for k, v in kwargs))
                for op, args, kwargs in written["nodes"]
            )
            more = tuple(EpilogueResult(value, dtype) for value, dtype in data.pop("more", ()))
            outliers = data.pop("outliers", None)
            if outliers is not None:
                outliers = Outliers(**outliers)
            epilogue = Epilogue(operands, nodes, more)
            return cls(weight=operand, epilogue=epilogue, outliers=outliers, **data)
        except (AttributeError, KeyError, TypeError, json.JSONDecodeError) as error:
            raise errors.bad_spec_text(repr(error)) from error
