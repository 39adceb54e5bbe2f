"""`PackedWeight`: an encoded tensor that behaves as the original."""

from __future__ import annotations

import hashlib
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.utils._pytree import tree_map_only

from fxquant.formats.codes import Codes, Place
from fxquant.formats.decode import decode
from fxquant.formats.encode import encode
from fxquant.formats.encoding import Encoding

LOG = logging.getLogger("fxquant.formats")
aten = torch.ops.aten
_LOOK_AT_METADATA = {
    "torch._dynamo.variables.builder",
    "torch._subclasses.fake_tensor",
    "torch._subclasses.meta_utils",
}
"""Modules that take tensors apart for types and shapes alone, whenever a graph is traced."""


def pack(tensor: Tensor, encoding: Encoding, *, name: str = "weight") -> PackedWeight:
    """Encodes a tensor.

    Args:
        tensor: One dimension or more; float16, bfloat16, float32 or float64; any strides.
        encoding: How to store it.
        name: What to call it in an error.

    Returns:
        The packed tensor, of the same shape, dtype and device.

    Raises:
        WeightError: The tensor is empty, not real floating point, or holds NaN or Inf.
        EncodingError: The encoding does not fit the tensor.
    """
    return PackedWeight(encode(tensor, encoding, name), encoding, tensor.shape, tensor.dtype)


class Anchor:
    """Stands for a packed weight in weak references, through its casts and moves.

    `nn.Module.to` swaps a packed parameter for its converted copy, and refuses to if anything holds
    a weak reference to the parameter.
    """


class PackedWeight(Tensor):
    """Holds codes and scales; shape, dtype and device are those of the original tensor.

    Eager code stays right: an operation that it does not know gets the decoded tensor, and one
    that writes to it has its result encoded again. Casts to another floating-point dtype change
    what it decodes to and leave the codes alone. What reads it gets a copy, never a view: writing
    to ``w[0]`` or ``w.T`` does not reach the packed weight.

    It is a traceable wrapper subclass, and may be an `nn.Parameter`, best without gradient.

    Args:
        tensors: The stored parts, in the order of ``encoding.parts``.
        encoding: How they are stored.
        shape: Of the original.
        dtype: Of the original, and of what operations see.
    """

    encoding: Encoding
    anchor: Anchor
    codes: Codes

    @staticmethod
    def __new__(  # noqa: PYI034 - Self is not in Python 3.10's typing
        cls: type[PackedWeight],
        tensors: Sequence[Tensor],
        encoding: Encoding,
        shape: Sequence[int],
        dtype: torch.dtype,
    ) -> PackedWeight:
        """Makes the tensor without storage that the parts hang on."""
        return Tensor._make_wrapper_subclass(
            cls, tuple(shape), dtype=dtype, device=tensors[0].device, requires_grad=False
        )

    def __init__(
        self,
        tensors: Sequence[Tensor],
        encoding: Encoding,
        shape: Sequence[int],  # noqa: ARG002 - for __new__
        dtype: torch.dtype,
    ) -> None:
        self.encoding = encoding
        self.anchor = Anchor()
        # Dynamo's guards ask for names and metadata at each call.
        self._names = tuple(f"packed_{part}" for part in encoding.parts)
        self._metadata = (encoding, dtype)
        self._others = self._names[1:]
        self.codes = Codes(tensors[0])
        for name, tensor in zip(self._others, tensors[1:], strict=True):
            setattr(self, name, tensor)

    @property
    def packed_codes(self) -> Tensor:
        """The codes, for whoever takes the tensor apart, as code of other backends does.

        Where a C++ kernel has taken them over they come back for good, but for those who look at
        shape and dtype only.
        """
        own: Codes = self.__dict__["codes"]  # attributes of a tensor are looked up slowly
        if own.place is Place.AWAY:
            reader = sys._getframe(1).f_globals.get("__name__")
            if reader not in _LOOK_AT_METADATA:
                LOG.info(
                    "the codes of a weight of shape %s are read outside of our kernels: they stay "
                    "in their stored form, too",
                    list(self.shape),
                )
                own.come_back()
        return own.held

    def tensors(self) -> list[Tensor]:
        """The stored parts, in the order of ``encoding.parts``.

        Where a C++ kernel has taken over the codes (`fxquant.runtime.handover`) they are made
        again, for the caller alone.
        """
        own = self.__dict__  # attributes of a tensor are looked up slowly
        return [own["codes"].stored(), *[own[name] for name in own["_others"]]]

    def held(self) -> list[Tensor]:
        """The parts as they are in memory: as `tensors`, but codes that are away are not made."""
        own = self.__dict__
        return [own["codes"].held, *[own[name] for name in own["_others"]]]

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The decoded tensor, in its own dtype or another."""
        return decode(self.tensors(), self.encoding, self.shape, dtype or self.dtype)

    @property
    def bits_per_weight(self) -> float:
        """Bits stored for each element, scales and all."""
        return 8 * sum(part.nbytes for part in self.held()) / self.numel()

    def numpy(self, *, force: bool = False) -> Any:
        """The decoded tensor as a NumPy array."""
        return self.dequantize().numpy(force=force)

    def tolist(self) -> Any:
        """The decoded tensor as nested lists."""
        return self.dequantize().tolist()

    def share_memory_(self) -> PackedWeight:
        """Moves the parts to memory that processes share, where they stay in their stored form."""
        self.codes.come_back()
        for name in self._names:
            getattr(self, name).share_memory_()
        return self

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        kind = "PackedWeight" if not getattr(self, "_is_param", False) else "PackedWeight parameter"
        return (
            f"{kind}(shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device}, "
            f"encoding={self.encoding})"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> PackedWeight:
        if id(self) not in memo:
            copied = self._with([part.clone() for part in self.tensors()])
            is_parameter = getattr(self, "_is_param", False)
            gradient = self.requires_grad
            memo[id(self)] = torch.nn.Parameter(copied, gradient) if is_parameter else copied
        return memo[id(self)]

    def __reduce_ex__(self, protocol: Any) -> tuple[Callable[..., Tensor], tuple[Any, ...]]:
        gradient = self.requires_grad if getattr(self, "_is_param", False) else None
        state = (self.tensors(), str(self.encoding), tuple(self.shape), self.dtype)
        return rebuild, (*state, gradient)

    # What torch.compile and autograd ask of a wrapper subclass.

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def __tensor_flatten__(self) -> tuple[list[str], tuple[Encoding, torch.dtype]]:
        return list(self._names), self._metadata

    @classmethod
    def __tensor_unflatten__(
        cls,
        inner: Mapping[str, Tensor],
        meta: tuple[Encoding, torch.dtype],
        outer_size: Sequence[int],
        outer_stride: Sequence[int],
    ) -> PackedWeight:
        encoding, dtype = meta
        tensors = [inner[f"packed_{part}"] for part in encoding.parts]
        return cls(tensors, encoding, outer_size, dtype)

    def _stable_hash_for_caching(self) -> str:
        described = (type(self).__name__, str(self.encoding), tuple(self.shape), str(self.dtype))
        return hashlib.sha256(repr(described).encode()).hexdigest()

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: torch._ops.OpOverload,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        handler = _HANDLERS.get(func)
        if handler is not None and isinstance(args[0], PackedWeight):
            result = handler(*args, **kwargs)
            if result is not NotImplemented:
                return result
        return _on_decoded(func, args, kwargs)

    def _with(self, tensors: Sequence[Tensor], dtype: torch.dtype | None = None) -> PackedWeight:
        return PackedWeight(tensors, self.encoding, self.shape, dtype or self.dtype)

    def _converted(
        self, tensors: Sequence[Tensor], dtype: torch.dtype | None = None
    ) -> PackedWeight:
        """As `_with`, for what stays the same weight: an alias, its casts and moves."""
        out = self._with(tensors, dtype)
        out.anchor = self.anchor
        return out


def anchor_of(tensor: Tensor) -> object:
    """What a weak reference to a weight should hold: its anchor, or a dense tensor itself."""
    return tensor.anchor if isinstance(tensor, PackedWeight) else tensor


def rebuild(
    tensors: Sequence[Tensor],
    encoding: str,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    gradient: bool | None,
) -> Tensor:
    """What a pickle of a `PackedWeight` calls; ``torch.load(weights_only=True)`` allows it.

    Args:
        tensors: The stored parts.
        encoding: As text.
        shape: Of the original.
        dtype: Of the original.
        gradient: Whether the parameter that it was wants a gradient; None if it was none.
    """
    packed = PackedWeight(tensors, Encoding.from_text(encoding), shape, dtype)
    return packed if gradient is None else torch.nn.Parameter(packed, gradient)


torch.serialization.add_safe_globals([rebuild])


def _on_decoded(func: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Runs an operation on decoded tensors; those that it writes to are encoded again."""
    decoded: dict[int, tuple[PackedWeight, Tensor]] = {}

    def decode_once(packed: PackedWeight) -> Tensor:
        if id(packed) not in decoded:
            decoded[id(packed)] = (packed, packed.dequantize())
        return decoded[id(packed)][1]

    plain_args, plain_kwargs = tree_map_only(PackedWeight, decode_once, (args, kwargs))
    result = func(*plain_args, **plain_kwargs)
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        given = args[position] if position < len(args) else kwargs.get(argument.name)
        for target in given if isinstance(given, (list, tuple)) else [given]:
            if isinstance(target, PackedWeight):
                dense = decoded[id(target)][1]
                _copy(target, dense)
                result = target if result is dense else result
    return result


def _detach(self: PackedWeight) -> PackedWeight:
    out = self._converted(self.held())
    out.codes = self.codes
    return out


def _clone(self: PackedWeight, **_: Any) -> PackedWeight:
    # Codes have one order only, so a memory format is a wish that changes nothing.
    return self._with([part.clone() for part in self.tensors()])


def _to_copy(
    self: PackedWeight,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
    non_blocking: bool = False,
    **_: Any,
) -> PackedWeight:
    if dtype is not None and not dtype.is_floating_point:
        return NotImplemented
    parts = [
        part.to(device=device, non_blocking=non_blocking, copy=True) for part in self.tensors()
    ]
    return self._converted(parts, dtype)


def _copy(self: PackedWeight, source: Tensor, non_blocking: bool = False) -> PackedWeight:
    theirs = source if isinstance(source, PackedWeight) else None
    if theirs is not None and (theirs.encoding, theirs.shape) == (self.encoding, self.shape):
        parts = theirs.tensors()
    else:
        dense = source if theirs is None else theirs.dequantize()
        dense = dense.to(self.device, self.dtype).expand(self.shape)
        parts = encode(dense, self.encoding, "the tensor copied into a packed weight")
    if self.codes.place is Place.AWAY:
        self.codes.renew()
    held = self.tensors()
    for mine, new in zip(held, parts, strict=True):
        mine.copy_(new, non_blocking)
        if not mine.is_inference():
            increment_version(mine)  # nothing does, this far below autograd
    if any(mine.is_inference() for mine in held):
        self.codes.rename()
    return self


_HANDLERS: dict[Any, Callable[..., Any]] = {
    aten.detach.default: _detach,
    aten.alias.default: _detach,
    aten.clone.default: _clone,
    aten._to_copy.default: _to_copy,
    aten.copy_.default: _copy,
}
