"""Prologues: what a spec refuses, and the reference against norms of torch."""

from __future__ import annotations

import functools
import json

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from fxquant import errors
from fxquant.codegen import Header, quantize
from fxquant.codegen.epilogue import EpilogueNode, EpilogueResult
from fxquant.codegen.prologue import MOST_INPUTS, Prologue, PrologueOperand
from fxquant.codegen.quantize import QuantizeSpec
from fxquant.codegen.row_bounds import enclosures
from tests.codegen import prologues

ROWS = PrologueOperand("mk", "float32")
ADD = EpilogueNode("aten.add.Tensor", ("%in0", 1.0))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_is_what_torch_computes_and_then_quantizes(dtype: str) -> None:
    k, real = 48, getattr(torch, dtype)
    spec = QuantizeSpec(k, dtype, prologue=prologues.layer_norm(dtype))
    x, y, weight, bias = prologues.operands(spec, 2, 5)
    codes, amax, normed = quantize.run_rows(spec, [x, y, weight, bias], [])
    want = torch.nn.functional.layer_norm((x + y).float(), (k,), weight, bias, 1e-5).to(real)
    torch.testing.assert_close(normed, want)
    plain = quantize.run(QuantizeSpec(k, dtype), normed, [])
    assert torch.equal(codes, plain[0])
    assert torch.equal(amax, plain[1])

    spec = QuantizeSpec(k, dtype, prologue=prologues.rms_norm(dtype))
    x, y, weight = prologues.operands(spec, 7)
    codes, _, added = quantize.run_rows(spec, [x, y, weight], [])
    assert torch.equal(added, x + y)
    normed = weight * torch.nn.functional.rms_norm(added.float(), (k,), eps=1e-6).to(real)
    want_codes, _ = quantize.run(QuantizeSpec(k, dtype), normed, [])
    assert (codes.int() - want_codes.int()).abs().max() <= 1


@pytest.mark.parametrize("seed", range(12))
def test_json_and_enclosures_of_random_prologues(seed: int) -> None:
    spec = QuantizeSpec(33, "float16", prologue=prologues.random_prologue(seed))
    assert QuantizeSpec.from_json(spec.to_json()) == spec
    prologues.check(spec, functools.partial(quantize.run_rows, spec), prologues.operands(spec, 3))


def test_enclosures_are_narrow_and_notice_what_is_wrong() -> None:
    spec = QuantizeSpec(384, "float32", prologue=prologues.layer_norm("float32"))
    given = prologues.operands(spec, 9)
    codes, amax, normed = quantize.run_rows(spec, given, [])
    of_codes, of_amax, of_normed = enclosures(spec, given, [], amax)
    assert (of_normed.high - of_normed.low).max() < 1e-3
    assert ((of_codes.high - of_codes.low) > 0).float().mean() < 0.05
    assert of_normed.excess(normed * 1.001).max() > 0
    assert of_amax.excess(amax * 1.001).min() > 0
    assert of_codes.excess(codes + 1).min() >= 0
    assert of_codes.excess(codes + 1).max() > 0
    given[0][3, 5] = torch.nan
    codes, amax, _ = quantize.run_rows(spec, given, [])
    assert amax.isnan().nonzero().flatten().tolist() == [3]
    assert not codes[3].any()
    _, of_amax, of_normed = enclosures(spec, given, [], amax)
    assert of_amax.excess(torch.ones(9))[3] == torch.inf
    assert of_normed.excess(normed)[3].min() == torch.inf


def test_traces_with_any_number_of_rows() -> None:
    spec = QuantizeSpec(6, "float16", prologue=prologues.rms_norm("float16"))
    traced = make_fx(functools.partial(quantize.run_rows, spec), tracing_mode="symbolic")(
        prologues.operands(spec, 2, 5), []
    )
    for rows in (3, 9):
        given = prologues.operands(spec, 2, rows)
        wanted = quantize.run_rows(spec, given, [])
        torch.testing.assert_close(traced(given, []), wanted, rtol=0, atol=0)


def test_a_spec_without_a_prologue_is_written_as_before() -> None:
    assert "prologue" not in json.loads(QuantizeSpec(8, "float16").to_json())
    spec = QuantizeSpec(8, "float16", prologue=prologues.gate("float16"))
    assert "x by silu, rounded, mul, rounded, mul, rounded" in spec.describe()
    assert "in0 = operands[0]" in quantize.render(spec, Header())
    assert "with 1 of its values written out" in prologues.layer_norm("float16").describe()


@pytest.mark.parametrize(
    "make",
    [
        lambda: PrologueOperand("km", "float32"),
        lambda: PrologueOperand("mk", "int8"),
        lambda: Prologue((ROWS,), ()),
        lambda: Prologue((PrologueOperand("k", "float32"),), (ADD,)),
        lambda: Prologue((ROWS,), (EpilogueNode("aten.add.Tensor", ("%in1", 1.0)),)),
        lambda: Prologue((ROWS,), (EpilogueNode("aten.add.Tensor", ("%0", 1.0)),)),
        lambda: Prologue((ROWS,), (EpilogueNode("aten.add.Tensor", ("%acc", 1.0)),)),
        lambda: Prologue((ROWS,), (EpilogueNode("aten.mean.dim", ("%in0",)),)),
        lambda: Prologue((ROWS,), (EpilogueNode("aten.mean.dim", ("%in0", -1)), ADD)),
        lambda: Prologue((ROWS,), (ADD,), (EpilogueResult("%in0", "float32"),)),
        lambda: QuantizeSpec(4, "float32", "tensor", prologue=Prologue((ROWS,), (ADD,))),
        lambda: QuantizeSpec(MOST_INPUTS + 1, "float32", prologue=Prologue((ROWS,), (ADD,))),
    ],
)
def test_what_a_spec_refuses(make) -> None:
    with pytest.raises(errors.KernelError, match=r"must be .*got"):
        make()


@pytest.mark.parametrize(
    "written",
    [
        {"nodes": []},
        {"operands": [["mk", "float32"]], "nodes": [["aten.add.Tensor"]]},
        {"operands": [["mk"]], "nodes": []},
        [],
    ],
)
def test_text_that_is_no_prologue(written: object) -> None:
    data = json.loads(QuantizeSpec(8, "float16").to_json())
    with pytest.raises(errors.KernelError, match="not a kernel spec"):
        QuantizeSpec.from_json(json.dumps({**data, "prologue": written}))
