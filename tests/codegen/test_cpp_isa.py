"""Instruction sets that lie between others: their texts are those, and run on what they ask for."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch

from fxquant.codegen import Header, KernelSpec, bounds, cpp, reference
from fxquant.codegen.cpp.isa import (
    AMX,
    AVX2,
    AVX2_VNNI,
    AVX512,
    AVX512_VBMI,
    AVX512_VNNI,
    ISAS,
    Isa,
)
from fxquant.codegen.cpp.pack import render_pack
from fxquant.codegen.cpp.plan import Plan
from fxquant.codegen.quantize import QuantizeSpec
from fxquant.runtime import toolchain
from tests.bounds import assert_close_within
from tests.codegen import cpp_harness, harness, prologues
from tests.codegen.cpp_harness import FEW, MANY
from tests.codegen.cpp_specs import SPECS

INTEL = replace(AVX512, looks_ahead=AMX.looks_ahead)
LIKE = {
    AVX512_VBMI: replace(INTEL, dot_bf16=False),
    AVX512_VNNI: replace(INTEL, dot_bf16=False, looks_up_bytes=False),
    AVX2_VNNI: replace(AVX2, dot_int8=True),
}
"""What else would have their texts."""
KERNEL = re.compile("^// --- kernel:.*", re.DOTALL | re.MULTILINE)  # behind what others share
SINGLE = re.compile(r"^.*(?:is_single|panel of one row).*\n", re.MULTILINE)
BYTES, WORDS = "lines[row][step]", "words_of(lines[row][step])"
LOOK_UP = re.compile("permutex2?var_epi8")
BODY = re.compile(r"^#include.*", re.DOTALL | re.MULTILINE)  # behind the header with the spec
BUILT = [
    *((AVX512_VBMI, name) for name in ("nf4_bf16", "int8_int8", "nf4_int8_outliers")),
    *((AVX512_VNNI, name) for name in ("nf4_bf16", "nf4_int8_outliers", "codes_fp4_odd")),
    *((AVX2_VNNI, name) for name in ("int8_int8", "nf4_int8_outliers", "zero8_int8")),
]


def test_those_are_all_that_other_tests_leave_out() -> None:
    assert {isa.name for isa in LIKE} == set(cpp_harness.OF_OTHERS) < set(ISAS)


def printed(spec: KernelSpec, isa: Isa) -> str:
    """The text without the name of the instruction set, which one section has."""
    return cpp.render(spec, Header(), isa).replace(f"// --- {isa.name}: ", "// --- vectors: ")


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("isa", LIKE, ids=lambda isa: isa.name)
def test_their_text_is_that_of_others(isa: Isa, name: str) -> None:
    spec = SPECS[name]
    text = printed(spec, isa)
    assert text == printed(spec, LIKE[isa])
    if isa is not AVX2_VNNI:
        plan = Plan(spec, isa)
        assert plan.path != "bf16"
        assert "bf16ps" not in text
        with_look_up = printed(spec, AVX512_VBMI)
        is_needed = bool(LOOK_UP.search(with_look_up))
        assert bool(LOOK_UP.search(text)) == (is_needed and isa.looks_up_bytes)
        assert is_needed or text == with_look_up
        alike, rounds_x = spec, False
        if spec.compute_dtype == "bfloat16":
            alike, rounds_x = replace(spec, compute_dtype="float32"), spec.x_dtype != "bfloat16"
        body = BODY.search(printed(alike, INTEL))[0]
        assert rounds_x or BODY.search(with_look_up)[0] == body
    else:
        without, is_int8 = printed(spec, AVX2), Plan(spec, isa).path == "int8"
        assert ("{vex%} vpdpbusd" in text) == ("vpmaddwd" in without) == is_int8
        assert is_int8 or text == without
        if is_int8:
            # Without the product bytes become words in panels, of which none is a line.
            own, plain = (KERNEL.search(found)[0] for found in (text, without))
            for words, bytes_ in (("Words*", "x_t*"), ("<Words>", "<x_t>"), (WORDS, BYTES)):
                plain = plain.replace(words, bytes_)
            assert SINGLE.sub("", own) == plain


@pytest.mark.parametrize(("isa", "name"), BUILT, ids=lambda value: getattr(value, "name", value))
def test_kernels_are_right_where_they_run(isa: Isa, name: str) -> None:
    if not toolchain.runs(isa) or toolchain.compiler() is None:
        pytest.skip(f"there is no {isa.name} here")
    spec: KernelSpec = SPECS[name]
    few = cpp_harness.with_few_heights(isa)
    kernel = cpp_harness.Kernel(spec, few)
    plain = cpp_harness.Kernel(spec, cpp_harness.with_few_heights(AVX2))
    tensors = harness.stored(spec.weight.encoding, spec.weight.shape)
    for rows in (1, 5, 17):
        x = cpp_harness.rows_of(spec, rows, outliers=(1,) if spec.outliers else ())
        extra = harness.operands(spec, rows)
        want = reference.run(spec, x, tensors, extra)
        bound = bounds.allowed(spec, x, tensors, extra)
        for way in (FEW, MANY):
            got = kernel.run(kernel.prepare(tensors), x, extra, way)
            assert_close_within(got, want, bound)
            if isa is AVX2_VNNI:
                assert torch.equal(got, plain.run(plain.prepare(tensors), x, extra, way))


def test_all_kinds_of_kernels_need_no_more_than_that() -> None:
    compiler = toolchain.compiler()
    if not toolchain.runs(AVX512_VNNI) or compiler is None:
        pytest.skip("there is no avx512vnni here")
    chain = toolchain.Toolchain(compiler, AVX512_VNNI, openmp=True)
    for spec in (QuantizeSpec(77, "bfloat16"), prologues.fixed(96, "bfloat16")[0]):
        toolchain.build(chain, spec.name, cpp.render(spec, Header(), AVX512_VNNI))
    encoding = SPECS["nf4_bf16"].weight.encoding
    toolchain.build(chain, "pack", render_pack(encoding, torch.bfloat16, AVX512_VNNI))


def test_pairs_of_bfloat16_are_left_to_processors_that_are_quick_with_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    features = frozenset((*AVX512.features, *AVX2_VNNI.features))
    monkeypatch.setattr(toolchain, "cpu_features", lambda: features)
    for maker, isa in (("AuthenticAMD", AVX512), ("GenuineIntel", AVX512_VBMI), ("", AVX512_VBMI)):
        monkeypatch.setattr(toolchain, "cpu_maker", lambda maker=maker: maker)
        assert toolchain.host_isa() is isa
    monkeypatch.setenv("FXQUANT_ISA", "avx512")
    assert toolchain.host_isa() is AVX512
    monkeypatch.delenv("FXQUANT_ISA")
    monkeypatch.setattr(toolchain, "cpu_features", lambda: frozenset(AVX512_VBMI.features))
    assert toolchain.host_isa() is AVX512_VBMI
    monkeypatch.setattr(toolchain, "cpu_features", lambda: frozenset(AVX2_VNNI.features))
    assert toolchain.host_isa() is AVX2_VNNI
