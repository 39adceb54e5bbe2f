"""Codes from repacked weights: which weights say all of theirs, and what fills up the last byte.

That they are the very codes is asserted wherever tests repack (`cpp_harness.Kernel.prepare`).
"""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch

from fxquant.codegen.cpp.isa import AVX512, ISAS
from fxquant.codegen.cpp.plan import Plan
from fxquant.codegen.cpp.restore import can_restore, restore
from fxquant.codegen.spec import WeightOperand
from fxquant.formats import Encoding, pack
from fxquant.runtime import toolchain
from tests.codegen import cpp_harness
from tests.codegen.cpp_specs import BOOK, CHANNELS, NF4, SPECS, spec

WHOLE = spec("whole", NF4, (3, 70, 192))
PARTS = {
    "the first rows": WeightOperand(NF4, (100, 192), None, 50, 192, (0, 192, 1)),
    "the last rows": WeightOperand(NF4, (100, 192), None, 50, 192, (0, 192, 1), 50 * 192),
    "every other row": WeightOperand(NF4, (100, 192), None, 50, 192, (0, 384, 1)),
    "fewer inputs": WeightOperand(NF4, (100, 192), None, 100, 100, (0, 192, 1)),
    "one matrix twice": WeightOperand(NF4, (2, 50, 192), 2, 50, 192, (0, 192, 1)),
}


@pytest.mark.parametrize("part", PARTS.values(), ids=PARTS)
@pytest.mark.parametrize("compute", ["float32", "bfloat16", "int8"])
def test_a_part_says_too_little(part: WeightOperand, compute: str) -> None:
    assert not can_restore(Plan(spec("part", part, compute=compute, x="float32"), AVX512))
    assert can_restore(Plan(replace(WHOLE, compute_dtype=compute), AVX512))


@pytest.mark.parametrize("isa", ISAS.values(), ids=ISAS)
def test_two_codes_of_one_integer_say_too_little(isa) -> None:
    book = spec("book", Encoding(8, BOOK, (64,)), (70, 192))
    for compute, enough in (("float32", True), ("bfloat16", True), ("int8", False)):
        assert can_restore(Plan(replace(book, compute_dtype=compute), isa)) == enough
        channels = replace(book, weight=WeightOperand.whole(CHANNELS, (70, 192), transposed=False))
        assert can_restore(Plan(replace(channels, compute_dtype=compute), isa))


def test_most_of_the_specs_that_kernels_are_tested_on_are_restored() -> None:
    able = {name for name, one in SPECS.items() if can_restore(Plan(one, AVX512))}
    assert {"nf4_bf16", "nf4_f32_batched", "int8_int8", "zero8_int8"} <= able
    assert "int2_f16_value_of_qkv" not in able
    assert len(able) > len(SPECS) / 2


@pytest.mark.skipif(
    toolchain.compiler() is None and not os.environ.get("CI"), reason=toolchain.NOT_FOUND
)
@pytest.mark.parametrize("transposed", [False, True])
def test_what_fills_up_the_last_byte_is_kept(transposed: bool) -> None:
    one = spec("filled", Encoding(2, block=(16,)), (7, 9), transposed=transposed)
    kernel = cpp_harness.Kernel(one, ISAS[cpp_harness.isas()[0]])
    plan, tensors = Plan(one, kernel.isa), pack(torch.randn(7, 9), one.weight.encoding).tensors()
    tensors[0][-1] ^= 0b10  # 63 codes: of the last byte the low two bits are no code
    (block,) = kernel.prepare(tensors)
    restored = restore(plan, block.tensor(), tensors[0][-1:])
    assert torch.equal(restored, tensors[0])
    # Another last byte changes nothing but itself.
    assert torch.equal(restore(plan, block.tensor(), restored[:1])[:-1], tensors[0][:-1])
