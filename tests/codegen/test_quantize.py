"""Rows to int8: the reference against NumPy, and what a spec refuses."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.fx.experimental.proxy_tensor import make_fx

from fxquant import errors
from fxquant.codegen import Header, KernelSpec, reference
from fxquant.codegen.quantize import SCOPES, QuantizeSpec, render, run
from fxquant.codegen.spec import Outliers, WeightOperand
from fxquant.formats import Encoding
from tests.codegen import harness

LEAST = np.float32(2.0**-100)
WAYS = [("token", False), ("token", True), ("tensor", False), ("tensor", True), ("static", False)]


def plain(spec: QuantizeSpec, x: torch.Tensor, limit: float | None) -> tuple[np.ndarray, ...]:
    """The definition, row by row in float32."""
    rows = x.float().numpy().reshape(-1, spec.k)
    peaks = np.abs(rows).max(-1) if len(rows) else np.zeros(0, np.float32)
    if spec.scope == "tensor" and len(rows):
        peaks = np.full_like(peaks, peaks.max() if np.isfinite(peaks).all() else np.nan)
    amax = np.where(np.isfinite(peaks), np.maximum(peaks, LEAST), np.float32("nan"))
    bound = None if limit is None else np.maximum(np.float32(limit), LEAST)
    if spec.clipped:
        amax = np.minimum(amax, bound)
    if spec.scope == "static":
        amax = np.where(np.isnan(amax), amax, bound)
    with np.errstate(over="ignore", invalid="ignore"):
        scaled = rows * (np.float32(127) / amax)[:, None]
    codes = np.where(np.isnan(amax)[:, None], 0, np.clip(np.rint(scaled), -127, 127))
    return codes.astype(np.int8), amax.astype(np.float32)


def check(spec: QuantizeSpec, x: torch.Tensor, limit: float | None) -> tuple[torch.Tensor, ...]:
    extra = [] if limit is None else [torch.tensor([limit])]
    codes, amax = run(spec, x, extra)
    want_codes, want_amax = plain(spec, x, limit)
    assert codes.shape == x.shape
    assert codes.dtype == torch.int8
    assert codes.is_contiguous()
    assert amax.shape == x.shape[:-1]
    assert amax.dtype == torch.float32
    np.testing.assert_array_equal(codes.reshape(-1, spec.k).numpy(), want_codes)
    np.testing.assert_array_equal(amax.reshape(-1).numpy(), want_amax)
    return codes, amax


@settings(max_examples=60, deadline=None)
@given(
    way=st.sampled_from(WAYS),
    dtype=st.sampled_from(("float16", "bfloat16", "float32")),
    shape=st.sampled_from([(1,), (0, 3), (5, 1), (2, 3, 7), (4, 64), (3, 33)]),
    limit=st.sampled_from([0.0, 2.0**-120, 0.25, 1.0, 50.0, 1e30]),
    planted=st.sampled_from((None, float("nan"), float("inf"), 0.0, 3e4)),
    turned=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_equals_the_definition(*, way, dtype, shape, limit, planted, turned, seed):
    scope, clipped = way
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(getattr(torch, dtype))
    if turned and x.ndim > 1:
        x = x.transpose(0, -1).contiguous().transpose(0, -1)
    if planted is not None and x.numel():
        x[(0,) * x.ndim] = planted
    spec = QuantizeSpec(shape[-1], dtype, scope, clipped)
    check(spec, x, limit if spec.has_limit else None)


def test_a_row_that_is_not_finite_spoils_its_row_or_its_tensor() -> None:
    x = torch.ones(3, 4)
    x[1, 2] = float("inf")
    for scope, spoiled in (("token", [1]), ("static", [1]), ("tensor", [0, 1, 2])):
        spec = QuantizeSpec(4, "float32", scope)
        codes, amax = check(spec, x, 1.0 if spec.has_limit else None)
        assert amax.isnan().nonzero().flatten().tolist() == spoiled
        assert not codes[amax.isnan()].any()


def test_what_lies_beyond_a_limit_saturates() -> None:
    x = torch.tensor([[0.5, -3.0, 2.0], [0.5, -0.25, 0.125]])
    codes, amax = check(QuantizeSpec(3, "float32", "token", clipped=True), x, 1.0)
    assert codes.tolist() == [[64, -127, 127], [127, -64, 32]]
    assert amax.tolist() == [1.0, 0.5]
    codes, amax = check(QuantizeSpec(3, "float32", "static"), x, 1.0)
    assert codes.tolist() == [[64, -127, 127], [64, -32, 16]]
    assert amax.tolist() == [1.0, 1.0]


@pytest.mark.parametrize("way", WAYS)
def test_traces_with_any_number_of_rows(way: tuple[str, bool]) -> None:
    spec = QuantizeSpec(6, "float16", *way)
    limit = [torch.tensor([0.5])] if spec.has_limit else []
    example = torch.randn(5, 6).half()
    traced = make_fx(functools.partial(run, spec), tracing_mode="symbolic")(example, limit)
    for rows in (2, 9):
        x = torch.randn(rows, 6).half()
        torch.testing.assert_close(traced(x, limit), run(spec, x, limit), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_two_steps_are_the_one_inside_a_product(dtype: str) -> None:
    weight = WeightOperand.whole(Encoding(8, block=(1, -1)), (24, 64), transposed=False)
    tensors = harness.stored(weight.encoding, weight.shape, 0)
    inside = KernelSpec(weight, dtype, "int8", dtype)
    apart = KernelSpec(weight, "int8", "int8", dtype)
    assert "quantized before" in reference.render(apart, Header())
    x = harness.activation(inside, 5, 1)
    x[2] = float("nan")
    codes, amax = run(QuantizeSpec(64, dtype), x, [])
    got = reference.run(apart, codes, tensors, [amax])
    want = reference.run(inside, x, tensors, [])
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)
    assert got[2].isnan().all()
    wrong = reference.run(apart, codes, tensors, [2 * amax])
    assert not torch.equal(wrong[:2], want[:2])


def test_json_names_its_kind() -> None:
    spec = QuantizeSpec(8, "float16", "tensor", clipped=True, name="rows")
    assert QuantizeSpec.from_json(spec.to_json()) == spec
    assert '"kind":"quantize"' in spec.to_json()
    for text in ("{}", "[]", "nonsense", '{"kind":"linear"}', '{"kind":"quantize"}'):
        with pytest.raises(errors.KernelError, match="not a kernel spec"):
            QuantizeSpec.from_json(text)
    assert "in int8 per tensor, clipped" in render(spec, Header())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"k": 0}, "k"),
        ({"k": 1.5}, "k"),
        ({"x_dtype": "int8"}, "x_dtype"),
        ({"scope": "row"}, ", ".join(SCOPES)),
        ({"scope": "static", "clipped": True}, "clipped"),
        ({"clipped": 1}, "clipped"),
        ({"name": "a b"}, "name"),
    ],
)
def test_what_a_spec_refuses(fields: dict[str, object], message: str) -> None:
    with pytest.raises(errors.KernelError, match=message):
        QuantizeSpec(**{"k": 4, "x_dtype": "float32", **fields})


@pytest.mark.parametrize(
    "fields",
    [
        {"compute_dtype": "float32"},
        {"out_dtype": "int8"},
        {"outliers": Outliers("float16", threshold=6.0)},
    ],
)
def test_what_a_product_of_codes_refuses(fields: dict[str, object]) -> None:
    weight = WeightOperand.whole(Encoding(8, block=(1, -1)), (4, 8), transposed=False)
    with pytest.raises(errors.KernelError):
        KernelSpec(
            weight,
            **{"x_dtype": "int8", "compute_dtype": "int8", "out_dtype": "float32", **fields},
        )
