"""The operator that makes rows and rounds them: rules, targets, counters."""

from __future__ import annotations

import pytest
import torch

from fxquant.codegen import RENDERERS, Header, quantize
from fxquant.codegen.epilogue import EpilogueResult
from fxquant.codegen.prologue import Prologue, PrologueOperand, cast
from fxquant.codegen.quantize import QuantizeSpec
from fxquant.runtime import counted, launch, ops
from tests.codegen import prologues

assert ops  # imported for its registrations
K = 48
PLAIN = QuantizeSpec(K, "float32", name="add_layer_norm", prologue=prologues.layer_norm("float32"))
# Only copies and casts, so that every target finds the same integers.
CASTS = Prologue(
    (PrologueOperand("mk", "float32"),),
    (cast("%in0", "bfloat16"), cast("%0", "float16")),
    (EpilogueResult("%0", "bfloat16"),),
)
STATIC = QuantizeSpec(K, "float16", "static", name="casts_static", prologue=CASTS)


@pytest.mark.parametrize("spec", [PLAIN, STATIC], ids=lambda spec: spec.name)
def test_rows_obey_the_rules_of_operators(spec: QuantizeSpec) -> None:
    limit = [torch.tensor([1.5])] if spec.has_limit else []
    args = (prologues.operands(spec, 2, 3), limit, spec.to_json(), "torch")
    torch.library.opcheck(torch.ops.fxquant.launch_rows.default, args)


@pytest.mark.parametrize("target", ["auto", "cpp", "torch"])
@pytest.mark.parametrize("leading", [(), (0,), (2, 3)])
def test_every_target_gives_the_same(target: str, leading: tuple[int, ...]) -> None:
    given, limit = prologues.operands(STATIC, *leading), [torch.tensor([0.5])]
    got = torch.ops.fxquant.launch_rows(given, limit, STATIC.to_json(), target)
    want = quantize.run_rows(STATIC, given, limit)
    for found, right in zip(got, want, strict=True):
        assert torch.equal(found, right)
    x = given[0].bfloat16().half()
    assert counted.saturated(limit[0]) == int((x.abs() > 0.5).sum())


def test_kernels_are_printed_for_every_target() -> None:
    assert launch.parse(PLAIN.to_json()) == PLAIN
    for target in (*RENDERERS, "cpp"):
        kernel = launch.make_kernel(PLAIN, target, Header(("a.b",)))
        assert kernel.spec == PLAIN
        assert "a.b" in kernel.source
        assert "rsqrt" in kernel.source
