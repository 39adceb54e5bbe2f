"""The packed-weight store: each parameter is packed once, whatever recompiles."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.weak import WeakIdKeyDictionary

from fxquant.formats import Encoding, PackedWeight, anchor_of, pack, sqnr_db

_T = TypeVar("_T")


class Snapshot:
    """Tells later whether a tensor still holds what it does now.

    It sees writes and a replaced storage. Writes through ``.data`` and to inference tensors leave
    no trace that could be seen here.

    Args:
        tensor: A dense tensor.
    """

    __slots__ = ("_pin", "_state")

    def __init__(self, tensor: Tensor) -> None:
        # As long as someone refers to it, no other storage gets its address.
        self._pin = StorageWeakRef(tensor.untyped_storage())
        self._state = _state_of(tensor)

    def is_current(self, tensor: Tensor) -> bool:
        """Whether nothing was seen to change."""
        return self._state == _state_of(tensor)


def _state_of(tensor: Tensor) -> tuple[int, int, int]:
    version = 0 if tensor.is_inference() else tensor._version
    return version, tensor.untyped_storage()._cdata, tensor.data_ptr()


def _identity(tensor: Tensor) -> tuple[Any, ...]:
    """What two tensors that share their elements have in common."""
    return (
        tensor.untyped_storage()._cdata,
        tensor.storage_offset(),
        tuple(tensor.shape),
        tensor.stride(),
        tensor.dtype,
        tensor.device,
    )


class Watched:
    """Several tensors as they are now: the very same ones, and unchanged.

    Args:
        tensors: They are held weakly.
        on_death: Called when one of them dies.
    """

    __slots__ = ("_refs", "_snapshots")

    def __init__(
        self, tensors: Sequence[Tensor], on_death: Callable[[Any], object] | None = None
    ) -> None:
        self._refs = [weakref.ref(tensor, on_death) for tensor in tensors]
        self._snapshots = [Snapshot(tensor) for tensor in tensors]

    def is_current(self, tensors: Sequence[Tensor]) -> bool:
        """Whether these are the same tensors and nothing was seen to change."""
        for ref, snapshot, tensor in zip(self._refs, self._snapshots, tensors, strict=True):
            if ref() is not tensor or not snapshot.is_current(tensor):
                return False
        return True

    def is_dead(self) -> bool:
        """Whether one of them is gone."""
        return any(ref() is None for ref in self._refs)


@dataclass(frozen=True)
class _Entry:
    packed: PackedWeight
    snapshot: Snapshot
    identity: tuple[Any, ...]


class WeightStore:
    """Packed weights by parameter and encoding, dropped when the parameter dies.

    A parameter that was written to since (its version counter moved, or its storage was replaced)
    is packed again when it is next asked for. Distinct parameters over the same storage share one
    entry.
    """

    def __init__(self) -> None:
        self._entries: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._aliases: dict[tuple[Any, ...], weakref.ref[Tensor]] = {}
        self._lock = threading.RLock()
        self._errors: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._kept: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._made: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self.packed_count = 0

    def get(self, tensor: Tensor, encoding: Encoding) -> PackedWeight | None:
        """What was packed from this tensor, or None."""
        with self._lock:
            entries: dict[Encoding, _Entry] = self._entries.get(tensor) or self._of_alias(tensor)
            entry = entries.get(encoding)
            if entry is None or entry.identity != _identity(tensor):
                return None
            return entry.packed if entry.snapshot.is_current(tensor) else None

    def pack(self, tensor: Tensor, encoding: Encoding, name: str) -> PackedWeight:
        """Packs a parameter, or finds what was packed from it.

        Args:
            tensor: The parameter; a `PackedWeight` is returned as it is.
            encoding: How to encode it.
            name: Its path in the model, for messages.

        Raises:
            WeightError: It holds NaN or Inf, is empty, or has a dtype that cannot be encoded.
        """
        if isinstance(tensor, PackedWeight):
            return tensor
        with self._lock:
            found = self.get(tensor, encoding)
            if found is not None:
                return found
            packed = pack(tensor.detach(), encoding, name=name)
            self.packed_count += 1
            self._errors[packed.anchor] = sqnr_db(tensor, packed)
            identity = _identity(tensor)
            entry = _Entry(packed, Snapshot(tensor), identity)
            self._entries.setdefault(tensor, {})[encoding] = entry
            self._aliases = {k: ref for k, ref in self._aliases.items() if ref() is not None}
            self._aliases[identity] = weakref.ref(tensor)
            return packed

    def remember(self, key: Hashable, parameters: Sequence[Tensor], make: Callable[[], _T]) -> _T:
        """What a function of parameters gives, called once for them as they are.

        Args:
            key: Tells functions apart.
            parameters: All that the result depends on, one or more. It is dropped with the first.
            make: The function.
        """
        with self._lock:
            known = self._made.setdefault(parameters[0], {})
            full = (key, tuple(map(id, parameters)))
            found = known.get(full)
            if found is not None and found[0].is_current(parameters):
                return cast("_T", found[1])
            result = make()
            for dead in [old for old, (watched, _) in known.items() if watched.is_dead()]:
                del known[dead]
            known[full] = (Watched(parameters), result)
            return result

    def error_db(self, packed: PackedWeight) -> float | None:
        """Signal to quantization noise in dB, None when the original was never here."""
        return self._errors.get(packed.anchor)

    def packed_from(self, tensor: Tensor) -> PackedWeight | None:
        """The latest that was packed from a tensor as it is now, or None."""
        with self._lock:
            entries: dict[Encoding, _Entry] = self._entries.get(tensor) or self._of_alias(tensor)
            found = [self.get(tensor, encoding) for encoding in entries]
            return next((packed for packed in reversed(found) if packed is not None), None)

    def keep(self, tensor: Tensor) -> None:
        """Notes that a compiled graph reads the original too, so that it must not be freed."""
        with self._lock:
            self._kept[anchor_of(tensor)] = True

    def is_kept(self, tensor: Tensor) -> bool:
        """Whether `keep` was called for a tensor."""
        return anchor_of(tensor) in self._kept

    def _of_alias(self, tensor: Tensor) -> dict[Encoding, _Entry]:
        ref = self._aliases.get(_identity(tensor))
        other = ref() if ref is not None else None
        return {} if other is None else self._entries.get(other, {})


STORE = WeightStore()
