"""`Recipe`: what is done to one product. A scheme is a named recipe."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypeGuard

from fxquant import errors
from fxquant.formats import Encoding

SCOPES = ("token", "tensor", "static")
AUTO = "auto"


@dataclass(frozen=True)
class Activation:
    """Activations in int8: ``q = round(x * 127 / amax)``, symmetric.

    Attributes:
        scope: Whose largest magnitude `amax` is: of every ``"token"`` (a row), of the whole
            ``"tensor"``, both found at run time, or ``"static"``: of all that calibration saw.
        clipped: No amax exceeds a limit that calibration chose; what lies beyond saturates.

    Raises:
        EncodingError: There is no such scope.
    """

    scope: str = "token"
    clipped: bool = False

    def __post_init__(self) -> None:
        if self.scope not in SCOPES:
            expected = f"one of {', '.join(SCOPES)}"
            raise errors.bad_recipe("activation.scope", self.scope, expected)

    def __str__(self) -> str:
        return f"int8 per {self.scope}".replace("per static", "static") + (
            ", clipped" if self.clipped else ""
        )


@dataclass(frozen=True)
class Smoothing:
    """Where the difficulty of an activation's channels goes before it is quantized.

    Attributes:
        alpha: SmoothQuant's migration strength, equation 4: the activation's channel j is divided
            by, and the weight's multiplied by ``max|X_j|**alpha / max|W_j|**(1 - alpha)``. From 0
            to 1, or ``"auto"``: the best on a grid, a site at a time.
        gamma: Outlier Suppression instead: the scale is the weight of the norm that made the
            activation, and needs no calibration.

    Raises:
        EncodingError: `alpha` is no number from 0 to 1.
    """

    alpha: float | str = 0.5
    gamma: bool = False

    def __post_init__(self) -> None:
        if not is_alpha(self.alpha):
            expected = f"a number from 0 to 1, or {AUTO!r}"
            raise errors.bad_recipe("smoothing.alpha", self.alpha, expected)


@dataclass(frozen=True)
class OutlierColumns:
    """LLM.int8()'s decomposition: columns of the activation that stay in 16 bits.

    Attributes:
        threshold: A column in which any magnitude reaches this is an outlier.
        static: The columns are those of calibration, and their weights are set apart when packed;
            else they are found in every call.

    Raises:
        EncodingError: `threshold` is no number above 0.
    """

    threshold: float = 6.0
    static: bool = False

    def __post_init__(self) -> None:
        if not is_threshold(self.threshold):
            raise errors.bad_recipe("outliers.threshold", self.threshold, "a number above 0")


def is_alpha(value: object) -> bool:
    """Whether a value can be a migration strength."""
    return value == AUTO or (_is_number(value) and 0 <= value <= 1)


def is_threshold(value: object) -> bool:
    """Whether a value can be the magnitude from which on a column is an outlier."""
    return _is_number(value) and 0 < value < math.inf


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


@dataclass(frozen=True)
class Recipe:
    """What is done to one matrix product.

    Attributes:
        weight: Encoding of the weight. Several block dimensions are given for the orientation
            ``[.., N, K]`` (outputs, inputs), whatever way the parameter is stored: ``(1, -1)`` is
            per channel, ``(1, 128)`` groups of 128 along the inputs.
        activation: How the activation is quantized; None leaves it as it is.
        smoothing: What moves from the activation into the weight beforehand.
        outliers: The columns that an int8 product leaves to 16 bits.

    Raises:
        EncodingError: A field has the wrong type, the weight's encoding is one for scales, or the
            outliers stand beside an activation that is not int8 per token.
    """

    weight: Encoding
    activation: Activation | None = None
    smoothing: Smoothing | None = None
    outliers: OutlierColumns | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.weight, Encoding):
            raise errors.bad_recipe("weight", self.weight, "an Encoding")
        if self.weight.offset:
            raise errors.bad_recipe(
                "weight", str(self.weight), "without offset, which is for scales"
            )
        for name, kind in (
            ("activation", Activation),
            ("smoothing", Smoothing),
            ("outliers", OutlierColumns),
        ):
            value = getattr(self, name)
            if value is not None and not isinstance(value, kind):
                raise errors.bad_recipe(name, value, f"None or of type {kind.__name__}")
        if self.outliers is not None and self.activation != Activation():
            expected = "None unless the activation is int8 per token, not clipped"
            raise errors.bad_recipe("outliers", self.outliers, expected)

    @property
    def needs_calibration(self) -> bool:
        """Whether statistics of the activations are needed."""
        static = self.activation is not None and (
            self.activation.scope == "static" or self.activation.clipped
        )
        smooth = self.smoothing is not None and not self.smoothing.gamma
        return static or smooth or (self.outliers is not None and self.outliers.static)


@dataclass(frozen=True)
class Scheme:
    """A recipe with a name, a paper and a sentence that says what it is for."""

    name: str
    recipe: Recipe
    paper: str
    summary: str
