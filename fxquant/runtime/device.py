"""The GPU that is there, as the choice of tiles sees it."""

from __future__ import annotations

import dataclasses
import functools
import os
from typing import Any

import torch

from fxquant.codegen.triton.gpu import ANY, FAMILIES, Gpu


def gpu() -> Gpu:
    """The current GPU; `ANY` without one, and where kernels are interpreted."""
    if os.environ.get("TRITON_INTERPRET") == "1" or not torch.cuda.is_available():
        return ANY
    return _described(torch.cuda.current_device())


@functools.cache
def _described(number: int) -> Gpu:
    return describe(torch.cuda.get_device_properties(number), is_amd=bool(torch.version.hip))


def describe(found: Any, *, is_amd: bool) -> Gpu:
    """A GPU by its properties.

    What its driver does not tell is that of the family's member in `FAMILIES`: of the newest one
    that is not newer, for an architecture that is not among them.

    Args:
        found: As from `torch.cuda.get_device_properties`.
        is_amd: Its vendor.
    """
    if is_amd:
        family = FAMILIES["gfx942"]
    else:
        capability = 10 * found.major + found.minor
        known = {int(name[3:]): name for name in FAMILIES if name.startswith("sm_")}
        family = FAMILIES[known[max((c for c in known if c <= capability), default=min(known))]]
    clock = getattr(found, "clock_rate", 0) * 1e3
    # Twice in a cycle, so many bits.
    bandwidth = getattr(found, "memory_clock_rate", 0) * 1e3 * 2
    bandwidth *= getattr(found, "memory_bus_width", 0) / 8
    processor = family.processor
    shared = getattr(found, "shared_memory_per_multiprocessor", 0)
    if 0 < shared < processor.shared_bytes:
        most = shared - processor.shared_reserved
        processor = dataclasses.replace(processor, shared_bytes=shared, program_bytes=most)
    return dataclasses.replace(
        family,
        name=found.name,
        processor=processor,
        processors=found.multi_processor_count,
        clock=clock or family.clock,
        bandwidth=bandwidth or family.bandwidth,
        cache_bytes=getattr(found, "L2_cache_size", 0) or family.cache_bytes,
    )
