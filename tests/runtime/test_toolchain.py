"""The C++ compiler: found, asked for what it can, run once a text, and named when it fails."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import pytest

from fxquant import errors
from fxquant.codegen.cpp.isa import ISAS
from fxquant.runtime import cache, precompiled, tile_unit, toolchain

SOURCE = 'extern "C" int answer(void) { return 42; }\n'


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.delenv("FXQUANT_ISA", raising=False)
    monkeypatch.setenv(cache.ENVIRONMENT, str(tmp_path / "cache"))
    # An empty cache has none, and making them takes longer than what is built here.
    monkeypatch.setattr(precompiled, "arguments", lambda *_: [])
    return tmp_path / "cache"


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Makes a shell script the C++ compiler; each of its calls adds a line to ``calls``."""

    def make(body: str) -> Path:
        path = tmp_path / "compiler"
        calls = tmp_path / "calls"
        calls.touch()
        path.write_text(f'#!/bin/sh\necho "$*" >> {calls}\n{body}\n')
        path.chmod(0o755)
        monkeypatch.setenv("CXX", str(path))
        return calls

    return make


def chain() -> toolchain.Toolchain:
    found = toolchain.toolchain()
    assert found is not None
    return found


def test_a_text_is_compiled_once_and_its_source_lies_beside_it(
    script: Callable[[str], Path],
) -> None:
    calls = script('exec g++ "$@"')
    first = toolchain.build(chain(), "answer", SOURCE)
    count = len(calls.read_text().splitlines())
    assert toolchain.build(chain(), "answer", SOURCE) == first
    assert len(calls.read_text().splitlines()) == count, "found in the cache"
    assert first.with_suffix(".cpp").read_text() == SOURCE
    other = toolchain.build(chain(), "answer", SOURCE.replace("42", "43"))
    assert other.parent != first.parent
    assert len(calls.read_text().splitlines()) == count + 1


@pytest.mark.parametrize("what", ["version", "isa", "fxquant"])
def test_entries_depend_on_compiler_flags_and_version(
    what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = chain()
    first = toolchain.build(before, "answer", SOURCE)
    compiler, isa = before.compiler, before.isa
    if what == "version":
        compiler = toolchain.Compiler(compiler.path, "another version")
    elif what == "isa":
        isa = ISAS["portable"]
    else:
        monkeypatch.setattr(toolchain, "__version__", "999")
    after = toolchain.Toolchain(compiler, isa, before.openmp)
    assert toolchain.build(after, "answer", SOURCE) != first


def test_a_damaged_entry_is_built_again(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    built = toolchain.build(chain(), "answer", SOURCE)
    whole = built.read_bytes()
    built.write_bytes(whole[: len(whole) // 2])
    assert toolchain.build(chain(), "answer", SOURCE) == built
    assert len(built.read_bytes()) > len(whole) // 2
    assert "damaged" in caplog.text


def test_a_failing_compiler_is_one_sentence_with_command_reason_and_source(
    script: Callable[[str], Path], folder: Path
) -> None:
    fails = """
        for last in "$@"; do case "$last" in *.cpp) source="$last";; esac; done
        if grep -qs answer "$source"; then echo "no space left" >&2; exit 3; fi
        exec g++ "$@"
    """
    script(fails)
    broken = chain()
    with pytest.raises(errors.CompilerError) as caught:
        toolchain.build(broken, "answer", SOURCE)
    text = str(caught.value)
    assert "'answer'" in text
    assert "no space left" in text
    assert f"{broken.compiler.path} -std=c++17 -O3" in text
    (kept,) = (folder / "failed").glob("answer_*.cpp")
    assert kept.read_text() == SOURCE
    assert text.count(str(kept)) == 2, "where the source is, and the command that reads it"
    assert not list((folder / "cpp").iterdir()), "nothing half-built stays"
    assert caught.value.reason == "the C++ compiler failed, saying 'no space left'"


def test_a_compiler_that_builds_nothing(
    script: Callable[[str], Path], folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    calls = script(
        'case "$1" in --version) echo broken 1.0;; *) echo "no licence" >&2; exit 3; esac'
    )
    found = toolchain.compiler()
    assert found is not None
    assert found.summary == "broken 1.0"
    for _ in range(3):
        assert toolchain.toolchain() is None
        assert toolchain.obstacle() == "the C++ compiler failed, saying 'no licence'"
    asked = calls.read_text().splitlines()
    assert len(asked) == len(set(asked)), "asked once for each set of flags"
    assert caplog.text.count("no licence") == 1
    assert f"{found.path} -std=c++17" in caplog.text
    assert (folder / "failed" / "nothing.cpp").read_text() == toolchain.PROBE


def test_an_error_in_a_source_quotes_the_compiler() -> None:
    with pytest.raises(errors.KernelError, match=r"kernel\.cpp:1:\d+: error: .*set CXX to another"):
        toolchain.build(chain(), "broken", "int main( {\n")


@pytest.mark.parametrize("name", ["/nowhere/g++", "no-such-compiler", "false"])
def test_a_compiler_that_does_not_run_is_passed_over(
    name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    usual = toolchain.compiler()
    toolchain._find.cache_clear()
    monkeypatch.setenv("CXX", name)
    for _ in range(2):
        assert toolchain.compiler() == usual
    assert caplog.text.count(f"CXX is '{name}', which does not run") == 1


def test_no_compiler_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert toolchain.compiler() is None
    assert toolchain.toolchain() is None


def test_a_compiler_without_openmp_builds_without(
    script: Callable[[str], Path], caplog: pytest.LogCaptureFixture
) -> None:
    script('case "$*" in *-fopenmp*) echo no openmp >&2; exit 1;; *) exec g++ "$@";; esac')
    found = chain()
    assert not found.openmp
    assert "-fopenmp" not in found.flags
    assert "has no OpenMP: kernels use one thread" in caplog.text
    toolchain.build(found, "answer", SOURCE)


@pytest.mark.skipif(toolchain.host_isa().name == "portable", reason="there is nothing below")
def test_an_old_compiler_gets_an_instruction_set_that_it_knows(
    script: Callable[[str], Path], caplog: pytest.LogCaptureFixture
) -> None:
    best = toolchain.host_isa()
    script(f'case "$*" in *{best.flags[-1]}*) exit 1;; *) exec g++ "$@";; esac')
    with caplog.at_level(logging.WARNING):
        found = chain()
    assert found.isa is not best
    assert found.openmp
    assert f"does not know {best.name}" in caplog.text


def test_the_instruction_set_can_be_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    best = toolchain.host_isa()
    monkeypatch.setenv("FXQUANT_ISA", "portable")
    assert chain().isa is ISAS["portable"]
    assert not set(chain().flags) & set(best.flags)
    monkeypatch.setenv("FXQUANT_ISA", "sse9")
    with pytest.raises(
        errors.OptionError,
        match=f"FXQUANT_ISA must be one of {', '.join(ISAS)}, got 'sse9'",
    ):
        toolchain.toolchain()


def test_an_instruction_set_that_the_processor_lacks_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(toolchain, "cpu_features", lambda: frozenset({"avx2", "fma", "f16c"}))
    assert toolchain.host_isa() is ISAS["avx2"]
    monkeypatch.setenv("FXQUANT_ISA", "avx512")
    with pytest.raises(errors.OptionError, match=r"lacks avx512f, .*: unset it, or name another"):
        toolchain.toolchain()


AMX = ISAS["amx"]


@pytest.fixture
def with_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor that has a tile unit, which the system does not permit this process to use."""
    monkeypatch.setattr(toolchain, "cpu_maker", lambda: "GenuineIntel")
    monkeypatch.setattr(toolchain, "cpu_features", lambda: frozenset(AMX.features))
    monkeypatch.setattr(tile_unit, "refusal", lambda: "the system says no")


@pytest.mark.usefixtures("with_tiles")
def test_a_tile_unit_that_is_not_permitted_is_done_without(monkeypatch: pytest.MonkeyPatch) -> None:
    assert toolchain.host_isa() is ISAS["avx512vbmi"]
    monkeypatch.setenv("FXQUANT_ISA", "amx")
    with pytest.raises(errors.OptionError, match="is 'amx', but the system says no: unset it"):
        toolchain.host_isa()
    monkeypatch.setattr(tile_unit, "refusal", lambda: "")
    assert toolchain.host_isa() is AMX
    monkeypatch.delenv("FXQUANT_ISA")
    assert toolchain.host_isa() is AMX


@pytest.mark.usefixtures("with_tiles")
def test_permission_is_not_asked_for_without_a_tile_unit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tile_unit, "refusal", lambda: pytest.fail("asked"))
    monkeypatch.setattr(toolchain, "cpu_features", lambda: frozenset(ISAS["avx512"].features))
    assert toolchain.host_isa() is ISAS["avx512vbmi"]


def test_other_processors_get_portable_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toolchain.platform, "machine", lambda: "aarch64")
    assert toolchain.cpu_features.__wrapped__() == frozenset()
    monkeypatch.setattr(toolchain, "cpu_features", frozenset)
    assert toolchain.host_isa() is ISAS["portable"]
