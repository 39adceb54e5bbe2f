"""Rates of the machine: measured, kept, measured again when what was kept is damaged."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest

from fxquant import errors
from fxquant.codegen.cpp.cost import usual_rates
from fxquant.codegen.cpp.isa import ISAS
from fxquant.codegen.cpp.support import paths
from fxquant.runtime import cache, rates, toolchain


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def chain(monkeypatch: pytest.MonkeyPatch, folder: Path) -> toolchain.Toolchain:
    """What builds the measuring program, once, in a cache without results."""
    monkeypatch.setenv(cache.ENVIRONMENT, str(folder))
    shutil.rmtree(folder / "rates", ignore_errors=True)
    forget()
    found = toolchain.toolchain()
    assert found is not None
    return found


def forget() -> None:
    rates._rates.cache_clear()


def kept() -> Path:
    (path,) = (cache.root() / "rates").iterdir()
    return path


def test_rates_are_measured_once_for_threads(
    chain: toolchain.Toolchain, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = rates.rates(chain, 2)
    # No processor of one core does less than 10^7 or more than 10^12 a second.
    every = [found.bandwidth, found.vectors, *found.few.values(), *found.many.values()]
    assert all(1e7 < rate < 1e12 for rate in every)
    assert set(found.few) == set(found.many) == set(paths(chain.isa))
    written = json.loads(kept().read_text())
    assert written["cpu"] == toolchain.cpu_name()
    assert (written["isa"], written["threads"]) == (chain.isa.name, 2)
    forget()
    monkeypatch.setattr(rates, "_measure", None)
    assert rates.rates(chain, 2) == found
    monkeypatch.undo()


def test_other_threads_are_measured_apart(chain: toolchain.Toolchain) -> None:
    for threads in (1, 2):
        rates.rates(chain, threads)
    assert len(list((cache.root() / "rates").iterdir())) == 2


@pytest.mark.parametrize("damage", ["", "{", "[]", "{}", '{"bandwidth": -1}', "null"])
def test_what_is_damaged_is_measured_again(
    damage: str, chain: toolchain.Toolchain, caplog: pytest.LogCaptureFixture
) -> None:
    rates.rates(chain, 1)
    path = kept()
    whole = json.loads(path.read_text())
    forget()
    path.write_text(damage or json.dumps({**whole, "vectors": float("nan")}))
    with caplog.at_level(logging.WARNING, "fxquant.rates"):
        found = rates.rates(chain, 1)
    assert "measuring again" in caplog.text
    assert json.loads(path.read_text())["vectors"] == found.vectors > 0


def test_usual_rates_where_nothing_can_be_measured(
    chain: toolchain.Toolchain,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fail(*_: object) -> None:
        raise errors.no_compiler("none here")

    monkeypatch.setattr(toolchain, "build", fail)
    with caplog.at_level(logging.WARNING, "fxquant.rates"):
        assert rates.rates(chain, 1) == usual_rates(chain.isa)
    assert "cannot be measured" in caplog.text
    assert not (cache.root() / "rates").exists()


@pytest.mark.parametrize("isa", ISAS.values(), ids=lambda isa: isa.name)
def test_every_instruction_set_can_be_measured(isa: object, chain: toolchain.Toolchain) -> None:
    if not toolchain.runs(isa):
        pytest.skip(f"there is no {isa.name} here")
    found = rates._measure(toolchain.Toolchain(chain.compiler, isa, chain.openmp), 1)
    assert set(found.few) == set(usual_rates(isa).few) == set(usual_rates(isa).many)
