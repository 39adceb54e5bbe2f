"""Where the codes of a packed weight are: in the stored form, or with a kernel that repacked them.

A kernel that has taken codes over finds what it made of them by the identity of a *stand-in*, a
tensor of their shape without memory. `stored` makes the codes again for everybody else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import Enum, auto

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

_makers: WeakIdKeyDictionary = WeakIdKeyDictionary()
"""What makes codes again, by their stand-in."""


class Place(Enum):
    """Where codes are."""

    HERE = auto()
    """Stored; a kernel may take them over."""
    AWAY = auto()
    """With a kernel alone."""
    FIXED = auto()
    """Stored, and needed so."""


class Codes:
    """The codes of a packed weight, and of all tensors that alias it.

    Args:
        stored: The codes: uint8 or int8, flat.

    Attributes:
        held: The stored codes or, while they are away, their stand-in.
        place: Where they are.
    """

    __slots__ = ("__weakref__", "_told", "held", "place")

    def __init__(self, stored: Tensor) -> None:
        self.held = stored
        self.place = Place.HERE
        self._told: Callable[[Tensor], None] | None = None

    def stored(self) -> Tensor:
        """The stored codes; made for the caller alone while they are away."""
        return stored([self.held])[0]  # not by `place`: another thread may be about to change it

    def leave(
        self, stand_in: Tensor, make: Callable[[], Tensor], told: Callable[[Tensor], None]
    ) -> None:
        """Lets go of the stored codes.

        Args:
            stand_in: What is held instead.
            make: Gives the codes again, bit for bit.
            told: Called with the codes when they come back.
        """
        _makers[stand_in] = make
        self._told = told
        self.place = Place.AWAY
        self.held = stand_in

    def renew(self) -> None:
        """Holds memory for codes again, without those that are away: for who writes all of them."""
        with torch.inference_mode(mode=False):
            self.held = torch.empty_like(self.held)
        self._told = None
        self.place = Place.HERE

    def rename(self) -> None:
        """Holds the same memory by another tensor, after a write that left no trace.

        C++ kernels know by the tensor what they made of codes. On a GPU nothing is made of them,
        and counters die with the tensor while CUDA graphs still write to them.
        """
        if self.held.is_cpu:
            self.held = self.held.view(-1)

    def come_back(self) -> None:
        """Has the stored codes held again, for good."""
        codes, told = self.stored(), self._told
        if told is not None:
            told(codes)
        self.held, self._told = codes, None
        self.place = Place.FIXED


def stored(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """The tensors of one or several weights, with stand-ins replaced by the codes."""
    if not _makers:
        return tensors
    return [_makers[tensor]() if tensor in _makers else tensor for tensor in tensors]
