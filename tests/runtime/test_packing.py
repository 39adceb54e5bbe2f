"""Packing by printed C++ behind `formats.pack`: when it runs, and what it must not change."""

from __future__ import annotations

import itertools
import logging
import os
import subprocess
import sys
import threading

import pytest
import torch

from fxquant import errors
from fxquant.formats import Encoding, native, pack
from fxquant.runtime import packing, toolchain

DOUBLE = Encoding(8, "dynamic8", (256,), offset=True)
NF4 = Encoding(4, "nf4", scale=DOUBLE)
INT8 = Encoding(8, block=(1, -1))


def seeded(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.fixture
def taken(monkeypatch):
    """What the registered encoder was handed and whether it took it; however small."""
    seen = []

    def spy(runs: native.Runs) -> bool:
        seen.append((str(runs.encoding), packing.encode(runs)))
        return seen[-1][1]

    monkeypatch.setattr(packing, "LEAST", 1)
    before = native.set_encoder(spy)
    yield seen
    native.set_encoder(before)


def by_torch(weight: torch.Tensor, encoding: Encoding) -> list[torch.Tensor]:
    registered = native.set_encoder(None)
    try:
        return pack(weight, encoding).tensors()
    finally:
        native.set_encoder(registered)


def assert_same(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> None:
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype
        assert a.numpy().tobytes() == b.numpy().tobytes()


def test_it_is_registered() -> None:
    before = native.set_encoder(None)
    native.set_encoder(before)
    assert before is packing.encode


@pytest.mark.parametrize("encoding", [NF4, INT8, Encoding(4, block=(1, 16))], ids=str)
def test_packed_tensors_are_the_same(taken, encoding: Encoding) -> None:
    for weight in (seeded(96, 64), seeded(64, 96).t(), seeded(48, 8, 64, dtype=torch.float32)):
        ours = pack(weight, encoding).tensors()
        assert taken[0] == (str(encoding), True)
        assert len(taken) == 1 + (encoding.scale is not None)
        assert all(took for _, took in taken)
        assert_same(ours, by_torch(weight, encoding))
        taken.clear()


def test_what_stays_with_torch_code(taken) -> None:
    weight = seeded(64, 48)
    for encoding, offered in (
        (Encoding(8, clip=0.9), True),
        (Encoding(8, block=(16, 16)), False),
        (Encoding(8, block=(-1, 1)), False),
    ):
        assert_same(pack(weight, encoding).tensors(), by_torch(weight, encoding))
        assert taken == ([(str(encoding), False)] if offered else [])
        taken.clear()
    pack(weight.double(), INT8)
    assert taken == [(str(INT8), False)]


def test_small_tensors_do_not_wait_for_a_compiler(monkeypatch) -> None:
    monkeypatch.setattr(toolchain, "toolchain", lambda: pytest.fail("not for a small tensor"))
    pack(seeded(packing.LEAST // 64 - 1, 64), NF4)


def test_one_kernel_serves_all_shapes_and_blocks(taken) -> None:
    packing._kernel.cache_clear()
    pack(seeded(64, 64), Encoding(8, block=(1, -1)))
    pack(seeded(64, 64), Encoding(8, block=(1, 16)))
    pack(seeded(8, 8, 32), Encoding(8, block=(1, -1), clip=1.0))
    assert packing._kernel.cache_info().misses == 1
    pack(seeded(64, 64), Encoding(8, block=(16,)))
    assert packing._kernel.cache_info().misses == 2
    assert all(took for _, took in taken)


@pytest.mark.parametrize("encoding", [NF4, INT8, Encoding(2, block=(16,), full_range=True)])
@pytest.mark.parametrize("bad", [float("nan"), -float("nan"), float("inf"), -float("inf")])
def test_not_finite(taken, encoding: Encoding, bad: float) -> None:
    weight = seeded(50, 50)
    weight[7, 3] = weight[49, 49] = bad
    with pytest.raises(errors.WeightError, match=r"layers\.0\.weight: it holds 2 NaN or Inf"):
        pack(weight, encoding, name="layers.0.weight")
    assert taken == [(str(encoding), True)]


def test_without_a_compiler_torch_code_runs(taken, monkeypatch, caplog) -> None:
    monkeypatch.setattr(toolchain, "toolchain", lambda: None)
    weight = seeded(64, 64)
    with caplog.at_level(logging.DEBUG, "fxquant.packing"):
        ours = pack(weight, INT8).tensors()
    assert taken == [(str(INT8), False)]
    assert [record.levelname for record in caplog.records] == ["DEBUG"]
    assert_same(ours, by_torch(weight, INT8))


def test_a_compiler_that_fails_is_said_once(taken, monkeypatch, caplog) -> None:
    def fail(chain, name, source):
        raise errors.compiler_failed(name, "g++", "no", "kept.cpp")

    monkeypatch.setattr(toolchain, "build", fail)
    packing._kernel.cache_clear()
    try:
        with caplog.at_level(logging.WARNING, "fxquant.packing"):
            for _ in range(3):
                pack(seeded(64, 64), INT8)
    finally:
        packing._kernel.cache_clear()
    assert [took for _, took in taken] == [False] * 3
    assert len(caplog.records) == 1
    assert "the C++ compiler failed" in caplog.text


def test_threads_do_not_disturb_each_other(taken) -> None:
    weights = [seeded(64, 1024) * (i + 1) for i in range(4)]
    expected = [by_torch(weight, NF4) for weight in weights]
    found: list[list[torch.Tensor]] = [[] for _ in weights]

    def run(i: int) -> None:
        for _ in range(20):
            found[i] = pack(weights[i], NF4).tensors()

    threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for ours, theirs in itertools.zip_longest(found, expected):
        assert_same(ours, theirs)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_packs_too() -> None:
    code = """
import os, torch
from fxquant.formats import Encoding, pack
torch.set_num_threads(2)
weight = torch.randn(1024, 512)
expected = pack(weight, Encoding(8, block=(1, -1))).tensors()
child = os.fork()
if child == 0:
    found = pack(weight, Encoding(8, block=(1, -1))).tensors()
    # Not torch.equal: torch's own parallel loops wait for ever in a forked child.
    same = all(bytes(a.numpy()) == bytes(b.numpy()) for a, b in zip(found, expected))
    os._exit(0 if same else 3)
raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
