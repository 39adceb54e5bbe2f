"""Tiles of Triton kernels: tuned on request, kept a file for each GPU, found again."""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from fxquant.codegen import Header, reference
from fxquant.codegen.epilogue import Epilogue
from fxquant.codegen.indexing import WeightIndex
from fxquant.codegen.spec import KernelSpec, WeightOperand
from fxquant.codegen.triton.gpu import ANY
from fxquant.codegen.triton.plan import plan_for
from fxquant.codegen.triton.tiles import Tile
from fxquant.formats import Encoding
from fxquant.runtime import cache, launch, targets, tiles, tuning
from fxquant.runtime.device import describe
from tests.codegen import harness

SPEC = KernelSpec(
    WeightOperand.whole(Encoding(4, "nf4", (64,)), (64, 512), transposed=False),
    *["float16"] * 3,
    Epilogue.bias("float16"),
    "tuned",
)
CPU = torch.device("cpu")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(cache.ENVIRONMENT, str(tmp_path / "cache"))
    monkeypatch.setattr(tiles, "_CALLS", 1)
    return tmp_path / "cache"


@pytest.fixture
def module(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A product with two tiles for 16 rows and one for more."""
    found = plan_for(SPEC, WeightIndex.of(SPEC.weight), ANY)
    first = found.variants[16][0]
    two = (first, dataclasses.replace(first, n=16))
    few = dataclasses.replace(found, variants={16: two, 32: found.variants[32][:1]})
    monkeypatch.setattr(tiles, "plan_for", lambda spec, index, gpu: few)
    return harness.load(SPEC, tmp_path, interpreted=True)


def tile_of(module: ModuleType, most: int) -> dict[str, int]:
    return dict(module.VARIANTS[most][1])


def prefer(monkeypatch: pytest.MonkeyPatch, outputs: int) -> None:
    """Makes tiles of so many outputs the quickest."""

    def timed(trial: tiles._Trial, run, right, tile: Tile) -> float:
        assert torch.equal(run(), run())
        return abs(tile.n - outputs) + 1.0

    monkeypatch.setattr(tiles._Trial, "_seconds", timed)


def test_what_won_runs_from_now_on_and_in_the_next_process(
    module: ModuleType, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefer(monkeypatch, 16)
    assert not tiles.is_tuned(SPEC, ANY)
    tiles.tune(module, SPEC, ANY, CPU)
    assert tile_of(module, 16)["BLOCK_N"] == 16
    assert list(module.VARIANTS) == [16, 32]
    kept = json.loads((folder / "triton" / "tuned-any.json").read_text())
    assert [entry["16"]["n"] for entry in kept.values()] == [16]
    # What only products with outliers have is left out: older files hold for the rest.
    assert all("gathered" not in entry["16"] for entry in kept.values())
    # The same product under another name, with another epilogue.
    other = dataclasses.replace(SPEC, name="other", epilogue=Epilogue())
    assert tiles.is_tuned(other, ANY)
    fresh = harness.load(other, folder, interpreted=True)
    assert tile_of(fresh, min(fresh.VARIANTS))["BLOCK_N"] != 16
    tiles.use(fresh, other, ANY)
    assert tile_of(fresh, 16)["BLOCK_N"] == 16
    assert not tiles.is_tuned(dataclasses.replace(SPEC, x_dtype="float32"), ANY)
    assert not tiles.is_tuned(SPEC, dataclasses.replace(ANY, name="another"))


def test_a_tile_that_computes_something_else_is_never_taken(
    module: ModuleType, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run = module.run

    def wrong(
        x: torch.Tensor, weight: list[torch.Tensor], extra: list[torch.Tensor]
    ) -> torch.Tensor:
        found = run(x, weight, extra)
        return found * 1.1 if tile_of(module, 16)["BLOCK_N"] == 16 else found

    module.run = wrong
    monkeypatch.setattr(tiles._Trial, "_once", lambda trial, call: float(call() is None))
    caplog.set_level(logging.WARNING, "fxquant.tuning")
    tiles.tune(module, SPEC, ANY, CPU)
    assert tile_of(module, 16)["BLOCK_N"] != 16
    assert "is wrong by 0.1" in caplog.text


def test_a_tile_that_cannot_be_built_is_passed_over(
    module: ModuleType, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run = module.run

    def failing(*args: object) -> torch.Tensor:
        if tile_of(module, 16)["BLOCK_N"] != 16:
            raise RuntimeError("out of resource")
        return run(*args)

    module.run = failing
    tiles.tune(module, SPEC, ANY, CPU)
    assert tile_of(module, 16)["BLOCK_N"] == 16
    assert "cannot run: out of resource" in caplog.text


def test_without_time_the_cost_model_decides(
    module: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefer(monkeypatch, 16)
    monkeypatch.setattr(tiles, "LIMIT_S", -1.0)
    before = tile_of(module, min(module.VARIANTS))
    tiles.tune(module, SPEC, ANY, CPU)
    assert tile_of(module, 16) == before


def test_each_tile_is_called_and_what_was_chosen_stays(module: ModuleType) -> None:
    before, seen = dict(module.VARIANTS), []

    def call() -> None:
        seen.append(tile_of(module, 16)["BLOCK_N"])
        if len(seen) == 1:
            raise RuntimeError("cannot be built")

    tiles.each(module, SPEC, ANY, 3, call)
    assert len(set(seen)) == 2
    assert before == module.VARIANTS


@pytest.mark.parametrize("text", ["", "[1]", '{"a": 3}', "{"])
def test_a_damaged_file_is_said_and_not_used(
    module: ModuleType, folder: Path, caplog: pytest.LogCaptureFixture, text: str
) -> None:
    tiles.path(ANY).parent.mkdir(parents=True)
    tiles.path(ANY).write_text(text)
    assert not tiles.is_tuned(SPEC, ANY)
    assert "cannot be read" in caplog.text


def test_a_tile_that_is_no_candidate_is_not_run(module: ModuleType, folder: Path) -> None:
    first = tile_of(module, min(module.VARIANTS))
    tiles.path(ANY).parent.mkdir(parents=True)
    tiles.path(ANY).write_text(json.dumps({tiles._key(SPEC): {"16": {"kernel": "gemm", "n": 7}}}))
    tiles.use(module, SPEC, ANY)
    assert tile_of(module, 16) == first


def test_results_that_come_with_the_package_count_behind_the_users(
    module: ModuleType, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiles, "SHIPPED", tmp_path)
    prefer(monkeypatch, 16)
    tiles.tune(module, SPEC, ANY, CPU)
    tiles.path(ANY).rename(tmp_path / "tuned-any.json")
    assert tiles.is_tuned(SPEC, ANY)
    other = tiles.plan_for(SPEC, None, ANY).variants[16][0]
    tiles._keep(SPEC, ANY, {"16": tiles._entry(other)})
    tiles.use(module, SPEC, ANY)
    assert tile_of(module, 16)["BLOCK_N"] == other.n != 16
    assert tiles.is_tuned(SPEC, ANY)  # the rest is the package's


def test_what_has_a_result_is_not_timed_again(
    module: ModuleType, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A table of the package may name a few numbers of rows."""
    monkeypatch.setattr(tiles, "SHIPPED", tmp_path)
    _, narrow = tiles.plan_for(SPEC, None, ANY).variants[16]
    shipped = {tiles._key(SPEC): {"16": tiles._entry(narrow)}}
    (tmp_path / "tuned-any.json").write_text(json.dumps(shipped))
    timed = []
    monkeypatch.setattr(
        tiles._Trial, "_best_of", lambda trial, most, found, done: timed.append(most) or found[-1]
    )
    both = dataclasses.replace(
        (plan := tiles.plan_for(SPEC, None, ANY)), variants={**plan.variants, 32: plan.variants[16]}
    )
    monkeypatch.setattr(tiles, "plan_for", lambda spec, index, gpu: both)
    assert not tiles.is_tuned(SPEC, ANY)
    tiles.tune(module, SPEC, ANY, CPU)
    assert timed == [32]
    assert tile_of(module, 16)["BLOCK_N"] == tile_of(module, 32)["BLOCK_N"] == 16
    own = {"32": tiles._entry(narrow)}
    assert json.loads(tiles.path(ANY).read_text()) == {tiles._key(SPEC): own}
    # What is shipped next has what was shipped before.
    written = tiles.write_table(ANY, tmp_path / "next")
    assert json.loads(written.read_text()) == {
        tiles._key(SPEC): {**shipped[tiles._key(SPEC)], **own}
    }


def test_rows_below_all_results_have_the_first_of_them(
    module: ModuleType, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = tiles.plan_for(SPEC, None, ANY)
    first, narrow = plan.variants[16]
    found = dataclasses.replace(plan, variants={1: (first,), **plan.variants})
    monkeypatch.setattr(tiles, "plan_for", lambda spec, index, gpu: found)
    tiles._keep(SPEC, ANY, {"16": tiles._entry(narrow)})
    tiles.use(module, SPEC, ANY)
    assert harness.build_for(module, 1).constants["BLOCK_N"] == 16
    assert not tiles.is_tuned(SPEC, ANY)


def test_few_rows_are_timed_against_what_won_for_more(
    module: ModuleType, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = tiles.plan_for(SPEC, None, ANY)
    first, narrow = plan.variants[16]
    own = dataclasses.replace(first, stages=2)
    found = dataclasses.replace(plan, variants={1: (first, own), **plan.variants})
    monkeypatch.setattr(tiles, "plan_for", lambda spec, index, gpu: found)
    timed: list[tuple[int, Tile]] = []

    def seconds(trial: tiles._Trial, run, right, tile: Tile) -> float:
        timed.append((len(right), tile))
        return float(tile != narrow)

    monkeypatch.setattr(tiles._Trial, "_seconds", seconds)
    tiles.tune(module, SPEC, ANY, CPU)
    assert timed == [(16, first), (16, narrow), (1, narrow), (1, own)]
    fresh = harness.load(SPEC, folder, interpreted=True)
    tiles.use(fresh, SPEC, ANY)
    assert [*fresh.VARIANTS] == [1, 16, 32]
    assert fresh.VARIANTS[1][1] == narrow.constants()


def test_a_tile_is_timed_by_itself_where_neighbours_have_the_same(
    module: ModuleType, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the largest number of rows of those with one tile is printed."""
    assert 16 not in module.VARIANTS

    def timed(trial: tiles._Trial, run, right, tile: Tile) -> float:
        ran = harness.build_for(module, len(right))
        assert ran.constants == tile.constants()
        return 1.0

    monkeypatch.setattr(tiles._Trial, "_seconds", timed)
    tiles.tune(module, SPEC, ANY, CPU)
    assert list(module.VARIANTS) == [16, 32]


@pytest.mark.parametrize("weights", [1, 2])
def test_a_compile_tunes_only_where_that_is_asked_for(
    folder: Path, monkeypatch: pytest.MonkeyPatch, weights: int
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(tiles, "LIMIT_S", 0.5)
    launch._triton_module.cache_clear()
    spec = dataclasses.replace(SPEC, weights=weights, epilogue=Epilogue())
    choice = targets.Choice("triton", "triton")
    text = spec.to_json()
    with harness.interpretation(wanted=True):
        targets.build(choice, {text: Header()}, CPU)
        assert not tiles.is_tuned(spec, ANY)
        monkeypatch.setenv(tuning.ENVIRONMENT, "1")
        targets.build(choice, {text: Header()}, CPU)
    assert tiles.is_tuned(spec, ANY)
    launch._triton_module.cache_clear()


def test_operands_are_those_that_the_reference_takes() -> None:
    weight = tuning.random_weight(SPEC)
    x = torch.randn(5, 512, dtype=torch.float16)
    assert reference.run(SPEC, x, weight, tiles.operands(SPEC, 5)).shape == (5, 64)


H100 = SimpleNamespace(
    name="NVIDIA H100 80GB HBM3",
    major=9,
    minor=0,
    multi_processor_count=132,
    clock_rate=1_980_000,
    memory_clock_rate=2_619_000,
    memory_bus_width=5120,
    L2_cache_size=50 << 20,
    shared_memory_per_multiprocessor=228 << 10,
)


def test_tables_that_come_with_the_package_name_tiles_that_are_tried() -> None:
    found = describe(H100, is_amd=False)
    stored = tiles._read(tiles.SHIPPED / tiles._file(found))
    assert stored
    left_out = {
        "name": "shipped",
        "out_dtype": "bfloat16",
        "epilogue": {"operands": [], "nodes": []},
    }
    for text, entries in stored.items():
        spec = KernelSpec.from_json(json.dumps({**json.loads(text), **left_out}))
        assert tiles._key(spec) == text
        plan = plan_for(spec, WeightIndex.of(spec.weight), found)
        for most, entry in entries.items():
            assert entry in [tiles._entry(tile) for tile in plan.variants[int(most)]]
