"""Where the inputs of a rewritten graph come from, call by call.

Dynamo does not guard on which parameter it passes: one graph serves every block of a model that is
compiled block by block, and every tensor of a shape that a function takes as an argument. So a
packed input remembers the parameter that it was packed from, and another one that arrives in its
place is packed in the same way.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fxquant.formats import Encoding, PackedWeight


@dataclass(frozen=True, eq=False)
class PackedPart:
    """One tensor of a packed parameter.

    Attributes:
        index: The parameter's position among Dynamo's inputs.
        part: Position of the tensor among ``Encoding.parts``.
        tensor: The tensor, packed at compile time.
        encoding: How the parameter is encoded.
        name: The parameter's name.
        pack_weight: Packs, or finds what was packed.
        parameter: The parameter that `tensor` belongs to; not kept alive.
    """

    index: int
    part: int
    tensor: Tensor
    encoding: Encoding
    name: str
    pack_weight: Callable[[Tensor, Encoding, str], PackedWeight]
    parameter: weakref.ref[Tensor]

    def of(self, args: Sequence[Any]) -> Tensor:
        """The tensor for one call's arguments.

        Raises:
            WeightError: Another parameter than at compile time was passed and cannot be encoded.
        """
        given = args[self.index]
        if given is self.parameter():
            return self.tensor
        return self.pack_weight(given, self.encoding, self.name).tensors()[self.part]


def gather(sources: Sequence[int | PackedPart], args: Sequence[Any]) -> list[Any]:
    """A rewritten graph's inputs for one call with Dynamo's arguments."""
    return [args[s] if isinstance(s, int) else s.of(args) for s in sources]
