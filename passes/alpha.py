"""``alpha="auto"``: the migration strength with the least error of the product's output.

Each strength of a grid is tried on the product as it will run: weights encoded, activations in
int8, on activations that are drawn as calibration says. A channel is normal, with the second moment
that was counted; where none was, the largest of N normal numbers is about ``sigma sqrt(2 ln N)``,
which gives sigma. The draw is the same every time.

The least error of each product is not that of the model: MiniLM is better off with 0.5 everywhere,
and that is not for the draw. Real rows in its place, the text itself that the model is measured on,
and errors relative to each row's result were tried, and chose strengths that are no better.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fxquant.calibration import SiteStats
from fxquant.formats import Encoding, pack
from fxquant.schemes.recipe import Activation

GRID = tuple(step / 20 for step in range(21))
TOKENS, ROWS = 64, 256
"""Rows of the drawn activation, and rows of each weight that are tried, at most."""

Choice = tuple[Tensor, Encoding, Activation | None]


def best_alpha(
    scale_of: Callable[[float], Tensor], consumers: Sequence[Choice], stats: SiteStats
) -> float:
    """The strength of `GRID` with the least error; of equal ones the nearest to one half.

    Args:
        scale_of: The scales ``[k]`` of a strength.
        consumers: Weights ``[e, n, k]`` of one activation, how each is encoded (for ``[n, k]``),
            and how its activation is.
        stats: The activation's.
    """
    x = drawn(stats, consumers[0][0].device)
    amax = stats.amax.to(x.device)
    samples = [(_sampled(weight), encoding, how) for weight, encoding, how in consumers]

    def error(alpha: float) -> float:
        scale = scale_of(alpha)
        return sum(
            output_error(x, amax, weight, scale, encoding, how) for weight, encoding, how in samples
        )

    return min(GRID, key=lambda alpha: (error(alpha), abs(alpha - 0.5)))


def drawn(stats: SiteStats, device: torch.device) -> Tensor:
    """``[TOKENS, k]`` float32: an activation as its statistics say."""
    if stats.moments is not None:
        sigma = (stats.moments.diagonal() / max(stats.tokens, 1)).clamp(min=0).sqrt()
    else:
        sigma = stats.amax / math.sqrt(2 * math.log(max(stats.tokens, 2)))
    normal = torch.randn(TOKENS, len(sigma), generator=torch.Generator().manual_seed(0))
    return (normal * sigma.cpu()).to(device)


def _sampled(weight: Tensor) -> Tensor:
    rows = weight.reshape(-1, weight.shape[-1])
    step = max(1, -(-len(rows) // ROWS))
    return rows[::step].float()


def output_error(  # noqa: PLR0917 - one product in full
    x: Tensor,
    amax: Tensor,
    weight: Tensor,
    scale: Tensor,
    encoding: Encoding,
    activation: Activation | None,
) -> float:
    """Squared error of ``x @ weight.T`` when ``x / scale`` and ``weight * scale`` are quantized.

    Args:
        x: ``[m, k]`` float32.
        amax: ``[k]``: the largest magnitudes that x may have, for a static range.
        weight: ``[n, k]`` float32.
        scale: ``[k]``.
        encoding: Of the weight.
        activation: Of x, or None to leave it as it is.
    """
    stored = pack(weight * scale, encoding).dequantize()
    smooth = x / scale
    if activation is not None:
        largest = {
            "token": smooth.abs().amax(-1, keepdim=True),
            "tensor": smooth.abs().amax(),
            "static": (amax / scale).amax(),
        }[activation.scope]
        step = largest.clamp(min=2.0**-100) / 127
        smooth = (smooth / step).round().clamp(-127, 127) * step
    return float((smooth @ stored.t() - x @ weight.t()).square().sum())
