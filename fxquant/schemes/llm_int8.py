"""LLM.int8(): int8 products, with the few columns of large activations in 16 bits.

LLM.int8(): 8-bit Matrix Multiplication for Transformers at Scale (Dettmers et al., 2022,
arXiv:2208.07339), section 3: columns of X in which any magnitude reaches 6 are outliers; they and
their rows of the weight are multiplied in 16 bits, everything else in int8 with a scale a token
and a scale an output channel (equation 8). Found in every call, or once in calibration.
"""

from __future__ import annotations

from fxquant.schemes.recipe import Activation, OutlierColumns, Recipe, Scheme
from fxquant.schemes.w8a8 import PER_CHANNEL

_PAPER = "LLM.int8(), Dettmers et al. 2022, arXiv:2208.07339"

LLM_INT8 = Scheme(
    "llm_int8",
    Recipe(PER_CHANNEL, Activation("token"), outliers=OutlierColumns(6.0)),
    _PAPER,
    "8-bit products; columns of large activations, found in every call, stay in 16 bits.",
)
LLM_INT8_STATIC = Scheme(
    "llm_int8_static",
    Recipe(PER_CHANNEL, Activation("token"), outliers=OutlierColumns(6.0, static=True)),
    _PAPER,
    "8-bit products; columns of large activations, known from calibration, stay in 16 bits.",
)
