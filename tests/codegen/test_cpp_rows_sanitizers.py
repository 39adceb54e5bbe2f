"""Printed C++ kernels that make rows keep inside of their memory, by the compiler's sanitizers."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from fxquant.codegen.cpp.isa import ISAS
from fxquant.codegen.quantize import QuantizeSpec
from tests.codegen import prologues
from tests.codegen.test_cpp_sanitizers import BEST, build, object_of, obstacle, run

pytestmark = pytest.mark.skipif(bool(obstacle()) and not os.environ.get("CI"), reason=obstacle())
DRIVER = Path(__file__).with_name("rows_driver.cpp")
CASES = {
    "norm": (QuantizeSpec(77, "bfloat16", prologue=prologues.layer_norm("bfloat16")), BEST),
    "soft": (QuantizeSpec(33, "float32", "static", prologue=prologues.soft("float32")), "portable"),
}


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    driver = object_of(DRIVER, tmp_path_factory.mktemp("driver"))
    return {
        name: build(spec, ISAS[isa], driver, tmp_path_factory.mktemp(name))
        for name, (spec, isa) in CASES.items()
    }


@pytest.mark.parametrize("name", CASES)
def test_rows_are_made_inside_of_their_memory(
    name: str, programs: dict[str, Path], tmp_path: Path
) -> None:
    spec, out = CASES[name][0], tmp_path / "out"
    prologue = spec.prologue
    assert prologue is not None
    results = prologue.more
    for rows, threads, gap in ((1, 1, 0), (5, 2, 3), (600, 2, 0)):
        given = prologues.operands(spec, rows, seed=rows)
        steps = []
        for number, (operand, value) in enumerate(zip(prologue.operands, given, strict=True)):
            spread, step = value, spec.k
            if operand.dims == "mk" and gap:
                step = spec.k + gap
                spread = torch.nn.functional.pad(value, (0, gap)).flatten()[:-gap]
            steps.append(step)
            raw = spread.contiguous().flatten().view(torch.uint8).numpy().tobytes()
            (tmp_path / f"in{number}").write_bytes(raw)
        sizes = [getattr(torch, result.dtype).itemsize for result in results]
        numbers = (rows, spec.k, threads, 1.5, out, len(given), *steps, *sizes)
        done = run(programs[name], str(tmp_path), *map(str, numbers))
        assert done.returncode == 0, done.stderr
        found = torch.frombuffer(bytearray(out.read_bytes()), dtype=torch.uint8)
        count = rows * spec.k
        parts = found.split([count, 4 * rows, *(count * size for size in sizes)])
        dtypes = [torch.int8, torch.float32, *(getattr(torch, r.dtype) for r in results)]
        shapes = [(rows, spec.k), (rows,), *[(rows, spec.k)] * len(results)]
        got = [
            part.clone().view(dtype).reshape(shape)
            for part, dtype, shape in zip(parts, dtypes, shapes, strict=True)
        ]
        prologues.check(spec, lambda *_, got=got: got, given)


def test_operands_that_are_too_short_are_noticed(programs: dict[str, Path], tmp_path: Path) -> None:
    spec = CASES["norm"][0]
    for number, value in enumerate(prologues.operands(spec, 3)):
        raw = value.flatten()[: value.numel() - (number == 3)]
        (tmp_path / f"in{number}").write_bytes(raw.view(torch.uint8).numpy().tobytes())
    numbers = (3, spec.k, 1, 0, tmp_path / "out", 4, *[spec.k] * 4, 2)
    done = run(programs["norm"], str(tmp_path), *map(str, numbers))
    assert "heap-buffer-overflow" in done.stderr
