"""Printed C++ taken apart for people: little of it is a kernel's own, and nothing is lost."""

from __future__ import annotations

import re
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from fxquant.codegen import Header, KernelSpec, cpp
from fxquant.codegen.cpp import support
from fxquant.codegen.cpp.isa import AMX, AVX2, AVX512, ISAS, PORTABLE
from fxquant.codegen.cpp.sections import divided
from fxquant.codegen.quantize import QuantizeSpec
from fxquant.formats import Encoding
from fxquant.runtime import toolchain
from tests import golden
from tests.codegen import cpp_harness
from tests.codegen.cpp_specs import CHANNELS, NF4, SPECS, spec

INT2 = Encoding(2, block=(1, 64), full_range=True)
INCLUDE = re.compile(r'^#include "(.+)"  // .*\n', re.MULTILINE)
MARK = re.compile(r"^// --- \w+: .* ---\n", re.MULTILINE)
OPERATION = re.compile(r"^(?:template <[^{]*> )?INLINE .*|^struct \w+ {$", re.MULTILINE)


def put_together(main: str, files: dict[str, str]) -> str:
    """A kernel with its sections in the places where it includes them, but for their titles."""
    return INCLUDE.sub(lambda found: files[found[1]].partition("\n\n")[2], main)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", SPECS)
def test_nothing_is_lost(name: str, isa: str) -> None:
    source = cpp.render(SPECS[name], Header(), ISAS[isa])
    main, files = divided(source)
    own = {file: text for file, text in files.items() if not file.startswith("fxquant_")}
    assert len(own) == len(files) - 2 >= 4
    shared = dict.fromkeys(files.keys() - own.keys(), "")
    head, *sections = MARK.split(source)
    of_kernels = [head, *sections[2:]]  # behind those of floats and of the instruction set
    assert put_together(main, own | shared).split() == "".join(of_kernels).split()
    # Of what all kernels share the whole is there, in the same words.
    whole = "".join(files[file] for file in shared)
    used = OPERATION.findall("".join(sections[:2]))
    assert len(used) > 10
    assert not [line for line in used if line not in whole]


@pytest.mark.parametrize("isa", [AMX, AVX512, AVX2, PORTABLE], ids=lambda isa: isa.name)
def test_kernels_of_other_sizes_share_all_sections(isa) -> None:
    """Of one encoding and one epilogue or another: what differs is the kernel's own."""
    for encoding, compute in ((NF4, "bfloat16"), (CHANNELS, "int8")):
        wide = spec("a", encoding, (1536, 768), compute=compute, x="bfloat16")
        tall = spec("b", encoding, (512, 3072), compute=compute, x="bfloat16")
        first, files = divided(cpp.render(wide, Header(), isa))
        second, others = divided(cpp.render(tall, Header(), isa))
        assert first != second
        assert files == others
        _, floats = divided(cpp.render(replace(wide, out_dtype="float32"), Header(), isa))
        assert {name.partition("_")[0] for name in floats.keys() & files.keys()} > {"weight", "few"}
        _, two_bits = divided(cpp.render(spec("c", INT2, (512, 768)), Header(), isa))
        assert not {name for name in two_bits.keys() & files.keys() if name.startswith("weight")}


def test_what_is_included_is_told_by_its_name() -> None:
    main, files = divided(cpp.render(SPECS["nf4_bf16"], Header(), AVX512))
    assert {name.partition("_")[0] for name in files} == {
        *("fxquant", "weight", "rows", "few", "many", "entry"),
    }
    assert INCLUDE.findall(main) == list(files)
    assert files["fxquant_avx512.h"].endswith(support.text(AVX512))


COMMON = [
    (one, isa) for one, isa in golden.PAIRS if isinstance(one, KernelSpec) or one.prologue is None
]


@pytest.mark.parametrize(("one", "isa"), COMMON, ids=lambda value: value.name)
def test_common_kernels_are_short(one: KernelSpec | QuantizeSpec, isa) -> None:
    main, _ = divided(cpp.render(one, golden._header(one), isa))
    assert len(main.splitlines()) <= 90


def machine_code(source: Path, isa, folder: Path) -> bytes:
    compiler = toolchain.compiler()
    assert compiler is not None
    built, code = source.with_suffix(".o"), source.with_suffix(".bin")
    flags = [flag for flag in toolchain.FLAGS if flag not in ("-O3", "-shared")]
    command = [compiler.path, *flags, *isa.flags, toolchain.OPENMP, "-O1", "-I", str(folder)]
    subprocess.run([*command, "-c", str(source), "-o", str(built)], check=True)
    subprocess.run(["objcopy", "-O", "binary", "-j", ".text", str(built), str(code)], check=True)
    return code.read_bytes()


@pytest.mark.parametrize("isa", [cpp_harness.isas()[0], "portable"])
@pytest.mark.parametrize(
    "one",
    [
        spec("nf4", NF4, (64, 256), compute="bfloat16"),
        QuantizeSpec(64, "bfloat16"),
    ],
    ids=lambda one: type(one).__name__,
)
def test_what_is_read_is_what_runs(
    one: KernelSpec | QuantizeSpec, isa: str, tmp_path: Path
) -> None:
    """Compiled from what a dump holds, a kernel is the same machine code."""
    if toolchain.compiler() is None:
        pytest.skip("there is no C++ compiler")
    made_for = cpp_harness.with_few_heights(ISAS[isa])
    source = cpp.render(one, Header(), made_for)
    whole, apart = tmp_path / "whole", tmp_path / "apart"
    main, files = divided(source)
    for folder, texts in ((whole, {"k.cpp": source}), (apart, {"k.cpp": main, **files})):
        folder.mkdir()
        for name, text in texts.items():
            (folder / name).write_text(text, encoding="utf-8")
    code = machine_code(whole / "k.cpp", made_for, whole)
    assert len(code) > 500
    assert machine_code(apart / "k.cpp", made_for, apart) == code
