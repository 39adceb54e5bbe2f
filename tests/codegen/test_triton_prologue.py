"""Printed Triton kernels that make rows and take them to int8: interpreted, and built for GPUs."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fxquant.codegen import Header
from fxquant.codegen.quantize import QuantizeSpec
from fxquant.codegen.triton import render
from fxquant.runtime import cubin
from tests.codegen import harness, prologues

# NumPy, which the interpreter computes with, warns of what is defined here.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
# The interpreter cuts bfloat16 off where hardware rounds.
DTYPES = ("float16", "float32")
FIXED = [*prologues.fixed(33, "float16"), *prologues.fixed(64, "float32")]


def run_of(spec: QuantizeSpec, folder):
    module = harness.load(spec, folder, interpreted=True)
    if not spec.has_limit:
        return module.run

    def run(operands, extra):
        counter = torch.full((1,), 5, dtype=torch.int64)
        results = module.run(operands, extra, counter=counter)
        at = (
            [m.value for m in spec.prologue.more].index(spec.prologue.result)
            if spec.prologue.more
            else None
        )
        if at is not None and spec.prologue.more[at].dtype == spec.x_dtype:
            beyond = (results[2 + at].float().abs() > results[1].unsqueeze(-1)).sum()
            assert counter.item() == 5 + beyond
        return results

    return run


@pytest.mark.parametrize("spec", FIXED, ids=lambda spec: f"{spec.name}_{spec.x_dtype}")
def test_norms_and_gates(tmp_path, spec):
    run = run_of(spec, tmp_path)
    for leading in ((), (0,), (1,), (2, 3), (130,)):
        prologues.check(spec, run, prologues.operands(spec, *leading))
    turned = [x.mT.contiguous().mT if x.dim() > 1 else x for x in prologues.operands(spec, 9)]
    prologues.check(spec, run, turned)
    bad = prologues.operands(spec, 5)
    bad[0][1, 3], bad[0][3, 4] = torch.nan, torch.inf
    amax = prologues.check(spec, run, bad)[1]
    assert not amax[[0, 2, 4]].isnan().any()


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    seed=st.integers(0, 2**16),
    k=st.sampled_from((1, 5, 32, 100)),
    dtype=st.sampled_from(DTYPES),
    way=st.sampled_from((("token", False), ("token", True), ("static", False))),
    rows=st.sampled_from((0, 1, 7)),
    planted=st.sampled_from((None, float("nan"), float("inf"), 3e4)),
)
def test_random_prologues(tmp_path, *, seed, k, dtype, way, rows, planted):
    spec = QuantizeSpec(k, dtype, *way, prologue=prologues.random_prologue(seed, DTYPES))
    operands = prologues.operands(spec, rows, seed=seed)
    if planted is not None and rows:
        operands[0][rows // 2, k // 2] = planted
    prologues.check(spec, run_of(spec, tmp_path), operands)


def test_rows_are_read_once(tmp_path):
    """Whole rows stay in registers: one load of each operand and one launch."""
    spec = QuantizeSpec(8192, "float16", prologue=prologues.layer_norm("float16"))
    text = render(spec, Header())
    assert text.count("tl.load(") == 4
    assert text.count("kernel[") == 1
    given_ = prologues.operands(spec, 2)
    given_[0][1, 8191] = 900.0
    prologues.check(spec, run_of(spec, tmp_path), given_)


@pytest.mark.parametrize("target", cubin.TARGETS)
@pytest.mark.parametrize("k", [4096, 8192])
def test_builds_for_gpus_without_spills(tmp_path, target, k):
    for make in (prologues.layer_norm, prologues.rms_norm):
        spec = QuantizeSpec(k, "bfloat16", name=make.__name__, prologue=make("bfloat16"))
        module = harness.load(spec, tmp_path, interpreted=False)
        (build,) = cubin.builds(module)
        binary = cubin.compile_for(target, module, build)
        assert binary.spills == 0
        # Two programs of a row each find room on a multiprocessor with 64 K registers.
        assert binary.registers * 32 * build.options["num_warps"] * 2 <= 65536
