"""Bytes that C++ kernels multiply, at the ends of their range, and that levels are made of."""

from __future__ import annotations

import dataclasses
import platform
import subprocess
from pathlib import Path

import pytest
import torch

from fxquant.codegen import Header, cpp
from fxquant.codegen.cpp.isa import AVX2, AVX2_VNNI, AVX512, ISAS, PORTABLE, Isa
from fxquant.codegen.cpp.rates import render_rates
from fxquant.formats import Encoding
from fxquant.runtime import toolchain
from tests.codegen import cpp_harness
from tests.codegen.cpp_harness import FEW, MANY
from tests.codegen.cpp_specs import CHANNELS, NF4, spec

FP4 = Encoding(4, "fp4", (64,))
INT2 = Encoding(2, block=(32,))


@pytest.mark.parametrize("name", [*cpp_harness.isas(), "avx2vnni"])
@pytest.mark.parametrize("zero_point", [False, True])
def test_products_of_bytes_are_exact_at_their_ends(name: str, zero_point: bool) -> None:
    if not toolchain.runs(ISAS[name]) or toolchain.compiler() is None:
        pytest.skip(f"there is no {name} here")
    encoding = dataclasses.replace(CHANNELS, zero_point=zero_point)
    ends = spec("ends", encoding, (70, 192), compute="int8", x="int8", out="float32")
    kernel = cpp_harness.Kernel(ends, cpp_harness.with_few_heights(ISAS[name]))
    generator = torch.Generator().manual_seed(0)
    stored = torch.uint8 if zero_point else torch.int8
    least, most = torch.iinfo(stored).min, torch.iinfo(stored).max
    codes = torch.randint(least, most + 1, (70, 192), generator=generator).to(stored)
    codes[:2], codes[2] = torch.tensor([[least], [most]]), torch.tensor([least, most]).repeat(96)
    tensors = [
        codes.flatten(),
        torch.ones(70),
        *([torch.zeros(70, dtype=torch.uint8)] * zero_point),
    ]
    prepared = kernel.prepare(tensors)
    for rows in (1, 7):
        x = torch.randint(-128, 128, (rows, 192), generator=generator, dtype=torch.int8)
        x[0] = -128
        x[-1, ::3] = 127
        want = (x.long() @ codes.long().T).float()
        for way in (FEW, MANY):
            got = kernel.run(prepared, x, [torch.full((rows,), 127.0)], way)
            assert torch.equal(got, want)


@pytest.mark.parametrize("isa", [AVX2, AVX2_VNNI], ids=lambda isa: isa.name)
def test_rates_compile_where_they_do_not_run(isa: Isa, tmp_path: Path) -> None:
    compiler = toolchain.compiler()
    if compiler is None or "x86" not in platform.machine():
        pytest.skip("there is no compiler for AVX2 here")
    source = tmp_path / "rates.cpp"
    source.write_text(render_rates(isa))
    command = [compiler.path, "-std=c++17", "-O1", *isa.flags, "-fsyntax-only", str(source)]
    subprocess.run(command, check=True)


@pytest.mark.parametrize(
    ("encoding", "compute", "looked_up"),
    [
        (NF4, "float32", 4),
        (NF4, "float16", 4),
        (NF4, "bfloat16", 2),  # rounded for the product
        (FP4, "float32", 4),  # thirds and sixths
        (INT2, "float32", 2),  # whole numbers
        (Encoding(4, block=(64,), zero_point=True), "float32", 2),
        (CHANNELS, "float32", 0),
    ],
)
def test_levels_on_avx2_are_made_of_the_bytes_that_they_have(
    encoding: Encoding, compute: str, looked_up: int
) -> None:
    kernel = spec("levels", encoding, (64, 64), compute=compute)
    for isa in (AVX2, AVX2_VNNI):
        text = cpp.render(kernel, Header(), isa)
        assert sum(f" BYTE{byte}[16]" in text for byte in range(4)) == looked_up
        assert "permutevar8x32" not in text
    for isa in (AVX512, PORTABLE):
        assert " BYTE3[16]" not in cpp.render(kernel, Header(), isa)
