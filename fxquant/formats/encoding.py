"""`Encoding`: the whole description of how a tensor is stored in few bits."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fxquant import errors
from fxquant.formats import codebooks

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
            dimensions, earlier dimensions having extent 1; ``-1`` is the whole dimension. A power
            of two from 16 to 4096, or -1; in a block of several dimensions also 1.
        scale: How the scales are themselves encoded (double quantization, QLoRA section 3);
            None keeps them in float32. Its block is always flat.
        offset: Subtract the tensor's mean before encoding and store it (float32, one number).
            Used for scales, which are positive.
        full_range: For uniform levels: use ``-2**(bits-1)`` too (int2: -2, -1, 0, 1) instead of
            the symmetric ``-(2**(bits-1) - 1) .. 2**(bits-1) - 1``.
        zero_point: For uniform levels: store a zero point (uint8) a block; codes are unsigned.
        clip: Keep this quantile of a block's magnitudes and saturate what is above; None keeps
            all (the scale is the block's absmax).

    Raises:
        EncodingError: A field, or the combination of two, that no tensor can be encoded with.
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
        if type(self.bits) is not int or self.bits not in (2, 4, 8):
            raise errors.bad_encoding("bits", self.bits, "2, 4 or 8")
        self._check_block()
        self._check_levels()
        self._check_scale()
        for name in ("offset", "full_range", "zero_point"):
            if type(getattr(self, name)) is not bool:
                raise errors.bad_encoding(name, getattr(self, name), "True or False")
        if self.zero_point and self.full_range:
            raise errors.bad_encoding(
                "full_range", True, "False with a zero point, whose codes use every value anyway"
            )
        if self.clip is not None and not (
            type(self.clip) in (int, float) and 0.0 < self.clip <= 1.0
        ):
            raise errors.bad_encoding("clip", self.clip, "above 0 and at most 1, or None")

    def _check_block(self) -> None:
        if type(self.block) is not tuple or not self.block:
            raise errors.bad_block_size(self.block)
        for size in self.block:
            in_range = type(size) is int and MIN_BLOCK <= size <= MAX_BLOCK
            if in_range and size & (size - 1) == 0:
                continue
            if type(size) is int and (size == -1 or (size == 1 and not self.is_flat)):
                continue
            raise errors.bad_block_size(size)

    def _check_levels(self) -> None:
        if isinstance(self.levels, str):
            known = {name: book.bits for name, book in codebooks.codebooks().items()}
            if self.levels != UNIFORM and known.get(self.levels) != self.bits:
                names = [UNIFORM, *(name for name, bits in known.items() if bits == self.bits)]
                expected = f"one of {', '.join(names)} at {self.bits} bits"
                raise errors.bad_encoding("levels", self.levels, expected)
        elif type(self.levels) is not tuple or not codebooks.is_table(self.levels, self.bits):
            expected = f"a name or a tuple of {2**self.bits} finite numbers"
            raise errors.bad_encoding("levels", self.levels, expected)
        if not self.is_uniform and (self.full_range or self.zero_point):
            name = "full_range" if self.full_range else "zero_point"
            raise errors.bad_encoding(name, True, "False for a codebook")

    def _check_scale(self) -> None:
        inner = self.scale
        if inner is None:
            return
        if not isinstance(inner, Encoding):
            raise errors.bad_encoding("scale", inner, "an Encoding or None")
        if inner.is_uniform or inner.bits != 8 or not inner.is_flat or inner.scale is not None:
            expected = "an 8-bit codebook encoding with flat blocks and float32 scales of its own"
            raise errors.bad_encoding("scale", str(inner), expected)

    def __deepcopy__(self, memo: dict[int, Any]) -> Encoding:
        """Itself, which never changes.

        Dynamo's guards compare with a copy at each call, which takes long unless it is the same.
        """
        return self

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

    def oriented(self, ndim: int, n_dims: Sequence[int], k_dims: Sequence[int]) -> Encoding:
        """This encoding for a parameter whose dimensions stand in another order.

        Args:
            ndim: Dimensions of the stored parameter.
            n_dims: Those that make up the outputs, outermost first.
            k_dims: Those that make up the inputs, outermost first.

        Returns:
            An encoding whose block, given for ``[.., N, K]``, is in the parameter's order. Flat
            blocks stay as they are. Where several dimensions make up one side, an extent other
            than 1 and -1 belongs to the first of them, the others having extent 1. Dimensions
            that are neither (a batch) have extent 1, or the extents that stand before N and K.
        """
        if self.is_flat:
            return self
        *batch, n_extent, k_extent = self.block
        extents = [1] * ndim
        for dims, extent in ((n_dims, n_extent), (k_dims, k_extent)):
            for position, dim in enumerate(dims):
                extents[dim] = extent if extent == -1 or position == 0 else 1
        others = [dim for dim in range(ndim) if dim not in n_dims and dim not in k_dims]
        for dim, extent in zip(reversed(others), reversed(batch), strict=False):
            extents[dim] = extent
        while len(extents) > 2 and extents[0] == 1:
            del extents[0]
        return dataclasses.replace(self, block=tuple(extents))

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

    @classmethod
    def from_text(cls, text: str) -> Encoding:
        """The encoding whose `str` this is."""
        return cls.from_json(json.loads(text))

    def __str__(self) -> str:
        return json.dumps(self.to_json(), sort_keys=True, separators=(",", ":"))
