"""What the distribution holds: all of ours, under one name."""

from __future__ import annotations

from importlib.metadata import entry_points
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def test_every_package_is_listed_and_below_fxquant() -> None:
    tomllib = pytest.importorskip("tomllib", reason="Python 3.11 reads pyproject.toml")
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {
        init.parent.relative_to(ROOT).parts
        for top in ("fxquant", "passes", "codegen")
        for init in (ROOT / top).rglob("__init__.py")
    }
    names = {".".join(parts if parts[0] == "fxquant" else ("fxquant", *parts)) for parts in folders}
    assert set(settings["packages"]) == names


def test_torch_finds_the_backend_by_its_entry_point() -> None:
    (found,) = entry_points(group="torch_dynamo_backends", name="fxquant")
    assert found.value == "fxquant.backend:fxquant"
