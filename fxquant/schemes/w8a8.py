"""W8A8: int8 weights, one scale an output channel, and int8 activations, one scale a token.

The plain form of SmoothQuant's table 2 (Xiao et al., 2022, arXiv:2211.10438): ``Y = diag(s_x) *
(X_int8 @ W_int8) * diag(s_w)`` with the scales found at run time for activations; nothing is done
about outliers.
"""

from __future__ import annotations

from fxquant.formats import Encoding
from fxquant.schemes.recipe import Activation, Recipe, Scheme

PER_CHANNEL = Encoding(8, block=(1, -1))

W8A8 = Scheme(
    "w8a8",
    Recipe(PER_CHANNEL, Activation("token")),
    "SmoothQuant, Xiao et al. 2022, arXiv:2211.10438, table 2",
    "8-bit integer weights per channel, activations per token, found at run time.",
)
