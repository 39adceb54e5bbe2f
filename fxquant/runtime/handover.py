"""Hands the codes of a weight over to C++ kernels, so that they are in memory once, repacked.

A graph does so when it first meets a weight, if kernels alone read its codes: they are repacked at
once, and the stored ones are let go of, weight by weight.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from fxquant.formats.codes import Place
from fxquant.formats.packed import PackedWeight
from fxquant.runtime import repacked
from fxquant.runtime.cpp import CppKernel
from fxquant.runtime.memory import Block, Freed

LOG = logging.getLogger("fxquant.handover")


def parts_for(readers: Sequence[CppKernel], packed: PackedWeight) -> list[Tensor]:
    """What a graph is called with for a weight; this is on the path of a call.

    Args:
        readers: The kernels to hand its codes over to; none if something else reads them, too.
        packed: The weight.
    """
    codes = packed.codes
    if readers:
        if codes.place is Place.HERE:
            _hand_over(packed, readers)
    elif codes.place is not Place.FIXED:
        codes.come_back()
    return packed.held()


def _hand_over(packed: PackedWeight, kernels: Sequence[CppKernel]) -> None:
    """Has kernels repack a weight, and lets go of its stored codes.

    These stay where no kernel's form says all of them, as when each reads a part. Kernels of other
    graphs have what they need made again (`CppKernel`).
    """
    codes, (first, *others) = packed.codes, packed.tensors()
    restores = [kernel.restore for kernel in kernels]
    restore = next(filter(None, restores), None)
    if restore is None or not first.is_cpu or not first.is_contiguous():
        codes.place = Place.FIXED
        LOG.info(
            "a weight of shape %s (%s) stays in its stored form beside the repacked one, which "
            "does not say all of its codes",
            list(packed.shape),
            packed.encoding,
        )
        return
    with torch.inference_mode(mode=False):  # there tensors have no version
        stand_in, last = torch.empty_like(first), first[-1:].clone()
    stand_in.untyped_storage().resize_(0)
    Freed.add(first.nbytes)  # but for this one, which is in use
    blocks = [kernel.take([first, *others], [stand_in, *others]) for kernel in kernels]
    block = blocks[restores.index(restore)]
    make = functools.partial(_made, restore, block, last)
    codes.leave(stand_in, make, functools.partial(_found_by, [stand_in, *others]))


def _found_by(away: Sequence[Tensor], codes: Tensor) -> None:
    """Has kernels find what they made of a weight by its codes, which come back."""
    repacked.also_of(away, [codes, *away[1:]])


def _made(restore: Callable[[Tensor, Tensor], Tensor], block: Block, last: Tensor) -> Tensor:
    # Asked for while a graph is traced, too, where tensors would be fake.
    with _disable_current_modes(), torch.inference_mode(mode=False):
        return restore(block.tensor(), last)
