"""The command line: each command, its exit codes and its one-sentence errors."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console

from fxquant import __version__, cli, doctor
from fxquant.runtime import toolchain
from fxquant.schemes import schemes

SCRIPT = """
import sys
import torch

def main(scheme):
    model = torch.nn.Sequential(torch.nn.Linear(96, 160), torch.nn.GELU(), torch.nn.Linear(160, 32))
    compiled = torch.compile(model, backend="fxquant", options={"scheme": scheme})
    with torch.inference_mode():
        out = compiled(torch.randn(5, 96))
    print("result", tuple(out.shape))

if __name__ == "__main__":
    main(sys.argv[1])
"""


@pytest.fixture(autouse=True)
def _as_in_a_new_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands set FXQUANT_DUMP for their process, and find nothing compiled in it."""
    monkeypatch.setenv("FXQUANT_DUMP", "")
    torch.compiler.reset()


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "use_model.py"
    path.write_text(SCRIPT)
    return path


def run(*arguments: object) -> int:
    return cli.main([str(argument) for argument in arguments])


def in_process(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env={**os.environ, **environment},
    )


def one_sentence(text: str) -> str:
    """The text of a printed error; fails on a traceback or on more than one line."""
    assert "Traceback" not in text
    lines = text.strip().splitlines()
    assert len(lines) == 1, text
    assert lines[0].startswith("error: ")
    assert lines[0].endswith(".")
    return lines[0]


# --- usage -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["frobnicate"],
        ["demo", "--limit", "0"],
        ["demo", "--batch-size", "-1"],
        ["demo", "--limit", "ten"],
        ["dump"],
        ["schemes", "--nonsense"],
    ],
)
def test_wrong_usage_is_exit_code_2(arguments: list[str], capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2
    assert "usage: fxquant" in capsys.readouterr().err


def test_module_and_version() -> None:
    done = in_process("-m", "fxquant", "--version")
    assert done.returncode == 0
    assert done.stdout.strip() == f"fxquant {__version__}"


# --- schemes ---------------------------------------------------------------------------------


def test_schemes_lists_every_name_and_paper(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert run("schemes") == 0
    out = capsys.readouterr().out
    assert {"nf4", "fp4", "int8", "w8a8"} <= set(schemes())
    assert "int8 per token" in out
    for name in schemes():
        assert re.search(rf"\b{name}\b", out)
    assert '"bits":4' in out.replace(" ", "").replace("\n", "")


# --- dump and report -------------------------------------------------------------------------


def test_dump_runs_the_script_and_writes_its_kernels(
    script: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    folder = tmp_path / "kernels"
    assert run("dump", "--out", folder, script, "nf4") == 0
    out = capsys.readouterr().out
    assert "result (5, 32)" in out
    sources = sorted(folder.glob("*.cpp"))
    assert len(sources) == 2  # two shapes
    for source in sources:
        assert source.name in out
        included = re.findall('#include "(.+)"', source.read_text())
        texts = [(folder / name).read_text() for name in included]
        assert 'extern "C"' in texts[-1]
        assert json.loads(source.with_suffix(".json").read_text())


def test_report_shows_models_that_are_gone(
    script: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """The script's model is local to a function: it does not outlive the run."""
    page, data = tmp_path / "report.html", tmp_path / "report.json"
    assert run("report", "--json", data, "--html", page, script, "int8") == 0
    out = capsys.readouterr().out
    assert "2 of 2 products quantized" in out
    assert "160x96" in out
    rows = json.loads(data.read_text())["rows"]
    assert [row["scheme"] for row in rows] == ["int8", "int8"]
    assert "160" in page.read_text()


def test_report_cannot_write_its_file(
    script: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert run("report", "--json", tmp_path / "no" / "report.json", script, "nf4") == 1
    assert "cannot be written" in one_sentence(capsys.readouterr().err)


def test_missing_script(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert run("report", tmp_path / "absent.py") == 1
    message = one_sentence(capsys.readouterr().err)
    assert "there is no Python file" in message
    assert "absent.py" in message


def test_script_that_compiles_nothing(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = tmp_path / "plain.py"
    path.write_text("import torch\n")
    for command in (["report"], ["dump", "--out", tmp_path / "out"]):
        assert run(*command, path) == 1
        assert "compiled nothing" in one_sentence(capsys.readouterr().err)


def test_script_that_raises_names_its_line(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = tmp_path / "broken.py"
    path.write_text("x = 1\n\nraise ValueError('no [weights]\\nat all')\n")
    argv, places = sys.argv[:], sys.path[:]
    assert run("report", path) == 1
    message = one_sentence(capsys.readouterr().err)
    assert "broken.py:3 (ValueError: no [weights])" in message
    assert (sys.argv, sys.path) == (argv, places)


def test_script_that_exits(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = tmp_path / "exits.py"
    path.write_text("raise SystemExit(3)\n")
    assert run("dump", "--out", tmp_path / "out", path) == 1
    assert "exit code 3" in one_sentence(capsys.readouterr().err)


def test_wrong_scheme_in_a_script_is_one_sentence(
    script: Path, capsys: pytest.CaptureFixture
) -> None:
    """Dynamo wraps what a backend raises in a message of many lines; ours is what is shown."""
    assert run("report", script, "nf5") == 1
    message = one_sentence(capsys.readouterr().err)
    assert "unknown quantization scheme 'nf5': the schemes are" in message
    last = list(schemes())[-1]
    assert f"{last}): make it run" in message, "a sentence inside a sentence keeps no full stop"


def test_dump_into_an_unwritable_folder_is_one_sentence(
    script: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    in_the_way = tmp_path / "file"
    in_the_way.write_text("not a folder")
    assert run("dump", "--out", in_the_way / "kernels", script, "nf4") == 1
    shown = capsys.readouterr()
    assert "result" not in shown.out, "the script ran before the folder was looked at"
    message = one_sentence(shown.err)
    assert "cannot be written" in message
    assert "point --out at a folder that can." in message


def test_script_in_which_every_product_is_left_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    path = tmp_path / "trains.py"
    path.write_text(SCRIPT.replace("torch.inference_mode", "torch.enable_grad"))
    assert run("dump", "--out", tmp_path / "out", path, "nf4") == 1
    assert "fxquant left every product in" in one_sentence(capsys.readouterr().err)
    torch.compiler.reset()
    assert run("report", path, "nf4") == 0
    assert "the parameter is trainable" in capsys.readouterr().out


def test_missing_argument_names_the_script_only(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        cli.main(["report"])
    assert "required: SCRIPT\n" in capsys.readouterr().err


def test_torch_logs_say_what_each_pass_did(script: Path) -> None:
    done = in_process(str(script), "nf4", TORCH_LOGS="+fxquant")
    assert done.returncode == 0
    for line in ("match: 2 products found", "pack: 2 products rewritten", "2 products quantized"):
        assert line in done.stderr


# --- doctor ----------------------------------------------------------------------------------

HIDDEN = """
import sys
sys.modules["triton"] = None
from fxquant.cli import main
sys.exit(main({}))
"""


def test_doctor_on_this_machine(capsys: pytest.CaptureFixture) -> None:
    assert run("doctor") == 0
    out = capsys.readouterr().out
    for name in ("Python", "torch", "Triton", "GPU", "C++ compiler", "kernel cache", "extras"):
        assert name in out
    assert 'target="auto"' in out
    assert "bad" not in out


def test_doctor_without_triton_and_compiler() -> None:
    done = in_process("-c", HIDDEN.format(["doctor"]), PATH="", CXX="")
    assert done.returncode == 0, done.stderr
    assert re.search(r"Triton\s.*note.*not found", done.stdout)
    assert re.search(r"C\+\+ compiler\s.*note.*not found", done.stdout)
    assert "one by one" in done.stdout
    assert "pip install 'fxquant[triton]'" in done.stdout
    assert "install g++ or clang" in done.stdout


def test_a_model_runs_without_triton_and_compiler(script: Path) -> None:
    """Slower, with a warning that says why, and with the right result."""
    arguments = ["report", str(script), "nf4"]
    done = in_process("-c", HIDDEN.format(arguments), PATH="", CXX="")
    assert done.returncode == 0, done.stderr
    assert "2 of 2 products quantized" in done.stdout
    assert "no C++ compiler was found" in done.stderr


def test_doctor_says_what_the_compiler_builds_for(monkeypatch: pytest.MonkeyPatch) -> None:
    chain = toolchain.toolchain()
    assert chain is not None
    finding = doctor.check_compiler()
    assert finding.status == doctor.OK
    for part in (chain.compiler.path, chain.compiler.summary, chain.isa.name, "OpenMP"):
        assert part in finding.detail
    assert "C++ kernels" in doctor.check_target().detail
    monkeypatch.setenv("FXQUANT_ISA", "portable")
    assert ", portable, " in doctor.check_compiler().detail
    monkeypatch.setenv("FXQUANT_ISA", "mmx")
    finding = doctor.check_compiler()
    assert finding.status == doctor.BAD
    assert finding.advice == "Unset FXQUANT_ISA, or name another."


def test_doctor_says_that_the_tile_unit_is_not_permitted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toolchain, "refused", lambda: "the system says no")
    finding = doctor.check_compiler()
    assert finding.status == doctor.NOTE
    assert finding.detail.endswith("; the system says no")


def test_doctor_names_a_compiler_that_builds_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "compiler"
    path.write_text('#!/bin/sh\n[ "$1" = --version ] || { echo "no licence" >&2; exit 1; }\n')
    path.chmod(0o755)
    monkeypatch.setenv("CXX", str(path))
    finding = doctor.check_compiler()
    assert finding.status == doctor.BAD
    assert "no licence" in finding.detail
    assert "one by one" in doctor.check_target().detail


def test_doctor_finds_unwritable_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    in_the_way = tmp_path / "file"
    in_the_way.write_text("not a folder")
    monkeypatch.setenv("FXQUANT_CACHE_DIR", str(in_the_way))
    monkeypatch.setenv("FXQUANT_DUMP", str(in_the_way))
    assert run("doctor") == 1
    out = capsys.readouterr().out
    assert "Point FXQUANT_CACHE_DIR at a folder that can be written." in out
    assert "Point FXQUANT_DUMP at a folder that can be written." in out


def test_doctor_leaves_no_folder_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FXQUANT_CACHE_DIR", str(tmp_path / "cache"))
    assert doctor.check_cache().status == doctor.OK
    assert list(tmp_path.iterdir()) == []


def test_doctor_reports_a_triton_that_cannot_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")

    def broken() -> None:
        raise RuntimeError("ptxas is gone\nand more")

    monkeypatch.setattr(doctor, "_compile_tiny_kernel", broken)
    finding = doctor.check_triton()
    assert finding.status == doctor.BAD
    assert finding.detail.endswith("failed: ptxas is gone")


def test_doctor_names_missing_extras(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_is_installed", lambda name: name != "transformers")
    finding = doctor.check_extras()
    assert finding.status == doctor.NOTE
    assert "demo: no transformers" in finding.detail
    assert "peers: yes" in finding.detail
    assert finding.advice == "For the demo: pip install 'fxquant[demo]'."


def test_doctor_prints_brackets_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Square brackets are markup to rich: advice that loses them is wrong advice."""
    finding = doctor.Finding("x", doctor.NOTE, "in [bold]", "pip install 'fxquant[triton]'.")
    monkeypatch.setattr(doctor, "CHECKS", (lambda: finding,))
    console = Console(file=io.StringIO(), record=True, width=200)
    assert doctor.show(console)
    text = console.export_text()
    assert "in [bold]" in text
    assert "- pip install 'fxquant[triton]'." in text
