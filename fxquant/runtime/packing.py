"""Encodes tensors on the CPU with printed C++, on behalf of `fxquant.formats`."""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import logging
from collections.abc import Callable

import torch

from fxquant import errors
from fxquant.formats import Encoding, native
from fxquant.runtime import toolchain
from fxquant.runtime.cpp import usable_threads

LOG = logging.getLogger("fxquant.packing")

LEAST = 1 << 18
"""Elements from which it pays to build a kernel: torch code takes a millisecond for them."""

Pack = Callable[[native.Runs], None]


def encode(runs: native.Runs) -> bool:
    """Encodes a large tensor; False where torch code has to."""
    if runs.x.numel() < LEAST:
        return False
    chain = toolchain.toolchain()
    pack = None if chain is None else _kernel(chain, _what_matters(runs.encoding), runs.x.dtype)
    if pack is None:
        LOG.debug("torch code encodes %s of %s", runs.encoding, runs.x.dtype)
        return False
    pack(runs)
    return True


def _what_matters(encoding: Encoding) -> Encoding:
    """An encoding that the same kernel serves, the same for all that it serves."""
    block = (64,) if encoding.is_flat else (1, -1)
    clip = None if encoding.clip == 1.0 else encoding.clip
    return dataclasses.replace(encoding, block=block, scale=None, offset=False, clip=clip)


@functools.lru_cache(maxsize=64)
def _kernel(chain: toolchain.Toolchain, encoding: Encoding, dtype: torch.dtype) -> Pack | None:
    """The built kernel; None where none can be printed or built."""
    from fxquant.codegen.cpp.pack import can_pack, render_pack

    if not can_pack(encoding, dtype):
        return None
    source = render_pack(encoding, dtype, chain.isa)
    try:
        library = ctypes.CDLL(str(toolchain.build(chain, "pack", source)))
    except (errors.FxquantError, OSError) as error:
        LOG.warning("weights are packed by torch code, which is slower: %s", error)
        return None
    function = library.fxquant_pack
    int64, pointer = ctypes.c_int64, ctypes.c_void_p
    function.argtypes = [pointer, int64, int64, int64, pointer, pointer, ctypes.c_int]
    function.restype = None

    def pack(runs: native.Runs) -> None:
        function(
            runs.x.data_ptr(),
            *(runs.blocks, runs.width, runs.rest),
            *(runs.packed.data_ptr(), runs.peaks.data_ptr()),
            usable_threads(openmp=chain.openmp),
        )

    return pack
