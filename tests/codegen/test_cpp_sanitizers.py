"""Printed C++ kernels under the address and undefined-behaviour sanitizers.

Every operand lies in memory of exactly its size, and each kernel is a program of its own: Python
does not run under the sanitizers.
"""

from __future__ import annotations

import functools
import os
import subprocess
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fxquant.codegen import Header, KernelSpec, QuantizeSpec, bounds, cpp, quantize, reference
from fxquant.codegen.cpp.isa import ISAS, Isa
from fxquant.codegen.cpp.plan import SUPER_ROWS, Plan
from fxquant.runtime import toolchain
from tests.bounds import assert_close_within
from tests.codegen import cpp_harness, cpp_joined, cpp_specs, harness

DRIVER = Path(__file__).with_name("driver.cpp")
QUANTIZE_DRIVER = DRIVER.with_name("quantize_driver.cpp")
SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")
SPECS = {**cpp_specs.SPECS, **cpp_joined.SPECS}
BEST, SECOND = [*cpp_harness.isas(), "portable"][:2]
CASES = [
    *((name, BEST) for name in ("nf4_bf16", "zero4_bf16_odd", "nf4_int8_outliers")),
    ("nf4_f32_batched", BEST),
    *((name, "portable") for name in ("fp4_f32_odd", "zero8_int8", "nf4_f32_batched")),
    *(
        (name, SECOND)
        for name in ("int2_f16_value_of_qkv", "int8_int8_given_outliers", "codes_int8")
    ),
    *(("gate_nf4_bf16", BEST), ("operands", SECOND)),
    *(("qkv_found", "portable"), ("qkv_given", SECOND)),
]
QUANTIZE_CASES = [
    (QuantizeSpec(77, "float32"), BEST),
    (QuantizeSpec(33, "float16", "tensor", clipped=True), SECOND),
    (QuantizeSpec(64, "bfloat16", "static"), "portable"),
]


def isa_of(name: str) -> Isa:
    """An instruction set with fewer heights of panels: with all, compilers take minutes."""
    return replace(ISAS[name], few_heights=(3, 1), many_heights=(2,))


def command(isa: Isa, *arguments: str) -> list[str]:
    found = toolchain.compiler()
    assert found is not None
    flags = [flag for flag in toolchain.FLAGS if flag not in ("-O3", "-fPIC", "-shared")]
    own = ("-Og", "-g1", "-Wno-psabi", toolchain.OPENMP, *SANITIZERS)
    return [found.path, *flags, *own, *isa.flags, *arguments]


@functools.lru_cache(maxsize=1)
def obstacle() -> str:
    """Why there are no sanitizers, or ``""``."""
    if toolchain.compiler() is None:
        return toolchain.NOT_FOUND
    done = subprocess.run(
        command(ISAS["portable"], "-x", "c++", "-", "-o", os.devnull),
        input="int main() {}",
        capture_output=True,
        text=True,
        check=False,
    )
    return "" if done.returncode == 0 else f"no sanitizers: {done.stderr.strip()[:200]}"


pytestmark = pytest.mark.skipif(bool(obstacle()) and not os.environ.get("CI"), reason=obstacle())


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Future[Path]]:
    """The drivers of all cases, built side by side."""
    driver = object_of(DRIVER, tmp_path_factory.mktemp("driver"))
    with ThreadPoolExecutor(2) as pool:
        return {
            (name, isa): pool.submit(
                build, SPECS[name], isa_of(isa), driver, tmp_path_factory.mktemp(name)
            )
            for name, isa in CASES
        }


def object_of(driver: Path, folder: Path) -> Path:
    """A driver that kernels can be linked with."""
    found = folder / "driver.o"
    compiled(ISAS["portable"], "-c", str(driver), "-o", str(found))
    return found


def compiled(isa: Isa, *arguments: str) -> None:
    done = subprocess.run(command(isa, *arguments), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def build(spec: KernelSpec | QuantizeSpec, isa: Isa, driver: Path, folder: Path) -> Path:
    source, program = folder / "kernel.cpp", folder / "kernel"
    source.write_text(cpp.render(spec, Header(), isa), encoding="utf-8")
    compiled(isa, str(source), str(driver), "-o", str(program))
    return program


def run(program: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    # Threads of OpenMP live as long as the program: they are no leak of ours.
    environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0"}
    return subprocess.run(
        [program, *arguments], env=environment, capture_output=True, text=True, check=False
    )


class Calls:
    """What a driver reads and writes in a folder."""

    def __init__(self, spec: KernelSpec, tensors: list[Tensor], folder: Path) -> None:
        self.spec, self.folder = spec, folder
        self.lines: list[str] = []
        dtypes = Plan(spec, ISAS["portable"]).result_dtypes
        self.dtypes = [getattr(torch, dtype) for dtype in dtypes]
        names = [self._write(f"part{i}", tensor) for i, tensor in enumerate(tensors)]
        parts = len(spec.weight.encoding.parts)
        lines = [" ".join(names[at : at + parts]) for at in range(0, len(names), parts)]
        (folder / "parts").write_text("\n".join(lines), encoding="utf-8")

    def add(self, x: Tensor, extra: list[Tensor], variant: int, threads: int) -> list[str]:
        """One more call; gives the names of its results' files."""
        number, rows, weight = len(self.lines), x.shape[-2], self.spec.weight
        elements = x.untyped_storage().nbytes() // x.element_size()
        storage = x.as_strided((elements,), (1,), 0)[x.storage_offset() :]
        files = [self._write(f"x{number}", storage)]
        files += [self._write(f"extra{number}_{i}", tensor) for i, tensor in enumerate(extra)]
        x_e = x.stride(0) if weight.batch else 0
        head = [rows, variant, threads, x_e, x.stride(-2), x.stride(-1), len(self.dtypes)]
        outs = [f"out{number}_{i}" for i in range(len(self.dtypes))]
        for dtype, out in zip(self.dtypes, outs, strict=True):
            head += [dtype.itemsize * rows * weight.n * (weight.batch or 1), out]
        self.lines.append(" ".join(map(str, [*head, *files])))
        return outs

    def run(self, program: Path) -> subprocess.CompletedProcess[str]:
        """Has the driver do all calls."""
        (self.folder / "calls").write_text("\n".join(self.lines), encoding="utf-8")
        return run(program, str(self.folder))

    def results(self, names: list[str], rows: int) -> list[Tensor]:
        weight = self.spec.weight
        shape = (rows, weight.n) if weight.batch is None else (weight.batch, rows, weight.n)
        raw = [bytearray((self.folder / name).read_bytes()) for name in names]
        pairs = zip(raw, self.dtypes, strict=True)
        return [torch.frombuffer(one, dtype=dtype).view(shape) for one, dtype in pairs]

    def _write(self, name: str, tensor: Tensor) -> str:
        raw = tensor.detach().clone().reshape(-1).view(torch.uint8)
        (self.folder / name).write_bytes(raw.numpy().tobytes())
        return name


def activations(spec: KernelSpec, rows: int) -> list[Tensor]:
    """Activations that end where the last row does, and one that starts at an odd place."""
    x = harness.activation(spec, rows)
    x[..., 0, 1] = 40  # an outlier
    spread = torch.zeros(x.numel() * 2 + 1, dtype=x.dtype)[1:-1]
    spread = spread.as_strided(x.shape, [2 * stride for stride in x.stride()], 1)
    return [x, spread.copy_(x)]


@pytest.mark.parametrize(("name", "isa"), CASES)
def test_nothing_is_touched_that_is_not_ours(
    name: str, isa: str, programs: dict[tuple[str, str], Future[Path]], tmp_path: Path
) -> None:
    spec = SPECS[name]
    tensors = [tensor for one in cpp_joined.stored(spec) for tensor in one]
    calls, checks = Calls(spec, tensors, tmp_path), []
    for rows in (1, 2, 7, 21, SUPER_ROWS + 9):
        extra = harness.operands(spec, rows)
        for threads, x in zip((1, 2), activations(spec, rows), strict=True):
            checks += [
                (calls.add(x, extra, variant, threads), x, extra)
                for variant in (cpp_harness.FEW, cpp_harness.MANY)
            ]
    done = calls.run(programs[name, isa].result())
    assert done.returncode == 0, done.stderr
    for out, x, extra in checks[:-4]:
        want = reference.run(spec, x, tensors, extra)
        bound = bounds.allowed(spec, x, tensors, extra)
        got = calls.results(out, x.shape[-2])
        if not spec.epilogue.more:
            want, bound = (want,), (bound,)
        for one in zip(got, want, bound, strict=True):
            assert_close_within(*one)


@pytest.mark.parametrize("short", ["x", "operand", "codes", "result"])
def test_what_is_too_short_is_noticed(
    short: str, programs: dict[tuple[str, str], Future[Path]], tmp_path: Path
) -> None:
    """Without this the test above could not fail."""
    name, isa = CASES[0]
    spec, rows = SPECS[name], 21
    tensors = harness.stored(spec.weight.encoding, spec.weight.shape)
    x, extra = harness.activation(spec, rows), harness.operands(spec, rows)
    if short == "codes":
        tensors[0] = tensors[0].flatten()[:-1]
    if short == "operand":
        extra[0] = extra[0][:-1]
    calls = Calls(spec, tensors, tmp_path)
    calls.add(x, extra, cpp_harness.MANY, 2)
    if short == "x":
        calls._write("x0", x[:-1])
    if short == "result":
        size = rows * spec.weight.n * x.element_size()
        calls.lines[0] = calls.lines[0].replace(f" {size} ", f" {size - 1} ")
    done = calls.run(programs[name, isa].result())
    assert done.returncode not in (0, 3, 4)
    assert "heap-buffer-overflow" in done.stderr


@pytest.fixture(scope="module")
def quantizers(tmp_path_factory: pytest.TempPathFactory) -> dict[QuantizeSpec, Path]:
    driver = object_of(QUANTIZE_DRIVER, tmp_path_factory.mktemp("driver"))
    return {
        spec: build(spec, ISAS[isa], driver, tmp_path_factory.mktemp(spec.scope))
        for spec, isa in QUANTIZE_CASES
    }


@pytest.mark.parametrize("spec", [spec for spec, _ in QUANTIZE_CASES], ids=QuantizeSpec.describe)
def test_rows_are_rounded_inside_of_their_memory(
    spec: QuantizeSpec, quantizers: dict[QuantizeSpec, Path], tmp_path: Path
) -> None:
    out, given = tmp_path / "out", tmp_path / "x"
    limit = [torch.tensor([1.5])] if spec.has_limit else []
    for rows, threads in ((1, 1), (5, 2), (600, 2)):
        x = torch.randn(rows, spec.k).to(getattr(torch, spec.x_dtype))
        x[rows // 2, 0] = torch.inf if rows == 5 else 9
        for step in (1, 3):
            spread = torch.zeros(rows, spec.k * step, dtype=x.dtype)
            spread[:, ::step] = x
            last = spread.flatten()[: spread.numel() - step + 1]
            given.write_bytes(last.view(torch.uint8).numpy().tobytes())
            numbers = (rows, spec.k, spec.k * step, step, threads, 1.5)
            done = run(quantizers[spec], str(given), *map(str, numbers), str(out))
            assert done.returncode == 0, done.stderr
            codes, amax = quantize.run(spec, x, limit)
            beyond = (x.float().abs() > amax[:, None]).sum() if limit else torch.tensor(0)
            want = [codes.flatten(), amax.nan_to_num(7), beyond]
            found = torch.frombuffer(bytearray(out.read_bytes()), dtype=torch.uint8)
            parts = found.split([codes.numel(), 4 * rows, 8])
            got = [part.clone().view(one.dtype) for part, one in zip(parts, want, strict=True)]
            got[1] = got[1].nan_to_num(7)
            assert all(torch.equal(a, b.reshape(-1)) for a, b in zip(got, want, strict=True))


def test_rows_that_are_too_short_are_noticed(
    quantizers: dict[QuantizeSpec, Path], tmp_path: Path
) -> None:
    spec, given = QUANTIZE_CASES[0][0], tmp_path / "x"
    given.write_bytes(bytes(4 * (3 * spec.k - 1)))
    numbers = (3, spec.k, spec.k, 1, 1, 0)
    done = run(quantizers[spec], str(given), *map(str, numbers), str(tmp_path / "out"))
    assert "heap-buffer-overflow" in done.stderr
