"""The GPU that is there, described by its driver's properties."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from fxquant.codegen.triton.gpu import ANY, FAMILIES
from fxquant.runtime import device


def properties(major: int, minor: int, **more: int) -> SimpleNamespace:
    return SimpleNamespace(name="one", major=major, minor=minor, multi_processor_count=60, **more)


@pytest.mark.parametrize(
    ("capability", "family"),
    [((9, 0), "sm_90"), ((8, 9), "sm_80"), ((7, 5), "sm_80"), ((12, 0), "sm_100")],
)
def test_the_newest_family_that_is_not_newer(capability: tuple[int, int], family: str) -> None:
    found = device.describe(properties(*capability), is_amd=False)
    assert (found.family, found.vendor, found.processors) == (family, "nvidia", 60)
    assert found.bandwidth == FAMILIES[family].bandwidth


def test_what_the_driver_says_counts() -> None:
    told = properties(
        8,
        6,
        clock_rate=1_700_000,
        memory_clock_rate=9_751_000,
        memory_bus_width=384,
        L2_cache_size=6 << 20,
        shared_memory_per_multiprocessor=100 << 10,
    )
    found = device.describe(told, is_amd=False)
    assert found.clock == 1.7e9
    assert found.bandwidth == pytest.approx(936e9, rel=1e-3)  # of a data sheet: an RTX 3090
    assert found.cache_bytes == 6 << 20
    assert found.processor.program_bytes == 99 << 10


def test_amd() -> None:
    found = device.describe(properties(9, 4), is_amd=True)
    assert (found.family, found.vendor, found.processor.lanes) == ("gfx942", "amd", 64)


def test_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert device.gpu() is ANY


def test_a_processor_holds_what_fits() -> None:
    processor = FAMILIES["sm_90"].processor
    assert processor.resident(128, 0, 4) == 4
    assert processor.resident(32, 0, 4) == 16
    assert processor.resident(32, 100 << 10, 4) == 2
    assert processor.resident(255, 0, 8) == 1
    assert processor.resident(255, 0, 16) == 0
