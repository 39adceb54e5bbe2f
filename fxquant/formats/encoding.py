"""`Encoding`: the whole description of how a tensor is stored in few bits."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any

from fxquant import errors

UNIFORM = "uniform"
MIN_BLOCK, MAX_BLOCK = 16, 4096


@dataclass(frozen=True)
class Encoding:
    """How a tensor is encoded: codes of `bits` bits, and one scale a block.

    The decoded value of an element is ``level(code) * scale(block)`` in float32 (for uniform
    levels with a zero point, ``(code - zero(block)) * scale(block)``), rounded to the dtype that is
    asked for. Hashable; `to_json` and `from_json` are exact inverses.

    Attributes:
        bits: Bits a code: 2, 4 or 8. Codes under 8 bits are packed into bytes, the first in the
            highest bits (as bitsandbytes does), over the flattened row-major tensor.
        levels: ``"uniform"`` (two's complement integers), the name of a codebook in
            `fxquant.formats.codebooks`, or the codebook itself: ``2**bits`` floats in code order.
        block: Elements that share a scale. One number: that many consecutive elements of the
            flattened row-major tensor. Several: the extent of a block in each of the *trailing*
            dimensions, earlier dimensions having extent 1; ``-1`` is the whole dimension.
        scale: How the scales are themselves encoded (double quantization, QLoRA section 3);
            None keeps them in float32. Its block is always flat.
        offset: Subtract the tensor's mean before encoding and store it (float32, one number).
            Used for scales, which are positive.
        full_range: For uniform levels: use ``-2**(bits-1)`` too (int2: -2, -1, 0, 1) instead of
            the symmetric ``-(2**(bits-1) - 1) .. 2**(bits-1) - 1``.
        zero_point: For uniform levels: store a zero point (uint8) a block; codes are unsigned.
        clip: Keep this quantile of a block's magnitudes and saturate what is above; None keeps
            all (the scale is the block's absmax).
    """

    bits: int
    levels: str | tuple[float, ...] = UNIFORM
    block: tuple[int, ...] = (64,)
    scale: Encoding | None = None
    offset: bool = False
    full_range: bool = False
    zero_point: bool = False
    clip: float | None = None

    def __post_init__(self) -> None:
        if self.bits not in (2, 4, 8):
            raise errors.bad_encoding("bits", self.bits, "2, 4 or 8")
        if not self.block:
            raise errors.bad_block_size(self.block)

    @property
    def is_uniform(self) -> bool:
        """Whether a code is the integer that it stands for."""
        return self.levels == UNIFORM

    @property
    def is_flat(self) -> bool:
        """Whether blocks run over the flattened tensor."""
        return len(self.block) == 1

    @property
    def codes_per_byte(self) -> int:
        """Codes packed into one byte."""
        return 8 // self.bits

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of the stored tensors, in the order in which kernels take them.

        ``codes`` always; ``scales`` always (float32, or uint8 codes when `scale` is set);
        ``nested`` (float32, one a block of scales) when `scale` is set; ``offset`` (float32, 0-d)
        when ``scale.offset``; ``zeros`` (uint8, one a block) when `zero_point`.
        """
        names = ["codes", "scales"]
        if self.scale is not None:
            names.append("nested")
            if self.scale.offset:
                names.append("offset")
        if self.zero_point:
            names.append("zeros")
        return tuple(names)

    def to_json(self) -> dict[str, Any]:
        """A JSON value with the fields that differ from their defaults."""
        out: dict[str, Any] = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value == field.default:
                continue
            if isinstance(value, Encoding):
                value = value.to_json()
            out[field.name] = list(value) if isinstance(value, tuple) else value
        return out

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Encoding:
        """The encoding that `to_json` described."""
        fields = dict(data)
        for name in ("block", "levels"):
            if isinstance(fields.get(name), list):
                fields[name] = tuple(fields[name])
        if fields.get("scale") is not None:
            fields["scale"] = cls.from_json(fields["scale"])
        return cls(**fields)

    def __str__(self) -> str:
        return json.dumps(self.to_json(), sort_keys=True, separators=(",", ":"))
