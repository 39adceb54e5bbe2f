"""The kernel cache: atomic, checked, rebuilt when damaged."""

from __future__ import annotations

import json
import logging
import threading
from pathlib import Path
from types import ModuleType

import pytest

from fxquant import errors
from fxquant.runtime import cache


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(cache.ENVIRONMENT, str(tmp_path / "cache"))
    return tmp_path / "cache"


class Builder:
    def __init__(self, text: str = "x = 1\n") -> None:
        self.text = text
        self.calls = 0

    def __call__(self, folder: Path) -> None:
        self.calls += 1
        (folder / "kernel.py").write_text(self.text)


def test_fingerprint_changes_with_the_source(tmp_path: Path) -> None:
    packages = []
    for number, text in enumerate(["a = 1", "a = 1", "a = 2"]):
        package = ModuleType(f"package{number}")
        package.__path__ = [str(tmp_path / str(number))]
        (tmp_path / str(number) / "deep").mkdir(parents=True)
        (tmp_path / str(number) / "deep" / "module.py").write_text(text)
        packages.append(package)
    one, same, other = (cache.fingerprint(package) for package in packages)
    assert one == same != other


def test_builds_once() -> None:
    build = Builder()
    first = cache.get_or_build("triton", "k", build)
    assert cache.get_or_build("triton", "k", build) == first
    assert build.calls == 1
    assert (first / "kernel.py").read_text() == "x = 1\n"


def test_keys_tell_parts_apart() -> None:
    assert cache.key_of("ab", "c") != cache.key_of("a", "bc")
    assert cache.key_of("ab", "c") == cache.key_of("ab", "c")


@pytest.mark.parametrize(
    "damage",
    [
        lambda entry: (entry / "kernel.py").write_text("x = 2\n"),
        lambda entry: (entry / "kernel.py").unlink(),
        lambda entry: (entry / cache.MANIFEST).write_text("{"),
        lambda entry: (entry / cache.MANIFEST).write_text("[]"),
        lambda entry: (entry / cache.MANIFEST).write_text(json.dumps({})),
        lambda entry: (entry / cache.MANIFEST).unlink(),
    ],
    ids=["changed", "missing", "cut manifest", "wrong manifest", "empty manifest", "no manifest"],
)
def test_damaged_entry_is_a_miss(damage: object, caplog: pytest.LogCaptureFixture) -> None:
    build = Builder()
    entry = cache.get_or_build("triton", "k", build)
    damage(entry)  # type: ignore[operator]
    with caplog.at_level(logging.WARNING, logger="fxquant"):
        again = cache.get_or_build("triton", "k", build)
    assert build.calls == 2
    assert (again / "kernel.py").read_text() == "x = 1\n"
    assert "damaged" in caplog.text
    assert [p.name for p in again.parent.iterdir()] == ["k"]


def test_failing_builder_leaves_nothing(folder: Path) -> None:
    def fail(scratch: Path) -> None:
        (scratch / "half").write_text("")
        msg = "no"
        raise ValueError(msg)

    with pytest.raises(ValueError, match="no"):
        cache.get_or_build("triton", "k", fail)
    assert list((folder / "triton").iterdir()) == []


def test_fifty_threads_agree() -> None:
    build = Builder()
    found: list[Path] = []
    threads = [
        threading.Thread(target=lambda: found.append(cache.get_or_build("triton", "k", build)))
        for _ in range(50)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 50
    assert len(set(found)) == 1
    assert (found[0] / "kernel.py").read_text() == "x = 1\n"


def test_unwritable_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(cache.ENVIRONMENT, str(tmp_path / "file" / "below"))
    with pytest.raises(errors.FolderError, match=r"kernel cache folder .* point FXQUANT_CACHE_DIR"):
        cache.get_or_build("triton", "k", Builder())


def test_write_atomically_keeps_the_old_text_on_failure(tmp_path: Path) -> None:
    target = tmp_path / "a.txt"
    cache.write_atomically(target, "old")
    with pytest.raises(UnicodeEncodeError):
        cache.write_atomically(target, "\udc80")
    assert target.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]
