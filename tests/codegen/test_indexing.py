"""Index expressions, against counting the blocks of a small tensor one by one."""

import itertools
import math

import pytest
import sympy
from hypothesis import given, settings

from fxquant.codegen.indexing import Div, E, K, N, Rem, WeightIndex, divide, remainder
from fxquant.codegen.spec import WeightOperand
from fxquant.formats import Encoding
from tests.codegen.specs import weights


def evaluate(expr, values):
    if isinstance(expr, Div):
        return evaluate(expr.args[0], values) // int(expr.args[1])
    if isinstance(expr, Rem):
        return evaluate(expr.args[0], values) % int(expr.args[1])
    if expr.is_Add:
        return sum(evaluate(arg, values) for arg in expr.args)
    if expr.is_Mul:
        return math.prod(evaluate(arg, values) for arg in expr.args)
    return values[expr] if expr.is_Symbol else int(expr)


def counted_block(operand, element):
    """The block by the encoding's definition."""
    encoding, shape = operand.encoding, operand.shape
    if encoding.is_flat:
        return element // encoding.block[0]
    coordinates = []
    for size in reversed(shape):
        coordinates.insert(0, element % size)
        element //= size
    extents = (1,) * (len(shape) - len(encoding.block)) + encoding.block
    block = 0
    for coordinate, extent, size in zip(coordinates, extents, shape, strict=True):
        width = size if extent == -1 else extent
        block = block * math.ceil(size / width) + coordinate // width
    return block


@settings(max_examples=60, deadline=None)
@given(weights())
def test_expressions_equal_counting(operand):
    index = WeightIndex.of(operand)
    per_byte = operand.encoding.codes_per_byte
    run = index.run_of_block(K, 64)
    per_run = index.per_run(index.block, K, run) if run > 1 else index.block
    packed = index.packs_along(K, per_byte)
    for e, n, k in itertools.product(*map(range, operand.sizes)):
        values = {E: e, N: n, K: k}
        element = operand.offset + sum(
            i * s for i, s in zip((e, n, k), operand.strides, strict=True)
        )
        block = counted_block(operand, element)
        assert evaluate(index.element, values) == element
        assert evaluate(index.byte, values) == element // per_byte
        assert evaluate(index.place, values) == element % per_byte
        assert evaluate(index.block, values) == block
        if operand.encoding.scale:
            assert evaluate(index.nested, values) == block // operand.encoding.scale.block[0]
        assert evaluate(per_run, {**values, K: k // max(run, 1)}) == block
        if packed and per_byte > 1:
            assert element % per_byte == k % per_byte


def test_divisions_fall_away_where_divisibility_is_known():
    flat = WeightOperand.whole(Encoding(4, "nf4", (64,)), (8, 128), transposed=False)
    index = WeightIndex.of(flat)
    assert index.block == 2 * N + Div(K, sympy.Integer(64))
    assert index.run_of_block(K, 512) == 64
    assert index.per_run(index.block, K, 64) == 2 * N + K
    assert index.per_run(index.byte, K, 2) == 64 * N + K
    assert index.packs_along(K, 2)
    assert not index.packs_along(N, 2)


def test_tiles_shorter_than_a_block_take_one_scale():
    group = WeightOperand.whole(Encoding(4, block=(1, 128)), (8, 256), transposed=False)
    index = WeightIndex.of(group)
    assert index.run_of_block(K, 64) == 64
    assert index.per_run(index.block, K, 64) == 2 * N + Div(K, sympy.Integer(2))


def test_per_channel_scales_do_not_depend_on_inputs():
    channel = WeightOperand.whole(Encoding(8, block=(1, -1)), (5, 33), transposed=False)
    index = WeightIndex.of(channel)
    assert index.block == N
    assert index.run_of_block(K, 512) == 0
    turned = WeightOperand.whole(Encoding(8, block=(-1, 1)), (33, 5), transposed=True)
    assert WeightIndex.of(turned).block == N


def test_odd_rows_are_not_taken_for_packed_ones():
    odd = WeightOperand.whole(Encoding(4, "nf4", (64,)), (8, 127), transposed=False)
    index = WeightIndex.of(odd)
    assert not index.packs_along(K, 2)
    assert index.run_of_block(K, 64) == 1
    shifted = WeightOperand(Encoding(4, "nf4"), (8, 128), None, 4, 100, (0, 128, 1), 1)
    assert not WeightIndex.of(shifted).packs_along(K, 2)


@pytest.mark.parametrize("by", [2, 3, 64])
def test_division_and_remainder_agree(by):
    ranges = {E: 3, N: 7, K: 50}
    expr = 64 * E + 6 * N + K + 5
    for e, n, k in itertools.product(range(3), range(7), range(50)):
        values = {E: e, N: n, K: k}
        number = 64 * e + 6 * n + k + 5
        assert evaluate(divide(expr, by, ranges), values) == number // by
        assert evaluate(remainder(expr, by, ranges), values) == number % by
