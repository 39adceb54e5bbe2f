"""The cost model of C++ kernels: what it counts, and the thresholds that follow."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fxquant.codegen.cpp.cost import (
    ALL_ROWS,
    BANDWIDTH,
    DOTS,
    DOUBT,
    THREADS,
    VECTORS,
    M,
    Rates,
    few_cost,
    few_rate,
    many_cost,
    many_rate,
    threshold,
    usual_rates,
)
from fxquant.codegen.cpp.isa import AMX, AVX2, AVX512, ISAS, PORTABLE, Isa
from fxquant.codegen.cpp.layout import prepared_bytes
from fxquant.codegen.cpp.plan import SUPER_ROWS, Plan
from fxquant.codegen.epilogue import Epilogue, EpilogueResult
from fxquant.codegen.spec import KernelSpec, WeightOperand
from fxquant.formats import Encoding
from tests.codegen.specs import specs

NF4 = Encoding(4, "nf4", (64,), scale=Encoding(8, "dynamic8", (256,), offset=True))
INT8 = Encoding(8, block=(1, -1))


def plan(
    n: int = 1024,
    k: int = 1024,
    compute: str = "bfloat16",
    encoding: Encoding = NF4,
    isa: Isa = AVX512,
) -> Plan:
    operand = WeightOperand.whole(encoding, (n, k), transposed=False)
    x = "float32" if compute == "float32" else "bfloat16"
    return Plan(KernelSpec(operand, x, compute, x), isa)


def rates(**changes: float) -> Rates:
    every = dict.fromkeys(("bf16", "int8", "f32"), 4e9)
    return dataclasses.replace(Rates(20e9, every, every, 8e9), **changes)


def test_traffic_is_the_packed_weight_once_and_the_rows() -> None:
    one = plan(512, 1024)
    for cost in (few_cost(one), many_cost(one)):
        assert cost.bytes.subs(M, 3) == prepared_bytes(one) + 3 * (1024 + 512) * 2
    # 4 bits of codes and 8 of a scale for 64 weights, and what nested scales take.
    assert 4.125 < prepared_bytes(one) * 8 / (512 * 1024) < 4.4


def test_several_weights_are_work_of_several_and_read_rows_once() -> None:
    one = plan(512, 1024)
    more = (EpilogueResult("%acc1", "float32"), EpilogueResult("%acc2", "bfloat16"))
    spec = dataclasses.replace(one.spec, weights=3, epilogue=Epilogue((), (), more))
    three = Plan(spec, one.isa)
    at = {M: 40, THREADS: 2}
    for cost, single in ((few_cost, few_cost(one)), (many_cost, many_cost(one))):
        joined = cost(three)
        assert joined.dots.subs(at) == 3 * single.dots.subs(at)
        assert joined.operations.subs(at) == 3 * single.operations.subs(at)
        assert joined.share == single.share
        traffic = 3 * prepared_bytes(one) + 40 * (1024 * 2 + 512 * (2 + 4 + 2))
        assert joined.bytes.subs(at) == traffic


def test_products_are_counted_in_instructions() -> None:
    # A row of 1024 outputs and 1024 inputs, 16 outputs and 1, 2 or 4 inputs at a time.
    for compute, inputs in (("float32", 1), ("bfloat16", 2), ("int8", 4)):
        one = plan(compute=compute)
        assert few_cost(one).dots.subs(M, 1) == 1024 * 1024 // 16 // inputs
        assert many_cost(one).dots.subs(M, 1) == 4 * few_cost(one).dots.subs(M, 1)
        assert many_cost(one).dots.subs(M, 12) == few_cost(one).dots.subs(M, 12)


def test_few_rows_decode_once_a_panel_and_many_once_for_many_panels() -> None:
    few, many = few_cost(plan()).operations, many_cost(plan()).operations
    steps = 1024 * 1024 // 32

    def grown(cost: object, first: int, last: int) -> int:
        return (cost.subs({M: last}) - cost.subs({M: first})).subs(THREADS, 2)

    totals = grown(few, 15, 16)
    assert grown(few, 16, 17) - totals >= 2 * steps
    assert grown(few, 17, 32) == 15 * totals
    per_panel = grown(many, 4, 8)
    assert grown(many, SUPER_ROWS - 4, SUPER_ROWS) == per_panel < 4 * totals
    assert grown(many, SUPER_ROWS, SUPER_ROWS + 4) - per_panel > 4 * 2 * steps


@given(specs())
def test_every_spec_has_a_threshold(spec: KernelSpec) -> None:
    for isa in ISAS.values():
        one = Plan(spec, isa)
        found = threshold(one, usual_rates(isa), 2)
        assert found in range(SUPER_ROWS + 1) or found == ALL_ROWS
        if not one.is_regular:
            assert found == 0


def test_scales_that_change_inside_a_group_leave_many_rows_alone() -> None:
    one = plan(encoding=Encoding(4, "nf4", (-1, 1)))
    assert not one.is_regular
    assert threshold(one, rates(), 2) == 0


@pytest.mark.parametrize("isa", [AMX, AVX512, AVX2, PORTABLE])
@pytest.mark.parametrize("compute", ["bfloat16", "float32", "int8"])
def test_one_row_is_few_and_the_choice_is_the_cheaper(isa: Isa, compute: str) -> None:
    one, found = plan(compute=compute, isa=isa), usual_rates(isa)
    most = threshold(one, found, 2)
    assert 1 <= most < SUPER_ROWS
    values = {BANDWIDTH: found.bandwidth, VECTORS: found.vectors, THREADS: 2}

    def seconds(rows: int) -> list[tuple[float, float]]:
        both = (few_cost(one), few_rate(one, found)), (many_cost(one), many_rate(one, found))
        at = [(cost, {**values, DOTS: dots, M: rows}) for cost, dots in both]
        few, many = ((float(cost.time.subs(v)), float(cost.work.subs(v))) for cost, v in at)
        # Of two that wait for memory it is the one with less work, and many rows have to be sure.
        return [few, (many[0], DOUBT * many[1])]

    few, many = seconds(most)
    assert few <= many
    height = one.few_heights[0]
    few, many = seconds(most + (1 if most < height else height))
    assert few > many


@given(st.floats(1.0, 3.0), st.floats(1.0, 3.0))
def test_thresholds_fall_when_products_of_few_rows_are_slower(faster: float, more: float) -> None:
    one = plan()
    quick = rates(few={"bf16": 3e9 * faster}, many={"bf16": 4e9})
    slow = rates(few={"bf16": 3e9 * faster / more}, many={"bf16": 4e9})
    assert threshold(one, slow, 2) <= threshold(one, quick, 2)


def test_what_needs_no_decoding_stays_with_few_rows_longer() -> None:
    decoded = threshold(plan(compute="int8"), rates(), 2)
    assert threshold(plan(compute="int8", encoding=INT8), rates(), 2) > decoded


def test_one_tile_of_outputs_on_two_threads_takes_many_rows_sooner() -> None:
    # Few rows leave a thread idle; many rows share out their panels.
    assert threshold(plan(n=64), rates(), 2) < threshold(plan(n=64), rates(), 1)
    share = many_cost(plan(n=64)).share.subs({M: SUPER_ROWS, THREADS: 2})
    assert float(few_cost(plan(n=64)).share.subs(THREADS, 2)) == 1 > float(share)


def test_the_tile_unit_is_counted_in_panels_of_eight_rows() -> None:
    for compute, encoding in (("bfloat16", NF4), ("int8", NF4), ("int8", INT8)):
        tiles, plain = plan(compute=compute, encoding=encoding, isa=AMX), plan(compute=compute)
        for rows, counted in ((1, 8), (8, 8), (17, 24), (768, 768)):
            assert many_cost(tiles).dots.subs(M, rows) == counted * few_cost(plain).dots.subs(M, 1)


def test_floats_in_three_parts_are_counted_in_whole_panels() -> None:
    three, plain = plan(compute="float32", isa=AMX), plan(compute="float32")
    assert three.has_thirds
    for rows, counted in ((1, 16), (16, 16), (17, 32)):
        # Six products of pairs.
        dots = many_cost(three).dots.subs(M, rows)
        assert dots == 6 * counted * few_cost(plain).dots.subs(M, 1) // 2
    assert threshold(three, usual_rates(AMX), 2) == 16
    slower = rates(many={"bf16": 12e9, "int8": 12e9, "f32": 6e9})
    assert threshold(three, slower, 2) > 16


def test_the_tile_unit_decodes_levels_for_some_rows_and_weights_for_more() -> None:
    one = plan(isa=AMX)
    work = many_cost(one).operations.subs(THREADS, 2)
    of_row, of_weight = [], []
    for rows in (1, one.span_rows + 1):
        first, later = (float(work.subs(M, m)) for m in (rows, rows + 12))
        of_row.append((later - first) / 12)
        of_weight.append(first - rows * of_row[-1])
    vectors, blocks, chunks = 1024 // 16, 1024 // 64, 1024 // 256
    assert of_row[1] == 2 * vectors * chunks, "sums are taken up by chunks of 256"
    loaded = vectors * (1024 // 2) // 16  # a vector of a row for each register of 16 pairs
    assert of_row[0] == 5 * vectors * blocks + loaded, "sums are taken up by blocks of 64"
    assert 3 * of_weight[0] < 2 * of_weight[1], "weights are scaled one by one"
    for rows in range(2, one.span_rows + 1):
        more = work.subs(M, rows) - work.subs(M, rows - 1) - of_row[0]
        assert more == (of_weight[0] if rows == 33 else 0), "every two panels decode for themselves"


def test_tiles_take_many_rows_sooner() -> None:
    faster = rates(many={"bf16": 40e9, "int8": 40e9, "f32": 4e9})
    for compute in ("bfloat16", "int8"):
        with_tiles = threshold(plan(compute=compute, isa=AMX), faster, 1)
        assert with_tiles < threshold(plan(compute=compute), rates(), 1)
