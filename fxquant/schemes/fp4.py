"""FP4: 4-bit floating-point weights (one sign, two exponent and one mantissa bit).

QLoRA (Dettmers et al., 2023, arXiv:2305.14314), section 4 and appendix A, the baseline to NF4, as
bitsandbytes stores it: ``w = level(code) * absmax(block)``, blocks of 64, float32 scales:
4 + 32/64 = 4.5 bits a weight.
"""

from __future__ import annotations

from fxquant.formats import Encoding
from fxquant.schemes.recipe import Recipe, Scheme

FP4 = Scheme(
    "fp4",
    Recipe(Encoding(4, "fp4", (64,))),
    "QLoRA, Dettmers et al. 2023, arXiv:2305.14314",
    "4-bit floating point, blocks of 64, float32 scales: 4.5 bits a weight.",
)
