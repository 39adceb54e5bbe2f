"""``options={"verify": True}``: right kernels pass, wrong ones are set aside with a file that shows
the error."""

from __future__ import annotations

import itertools
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fxquant
from fxquant.codegen import KernelSpec, quantize
from fxquant.codegen.quantize import QuantizeSpec
from fxquant.formats import Encoding, pack
from fxquant.runtime import launch, replay, toolchain, verify
from fxquant.runtime.cpp import CppKernel
from tests.codegen import harness, prologues
from tests.helpers import compile_, decoded, frozen
from tests.runtime import broken

needs_compiler = pytest.mark.skipif(toolchain.compiler() is None, reason=toolchain.NOT_FOUND)
pytestmark = [needs_compiler, pytest.mark.usefixtures("few_heights", "fresh")]
CPU = torch.device("cpu")


@pytest.fixture
def checks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of rows of all checks."""
    seen: list[int] = []
    whole = verify.check

    def check(spec: Any, operands: Any, result: Any) -> Any:
        seen.append(operands[0].shape[-2])
        return whole(spec, operands, result)

    monkeypatch.setattr(verify, "check", check)
    return seen


def model(*sizes: int) -> nn.Module:
    """Layers of sizes that no other test uses: kernels are kept by their specs."""
    return frozen(nn.Sequential(*(nn.Linear(k, n) for k, n in itertools.pairwise(sizes))))


def run_file(path: Path, patch: pytest.MonkeyPatch) -> object:
    """Its exit code, in a process that has built nothing and set nothing aside."""
    patch.setattr(verify, "_set_aside", {})
    launch._build_once.cache_clear()
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(path), run_name="__main__")
    launch._build_once.cache_clear()
    return stop.value.code


def test_a_wrong_kernel_is_set_aside(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    plain = model(64, 40, 24)
    x = torch.randn(5, 64)
    with monkeypatch.context() as patch:
        broken.install(patch)
        compiled = compile_(plain, verify=True, dump=str(tmp_path))
        for _ in range(2):
            torch.testing.assert_close(compiled(x), decoded(plain)(x), rtol=1e-4, atol=1e-4)
    lines = [record.getMessage() for record in caplog.records if record.name == "fxquant.verify"]
    assert len(lines) == 2, "one a kernel"
    assert all("cpp kernel nf4_linear_" in line and "is allowed" in line for line in lines)
    assert "'0'" in lines[0]
    assert "'1'" in lines[1]
    for row in fxquant.report(plain).rows:
        assert any("set aside for torch: the cpp kernel was off by" in note for note in row.notes)
    files = sorted(tmp_path.glob("repro_cpp_*.py"))
    assert len(files) == 2
    assert all(any(str(path) in line for line in lines) for path in files)
    assert files[0].with_suffix(".cpp").is_file()
    with monkeypatch.context() as patch:
        assert run_file(files[0], patch) == 0
        assert capsys.readouterr().out.endswith(": right\n")
        broken.install(patch)
        assert run_file(files[0], patch) == 1
        assert capsys.readouterr().out.endswith("is allowed\n")


def test_right_kernels_are_checked_once_a_size(checks: list[int], tmp_path: Path) -> None:
    plain = model(64, 41)
    compiled = torch.compile(plain, backend="fxquant", dynamic=True, options={"verify": True})
    for rows in (2, 3, 3, 4, 5, 2, 8, 40, 33, 7, 64, 65):
        x = torch.randn(rows, 64)
        torch.testing.assert_close(compiled(x), decoded(plain)(x), rtol=1e-4, atol=1e-4)
    assert checks == [2, 3, 5, 40, 65]
    assert not any("set aside" in note for row in fxquant.report(plain).rows for note in row.notes)
    assert not list(tmp_path.iterdir())


def test_off_nothing_stands_between_a_launch_and_its_kernel(checks: list[int]) -> None:
    plain = model(64, 42)
    compile_(plain)(torch.randn(3, 64))
    assert checks == []
    texts = [key for key in launch._runners if '"n":42,' in key[0]]
    assert texts
    assert all(not target.endswith(verify.VERIFIED) for _, target, _ in texts)
    runners = [launch._runners[key] for key in texts if key[1] == "cpp"]
    assert all(isinstance(runner.__self__, CppKernel) for runner in runners)  # type: ignore[attr-defined]


def test_nothing_is_checked_while_a_cuda_graph_is_captured(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, checks: list[int]
) -> None:
    monkeypatch.setattr(verify, "_may_check", lambda operands: False)
    plain = model(64, 43)
    compiled = compile_(plain, verify=True)
    for _ in range(3):
        compiled(torch.randn(3, 64))
    assert checks == []
    assert caplog.text.count("is not verified: a CUDA graph is being captured") == 1
    monkeypatch.undo()


def spec_text(scope: str, k: int) -> str:
    return QuantizeSpec(k, "float32", scope, name=f"quantize_{k}_{scope}").to_json()


def test_wrong_codes_are_seen(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    text, x = spec_text("tensor", 44), torch.randn(6, 44)
    with monkeypatch.context() as patch:
        broken.install(patch)
        runner = launch.runner_of(text, f"cpp{verify.VERIFIED}", CPU)
        for got in (runner(x, []), runner(x, [])):
            for found, want in zip(
                got, quantize.run(launch.parse_quantize(text), x, []), strict=True
            ):
                assert torch.equal(found, want)
    assert caplog.text.count("the cpp kernel quantize_44_tensor is off by") == 1
    right = launch.runner_of(spec_text("token", 44), f"cpp{verify.VERIFIED}", CPU)
    right(x, [])
    right(torch.full((2, 44), torch.nan), [])
    assert caplog.text.count("is off by") == 1


def test_rows_that_are_made_are_checked() -> None:
    spec = QuantizeSpec(46, "float32", prologue=prologues.layer_norm("float32"), name="made_46")
    operands = [torch.randn(6, 46), torch.randn(6, 46), torch.randn(46), torch.randn(46)]
    runner = launch.runner_of(spec.to_json(), f"cpp{verify.VERIFIED}", CPU)
    right = runner(operands, [])
    assert verify.set_aside_because(spec.to_json(), "cpp") == ""
    for place in range(3):
        wrong = [part.clone() for part in right]
        wrong[place][3] += 2
        failure = verify.check(spec, (operands, []), wrong)
        assert failure is not None
        assert failure.error >= 1


def test_a_check_looks_at_all_results_and_at_the_last_rows() -> None:
    spec = KernelSpec(harness.whole(Encoding(8, block=(1, -1)), 2048, 2048), *["float32"] * 3)
    tensors = pack(torch.randn(2048, 2048), spec.weight.encoding).tensors()
    x = torch.randn(2000, 2048)
    result = launch.run(x, tensors, [], spec.to_json(), "torch")
    assert verify.check(spec, (x, tensors, []), result) is None
    result[-1, 17] += 1
    failure = verify.check(spec, (x, tensors, []), result)
    assert failure is not None
    assert 0.99 < failure.error < 1.1
    assert 0 < failure.allowed < 0.2


def test_files_keep_strides(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = spec_text("token", 45)
    x = torch.randn(45, 7).t()
    tensors: dict[str, torch.Tensor] = {}
    shapes = [verify._stored(tensors, "0", x), []]
    verify.tensorfile.write(tmp_path / "x.safetensors", tensors, {})
    assert replay.main(text, "cpp", tmp_path / "x.safetensors", shapes, "cpu") == 0
    assert capsys.readouterr().out == "quantize_45_token: right\n"
    assert torch.equal(replay._found(tensors, shapes[0], "cpu"), x)
    assert replay._found(tensors, shapes[0], "cpu").stride() == x.stride()


SCRIPT = """
import logging
import sys
from pathlib import Path
import pytest
import torch
from torch import nn
import fxquant
from tests.runtime import broken

patch = pytest.MonkeyPatch()
broken.install(patch)
torch.manual_seed(0)
model = nn.Linear(64, 48).eval().requires_grad_(False)
options = {"verify": True, "target": "triton", "dump": sys.argv[1]}
x = torch.randn(3, 64)
got = torch.compile(model, backend="fxquant", options=options)(x)
torch._dynamo.reset()
want = torch.compile(model, backend="fxquant", options={"target": "torch"})(x)
torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
patch.undo()
model = nn.Linear(64, 32).eval().requires_grad_(False)
torch.compile(model, backend="fxquant", options=options)(x)
notes = [row.notes for row in fxquant.report(model).rows]
assert not any("set aside" in str(note) for note in notes), notes
"""


def test_triton_kernels_are_checked_too(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path)],
        env={
            **os.environ,
            "TRITON_INTERPRET": "1",
            "PYTHONPATH": str(Path(__file__).parents[2]),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stderr.count("is off by") == 1
    (file,) = tmp_path.glob("repro_triton_*[0-9a-f].py")
    assert 'os.environ["TRITON_INTERPRET"] = "1"' in file.read_text()
    # Whoever gets the folder runs the script alone, elsewhere, with kernels as they should be.
    again = subprocess.run(
        [sys.executable, str(file)], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert again.returncode == 0, again.stderr[-4000:]
    assert again.stdout.endswith(": right\n")


def test_the_option_is_a_bool() -> None:
    with pytest.raises(fxquant.errors.OptionError, match="'verify' must be a bool, got 1"):
        fxquant.Config(verify=1)  # type: ignore[arg-type]
