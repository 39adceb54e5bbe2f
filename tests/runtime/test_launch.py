"""Printed modules are imported once a text and version; kernels that run are recorded."""

from __future__ import annotations

import types
from pathlib import Path

import pytest
import torch

from fxquant import errors
from fxquant.codegen import Header
from fxquant.codegen.spec import KernelSpec, WeightOperand
from fxquant.formats import Encoding
from fxquant.runtime import cache, device, launch, recorded, triton

SPEC = KernelSpec(
    WeightOperand.whole(Encoding(4, "nf4"), (32, 64), transposed=False),
    *["float32"] * 3,
    name="nf4_linear_32x64",
)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(cache.ENVIRONMENT, str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_text_is_imported_once() -> None:
    first = triton.load_module("once", "x = 1\n")
    assert triton.load_module("once", "x = 1\n") is first
    assert triton.load_module("once", "x = 2\n").x == 2


def test_another_version_does_not_take_the_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    old = triton.load_module("versioned", "x = 1\n")
    monkeypatch.setattr(triton, "__version__", "999")
    new = triton.load_module("versioned", "x = 1\n")
    assert Path(new.__file__).parent != Path(old.__file__).parent


def test_a_text_that_raises_is_not_kept() -> None:
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            triton.load_module("raises", "1 / 0\n")


def test_an_unwritable_cache_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(cache.ENVIRONMENT, str(tmp_path / "file" / "below"))
    with pytest.raises(errors.FolderError, match=r"kernel cache folder .* point FXQUANT_CACHE_DIR"):
        triton.load_module("nowhere", "x = 1\n")


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
