"""Floats in three parts on the tile unit: within the bounds of floats, whatever rows hold."""

from __future__ import annotations

import functools
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch

from fxquant.codegen import Header, bounds, cpp, reference
from fxquant.codegen.cpp.isa import AMX, AVX512
from fxquant.codegen.cpp.plan import Plan
from fxquant.formats import Encoding, pack
from tests.bounds import assert_close_within
from tests.codegen import cpp_specs
from tests.codegen.cpp_harness import FEW, MANY, Kernel
from tests.codegen.cpp_specs import NF4, spec
from tests.codegen.test_cpp_tiles import check_memory, needs_tiles, operands

HALVES = (0.0, *(1 + number / 4096 for number in range(15)))
"""Levels of up to 13 bits."""
SPECS = {
    one.name: one
    for one in (
        spec("levels", NF4, (80, 448)),
        spec("batched", NF4, (3, 70, 192), epilogue=cpp_specs.SPECS["nf4_f32_batched"].epilogue),
        # One part of a level is enough, of codes that hold 8 and 16 inputs a dword.
        spec("int4_channels", Encoding(4, block=(1, -1)), (1, 77)),
        spec(
            "int2_f16", Encoding(2, block=(1, 128), full_range=True), (70, 320), compute="float16"
        ),
        # More inputs than a second-level cache holds of many rows.
        spec("long", Encoding(4, "fp4", (256,)), (33, 6400)),
        spec("halves", Encoding(4, HALVES, (1, 64)), (20, 128)),
        spec("rounded", NF4, (64, 64), x="bfloat16"),
    )
}
ROWS = (0, 1, 3, 4, 16, 17, 19, 20, 33, 64, 69, 97)

pytestmark = needs_tiles


@functools.cache
def kernels() -> dict[str, Kernel]:
    isa = replace(AMX, few_heights=(2, 1))
    with ThreadPoolExecutor(2) as pool:
        built = pool.map(lambda one: Kernel(one, isa), SPECS.values())
        return dict(zip(SPECS, built, strict=True))


@pytest.mark.parametrize("name", SPECS)
def test_the_text_goes_the_way_that_is_meant(name: str) -> None:
    plan = Plan(SPECS[name], AMX)
    text = cpp.render(SPECS[name], Header(), AMX)
    assert plan.has_thirds
    assert not plan.uses_tiles
    assert "tdpbf16ps" in text
    assert max(map(len, text.splitlines())) <= 100
    assert not Plan(SPECS[name], AVX512).has_thirds


@pytest.mark.parametrize("name", SPECS)
def test_parts_make_up_levels(name: str) -> None:
    plan = Plan(SPECS[name], AMX)
    parts = torch.tensor(plan.level_thirds, dtype=torch.float64)
    assert torch.equal(parts.sum(0), torch.tensor(plan.levels, dtype=torch.float64))
    assert torch.equal(parts, parts.bfloat16().double())
    assert len(parts) == (1 if plan.encoding.is_uniform else 2 if name == "halves" else 3)


@pytest.mark.parametrize("name", SPECS)
def test_every_number_of_rows(name: str) -> None:
    one, kernel = SPECS[name], kernels()[name]
    for rows in ROWS:
        x, tensors, extra = operands(one, rows)
        prepared = kernel.prepare(tensors)
        got = [kernel.run(prepared, x, extra, MANY, threads) for threads in (1, 2)]
        assert torch.equal(*got), "the number of threads is seen in the result"
        want, bound = reference.run(one, x, tensors, extra), bounds.allowed(one, x, tensors, extra)
        assert_close_within(got[0], want, bound)
        assert_close_within(kernel.run(prepared, x, extra, FEW), want, bound)


@pytest.mark.parametrize("rows", [20, 33])
@pytest.mark.parametrize("name", ["levels", "batched", "int4_channels", "rounded"])
@pytest.mark.parametrize("odd", [torch.nan, torch.inf, -torch.inf, 3.4e38, 1e-30, 1e-38, 1e-44])
def test_rows_without_three_parts(odd: float, name: str, rows: int) -> None:
    """They are what few rows would be, and others are as if they were not there."""
    one, kernel = SPECS[name], kernels()[name]
    x, tensors, extra = operands(one, rows)
    prepared = kernel.prepare(tensors)
    plain = kernel.run(prepared, x, extra, MANY, 2)
    x[..., 7, 5] = x[..., 18, 0] = odd
    got = [kernel.run(prepared, x, extra, MANY, threads) for threads in (1, 2)]
    assert torch.equal(got[0].nan_to_num(7), got[1].nan_to_num(7))
    by_row = torch.stack(
        [kernel.run(prepared, x[..., row, :].unsqueeze(-2), extra, FEW) for row in (7, 18)], -2
    ).reshape(*plain.shape[:-2], 2, -1)
    assert torch.equal(got[0][..., [7, 18], :].nan_to_num(7), by_row.nan_to_num(7))
    got[0][..., [7, 18], :] = plain[..., [7, 18], :]
    assert torch.equal(got[0], plain)


@pytest.mark.parametrize("name", ["levels", "long"])
@pytest.mark.parametrize("exponent", [-149, -126, -100, -81, -79, -60, 60, 99, 101, 120])
def test_rows_of_any_magnitude(exponent: int, name: str) -> None:
    one, kernel = SPECS[name], kernels()[name]
    x, tensors, extra = operands(one, 20)
    x[::2] = torch.ldexp(x[::2].clamp(-2, 2), torch.tensor(exponent))
    x[1::4, ::2] = torch.ldexp(x[1::4, ::2], torch.tensor(min(exponent, 90)))
    prepared = kernel.prepare(tensors)
    got = [kernel.run(prepared, x, extra, MANY, threads) for threads in (1, 2)]
    assert torch.equal(*got)
    want, bound = reference.run(one, x, tensors, extra), bounds.allowed(one, x, tensors, extra)
    assert_close_within(got[0], want, bound)


@pytest.mark.parametrize("name", SPECS)
def test_many_rows_without_three_parts(name: str) -> None:
    """They are few rows, in blocks that one thread or all work off."""
    one, kernel = SPECS[name], kernels()[name]
    for rows in (1, 5, 40, 2 * Plan(one, AMX).super_rows + 5):
        x, tensors, extra = operands(one, rows)
        x[..., ::3, 1] = 1e-30
        prepared = kernel.prepare(tensors)
        got = [kernel.run(prepared, x, extra, MANY, threads) for threads in (1, 2)]
        assert torch.equal(*got)
        few = kernel.run(prepared, x, extra, FEW, 2)
        if rows < 100 and one.x_dtype == "float32":
            assert torch.equal(got[0], few)
        want, bound = reference.run(one, x, tensors, extra), bounds.allowed(one, x, tensors, extra)
        assert_close_within(got[0], want, bound)


@pytest.mark.parametrize("name", ["levels", "long", "int4_channels"])
def test_one_input_at_a_time(name: str) -> None:
    """Where nothing is summed but parts, results are those of floats to two roundings and a few."""
    one, kernel = SPECS[name], kernels()[name]
    _, tensors, extra = operands(one, 1)
    k = one.weight.k
    chosen = torch.arange(0, k, max(1, k // 60))[:60]
    values = torch.randn(len(chosen), generator=torch.Generator().manual_seed(1)) * 3
    x = torch.zeros(len(chosen), k)
    x[torch.arange(len(chosen)), chosen] = values
    got = kernel.run(kernel.prepare(tensors), x, extra, MANY, 2).double()
    dense = reference.operand(one.weight, tensors, torch.float32).double()
    exact = values.double()[:, None] * dense.t()[chosen]
    assert ((got - exact).abs() <= 12 * bounds.UNIT * exact.abs()).all()


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("short", [0, 64])
def test_nothing_behind_the_operands_is_touched(short: int) -> None:
    check_memory(kernels()["levels"], short)


def test_any_layout_of_x() -> None:
    one, kernel = SPECS["levels"], kernels()["levels"]
    x, tensors, extra = operands(one, 40)
    prepared = kernel.prepare(tensors)
    want = kernel.run(prepared, x, extra, MANY)
    apart = torch.zeros(40, 3 * x.shape[1])[:, ::3]
    apart.copy_(x)
    turned = x.t().contiguous().t()
    shifted = torch.zeros(40, x.shape[1] + 1)[:, 1:]
    shifted.copy_(x)
    for same in (apart, turned, shifted):
        assert torch.equal(kernel.run(prepared, same, extra, MANY, 2), want)


def test_an_instruction_sums_its_products_before_it_adds_them() -> None:
    """As Intel's manual has it, and `bounds.float_sums` counts on it; one by one 7 would be 8."""
    one = spec("sevens", Encoding(4, block=(1, -1)), (16, 64))
    kernel = Kernel(one, replace(AMX, few_heights=(1,)))
    tensors = pack(torch.full((16, 64), 7.0), one.weight.encoding).tensors()
    x = torch.zeros(16, 64)
    x[:, 0], x[:, 32:] = 2.0**24, 1
    got = kernel.run(kernel.prepare(tensors), x, [], MANY)
    assert (got == 7 * 2.0**24 + 7 * 32).all()
