"""Calibrations as values: lookup, merging, hashing, files."""

from __future__ import annotations

import gc
import json
import math
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from fxquant import errors
from fxquant.calibration import SAMPLE, Calibration, SiteStats
from fxquant.runtime.observe import Collector, ObservedGraph, Site, observe
from tests.helpers import packed_of


def stats_of(rows: Tensor, *, moments: bool = False) -> SiteStats:
    """What a collector makes of some rows ``[m, k]`` in one go."""
    return collected([rows], nn.Parameter(torch.ones(4, rows.shape[1])), moments).stats["w"]


def collected(parts: list[Tensor], weight: Tensor, moments: bool = False) -> Calibration:
    collector = Collector(moments=moments)
    graph = ObservedGraph(lambda x, _: observe(x, [0]), [Site(1, "w")])
    for part in parts:
        graph(collector, [part, weight])
    return collector.calibration()


def some(seed: int, k: int = 6, m: int = 10, **options: Any) -> SiteStats:
    return stats_of(torch.randn(m, k, generator=torch.Generator().manual_seed(seed)), **options)


def assert_same(a: SiteStats, b: SiteStats) -> None:
    assert (a.low, a.high, a.tokens) == (b.low, b.high, b.tokens)
    assert torch.equal(a.amax, b.amax)
    assert torch.equal(a.token_amax, b.token_amax)
    assert (a.moments is None) == (b.moments is None)
    if a.moments is not None and b.moments is not None:
        assert torch.equal(a.moments, b.moments)


# --- merging ---------------------------------------------------------------------------------


@given(
    sizes=st.lists(st.integers(1, 60), min_size=2, max_size=5),
    k=st.integers(1, 9),
    seed=st.integers(0, 2**31),
)
def test_merged_shards_are_one_run(sizes: list[int], k: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    # Small integers, whose sums are exact: second moments are compared bit by bit.
    parts = [torch.randint(-9, 9, (m, k), generator=generator).float() for m in sizes]
    weight = nn.Parameter(torch.ones(2, k))
    whole = collected(parts, weight, moments=True)
    shards = [collected([part], weight, moments=True) for part in parts]
    merged = shards[0]
    for shard in shards[1:]:
        merged = merged | shard
    assert merged == whole
    assert_same(merged.stats["w"], whole.stats["w"])
    found = merged.of(weight, "another name")
    assert found is not None
    assert_same(found, whole.stats["w"])


def test_merged_samples_keep_the_distribution() -> None:
    a, b = torch.linspace(0, 1, 9000)[:, None], torch.linspace(1, 2, 3000)[:, None]
    merged = stats_of(a).merged(stats_of(b))
    assert merged.tokens == 12_000
    assert len(merged.token_amax) == SAMPLE
    assert torch.equal(merged.token_amax, merged.token_amax.sort().values)
    # Three quarters of the tokens are a's.
    assert int((merged.token_amax < 1).sum()) in (SAMPLE * 3 // 4 - 1, SAMPLE * 3 // 4)
    # Not the order of merging, but the shares decide; the median is that of all 12000 within
    # twice the sampling error of a's 4096, 1 / (2 sqrt(4096)) of a's range at most.
    assert abs(float(merged.token_amax[SAMPLE // 2]) - 2 / 3) < 4 * 2 / (2 * 64)
    tiny = stats_of(a).merged(stats_of(torch.full((1, 1), 7.0)))
    assert (tiny.tokens, tiny.high) == (9001, 7.0)
    assert len(tiny.token_amax) == SAMPLE


def test_weights_that_one_shard_alone_knows_are_kept() -> None:
    a, b = Calibration({"x": some(1), "t": some(2)}), Calibration({"y": some(3), "t": some(4)})
    merged = a.merge(b)
    assert set(merged.stats) == {"x", "y", "t"}
    assert merged.stats["x"] is a.stats["x"]
    assert merged.stats["t"].tokens == 20
    with_moments = Calibration({"x": some(1, moments=True)})
    assert (a | with_moments).stats["x"].moments is None
    with pytest.raises(errors.CalibrationError, match="7 channels for 'x' and the model 6"):
        a.merge(Calibration({"x": some(1, k=7)}))


def test_update_replaces() -> None:
    a, b = Calibration({"x": some(1), "y": some(2)}), Calibration({"y": some(3)})
    before = a.digest
    a.update(b)
    assert a.stats["y"] is b.stats["y"]
    assert a.digest != before
    assert a == Calibration({"x": some(1), "y": some(3)})


# --- lookup ----------------------------------------------------------------------------------


def test_by_identity_then_name_then_unique_end() -> None:
    weight, other = nn.Parameter(torch.ones(2, 6)), nn.Parameter(torch.ones(2, 6))
    known, a, b, c = (some(seed) for seed in range(4))
    stats = {"blocks.0.up.weight": a, "blocks.1.up.weight": b, "head.weight": c}
    calibration = Calibration(stats, [(weight, known)])
    assert calibration.of(weight, "head.weight") is known
    assert calibration.of(other, "blocks.1.up.weight") is b
    assert calibration.of(other, "_orig_mod.blocks.1._orig_mod.up.weight") is b
    assert calibration.of(other, "weight") is None
    assert calibration.of(other, "up.weight") is None
    assert calibration.of(other, "1.up.weight") is b
    # A name ends at a dot.
    assert calibration.of(other, "p.weight") is None
    assert calibration.of(other, "ead.weight") is None


def test_weights_are_held_weakly() -> None:
    weight = nn.Parameter(torch.ones(2, 6))
    calibration = Calibration({}, [(weight, some(0))])
    assert len(calibration._by_parameter) == 1
    del weight
    gc.collect()
    assert len(calibration._by_parameter) == 0


def test_packed_weights_are_known_too() -> None:
    packed = packed_of(torch.randn(16, 64))
    calibration = Calibration({}, [(packed, some(0, k=64))])
    assert calibration.of(packed, "w") is not None
    assert calibration.of(packed_of(torch.randn(16, 64)), "w") is None


def test_what_is_missing_is_named() -> None:
    weight = nn.Parameter(torch.ones(2, 6))
    calibration = Calibration({"head.weight": some(0)})
    assert calibration.require(weight, "head.weight", 6) is calibration.stats["head.weight"]
    for name, k, match in (
        ("layers.0.up.weight", 6, r"no statistics for 'layers\.0\.up\.weight' \(.* 1 weights\)"),
        ("head.weight", 8, "6 channels for 'head.weight' and the model 8"),
    ):
        with pytest.raises(errors.CalibrationError, match=match) as caught:
            calibration.require(weight, name, k)
        assert "fxquant.calibrate(model, batches)" in str(caught.value)


# --- hashing and files -----------------------------------------------------------------------


def test_equal_by_content() -> None:
    a, b = Calibration({"x": some(1)}), Calibration({"x": some(1)})
    assert a == b
    assert hash(a) == hash(b)
    assert a.digest == b.digest
    others = (
        Calibration({"y": some(1)}),
        Calibration({"x": some(2)}),
        Calibration({"x": some(1, moments=True)}),
        Calibration({"x": some(1), "y": some(1)}),
        Calibration({}),
    )
    assert all(other != a for other in others)
    assert len({a, b, *others}) == 1 + len(others)
    assert a != a.digest


@pytest.mark.parametrize("moments", [False, True])
def test_a_file_holds_all_of_it(tmp_path: Path, moments: bool) -> None:
    tied = some(2, moments=moments)
    saved = Calibration({"a.weight": some(1, m=1, moments=moments), "b": tied, "c.d": tied})
    saved.save(tmp_path / "calibration")
    loaded = Calibration.load(tmp_path / "calibration")
    assert loaded == saved
    assert list(loaded.stats) == list(saved.stats)
    assert loaded.stats["b"] is loaded.stats["c.d"]
    for name, found in saved.stats.items():
        assert_same(loaded.stats[name], found)
    # The tied statistics are there once.
    names = safetensors.torch.load_file(tmp_path / "calibration").keys()
    assert len(names) == 2 * (3 if moments else 2)
    assert [path.name for path in tmp_path.iterdir()] == ["calibration"]


def unloadable(path: Path, match: str) -> None:
    with pytest.raises(errors.CheckpointError, match=match) as caught:
        Calibration.load(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_that_are_none_or_cut_short(tmp_path: Path) -> None:
    unloadable(tmp_path / "nothing", "missing")
    (tmp_path / "text").write_text("This is no calibration, however long it may be. " * 9)
    unloadable(tmp_path / "text", "not a safetensors file")
    safetensors.torch.save_file({"w": torch.ones(3)}, tmp_path / "weights")
    unloadable(tmp_path / "weights", "holds no calibration")
    whole = tmp_path / "whole"
    Calibration({"a": some(1), "b": some(2)}).save(whole)
    content = whole.read_bytes()
    for place in {0, 1, 8, 100, len(content) // 2, len(content) - 1}:
        (tmp_path / "cut").write_bytes(content[:place])
        unloadable(tmp_path / "cut", "cut short")
    with pytest.raises(errors.FolderError, match="cannot be written"):
        Calibration({}).save(tmp_path / "no folder" / "file")


@pytest.mark.parametrize(
    ("tensors", "site"),
    [
        ({"a.amax": None}, {}),
        ({"a.amax": torch.ones(6, dtype=torch.float64)}, {}),
        ({"a.amax": torch.ones(2, 3)}, {}),
        ({"a.amax": torch.full((6,), math.nan)}, {}),
        ({"a.token_amax": torch.ones(3)}, {}),
        ({"a.moments": torch.ones(6, 5)}, {}),
        ({}, {"tokens": 11}),
        ({}, {"low": None}),
        ({}, {"high": math.inf}),
        ({}, {"tied": "b"}),
        ({}, None),
    ],
)
def test_damaged_files(tmp_path: Path, tensors: dict[str, Any], site: Any) -> None:
    path = tmp_path / "file"
    Calibration({"a": some(1)}).save(path)
    with safetensors.safe_open(path, framework="pt") as file:
        metadata = dict(file.metadata())
    stored = {**safetensors.torch.load_file(path), **tensors}
    sites = json.loads(metadata["fxquant.calibration"])
    sites["a"] = site if site is None else {**sites["a"], **site}
    metadata["fxquant.calibration"] = json.dumps(sites)
    kept = {name: tensor for name, tensor in stored.items() if tensor is not None}
    safetensors.torch.save_file(kept, path, metadata)
    unloadable(path, "its entry for 'a' is damaged")


def test_damaged_metadata(tmp_path: Path) -> None:
    for text in ("{", "3"):
        metadata = {"fxquant.calibration": text}
        safetensors.torch.save_file({"a": torch.ones(1)}, tmp_path / "file", metadata)
        unloadable(tmp_path / "file", "is damaged")
