"""A compiled graph behind Dynamo's calling convention.

Dynamo does not guard on which parameter it passes: one graph serves every block of a model that is
compiled block by block, and a second model of the same class. So packed tensors are not constants
of a graph: they are looked up for the parameter that arrives, which is packed when it is new or was
written to since. The same holds for what is made of several parameters (`Derived`).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from fxquant.formats import Encoding, PackedWeight
from fxquant.runtime import launch, recorded
from fxquant.runtime.cpp import CppKernel
from fxquant.runtime.handover import parts_for
from fxquant.runtime.store import STORE, Snapshot, Watched


@dataclass(frozen=True)
class Slot:
    """A packed parameter's place in a graph.

    Attributes:
        index: The parameter's position among Dynamo's inputs.
        encoding: How it is stored.
        name: Its path in the model that was compiled, for messages.
        readers: All that read its codes, where these are kernels that can have them to themselves.
    """

    index: int
    encoding: Encoding
    name: str
    readers: tuple[CppKernel, ...] = ()


@dataclass(frozen=True, eq=False)
class Derived:
    """The place of what is made of several parameters.

    Attributes:
        indices: The positions of all that it depends on, among Dynamo's inputs.
        compute: Takes Dynamo's inputs and gives a tensor or a `PackedWeight`.
        slot: The parameter whose values are packed, or None.
        readers: As of a `Slot`.
    """

    indices: tuple[int, ...]
    compute: Callable[[Sequence[Any]], Tensor | PackedWeight]
    slot: Slot | None = None
    readers: tuple[CppKernel, ...] = ()


Source = int | tuple[int, int]
"""Where an input of the rewritten graph comes from: a position among Dynamo's inputs, or the number
of a slot and of a part of it."""


class CompiledGraph:
    """Runs a rewritten graph on Dynamo's inputs.

    Args:
        compiled: Takes the rewritten graph's inputs.
        sources: Where each of them comes from.
        slots: The packed parameters, and what is made of several.
        kernels: What it runs.
        on_new: Told of each parameter that a slot meets for the first time.
    """

    def __init__(
        self,
        compiled: Callable[..., Any],
        sources: Sequence[Source],
        slots: Sequence[Slot | Derived],
        kernels: Sequence[launch.Kernel],
        on_new: Callable[[Slot, Tensor, PackedWeight], None],
    ) -> None:
        self.compiled = compiled
        plain = [slot for slot in slots if isinstance(slot, Slot)]
        derived = [slot for slot in slots if isinstance(slot, Derived)]
        place = {slot: number for number, slot in enumerate([*plain, *derived])}
        self.sources = [
            (place[slots[s[0]]], s[1]) if isinstance(s, tuple) else (-1, s) for s in sources
        ]
        self.lookups = [_Lookup(slot, on_new) for slot in plain]
        self.derived = _Derivations(derived, on_new) if derived else None
        self.kernels = tuple(kernels)

    def __call__(self, *args: Any) -> Any:
        """Runs the graph.

        Raises:
            WeightError: Another parameter than at compile time was passed and cannot be encoded.
            CalibrationError: It has no statistics.
        """
        if recorded.is_recording():
            recorded.record(self.kernels)
        parts = [lookup(args[lookup.index]) for lookup in self.lookups]
        if self.derived is not None:
            parts += self.derived(args)
        parts.append(args)
        return self.compiled(*[parts[slot][part] for slot, part in self.sources])


class _Lookup:
    """The packed tensors of whatever parameter arrives at a slot; this is on the path of a call."""

    def __init__(self, slot: Slot, on_new: Callable[[Slot, Tensor, PackedWeight], None]) -> None:
        self.slot = slot
        self.index = slot.index
        self.readers = slot.readers
        self.on_new = on_new
        self.known: dict[int, tuple[weakref.ref[Any], Snapshot, Sequence[Any]]] = {}
        self.met: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self.last: Callable[[], Any] = lambda: None
        """A weak reference to the anchor that came last: asking `met` takes longer."""

    def __call__(self, parameter: Tensor) -> Sequence[Any]:
        if isinstance(parameter, PackedWeight):
            anchor = parameter.anchor
            if self.last() is not anchor:
                if anchor not in self.met:
                    self.met[anchor] = True
                    self.on_new(self.slot, parameter, parameter)
                self.last = weakref.ref(anchor)
            return parts_for(self.readers, parameter)
        key = id(parameter)
        found = self.known.get(key)
        if found is not None and found[0]() is parameter and found[1].is_current(parameter):
            return found[2]
        packed = STORE.pack(parameter, self.slot.encoding, self.slot.name)
        parts = parts_for(self.readers, packed)
        ref = weakref.ref(parameter, lambda _: self.known.pop(key, None))
        self.known[key] = (ref, Snapshot(parameter), parts)
        self.on_new(self.slot, parameter, packed)
        return parts


class _Derivations:
    """All that a graph has made of several parameters, looked up at once: on the path of a call."""

    def __init__(
        self,
        slots: Sequence[Derived],
        on_new: Callable[[Slot, Tensor, PackedWeight], None],
    ) -> None:
        self.slots = slots
        self.indices = sorted({index for slot in slots for index in slot.indices})
        self.on_new = on_new
        self.known: dict[tuple[int, ...], tuple[Watched, list[Sequence[Any]]]] = {}

    def __call__(self, args: Sequence[Any]) -> list[Sequence[Any]]:
        parameters = [args[index] for index in self.indices]
        key = tuple(map(id, parameters))
        found = self.known.get(key)
        if found is not None and found[0].is_current(parameters):
            return found[1]
        parts: list[Sequence[Any]] = []
        for slot in self.slots:
            made = slot.compute(args)
            packed = made if isinstance(made, PackedWeight) else None
            parts.append([made] if packed is None else parts_for(slot.readers, packed))
            if packed is not None and slot.slot is not None:
                self.on_new(slot.slot, args[slot.slot.index], packed)
        watched = Watched(parameters, lambda _: self.known.pop(key, None))
        self.known[key] = (watched, parts)
        return parts
