"""The choice between skeletons: tuned and kept, or by the cost model; what a call makes of it."""

from __future__ import annotations

import json
import logging
import struct
from pathlib import Path

import pytest
import torch

from fxquant.codegen.cpp.cost import ALL_ROWS, threshold
from fxquant.codegen.cpp.plan import Plan
from fxquant.runtime import cache, cpp, entry, rates, toolchain, tuning
from tests.runtime import printed


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch, folder: Path) -> cpp.CppKernel:
    """A kernel that nobody has tuned, in a cache of its own."""
    monkeypatch.setenv(cache.ENVIRONMENT, str(folder))
    monkeypatch.setattr(tuning, "LIMIT_S", 0.05)
    for result in folder.glob(f"cpp/*/{tuning.FILE}"):
        result.unlink()
    return printed.kernel(printed.ENCODINGS["int8"])


def chain() -> toolchain.Toolchain:
    found = toolchain.toolchain()
    assert found is not None
    return found


class Variants:
    """Records which skeleton calls ask for."""

    def __init__(self, kernel: cpp.CppKernel) -> None:
        self.seen: list[int] = []
        self.inner, kernel._entry.call = kernel._entry.call, self

    def __call__(self, words: bytes) -> None:
        self.seen.append(struct.unpack_from("q", words, 8 * entry.VARIANT)[0])
        self.inner(words)


def test_calls_ask_for_few_rows_up_to_the_threshold(kernel: cpp.CppKernel) -> None:
    weight, variants = printed.weight(kernel).tensors(), Variants(kernel)
    for kernel.few_rows in (0, 2, ALL_ROWS):
        for rows in (1, 2, 3):
            kernel.run(torch.randn(rows, printed.K), weight, [printed.bias()])
    assert variants.seen == [1, 1, 1, 0, 0, 1, 0, 0, 0]


def test_the_cost_model_decides_where_nothing_was_tuned(kernel: cpp.CppKernel) -> None:
    threads = torch.get_num_threads()
    plan = Plan(kernel.spec, chain().isa)
    wanted = threshold(plan, rates.rates(chain(), threads), threads)
    assert tuning.few_rows(chain(), kernel.spec, kernel.library) == wanted


def test_what_tuning_finds_is_kept_for_threads(
    kernel: cpp.CppKernel, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    variants = Variants(kernel)
    with caplog.at_level(logging.INFO, "fxquant.tuning"):
        tuning.tune(chain(), kernel)
    assert "tuned now" in caplog.text
    # The first call repacks; every number of rows is timed with both, in turns.
    assert variants.seen[1:15] == [0, 1] * 7
    assert kernel.few_rows in (0, *tuning.ROWS, ALL_ROWS)
    assert tuning.tuned_kernels() == 1
    written = json.loads(kernel.library.with_name(tuning.FILE).read_text())
    assert list(written.values()) == [kernel.few_rows]

    path, (machine,) = kernel.library.with_name(tuning.FILE), written
    path.write_text(json.dumps({machine: 77}))
    assert tuning.few_rows(chain(), kernel.spec, kernel.library) == 77
    count = len(variants.seen)
    tuning.tune(chain(), kernel)
    assert len(variants.seen) == count
    # With other threads the result does not count.
    monkeypatch.setattr(tuning, "usable_threads", lambda **_: 17)
    monkeypatch.setattr(tuning, "rates", lambda chain, _: rates.rates(chain, 1))
    assert tuning.few_rows(chain(), kernel.spec, kernel.library) != 77


@pytest.mark.parametrize("damage", ["{", "[1]", "null", '{"a": -1}', '{"a": "b"}', '{"a": 1e99}'])
def test_damaged_results_are_not_used(
    damage: str, kernel: cpp.CppKernel, caplog: pytest.LogCaptureFixture
) -> None:
    kernel.library.with_name(tuning.FILE).write_text(damage)
    with caplog.at_level(logging.WARNING, "fxquant.tuning"):
        tuning.few_rows(chain(), kernel.spec, kernel.library)
    assert "are not used" in caplog.text


def test_kernels_with_one_skeleton_are_not_timed(kernel: cpp.CppKernel) -> None:
    # Flat blocks of 64 in rows of 40: scales change inside groups.
    irregular = printed.kernel(printed.ENCODINGS["nf4"])
    variants = Variants(irregular)
    tuning.tune(chain(), irregular)
    assert not variants.seen
    assert tuning.few_rows(chain(), irregular.spec, irregular.library) == 0


def test_the_best_threshold_loses_least() -> None:
    assert tuning.best_threshold({1: (1, 2), 4: (1, 2), 16: (2, 1)}) == 4
    assert tuning.best_threshold({1: (2, 1), 4: (2, 1)}) == 0
    assert tuning.best_threshold({1: (1, 2), 4: (1, 2)}) == ALL_ROWS
    # A little lost in between is made good by what comes after.
    assert tuning.best_threshold({1: (1, 2), 4: (1.1, 1), 16: (1, 2), 64: (2, 1)}) == 16


@pytest.mark.parametrize(("value", "on"), [("", False), ("0", False), ("1", True)])
def test_tuning_is_asked_for(value: str, on: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(tuning.ENVIRONMENT, value)
    assert tuning.is_on() == on


def test_a_compile_tunes_its_kernels(
    kernel: cpp.CppKernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fxquant.codegen import Header
    from fxquant.runtime import launch, targets

    text, device = kernel.spec.to_json(), torch.device("cpu")
    launch._build_once.cache_clear()
    choice = targets.Choice("cpp", "cpp")
    assert targets.build(choice, {text: Header()}, device) == {text: choice}
    assert tuning.tuned_kernels() == 0
    monkeypatch.setenv(tuning.ENVIRONMENT, "1")
    assert targets.build(choice, {text: Header()}, device) == {text: choice}
    assert tuning.tuned_kernels() == 1
    launch._build_once.cache_clear()
