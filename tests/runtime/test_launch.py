"""Kernels that run are recorded, and are those of the GPU that is there."""

from __future__ import annotations

import types
from pathlib import Path

import pytest
import torch

from fxquant.codegen import Header
from fxquant.codegen.spec import KernelSpec, WeightOperand
from fxquant.formats import Encoding
from fxquant.runtime import cache, device, launch, recorded

SPEC = KernelSpec(
    WeightOperand.whole(Encoding(4, "nf4"), (32, 64), transposed=False),
    *["float32"] * 3,
    name="nf4_linear_32x64",
)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(cache.ENVIRONMENT, str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_every_listener_gets_each_kernel_once() -> None:
    kernel = launch.make_kernel(SPEC, "torch", Header())
    with recorded.recording() as outer:
        recorded.record([kernel, kernel])
        with recorded.recording() as inner:
            recorded.record([kernel])
    assert list(outer.values()) == list(inner.values()) == [kernel]
    assert not recorded.is_recording()


@pytest.mark.parametrize("target", ["torch", "triton"])
def test_a_kernel_that_does_not_run_says_so_first(target: str) -> None:
    kernel = launch.make_kernel(SPEC, target, Header(("layer.0",), "nf4"), "there is no GPU")
    assert kernel.source.startswith('# Not run: there is no GPU\n"""layer.')
    assert "Modules: layer.0" in kernel.source
    compile(kernel.source, "kernel", "exec")


@pytest.mark.parametrize(
    ("interpreted", "found", "hip", "vendor"),
    [
        ("0", True, None, "nvidia"),
        ("0", True, "6.4", "amd"),
        ("1", True, None, ""),
        ("0", False, None, ""),
    ],
)
def test_assembly_is_that_of_the_gpu(
    monkeypatch: pytest.MonkeyPatch, interpreted: str, *, found: bool, hip: str | None, vendor: str
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", interpreted)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: found)
    monkeypatch.setattr(torch.version, "hip", hip)
    properties = types.SimpleNamespace(name="a", major=9, minor=0, multi_processor_count=7)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number: properties)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    device._described.cache_clear()
    assert device.gpu().vendor == vendor
    weight = WeightOperand.whole(Encoding(4, "nf4"), (32, 64), transposed=False)
    text = launch.make_kernel(KernelSpec(weight, *["float16"] * 3), "triton", Header()).source
    assert ("inline_asm" in text) == (vendor == "nvidia")
