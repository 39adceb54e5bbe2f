"""Which channel's scale each position of a value has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

Pattern = Tensor
"""For every position of a value, by which channel's scale it is divided: int64, with the value's
number of dimensions, of size 1 along those that do not matter (batch and time, whose sizes may be
symbolic), and `FREE` where the value is not scaled."""
FREE = -1


@dataclass(frozen=True)
class Need:
    """What one operand has to become for a call's result to be divided by a pattern.

    Attributes:
        operand: The operand.
        pattern: What it is divided by.
        vector: ``"factor"`` or ``"addend"`` where the operand has an element a channel: it can be
            divided at this call, whoever else reads it.
    """

    operand: fx.Node
    pattern: Pattern
    vector: str = ""


class Ties:
    """Channels that have to share a scale, because one element of a producer serves them all.

    Attributes:
        label: int64 ``[k]``: equal labels share a scale. A label is the lowest of its channels.
    """

    def __init__(self, label: Tensor) -> None:
        self.label = label

    @classmethod
    def none(cls, k: int) -> Ties:
        """Every channel on its own."""
        return cls(torch.arange(k))

    def copy(self) -> Ties:
        """Independent of this one."""
        return Ties(self.label)

    def of(self, pattern: Pattern) -> Pattern:
        """A pattern in labels, its constant dimensions of size 1."""
        out = torch.where(pattern < 0, FREE, self.label[pattern.clamp(min=0)])
        for dim in range(out.ndim):
            first = out.narrow(dim, 0, 1)
            if out.shape[dim] > 1 and bool((out == first).all()):
                out = first
        return out

    def join(self, pattern: Pattern, dim: int) -> Pattern | None:
        """The pattern with size 1 along a dimension, whose channels from now on share a scale.

        None where scaled and unscaled elements would have to agree, or all channels.
        """
        while True:
            pattern = self.of(pattern)
            if pattern.shape[dim] == 1:
                return pattern
            low = pattern.amin(dim, keepdim=True).expand_as(pattern)
            if bool(((low < 0) != (pattern < 0)).any()):
                return None
            scaled = pattern >= 0
            table = torch.arange(len(self.label))
            table.scatter_reduce_(0, pattern[scaled], low[scaled], "amin")
            self.label = table[self.label]
            if len(self.label) > 1 and bool((self.label == 0).all()):
                return None


Ways = list[list[Need]]


def shape_of(node: Any) -> tuple[Any, ...]:
    """The sizes of a node's value."""
    return tuple(node.meta["val"].shape)


def thin(pattern: Pattern) -> Pattern:
    """Constant dimensions of size 1."""
    for dim in range(pattern.ndim):
        first = pattern.narrow(dim, 0, 1)
        if pattern.shape[dim] > 1 and bool((pattern == first).all()):
            pattern = first
    return pattern
