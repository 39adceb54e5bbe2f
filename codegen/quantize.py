"""`QuantizeSpec`: rows of an activation to int8, and the torch code that defines it.

What several products read, or what has more to its scale than a row's largest magnitude, is
quantized apart from the products; `KernelSpec.x_dtype` ``"int8"`` takes it from there.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from fxquant import errors
from fxquant.codegen.epilogue import FLOAT_DTYPES
from fxquant.codegen.header import Header

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
        x_dtype: Dtype of the activation, ``"float16"``, ``"bfloat16"`` or ``"float32"``.
        scope: ``"token"``, ``"tensor"``, or ``"static"``: amax is the limit.
        clipped: amax is at most the limit. A limit is a float32 tensor of one element, the only
            one beside x.
        name: What the kernel does, as an identifier; not part of its meaning.
    """

    k: int
    x_dtype: str
    scope: str = "token"
    clipped: bool = False
    name: str = "quantize"

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

    @property
    def has_limit(self) -> bool:
        """Whether a limit is given beside x, which what lies beyond saturates at."""
        return self.clipped or self.scope == "static"

    def describe(self) -> str:
        """One line for people: ``q[m, 384], amax[m] = x[m, 384] in int8 per token``."""
        how = "at a given amax" if self.scope == "static" else f"per {self.scope}"
        how += ", clipped" if self.clipped else ""
        return f"q[m, {self.k}], amax[m] = x[m, {self.k}] in int8 {how} (from {self.x_dtype})"

    def to_json(self) -> str:
        """Canonical JSON text, which says its kind: equal specs give equal text."""
        return json.dumps({"kind": KIND, **asdict(self)}, sort_keys=True, separators=(",", ":"))

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
            return cls(**data)
        except (AttributeError, KeyError, TypeError, json.JSONDecodeError) as error:
            raise errors.bad_spec_text(repr(error)) from error


def run(spec: QuantizeSpec, x: Tensor, extra: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Quantizes an activation.

    Args:
        spec: How.
        x: ``[.., k]``, any strides.
        extra: The limit, where the spec has one.

    Returns:
        int8 codes ``[.., k]`` and float32 amax ``[..]``.
    """
    return _compiled(spec)(x, extra)


def render(spec: QuantizeSpec, header: Header) -> str:
    """The torch code that `run` executes, with what the header says on top."""
    lines = ["rows = x.float()", "amax = rows.abs().amax(-1)"]
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
        "return q.to(torch.int8).contiguous(), amax.contiguous()",
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
        "def run(x, extra):",
    ]
    return "\n".join([*head, *(f"    {line}" for line in lines)]) + "\n"


@functools.lru_cache(maxsize=1024)
def _compiled(spec: QuantizeSpec) -> Callable[..., tuple[Tensor, Tensor]]:
    namespace: dict[str, Any] = {}
    code = compile(render(spec, Header()), f"<fxquant reference {spec.name}>", "exec")
    exec(code, namespace)  # noqa: S102 - text that `render` just printed
    run_: Callable[..., tuple[Tensor, Tensor]] = namespace["run"]
    return run_
