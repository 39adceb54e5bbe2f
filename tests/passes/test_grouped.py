"""Products of rows with one matrix of a batch each: the spellings, and what is none of them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fxquant
from fxquant.codegen.spec import KernelSpec
from tests.passes.harness import Captured, run
from tests.passes.smooth_harness import Smoothed
from tests.passes.smooth_harness import run as run_smoothed

E, N, K = 4, 48, 32
BOUND = 2 * 2**-8
"""Both sides round a sum to bfloat16."""


class Experts(nn.Module):
    def __init__(self, function, shape=(E, N, K), dtype=torch.float32):
        super().__init__()
        rng = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(shape, generator=rng).to(dtype), requires_grad=False)
        self.function = function

    def forward(self, *args):
        return self.function(*args, self.weight)


def ends(*values):
    return torch.tensor(values, dtype=torch.int32)


def fallback(x, offs, w):
    return torch.ops.transformers.grouped_mm_fallback(x, w.transpose(-2, -1), offs=offs)


def spec_of(captured):
    (site,) = captured.sites
    assert captured.refusals == []
    return KernelSpec.from_json(site.spec_json)


@pytest.mark.parametrize("offs", [ends(2, 2, 5, 7), ends(0, 0, 7, 7), ends(7, 7, 7, 7)])
@pytest.mark.parametrize("wide", [False, True])
def test_the_fallback_of_transformers(offs, wide):
    pytest.importorskip("transformers.integrations.moe")
    offs = offs.long() if wide else offs
    spec = spec_of(run(Experts(fallback), torch.randn(7, K), offs))
    assert spec.grouped
    assert (spec.weight.batch, spec.weight.n, spec.weight.k) == (E, N, K)
    assert spec.weight.strides == (N * K, K, 1), "no copy of the parameter"
    assert spec.name == f"nf4_grouped_{E}x{N}x{K}"


@pytest.mark.skipif(not hasattr(torch, "_grouped_mm"), reason="this torch has none")
@pytest.mark.parametrize("offs", [ends(2, 2, 5, 8), ends(0, 8, 8, 8)])
def test_of_torch(offs):
    turned = Experts(lambda x, o, w: torch._grouped_mm(x, w.mT, offs=o), dtype=torch.bfloat16)
    plain = Experts(
        lambda x, o, w: torch._grouped_mm(x, w, offs=o), (E, K, N), dtype=torch.bfloat16
    )
    x = torch.randn(8, K).bfloat16()
    assert spec_of(run(turned, x, offs, tol=BOUND)).weight.strides == (N * K, K, 1)
    assert spec_of(run(plain, x, offs, tol=BOUND)).weight.strides == (N * K, 1, N)


PICKED = {
    "W[ids] @ x": ((7, K, 1), lambda x, ids, w: torch.bmm(w[ids], x)),
    "x @ W[ids].T": ((7, 1, K), lambda x, ids, w: torch.bmm(x, w.mT[ids])),
    "several rows": ((7, 3, K), lambda x, ids, w: x @ w.mT[ids]),
    "several columns": ((7, K, 3), lambda x, ids, w: torch.matmul(w[ids], x)),
    "index_select": ((7, K, 1), lambda x, ids, w: torch.bmm(w.index_select(0, ids), x)),
    "turned": ((7, 1, N), lambda x, ids, w: torch.bmm(x, w[ids])),
    "turned after": ((7, N, 1), lambda x, ids, w: torch.bmm(w[ids].transpose(1, 2), x)),
    "a part": ((7, K, 1), lambda x, ids, w: torch.bmm(w[ids][:, 8:24], x)),
    "from the last": ((7, K, 1), lambda x, ids, w: torch.bmm(w[ids - 4], x)),
}


@pytest.mark.parametrize("ids", [(3, 0, 3, 1, 0, 0, 3), (2,) * 7])
@pytest.mark.parametrize("kind", PICKED)
def test_matrices_picked_by_number(kind, ids):
    shape, function = PICKED[kind]
    spec = spec_of(run(Experts(function), torch.randn(shape), torch.tensor(ids)))
    assert spec.grouped
    strides = (N * K, 1, K) if "turned" in kind else (N * K, K, 1)
    assert spec.weight.strides == strides, "no copy of the parameter"


@pytest.mark.parametrize("dynamic", [True, False])
def test_numbers_are_sorted_once_for_all_their_products(dynamic):
    def twice(x, ids, w):
        return torch.bmm(w[ids].mT, torch.bmm(w[ids], x).relu())

    captured = Captured()
    compiled = torch.compile(Experts(twice), backend=captured.backend, dynamic=dynamic)
    model = Experts(twice)
    for count in (7, 5):
        x, ids = torch.randn(count, K, 1), torch.randint(0, E, (count,))
        with torch.no_grad():
            got = compiled(x, ids)
        with captured.decoded():
            model.weight.data = compiled._orig_mod.weight.data.clone()
            torch.testing.assert_close(got, model(x, ids), rtol=1e-4, atol=1e-3)
    for context in captured.contexts:
        sorts = [n for n in context.gm.graph.nodes if n.target is torch.ops.aten.sort.stable]
        gathers = [n for n in context.gm.graph.nodes if n.target is torch.ops.aten.index.Tensor]
        assert (len(sorts), gathers) == (1, [])
    assert len(captured.contexts) == (1 if dynamic else 2)


def rewritten(x, ids, w):
    picked = w[ids]
    ids += 1
    return torch.bmm(picked, x)


REFUSED = {
    "numbers that change": (rewritten, ((3, K, 1), torch.tensor([0, 1, 2])), "are written to"),
    "a sum": (
        lambda x, ids, w: torch.baddbmm(torch.ones(1), w[ids], x),
        ((3, K, 1), torch.tensor([0, 1, 2])),
        "picked by number",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_refused(kind):
    function, (shape, ids), reason = REFUSED[kind]
    captured = run(Experts(function), torch.randn(shape), ids)
    assert captured.sites == []
    assert reason in captured.losses[0].reason


@pytest.mark.skipif(not hasattr(torch, "_grouped_mm"), reason="this torch has none")
def test_groups_of_outputs_are_refused():
    """A 2-D weight whose columns are cut into groups is something else."""
    function = lambda x, o, w: torch._grouped_mm(x, w, offs=o)  # noqa: E731
    model = Experts(function, (K, 16), dtype=torch.bfloat16)
    captured = run(model, torch.randn(2, 8, K).bfloat16(), ends(8, 16), tol=BOUND)
    assert captured.sites == []
    assert "does not multiply groups of rows" in captured.losses[0].reason


def test_masks_and_rows_of_a_matrix_pick_nothing():
    table = Experts(lambda x, ids, w: x @ w[ids].mT, (9, K))
    captured = run(table, torch.randn(2, K), torch.tensor([1, 5]))
    assert captured.sites == []
    assert captured.losses == []


@pytest.mark.parametrize("kind", ["given", "picked"])
def test_calibration_sees_the_rows_of_all_matrices(kind):
    x = torch.randn(7, K)
    if kind == "given":
        pytest.importorskip("transformers.integrations.moe")
        model, args = Experts(fallback), (x, ends(2, 2, 5, 7))
    else:
        ids = torch.tensor([3, 0, 3, 1, 0, 0, 3])
        model, args = Experts(lambda x, ids, w: torch.bmm(w[ids], x[..., None])), (x, ids)
    found = fxquant.calibrate(model, [args], progress=False).stats["weight"]
    torch.testing.assert_close(found.amax, x.abs().amax(0))
    assert found.tokens == 7


def test_smoothing_goes_through_rows_that_are_picked():
    """From the second product into the rows of the first, between which rows are put back."""

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            rng = torch.Generator().manual_seed(0)
            self.up = nn.Parameter(torch.randn(E, N, K, generator=rng), requires_grad=False)
            self.down = nn.Parameter(torch.randn(E, K, N, generator=rng), requires_grad=False)

        def forward(self, x, ids):
            return torch.bmm(self.down[ids], torch.bmm(self.up[ids], x).relu())

    found = run_smoothed(
        Two(), torch.randn(7, K, 1), torch.randint(0, E, (7,)), smoothed=Smoothed()
    )
    assert found.folded() == ["down"]
    assert found.multiplied() == ["up"]
