"""Grouped products: rows that belong to one matrix of a batch each."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.fx.experimental.proxy_tensor import make_fx

from fxquant import errors
from fxquant.codegen import RENDERERS, Header, bounds, reference
from fxquant.codegen.epilogue import Epilogue, EpilogueOperand
from fxquant.codegen.groups import grouped_product
from fxquant.codegen.spec import FLOAT_DTYPES, KernelSpec, WeightOperand
from fxquant.formats import Encoding
from tests.codegen import grouped, harness

NF4 = Encoding(4, "nf4", (64,), scale=Encoding(8, "dynamic8", (256,), offset=True))


def experts(dtype: str = "float32", batch: int = 3) -> KernelSpec:
    weight = WeightOperand.whole(NF4, (batch, 24, 64), transposed=False)
    return KernelSpec(weight, dtype, dtype, dtype, grouped=True)


@pytest.mark.parametrize("kind", grouped.KINDS)
@pytest.mark.parametrize("rows", [0, 1, 7])
def test_a_loop_over_the_matrices(kind: str, rows: int) -> None:
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(rows, 5, generator=rng, dtype=torch.float64)
    weight = torch.randn(4, 5, 6, generator=rng, dtype=torch.float64)
    ends = grouped.ends_of(kind, rows, 4)
    want = torch.zeros(rows, 6, dtype=torch.float64)
    first = 0
    for e, last in enumerate(ends.tolist()):
        want[first:last] = x[first:last] @ weight[e]
        first = last
    torch.testing.assert_close(grouped_product(x, weight, ends), want)


def test_what_rows_of_other_matrices_hold_does_no_harm() -> None:
    x = torch.tensor([[1.0], [torch.inf], [torch.nan]])
    weight = torch.tensor([[[2.0]], [[0.0]], [[3.0]]])
    got = grouped_product(x, weight, torch.tensor([1, 2, 2], dtype=torch.int32))
    torch.testing.assert_close(got, torch.tensor([[2.0], [torch.nan], [0.0]]), equal_nan=True)


@settings(max_examples=60, deadline=None)
@given(
    grouped.grouped_specs(FLOAT_DTYPES), st.sampled_from(grouped.KINDS), st.sampled_from((1, 2, 9))
)
def test_equals_the_products_of_each_matrix_alone(spec: KernelSpec, kind: str, rows: int) -> None:
    tensors = harness.stored(spec.weight.encoding, spec.weight.shape) * spec.weights
    x, extra = harness.activation(spec, rows), harness.operands(spec, rows)
    extra[-1] = grouped.ends_of(kind, rows, spec.weight.batch or 1)
    got = reference.run(spec, x, tensors, extra)
    assert isinstance(got, torch.Tensor)
    grouped.check(spec, x, tensors, extra, got=got)
    (found,) = bounds.enclosures(spec, x, tensors, extra)
    lost = got.isnan()
    assert ((found.low <= got) & (got <= found.high) | lost).all()
    assert torch.equal(lost, found.low.isnan() | found.high.isnan())


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_traces_with_symbolic_rows(dtype: str) -> None:
    spec = experts(dtype)
    tensors = harness.stored(NF4, spec.weight.shape)

    def call(x, weight, extra):
        return reference.run(spec, x, weight, extra)

    x, extra = harness.activation(spec, 5), harness.operands(spec, 5)
    traced = make_fx(call, tracing_mode="symbolic")(x, tensors, extra)
    for rows in (5, 9):
        x, extra = harness.activation(spec, rows), harness.operands(spec, rows)
        assert torch.equal(traced(x, tensors, extra), call(x, tensors, extra))


def test_written_down_and_said() -> None:
    spec = experts()
    assert KernelSpec.from_json(spec.to_json()) == spec
    assert "grouped" not in dataclasses.replace(spec, grouped=False).to_json()
    assert spec.describe().startswith("out[m, 24] = x[m, 64] @ weight[one of 3].T")
    assert spec.batch is None
    assert dataclasses.replace(spec, grouped=False).batch == 3
    assert "grouped_product(" in RENDERERS["torch"](spec, Header())


def test_groups_need_a_batch_and_have_no_operands_of_one() -> None:
    single = WeightOperand.whole(NF4, (24, 64), transposed=False)
    with pytest.raises(errors.KernelError, match="grouped"):
        KernelSpec(single, "float32", "float32", "float32", grouped=True)
    with pytest.raises(errors.KernelError, match="dims"):
        dataclasses.replace(experts(), epilogue=Epilogue((EpilogueOperand("en", "float32"),)))
