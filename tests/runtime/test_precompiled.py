"""Precompiled headers: made once, used by every kernel, and done without where they fail."""

from __future__ import annotations

import ctypes
import logging
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from fxquant.runtime import cache, precompiled, toolchain

SOURCE = '#include <algorithm>\nextern "C" int answer(void) { return std::max(42, 7); }\n'
pytestmark = pytest.mark.skipif(
    precompiled.GCC not in getattr(toolchain.compiler(), "version", ""), reason="needs g++"
)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(cache.ENVIRONMENT, str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Has a line of shell run before g++; gives the file with the arguments of each call."""

    def make(before: str) -> Path:
        path, calls = tmp_path / "compiler", tmp_path / "calls"
        path.write_text(f'#!/bin/sh\necho "$*" >> {calls}\n{before}\nexec g++ "$@"\n')
        path.chmod(0o755)
        monkeypatch.setenv("CXX", str(path))
        return calls

    return make


def build(source: str = SOURCE) -> int:
    chain = toolchain.toolchain()
    assert chain is not None
    result: int = ctypes.CDLL(str(toolchain.build(chain, "answer", source))).answer()
    return result


def test_headers_are_made_once_and_taken_by_each_kernel(
    compiler: Callable[[str], Path], folder: Path
) -> None:
    calls = compiler("")
    assert build() == 42
    assert build(SOURCE.replace("42", "43")) == 43
    lines = calls.read_text().splitlines()
    assert len([line for line in lines if "c++-header" in line]) == 1
    (header,) = folder.glob(f"headers/*/{precompiled.NAME}")
    kernels = [line for line in lines if line.endswith("kernel.so") and str(folder) in line]
    assert len(kernels) == 2
    assert all(f"-include {header} " in line for line in kernels)
    # GCC says so with an exclamation mark where it takes the precompiled form of a header.
    chain = toolchain.toolchain()
    assert chain is not None
    (source,) = {path for path in folder.glob("cpp/*/kernel.cpp") if path.read_text() == SOURCE}
    command = [chain.compiler.path, *chain.flags, "-H", "-fsyntax-only", "-include", str(header)]
    said = subprocess.run([*command, str(source)], capture_output=True, text=True, check=True)
    assert f"! {header}.gch" in said.stderr


@pytest.mark.parametrize("step", ["c++-header", "-fsyntax-only"])
def test_where_they_fail_kernels_are_compiled_without(
    step: str, compiler: Callable[[str], Path], folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    calls = compiler(f'case "$*" in *{step}*) exit 1; esac')
    with caplog.at_level(logging.INFO, "fxquant.toolchain"):
        assert build() == 42
        assert build(SOURCE.replace("42", "43")) == 43
    assert caplog.text.count("without precompiled headers") == 1, "tried once"
    lines = [line for line in calls.read_text().splitlines() if line.endswith("kernel.so")]
    assert not any("-include" in line for line in lines)
    assert not list((folder / "headers").iterdir())


def test_they_are_made_again_when_they_are_gone(folder: Path) -> None:
    assert build() == 42
    (header,) = folder.glob(f"headers/*/{precompiled.NAME}")
    for path in header.parent.iterdir():
        path.unlink()
    assert build(SOURCE.replace("42", "43")) == 43
    assert header.is_file()


def test_other_compilers_get_no_such_arguments(folder: Path) -> None:
    assert precompiled.arguments(("clang++",), "clang version 17.0.0", "", 1.0) == []
    assert not folder.exists()
