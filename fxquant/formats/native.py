"""Where faster code for encoding registers itself.

Formats know nothing of compilers and kernels: `fxquant.runtime` calls `set_encoder` when it is
imported. What it registers must give the bits that torch code gives.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from fxquant.formats.encoding import Encoding


@dataclass(frozen=True)
class Runs:
    """A tensor whose blocks are runs of its flattened elements, and room for the result.

    Attributes:
        encoding: How to encode it; of `block` it matters only whether it is flat.
        x: Its elements, flat and contiguous.
        blocks: How many whole blocks there are.
        width: Elements of a whole block.
        rest: Elements of the shorter last block, 0 without one. With flat blocks it is what
            quantizers call cut short.
        packed: uint8, to be filled with the codes.
        peaks: float32 ``[peak_rows, blocks]`` (one more with a rest), to be filled. Where a block
            holds NaN or Inf, so must its peaks.
    """

    encoding: Encoding
    x: Tensor
    blocks: int
    width: int
    rest: int
    packed: Tensor
    peaks: Tensor


Encoder = Callable[[Runs], bool]


class _Registered:
    encoder: Encoder | None = None


def set_encoder(encoder: Encoder | None) -> Encoder | None:
    """Registers code that encodes tensors on the CPU.

    Args:
        encoder: Returns whether it did; if not, torch code does. None for torch code alone.

    Returns:
        What was registered before.
    """
    before = _Registered.encoder
    _Registered.encoder = encoder
    return before


def encode(runs: Runs) -> bool:
    """Has the registered code encode a tensor; False if there is none, or it declines."""
    encoder = _Registered.encoder
    return encoder is not None and runs.x.device.type == "cpu" and encoder(runs)
