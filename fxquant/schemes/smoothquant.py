"""SmoothQuant: activations made easy to quantize by scales that move into the weights.

SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models (Xiao et
al., 2022, arXiv:2211.10438), section 4. ``Y = (X / s) @ (s * W)`` with, for channel j,
``s_j = max|X_j|**alpha / max|W_j|**(1 - alpha)`` (equation 4; the maxima of X from calibration),
then both factors in int8. Table 2's levels differ in how activations are scaled: O1 per token and
O2 per tensor at run time, O3 per tensor beforehand.
"""

from __future__ import annotations

from fxquant.schemes.recipe import Activation, Recipe, Scheme, Smoothing
from fxquant.schemes.w8a8 import PER_CHANNEL

_PAPER = "SmoothQuant, Xiao et al. 2022, arXiv:2211.10438"
_LEVELS = {
    "o1": (Activation("token"), "per token, found at run time"),
    "o2": (Activation("tensor"), "per tensor, found at run time"),
    "o3": (Activation("static"), "per tensor, known from calibration"),
}


def _scheme(name: str, level: str) -> Scheme:
    activation, how = _LEVELS[level]
    recipe = Recipe(PER_CHANNEL, activation, Smoothing(0.5))
    summary = f"Scales migrate into 8-bit weights; 8-bit activations {how}. Needs calibration."
    return Scheme(name, recipe, _PAPER, summary)


SMOOTHQUANT = _scheme("smoothquant", "o1")
SMOOTHQUANT_LEVELS = tuple(_scheme(f"smoothquant_{level}", level) for level in _LEVELS)
