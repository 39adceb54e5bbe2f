"""Where the inputs of a rewritten graph come from.

A packed input is described by the parameter's position, since one graph serves many parameters
(`fxquant.runtime.graph` says why): whoever runs the graph packs what arrives there.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fxquant.formats import Encoding


@dataclass(frozen=True, eq=False)
class PackedPart:
    """One tensor of a packed parameter.

    Attributes:
        index: The parameter's position among Dynamo's inputs.
        part: Position of the tensor among ``Encoding.parts``.
        tensor: The tensor that was packed at compile time.
        encoding: How the parameter is encoded.
        name: The parameter's name.
    """

    index: int
    part: int
    tensor: Tensor
    encoding: Encoding
    name: str
