"""NF4: NormalFloat-4 weights with double-quantized scales.

QLoRA: Efficient Finetuning of Quantized LLMs (Dettmers et al., 2023, arXiv:2305.14314), section 3.
The levels are quantiles of the standard normal distribution (equation 4); a block of 64 weights
shares an absmax scale; the scales, less their mean, are encoded again in 8 bits, 256 of them to a
float32 scale (double quantization, equations 5 and 6): 4 + 8/64 + 32/(64 * 256) = 4.127 bits a
weight. The scales' 8-bit type is bitsandbytes' signed dynamic map, so that checkpoints are the
same bit for bit; `Encoding(8, "e4m3", ...)` in its place is the paper's FP8.
"""

from __future__ import annotations

from fxquant.formats import Encoding
from fxquant.schemes.recipe import Recipe, Scheme

SCALES = Encoding(8, "dynamic8", (256,), offset=True)

NF4 = Scheme(
    "nf4",
    Recipe(Encoding(4, "nf4", (64,), scale=SCALES)),
    "QLoRA, Dettmers et al. 2023, arXiv:2305.14314",
    "4-bit normal quantiles, blocks of 64, double-quantized scales: 4.127 bits a weight.",
)
