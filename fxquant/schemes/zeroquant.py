"""ZeroQuant: group-wise integer weights, token-wise integer activations.

ZeroQuant: Efficient and Affordable Post-Training Quantization for Large-Scale Transformers (Yao et
al., 2022, arXiv:2206.01861), section 3.1: a scale for every group of a weight's row, and a scale
for every token, found at run time. The paper's W4/8A8 keeps some weights in 4 bits; here that is a
scheme of its own, for `Config.overrides` to mix.
"""

from __future__ import annotations

from fxquant.formats import Encoding
from fxquant.schemes.recipe import Activation, Recipe, Scheme

_PAPER = "ZeroQuant, Yao et al. 2022, arXiv:2206.01861"

ZEROQUANT = Scheme(
    "zeroquant",
    Recipe(Encoding(8, block=(1, 128)), Activation("token")),
    _PAPER,
    "8-bit weights in groups of 128, activations in 8 bits per token.",
)
ZEROQUANT_W4A8 = Scheme(
    "zeroquant_w4a8",
    Recipe(Encoding(4, block=(1, 128)), Activation("token")),
    _PAPER,
    "4-bit weights in groups of 128, activations in 8 bits per token.",
)
