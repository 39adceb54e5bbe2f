"""Compilers that are absent, broken or fail on one kernel: the model runs, and that is said."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._inductor.utils import fresh_cache

import fxquant
from fxquant.codegen.cpp.isa import ISAS
from fxquant.runtime import cache, launch, precompiled, targets, toolchain
from fxquant.testing import run_and_get_kernels
from tests.helpers import TwoLayers, compile_, decoded, frozen

pytestmark = pytest.mark.usefixtures("few_heights", "fresh")
FINDS_SOURCE = 'for a in "$@"; do case "$a" in *.cpp) source="$a";; esac; done\n'


@pytest.fixture(autouse=True)
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    targets._warn.cache_clear()
    monkeypatch.setenv(cache.ENVIRONMENT, str(tmp_path / "cache"))
    # An empty cache has none, and making them takes longer than what is built here.
    monkeypatch.setattr(precompiled, "arguments", lambda *_: [])


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Makes a shell script the C++ compiler; gives the file with a line for each call."""

    def make(body: str) -> Path:
        path, calls = tmp_path / "compiler", tmp_path / "calls"
        path.write_text(f'#!/bin/sh\necho "$*" >> {calls}\n{body}\n')
        path.chmod(0o755)
        monkeypatch.setenv("CXX", str(path))
        return calls

    return make


def kernels_of(model: torch.nn.Module) -> list[str]:
    return [row.kernel for row in fxquant.report(model).quantized]


def test_no_compiler(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    model, x = frozen(TwoLayers()), torch.randn(3, 128)
    torch.testing.assert_close(compile_(model)(x), decoded(model)(x), rtol=1e-4, atol=1e-4)
    warned = [record for record in caplog.records if record.levelname == "WARNING"]
    (line,) = [record.getMessage() for record in warned]
    assert line == (
        f"target 'cpp' cannot run here ({toolchain.NOT_FOUND}): target 'torch' runs instead"
    )
    for kernel in kernels_of(model):
        assert kernel.startswith("torch:")
        assert kernel.endswith(f" (dequantize + matmul fallback: {toolchain.NOT_FOUND})")


def test_no_compiler_where_kernels_are_asked_for_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    model, x = frozen(TwoLayers()), torch.randn(3, 128)
    _, kernels = run_and_get_kernels(compile_(model, target="cpp"), x)
    printed = [kernel for kernel in kernels if kernel.target == "cpp"]
    assert len(printed) == 2
    assert all(k.source.startswith(f"// Not run: {toolchain.NOT_FOUND}\n// ") for k in printed)
    assert {kernel.note for kernel in kernels if kernel.target == "torch"} == {""}


def test_a_compiler_that_builds_nothing(
    compiler: Callable[[str], Path], caplog: pytest.LogCaptureFixture
) -> None:
    compiler('case "$1" in --version) echo cc 1.0;; *) echo "no licence" >&2; exit 3;; esac')
    model, x = frozen(TwoLayers()), torch.randn(3, 128)
    torch.testing.assert_close(compile_(model)(x), decoded(model)(x), rtol=1e-4, atol=1e-4)
    assert "op by op" in caplog.text
    said = "dequantize + matmul fallback: the C++ compiler failed, saying 'no licence'"
    assert all(said in kernel for kernel in kernels_of(model))


def test_a_compiler_that_fails_on_one_kernel(
    compiler: Callable[[str], Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    calls = compiler(
        FINDS_SOURCE + 'if grep -qs "^// up_gelu" "$source"; then\n'
        'echo "internal compiler error" >&2; exit 4; fi\nexec g++ "$@"'
    )
    model, x = frozen(TwoLayers()), torch.randn(3, 128)
    compiled = compile_(model, dump=str(tmp_path / "dump"))
    for _ in range(3):
        torch.testing.assert_close(compiled(x), decoded(model)(x), rtol=1e-4, atol=1e-4)
    up, down = kernels_of(model)
    assert up.startswith("torch:nf4_linear_64x128_bias_gelu (dequantize + matmul fallback: the C++")
    assert "internal compiler error" in up
    assert down == "cpp:nf4_linear_128x64_bias"
    (kept,) = (tmp_path / "cache" / "failed").iterdir()
    assert f"read the source {kept} and run" in caplog.text
    dumped = {path.name.rsplit("_", 1)[0]: path for path in (tmp_path / "dump").glob("*[!n]")}
    assert dumped["cpp_up_gelu"].read_text().startswith("// Not run: the C++ comp")
    assert "torch_up_gelu" in dumped
    assert "torch_down" not in dumped
    # Neither a call nor another compile asks again.
    before = calls.read_text().count("kernel.cpp")
    torch._dynamo.reset()
    compile_(model)(x)
    assert calls.read_text().count("kernel.cpp") == before
    assert caplog.text.count("internal compiler error") == 1


def test_inductor_takes_the_compiler_that_we_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "/nowhere/g++")
    found = toolchain.compiler()
    assert found is not None
    assert targets.inductor_patches() == {"cpp.cxx": (found.path,)}
    monkeypatch.setenv("CXX", found.path)
    assert targets.inductor_patches() == {}
    monkeypatch.delenv("CXX")
    assert targets.inductor_patches() == {}


@pytest.fixture
def unloadable(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Kernels are built and cannot be loaded, until this is undone."""
    load = ctypes.CDLL

    def refuse(path: str | None, **options: Any) -> ctypes.CDLL:
        if path is None or not path.endswith("kernel.so"):
            return load(path, **options)
        raise OSError("failed to map segment from shared object")

    launch._build_once.cache_clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fxquant.runtime.cpp.ctypes.CDLL", refuse)
        yield patch
    launch._build_once.cache_clear()


@pytest.mark.usefixtures("unloadable")
def test_a_kernel_that_cannot_be_loaded(caplog: pytest.LogCaptureFixture) -> None:
    model, x = frozen(TwoLayers()), torch.randn(3, 128)
    torch.testing.assert_close(compile_(model)(x), decoded(model)(x), rtol=1e-4, atol=1e-4)
    assert "point FXQUANT_CACHE_DIR at a folder from which programs may run" in caplog.text
    assert all("cannot be loaded (failed to map" in kernel for kernel in kernels_of(model))


@pytest.mark.parametrize("folders", [1, 2])
def test_code_that_was_made_without_kernels_is_not_taken_with_them(
    folders: int,
    unloadable: pytest.MonkeyPatch,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    def compiled() -> list[str]:
        torch._dynamo.reset()
        model = frozen(TwoLayers())
        torch.testing.assert_close(compile_(model)(x), decoded(model)(x), rtol=1e-4, atol=1e-4)
        return [kernel.partition(":")[0] for kernel in kernels_of(model)]

    def answered() -> int:
        found: int = torch._dynamo.utils.counters["aot_autograd"]["autograd_cache_hit"]
        return found

    x = torch.randn(3, 128)
    with fresh_cache():
        assert [compiled() for _ in range(2)] == [["torch", "torch"]] * 2
        assert answered() == 1
        unloadable.undo()
        launch._build_once.cache_clear()
        if folders == 2:
            monkeypatch.setenv(cache.ENVIRONMENT, str(tmp_path / "another"))
        assert compiled() == ["cpp", "cpp"]
        assert answered() == 1
        assert [compiled() for _ in range(2)] == [["cpp", "cpp"]] * 2
        assert answered() == 3


def test_decisions_are_kept_where_inductor_forgets() -> None:
    def compiled() -> str:
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = frozen(TwoLayers())
        compile_(model)(torch.randn(3, 128))
        return fxquant.report(model).to_json()

    with fresh_cache():
        first = compiled()
        assert compiled() == first
    with fresh_cache():
        assert compiled() == first


def test_a_forced_instruction_set_is_what_kernels_are_printed_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("FXQUANT_ISA", "portable")
    model, x = frozen(TwoLayers()), torch.randn(3, 128)
    out, kernels = run_and_get_kernels(compile_(model), x)
    torch.testing.assert_close(out, decoded(model)(x), rtol=1e-4, atol=1e-4)
    assert {kernel.target for kernel in kernels} == {"cpp"}
    assert not any("immintrin.h" in kernel.source for kernel in kernels)
    monkeypatch.setenv("FXQUANT_ISA", "mmx")
    torch._dynamo.reset()
    with pytest.raises(Exception, match=f"FXQUANT_ISA must be one of {', '.join(ISAS)}"):
        compile_(model)(x)


def test_kernels_of_a_graph_are_built_side_by_side(
    compiler: Callable[[str], Path], tmp_path: Path
) -> None:
    if targets._cores() < 2:
        pytest.skip("one core builds one kernel at a time")
    # Each build waits until the other has begun: one after the other they would both give up.
    meet = tmp_path / "meet"
    meet.mkdir()
    compiler(
        FINDS_SOURCE + f'if grep -qs "^// \\(up\\|down\\)" "$source"; then touch {meet}/$$; n=0\n'
        f'while [ "$(ls {meet} | wc -l)" -lt 2 ]; do n=$((n+1)); sleep 0.05\n'
        'if [ $n -gt 600 ]; then echo alone >&2; exit 1; fi; done; fi\nexec g++ "$@"'
    )
    model = frozen(TwoLayers())
    compile_(model)(torch.randn(3, 128))
    assert all(kernel.startswith("cpp:") for kernel in kernels_of(model))
    assert len(list(meet.iterdir())) == 2
