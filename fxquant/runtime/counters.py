"""What kernels count while they run: saturated elements, columns of outliers.

A counter belongs to a tensor that every call gets, a limit or the codes of a weight, and dies with
it. It lies on the tensor's device: counting never waits for a GPU, reading does.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

_COUNTERS: WeakIdKeyDictionary = WeakIdKeyDictionary()
_MAKING = threading.Lock()


def of(tensor: Tensor, size: int) -> Tensor:
    """The counter of a tensor: int64 ``[size]`` on its device, which kernels add to.

    It must be there before a CUDA graph is captured: memory made while one is belongs to it.
    """
    found: Tensor | None = _COUNTERS.get(tensor)
    if found is None:
        with _MAKING, torch.inference_mode(mode=False):
            found = _COUNTERS.get(tensor)
            if found is None:
                found = torch.zeros(size, dtype=torch.int64, device=tensor.device)
                _COUNTERS[tensor] = found
    return found


def read(tensor: Tensor) -> list[int] | None:
    """What was counted for a tensor, None if nothing counts for it."""
    found: Tensor | None = _COUNTERS.get(tensor)
    return None if found is None else found.tolist()
