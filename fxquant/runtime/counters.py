"""What kernels count while they run: saturated elements, columns of outliers.

A counter belongs to a tensor that every call gets, a limit or the codes of a weight, and dies with
it. It lies on the tensor's device: counting never waits for a GPU, reading does.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

_COUNTERS: WeakIdKeyDictionary = WeakIdKeyDictionary()


def of(tensor: Tensor, size: int) -> Tensor:
    """The counter of a tensor: int64 ``[size]`` on its device, which kernels add to."""
    found: Tensor | None = _COUNTERS.get(tensor)
    if found is None:
        found = _COUNTERS[tensor] = torch.zeros(size, dtype=torch.int64, device=tensor.device)
    return found


def read(tensor: Tensor) -> list[int] | None:
    """What was counted for a tensor, None if nothing counts for it."""
    found: Tensor | None = _COUNTERS.get(tensor)
    return None if found is None else found.tolist()
