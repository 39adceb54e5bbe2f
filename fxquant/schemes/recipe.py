"""`Recipe`: what is done to one product. A scheme is a named recipe."""

from __future__ import annotations

from dataclasses import dataclass

from fxquant import errors
from fxquant.formats import Encoding


@dataclass(frozen=True)
class Recipe:
    """What is done to one matrix product.

    Attributes:
        weight: Encoding of the weight. Several block dimensions are given for the orientation
            ``[.., N, K]`` (outputs, inputs), whatever way the parameter is stored: ``(1, -1)`` is
            per channel, ``(1, 128)`` groups of 128 along the inputs.

    Raises:
        EncodingError: The weight's encoding is none, or is one for scales.
    """

    weight: Encoding

    def __post_init__(self) -> None:
        if not isinstance(self.weight, Encoding):
            raise errors.bad_recipe("weight", self.weight, "an Encoding")
        if self.weight.offset:
            raise errors.bad_recipe(
                "weight", str(self.weight), "without offset, which is for scales"
            )


@dataclass(frozen=True)
class Scheme:
    """A recipe with a name, a paper and a sentence that says what it is for."""

    name: str
    recipe: Recipe
    paper: str
    summary: str
