"""`QuantizeSpec`: rows of an activation to int8, and the torch code that defines it.

What several products read, or what has more to its scale than a row's largest magnitude, is
quantized apart from the products; `KernelSpec.x_dtype` ``"int8"`` takes it from there.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import Tensor

from fxquant import errors
from fxquant.codegen.epilogue import FLOAT_DTYPES
from fxquant.codegen.header import Header
from fxquant.codegen.prologue import (
    MOST_INPUTS,
    REDUCTIONS,
    Prologue,
    is_cast,
    is_reduction,
    references,
)
from fxquant.codegen.reference import call_text

SCOPES = ("token", "tensor", "static")
KIND = "quantize"


@dataclass(frozen=True)
class QuantizeSpec:
    """Activations ``x[.., k]`` as integers ``q[.., k]`` and one ``amax[..]`` a row.

    All in float32::

        limit = max(extra[0], 2**-100)                              static or clipped
        amax  = max(max |x|, 2**-100)      of the row, or of the whole tensor
                limit                      static
                min(amax, limit)           clipped
        q     = clamp(round_half_even(x * (127 / amax)), -127, 127)

    A row that is not finite (``"tensor"``: a tensor) has amax NaN and codes 0. With scope
    ``"token"`` and nothing clipped these are the integers of a `KernelSpec` that rounds x itself.

    Attributes:
        k: Inputs of a row.
        x_dtype: Dtype of the activation, ``"float16"``, ``"bfloat16"`` or ``"float32"``; what a
            prologue makes is rounded to it.
        scope: ``"token"``, ``"tensor"``, or ``"static"``: amax is the limit.
        clipped: amax is at most the limit. A limit is a float32 tensor of one element, the only
            one beside x.
        name: What the kernel does, as an identifier; not part of its meaning.
        prologue: What makes the activation of other tensors, in the same kernel. There is none
            where all rows share a scale: nothing is quantized before the last row is there.
    """

    k: int
    x_dtype: str
    scope: str = "token"
    clipped: bool = False
    name: str = "quantize"
    prologue: Prologue | None = None

    def __post_init__(self) -> None:
        if type(self.k) is not int or self.k < 1:
            raise errors.bad_spec("k", self.k, "a whole number, 1 or more")
        for field, known in (("x_dtype", FLOAT_DTYPES), ("scope", SCOPES)):
            if getattr(self, field) not in known:
                raise errors.bad_spec(field, getattr(self, field), f"one of {', '.join(known)}")
        if type(self.clipped) is not bool or (self.clipped and self.scope == "static"):
            raise errors.bad_spec("clipped", self.clipped, "a bool, and False where static")
        if not self.name.isidentifier():
            raise errors.bad_spec("name", self.name, "an identifier")
        if self.prologue is not None and self.scope == "tensor":
            raise errors.bad_spec("prologue", self.prologue, "None with a scale per tensor")
        if self.prologue is not None and self.k > MOST_INPUTS:
            raise errors.bad_spec("prologue", self.prologue, f"None above {MOST_INPUTS} inputs")

    @property
    def has_limit(self) -> bool:
        """Whether a limit is given beside x, which what lies beyond saturates at."""
        return self.clipped or self.scope == "static"

    def describe(self) -> str:
        """One line for people: ``q[m, 384], amax[m] = x[m, 384] in int8 per token``."""
        how = "at a given amax" if self.scope == "static" else f"per {self.scope}"
        how += ", clipped" if self.clipped else ""
        text = f"q[m, {self.k}], amax[m] = x[m, {self.k}] in int8 {how} (from {self.x_dtype})"
        return text if self.prologue is None else f"{text}, x by {self.prologue.describe()}"

    def to_json(self) -> str:
        """Canonical JSON text, which says its kind: equal specs give equal text."""
        data = {"kind": KIND, **asdict(replace(self, prologue=None))}
        if self.prologue is None:
            del data["prologue"]
        else:
            data["prologue"] = self.prologue.as_json()
        return json.dumps(data, sort_keys=True, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> QuantizeSpec:
        """The spec that `to_json` wrote.

        Raises:
            KernelError: The text is not a spec of this kind.
        """
        try:
            data = json.loads(text)
            if data.pop("kind") != KIND:
                raise errors.bad_spec_text("another kind")
            prologue = data.pop("prologue", None)
            if prologue is not None:
                prologue = Prologue.from_json(prologue)
            return cls(**data, prologue=prologue)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise errors.bad_spec_text(repr(error)) from error


def run(spec: QuantizeSpec, x: Tensor, extra: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Quantizes an activation.

    Args:
        spec: How; without a prologue.
        x: ``[.., k]``, any strides.
        extra: The limit, where the spec has one.

    Returns:
        int8 codes ``[.., k]`` and float32 amax ``[..]``.
    """
    codes, amax = _compiled(spec)(x, extra)
    return codes, amax


def run_rows(
    spec: QuantizeSpec, operands: Sequence[Tensor], limit: Sequence[Tensor]
) -> list[Tensor]:
    """Makes an activation and quantizes it.

    Args:
        spec: How; with a prologue.
        operands: Those of the prologue: ``[.., k]`` for ``"mk"``, all with the same leading sizes,
            and as many elements as their axes say for others; any strides.
        limit: The limit, where the spec has one.

    Returns:
        int8 codes ``[.., k]``, float32 amax ``[..]``, and the prologue's further results
        ``[.., k]``; the leading sizes are those of the first operand ``"mk"``.
    """
    return list(_compiled(spec)(operands, limit))


def render(spec: QuantizeSpec, header: Header) -> str:
    """The torch code that `run` or `run_rows` executes, with what the header says on top."""
    prologue = spec.prologue
    lines = ["rows = x.float()"] if prologue is None else _prologue_lines(spec, prologue)
    lines.append("amax = rows.abs().amax(-1)")
    if spec.scope == "tensor":
        # A further 0, for a tensor without rows.
        lines.append("amax = F.pad(amax.reshape(-1), (0, 1)).amax().expand(x.shape[:-1])")
    # What is not finite is a NaN from here on; minimum, maximum and division hand it on.
    lines.append("amax = torch.where(amax.isfinite(), amax.clamp_min(2.0**-100), math.nan)")
    if spec.has_limit:
        lines.append("limit = extra[0].reshape(()).clamp_min(2.0**-100)")
    if spec.clipped:
        lines.append("amax = torch.minimum(amax, limit)")
    if spec.scope == "static":
        lines.append("amax = torch.where(amax.isnan(), amax, limit)")
    lines += [
        # A number over a tensor would be torch's reciprocal and a product: two roundings.
        "scaled = rows * (torch.full_like(amax, 127.0) / amax).unsqueeze(-1)",
        "q = torch.where(scaled.isnan(), 0.0, torch.round(scaled).clamp(-127.0, 127.0))",
    ]
    if prologue is None:
        lines.append("return q.to(torch.int8).contiguous(), amax.contiguous()")
    else:
        more = [f"more{number}" for number in range(len(prologue.more))]
        lines += [
            "codes = q.to(torch.int8).reshape(shape)",
            f"return {', '.join(['codes', 'amax.reshape(shape[:-1])', *more])}",
        ]
    head = [
        *header.comment(spec).splitlines(),
        "",
        "import math",
        "",
        "import torch",
        *(["import torch.nn.functional as F"] if spec.scope == "tensor" else []),
        "",
        "",
        "def run(x, extra):" if prologue is None else "def run(operands, extra):",
    ]
    return "\n".join([*head, *(f"    {line}" for line in lines)]) + "\n"


def _prologue_lines(spec: QuantizeSpec, prologue: Prologue) -> list[str]:
    """From the operands to ``rows``, and the further results."""
    first = [operand.dims for operand in prologue.operands].index("mk")
    lines, names = [f"shape = operands[{first}].shape", "m = math.prod(shape[:-1])"], {}
    sizes = {"m": "m", "k": str(spec.k)}
    for number, operand in enumerate(prologue.operands):
        shape = ", ".join(sizes[axis] if axis in operand.dims else "1" for axis in "mk")
        to_float = ".float()" if operand.dtype in ("float16", "bfloat16") else ""
        lines.append(f"in{number} = operands[{number}].reshape({shape}){to_float}")
        names[f"%in{number}"] = f"in{number}"
    for number, node in enumerate(prologue.nodes):
        if is_reduction(node):
            (value,) = references(node)
            text = f"{names[value]}.{REDUCTIONS[node.op]}(-1, keepdim=True)"
        else:
            text = call_text(node, names)
        lines.append(f"v{number} = {text}")
        names[f"%{number}"] = f"v{number}"
    for number, result in enumerate(prologue.more):
        text = f"{names[result.value]}.to(torch.{result.dtype}).reshape(shape)"
        lines.append(f"more{number} = {text}")
    rounded = "" if is_cast(prologue.nodes[-1], spec.x_dtype) else f".to(torch.{spec.x_dtype})"
    lines.append(f"rows = {names[prologue.result]}{rounded}{'.float()' if rounded else ''}")
    return lines


@functools.lru_cache(maxsize=1024)
def _compiled(spec: QuantizeSpec) -> Callable[..., tuple[Tensor, ...]]:
    namespace: dict[str, Any] = {}
    code = compile(render(spec, Header()), f"<fxquant reference {spec.name}>", "exec")
    exec(code, namespace)  # noqa: S102 - text that `render` just printed
    run_: Callable[..., tuple[Tensor, ...]] = namespace["run"]
    return run_
