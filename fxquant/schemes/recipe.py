"""`Recipe`: what is done to one product. A scheme is a named recipe."""

from __future__ import annotations

from dataclasses import dataclass

from fxquant.formats import Encoding


@dataclass(frozen=True)
class Recipe:
    """What is done to one matrix product.

    Attributes:
        weight: Encoding of the weight. Several block dimensions are given for the orientation
            ``[.., N, K]`` (outputs, inputs), whatever way the parameter is stored: ``(1, -1)`` is
            per channel, ``(1, 128)`` groups of 128 along the inputs.
    """

    weight: Encoding


@dataclass(frozen=True)
class Scheme:
    """A recipe with a name, a paper and a sentence that says what it is for."""

    name: str
    recipe: Recipe
    paper: str
    summary: str
