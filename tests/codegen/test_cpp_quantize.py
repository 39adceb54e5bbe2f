"""Printed C++ kernels that round rows to int8: equal to the reference, bit for bit."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fxquant import errors
from fxquant.codegen import Header, cpp
from fxquant.codegen import quantize as reference
from fxquant.codegen.cpp.isa import ISAS
from fxquant.codegen.quantize import QuantizeSpec
from fxquant.runtime import counters, toolchain
from fxquant.runtime.cpp_quantize import CppQuantizer
from tests.codegen.cpp_harness import vector_isas

pytestmark = pytest.mark.skipif(
    toolchain.compiler() is None and not os.environ.get("CI"), reason=toolchain.NOT_FOUND
)
KINDS = (("token", False), ("token", True), ("tensor", False), ("tensor", True), ("static", False))
SPECS = [
    QuantizeSpec(k, dtype, scope, clipped)
    for number, (scope, clipped) in enumerate(KINDS)
    for k, dtype in (((77, "float32"), (96, "float16"), (1, "bfloat16"))[number % 3 :][:2])
]
GUARD = 64


@functools.cache
def kernel(spec: QuantizeSpec, isa: str) -> CppQuantizer:
    compiler = toolchain.compiler()
    assert compiler is not None
    chain = toolchain.Toolchain(compiler, ISAS[isa], openmp=True)
    library = toolchain.build(chain, spec.name, cpp.render(spec, Header(), ISAS[isa]))
    return CppQuantizer(library, spec, openmp=True)


def limits(spec: QuantizeSpec, value: float = 1.5) -> list[Tensor]:
    return [torch.tensor([value])] if spec.has_limit else []


def values(spec: QuantizeSpec, *shape: int, seed: int = 0) -> Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return x.to(getattr(torch, spec.x_dtype))


def check(spec: QuantizeSpec, isa: str, x: Tensor, extra: list[Tensor]) -> None:
    """The same integers and amax; what saturates is counted."""
    want, want_amax = reference.run(spec, x, extra)
    before = counters.read(extra[0]) if extra else None
    got, amax = kernel(spec, isa).run(x, extra)
    assert got.is_contiguous()
    assert amax.is_contiguous()
    assert torch.equal(got, want)
    assert got.dtype is torch.int8
    assert torch.equal(
        amax.view(torch.int32).where(~amax.isnan(), 0),
        want_amax.view(torch.int32).where(~want_amax.isnan(), 0),
    )
    assert torch.equal(amax.isnan(), want_amax.isnan())
    if extra:
        counted = counters.read(extra[0])
        assert counted is not None
        beyond = int((x.float().abs() > want_amax.unsqueeze(-1)).sum())
        assert counted[0] - (before or [0])[0] == beyond


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "rows": lambda x: x,
    "unaligned": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape),
    "apart": lambda x: torch.stack([x, x], -1)[..., 0],
    "turned": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "columns first": lambda x: x.transpose(0, 2).contiguous().transpose(0, 2),
    "one row for all": lambda x: x[:1, :1].expand(x.shape),
}


@pytest.mark.parametrize("isa", vector_isas())
@pytest.mark.parametrize("spec", SPECS, ids=QuantizeSpec.describe)
def test_integers_are_those_of_the_reference(spec: QuantizeSpec, isa: str) -> None:
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            for rows in (0, 1, 3, 250):
                for layout in LAYOUTS.values():
                    check(spec, isa, layout(values(spec, 2, rows, spec.k, seed=rows)), limits(spec))
            check(spec, isa, values(spec, spec.k), limits(spec))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("isa", vector_isas())
@pytest.mark.parametrize("spec", SPECS, ids=QuantizeSpec.describe)
def test_edges(spec: QuantizeSpec, isa: str) -> None:
    """What is not finite, far too small or large, and ties."""
    for bad in (torch.nan, -torch.nan, torch.inf, -torch.inf):
        x = values(spec, 5, spec.k)
        x[3, spec.k // 2] = bad
        check(spec, isa, x, limits(spec))
        assert not kernel(spec, isa).run(x, limits(spec))[0][3].any()
    for size in (0.0, -0.0, 1e-45, 1e-38, 1e-30, 1e30, 3e38):
        x = values(spec, 5, spec.k).float() * size
        check(
            spec, isa, x.nan_to_num(0, 3e38, -3e38).to(getattr(torch, spec.x_dtype)), limits(spec)
        )
    ties = torch.arange(-128, 129).repeat_interleave(spec.k).view(-1, spec.k) / 2
    ties[:, 0] = 127
    check(spec, isa, ties.to(getattr(torch, spec.x_dtype)), limits(spec, 127.0))
    for limit in (0.0, 1e-45, 3e38, torch.inf, torch.nan):
        check(spec, isa, values(spec, 5, spec.k), limits(spec, limit))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_products_and_sums_are_not_fused(data: st.DataObject) -> None:
    """Numbers a rounding away from a tie, of which a fused product would make another integer."""
    spec, isa = QuantizeSpec(96, "float32"), data.draw(st.sampled_from(vector_isas()))
    amax = data.draw(st.floats(2.0**-99, 2.0**120, width=32))
    factor = torch.tensor(127.0) / torch.tensor(amax)
    near = (torch.arange(0, 95) + 0.5) / factor
    steps = data.draw(st.integers(-2, 2))
    x = (near.view(torch.int32) + steps).view(torch.float32)
    check(spec, isa, torch.cat([torch.tensor([amax]), x])[None], [])


def test_nothing_is_written_behind_codes_and_amax() -> None:
    spec = QuantizeSpec(77, "float32")
    x, codes, amax = (
        torch.randn(3, 77),
        torch.full((3 * 77 + GUARD,), 99),
        torch.full((3 + GUARD,), 9.0),
    )
    codes = codes.to(torch.int8)
    entry = kernel(spec, vector_isas()[0])._entry
    words = (x.data_ptr(), 77, 1, 3, 0, codes.data_ptr(), amax.data_ptr(), 2)
    entry.call(entry.pack(entry.address, *words))
    assert (codes[3 * 77 :] == 99).all()
    assert (amax[3:] == 9).all()
    assert torch.equal(codes[: 3 * 77].view(3, 77), reference.run(spec, x, [])[0])


def test_counts_are_kept_for_a_limit_in_inference_mode_too() -> None:
    spec = QuantizeSpec(77, "float32", "static")
    limit, built = torch.tensor([0.25]), kernel(spec, vector_isas()[0])
    with torch.inference_mode():
        built.run(torch.ones(2, 77), [limit])
    built.run(torch.ones(3, 77), [limit])
    assert counters.read(limit) == [5 * 77]
    assert counters.read(torch.tensor([0.25])) is None


@pytest.mark.parametrize(
    ("x", "extra", "said"),
    [
        (torch.ones(2, 76), [torch.ones(1)], "x"),
        (torch.ones(2, 77, dtype=torch.float16), [torch.ones(1)], "x"),
        (torch.ones(2, 77), [], "the number of operands"),
        (torch.ones(2, 77), [torch.ones(2)], "operand 0"),
        (torch.ones(2, 77), [torch.ones(1, dtype=torch.float64)], "operand 0"),
    ],
)
def test_operands_that_do_not_fit(x: Tensor, extra: list[Tensor], said: str) -> None:
    with pytest.raises(errors.KernelError, match=said):
        kernel(QuantizeSpec(77, "float32", "static"), vector_isas()[0]).run(x, extra)


def test_a_library_that_is_none(tmp_path) -> None:
    path = tmp_path / "kernel.so"
    path.write_text("text")
    with pytest.raises(errors.CompilerError):
        CppQuantizer(path, SPECS[0], openmp=True)
