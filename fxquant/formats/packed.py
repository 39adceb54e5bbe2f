"""`PackedWeight`: an encoded tensor that behaves as the original."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from fxquant.formats.decode import decode
from fxquant.formats.encode import encode
from fxquant.formats.encoding import Encoding


class PackedWeight(Tensor):
    """Holds codes and scales; shape, dtype and device are those of the original tensor.

    Any operation that it does not know decodes it first, so eager code stays right.
    """

    _parts: list[Tensor]
    encoding: Encoding

    @staticmethod
    def __new__(
        cls: type[PackedWeight],
        tensors: Sequence[Tensor],
        encoding: Encoding,
        shape: Sequence[int],
        dtype: torch.dtype,
        requires_grad: bool = False,
    ) -> PackedWeight:
        return Tensor._make_wrapper_subclass(
            cls, tuple(shape), dtype=dtype, device=tensors[0].device, requires_grad=requires_grad
        )

    def __init__(
        self,
        tensors: Sequence[Tensor],
        encoding: Encoding,
        shape: Sequence[int],
        dtype: torch.dtype,
        requires_grad: bool = False,
    ) -> None:
        self._parts = list(tensors)
        self.encoding = encoding

    def tensors(self) -> list[Tensor]:
        return list(self._parts)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        return decode(self._parts, self.encoding, self.shape, dtype or self.dtype)

    @property
    def bits_per_weight(self) -> float:
        return 8 * sum(part.nbytes for part in self._parts) / self.numel()

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        for i, part in enumerate(self._parts):
            setattr(self, f"_part{i}", part)
        return [f"_part{i}" for i in range(len(self._parts))], (self.encoding, self.dtype)

    @classmethod
    def __tensor_unflatten__(cls, inner, meta, outer_size, outer_stride):
        encoding, dtype = meta
        return cls([inner[f"_part{i}"] for i in range(len(inner))], encoding, outer_size, dtype)

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            (self,) = args
            return cls(self._parts, self.encoding, self.shape, self.dtype)
        plain = tree_map(lambda v: v.dequantize() if isinstance(v, PackedWeight) else v, (args, kwargs or {}))
        return func(*plain[0], **plain[1])


def pack(tensor: Tensor, encoding: Encoding, *, name: str = "weight") -> PackedWeight:
    """Encodes a tensor."""
    return PackedWeight(encode(tensor, encoding, name), encoding, tensor.shape, tensor.dtype)
