"""Repacked weights: what C++ kernels read instead of the stored tensors.

A weight is repacked once for all kernels that want it in the same form, and dropped with its codes.
"""

from __future__ import annotations

import ctypes
import os
import threading
import weakref
from collections.abc import Callable, Hashable, Sequence
from typing import Any

from torch import Tensor

from fxquant.runtime.memory import Block

Make = Callable[[Sequence[Tensor]], Block]
"""Repacks the stored tensors of one weight."""


class _Lock:
    """Held while a weight is repacked, by threads that a forked child does not have."""

    held = threading.Lock()


def _after_fork() -> None:
    _Lock.held = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


class Seen:
    """Tensors as they were once.

    Args:
        tensors: All that matter.
    """

    __slots__ = ("_addresses", "_storages", "_versions")

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        # As long as these live, no other storage gets their address.
        self._storages = [tensor.untyped_storage() for tensor in tensors]
        self._addresses = [tensor.data_ptr() for tensor in tensors]
        counted = not any(tensor.is_inference() for tensor in tensors)
        self._versions = [tensor._version for tensor in tensors] if counted else None

    def is_current(self, tensors: Sequence[Tensor]) -> bool:
        """Whether nothing was seen to change since.

        Writes through ``.data`` and to inference tensors leave no trace that could be seen here.
        """
        return self._addresses == [tensor.data_ptr() for tensor in tensors] and (
            self._versions is None or self._versions == [tensor._version for tensor in tensors]
        )


class Repacked(Seen):
    """One weight.

    Args:
        weight: The stored tensors.
        block: What was made of them.

    Attributes:
        address: Of what kernels read.
    """

    __slots__ = ("address", "block")

    def __init__(self, weight: Sequence[Tensor], block: Block) -> None:
        super().__init__(weight)
        self.block = block
        self.address = block.address


class Several(Seen):
    """The weights of one product.

    Args:
        tensors: Those of all weights.
        parts: The weights.

    Attributes:
        address: Of an array of their addresses.
    """

    __slots__ = ("_array", "address", "parts")

    def __init__(self, tensors: Sequence[Tensor], parts: Sequence[Repacked]) -> None:
        super().__init__(tensors)
        self.parts = parts
        self._array = (ctypes.c_void_p * len(parts))(*[part.address for part in parts])
        self.address = ctypes.addressof(self._array)


class Store:
    """Weights by the identity of their codes, each for as long as these live.

    Attributes:
        found: What was repacked, by ``id`` of the codes.
    """

    def __init__(self) -> None:
        self.found: dict[int, Any] = {}
        self._references: dict[int, list[weakref.ref[Tensor]]] = {}

    def weight(self, tensors: Sequence[Tensor], make: Make) -> Repacked:
        """One weight, repacked if it was not, or was written to since.

        Args:
            tensors: The stored tensors.
            make: Repacks them.
        """
        with _Lock.held:
            found: Repacked | None = self.found.get(id(tensors[0]))
            if found is None or not found.is_current(tensors):
                found = Repacked(tensors, make(tensors))
                self.keep(tensors[:1], found)
            return found

    def keep(self, codes: Sequence[Tensor], found: Repacked | Several) -> None:
        """Keeps what was made by the first of these tensors, until any of them dies."""
        key = id(codes[0])
        self._references[key] = [weakref.ref(one, lambda _: self._drop(key)) for one in codes]
        self.found[key] = found

    def _drop(self, key: int) -> None:
        # Without the lock: the collector may call this in a thread that holds it.
        self.found.pop(key, None)
        self._references.pop(key, None)


_stores: weakref.WeakValueDictionary[Hashable, Store] = weakref.WeakValueDictionary()


def store(form: Hashable) -> Store:
    """The weights in one form, shared by all kernels that have it; None is a form of one's own."""
    return Store() if form is None else _stores.setdefault(form, Store())


def also_of(known: Sequence[Tensor], weight: Sequence[Tensor]) -> None:
    """Has kernels find what they made of a weight by other tensors of the same values, too.

    Args:
        known: The tensors that they found it by.
        weight: The others.
    """
    for shared in list(_stores.values()):
        found: Repacked | None = shared.found.get(id(known[0]))
        if found is not None and found.is_current(known):
            shared.keep(weight[:1], Repacked(weight, found.block))
