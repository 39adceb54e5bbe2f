"""Printed modules are imported once a text and version."""

from __future__ import annotations

from pathlib import Path

import pytest

from fxquant import errors
from fxquant.runtime import cache, triton


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
