"""int8: symmetric 8-bit integer weights, one scale an output channel.

LLM.int8() (Dettmers et al., 2022, arXiv:2208.07339), section 2.1, absmax quantization, row-wise:
``scale = absmax(row) / 127``, ``code = round(w / scale)``. Weights only: activations stay as they
are.
"""

from __future__ import annotations

from fxquant.formats import Encoding
from fxquant.schemes.recipe import Recipe, Scheme

INT8 = Scheme(
    "int8",
    Recipe(Encoding(8, block=(1, -1))),
    "LLM.int8(), Dettmers et al. 2022, arXiv:2208.07339, section 2.1",
    "8-bit integer weights, one scale an output channel, rounded to nearest.",
)
