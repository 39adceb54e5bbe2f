"""Outlier Suppression: the norm's weight moves out of the activation, and tokens are clipped.

Outlier Suppression: Pushing the Limit of Low-bit Transformer Language Models (Wei et al., 2022,
arXiv:2209.13325). Section 4.1, gamma migration: the outliers of a norm's output sit where its
weight is large, so the norm keeps ``X / gamma`` and gamma goes into the products that follow and
into the residual branch. Section 4.2, token-wise clipping: the few tokens with the largest
magnitudes cost the others their resolution and matter little, so amax is limited by a quantile of
the tokens' maxima that calibration chooses.
"""

from __future__ import annotations

from fxquant.schemes.recipe import Activation, Recipe, Scheme, Smoothing
from fxquant.schemes.w8a8 import PER_CHANNEL

OUTLIER_SUPPRESSION = Scheme(
    "outlier_suppression",
    Recipe(PER_CHANNEL, Activation("token", clipped=True), Smoothing(gamma=True)),
    "Outlier Suppression, Wei et al. 2022, arXiv:2209.13325",
    "Norm weights migrate into 8-bit weights; 8-bit activations, clipped. Needs calibration.",
)
