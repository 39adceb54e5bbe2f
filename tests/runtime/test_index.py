"""The page beside dumped kernels, and the timer behind it."""

from __future__ import annotations

import html.parser
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fxquant
from fxquant.codegen import KernelSpec
from fxquant.codegen.epilogue import Epilogue, EpilogueOperand, EpilogueResult
from fxquant.codegen.quantize import QuantizeSpec
from fxquant.codegen.work import Work, amount, stored_bytes, work_of
from fxquant.formats import Encoding, pack
from fxquant.runtime import index, launch, timing, toolchain
from tests.codegen import harness
from tests.helpers import compile_, frozen

needs_compiler = pytest.mark.skipif(toolchain.compiler() is None, reason=toolchain.NOT_FOUND)
pytestmark = pytest.mark.usefixtures("few_heights", "fresh")
NF4 = Encoding(4, "nf4", (64,), scale=Encoding(8, "dynamic8", (256,), offset=True))


class Page(html.parser.HTMLParser):
    """Links, and tags that were opened and not closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        if tag not in ("meta", "br"):
            self.open.append(tag)
        self.links += [value for name, value in attrs if name == "href"]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def lines_of(folder: Path, kernel: str) -> list[dict[str, Any]]:
    kernels = json.loads((folder / index.DATA).read_text())["kernels"]
    (entry,) = (entry for entry in kernels if kernel in entry["file"])
    return entry["lines"]  # type: ignore[no-any-return]


@needs_compiler
def test_modules_calls_and_times(tmp_path: Path) -> None:
    layers = nn.Sequential(nn.Linear(64, 51), nn.ReLU(), nn.Linear(51, 64), nn.Linear(64, 51))
    model = frozen(layers)
    compiled = torch.compile(
        model, backend="fxquant", dynamic=True, options={"dump": str(tmp_path), "fuse": False}
    )
    for rows in (2, 2, 2, 7):
        compiled(torch.randn(rows, 64))
    assert (tmp_path / index.PAGE).is_file(), "there before anyone asks"
    assert lines_of(tmp_path, "51x64") == [], "counts are those of the last report"
    fxquant.report(model)
    first, second = lines_of(tmp_path, "51x64")
    assert (first["rows"], first["calls"], second["rows"], second["calls"]) == (2, 6, 7, 2)
    assert 0 < first["measured_us"] < 1e6
    assert 0 < first["predicted_us"] < 1e6
    page = Page((tmp_path / index.PAGE).read_text())
    assert page.open == []
    assert len(page.links) == 2
    assert all((tmp_path / link).is_file() for link in page.links)
    text = (tmp_path / index.PAGE).read_text()
    assert "0<br>3" in text
    assert "<script" not in text


@needs_compiler
def test_a_kernel_of_two_graphs_is_one(tmp_path: Path) -> None:
    class Model(nn.Module):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.name = name
            self.add_module(name, nn.Linear(64, 55))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return getattr(self, self.name)(x)  # type: ignore[no-any-return]

    for name in ("first", "second"):
        torch._dynamo.reset()
        compile_(frozen(Model(name)), dump=str(tmp_path))(torch.randn(2, 64))
    index.write()
    (file,) = tmp_path.glob("*.cpp")
    assert file.name.startswith("cpp_first_")
    (entry,) = json.loads((tmp_path / index.DATA).read_text())["kernels"]
    assert entry["modules"] == ["first", "second"]
    assert [line["calls"] for line in entry["lines"]] == [2]


@needs_compiler
def test_nothing_is_timed_without_a_dump() -> None:
    model = frozen(nn.Linear(64, 52))
    compile_(model)(torch.randn(3, 64))
    keys = [key for key in launch._runners if '"n":52,' in key[0]]
    assert keys
    assert not any(target.endswith(timing.TIMED) for _, target, _ in keys)
    assert not any(isinstance(launch._runners[key], timing.Timed) for key in keys)


@needs_compiler
def test_what_other_processes_wrote_is_kept(tmp_path: Path) -> None:
    code = (
        "import torch, sys; from torch import nn; import fxquant;"
        "m = nn.Linear(64, 53).eval().requires_grad_(False);"
        "torch.compile(m, backend='fxquant', options={'dump': sys.argv[1]})(torch.randn(3, 64))"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
    (theirs,) = lines_of(tmp_path, "53x64")
    assert (theirs["rows"], theirs["calls"]) == (3, 1), "written at the end of the process"
    compile_(frozen(nn.Linear(64, 54)), dump=str(tmp_path))(torch.randn(2, 64))
    index.write()
    assert lines_of(tmp_path, "53x64") == [theirs]
    assert len(lines_of(tmp_path, "54x64")) == 1
    (tmp_path / index.DATA).write_text("{")
    index.write()
    assert len(json.loads((tmp_path / index.DATA).read_text())["kernels"]) == 1


def test_medians_by_rows() -> None:
    runner = timing.timed(("medians", "cpp"), lambda x: x + 1, lambda operands: len(operands[0]))
    for rows in (1, 1, 3):
        assert torch.equal(runner(torch.zeros(rows)), torch.ones(rows))
    found = timing.calls("medians", "cpp")
    assert [(calls.rows, calls.count) for calls in found] == [(1, 2), (3, 1)]
    assert all(calls.seconds is not None and calls.seconds > 0 for calls in found)
    assert timing.calls("medians", "triton") == []


@pytest.mark.parametrize(
    "encoding",
    [NF4, Encoding(8, block=(1, -1)), Encoding(4, block=(1, 128), zero_point=True)],
    ids=["nf4", "int8", "int4"],
)
def test_stored_bytes_are_those_of_the_tensors(encoding: Encoding) -> None:
    operand = harness.whole(encoding, 96, 256)
    parts = pack(torch.randn(96, 256), encoding).tensors()
    offset = 4 * (encoding.scale is not None and encoding.scale.offset)
    assert stored_bytes(operand) == sum(part.nbytes for part in parts) - offset


def test_work_by_hand() -> None:
    epilogue = Epilogue(
        (EpilogueOperand("n", "float32"), EpilogueOperand("mn", "float16")),
        Epilogue.bias("float32").nodes,
        (EpilogueResult("%acc1", "float32"),),
    )
    int8 = Encoding(8, block=(1, -1))
    spec = KernelSpec(
        harness.whole(int8, 10, 20), *("float16", "int8", "float16"), epilogue, weights=2
    )
    weights = 2 * (200 + 40)
    assert work_of(spec) == Work(weights + 40, 40 + 20 + 40 + 20, 10 * (2 * 20 * 2 + 1))
    assert work_of(spec).bytes(3) == weights + 40 + 3 * 120
    assert work_of(QuantizeSpec(20, "float16")) == Work(0.0, 40 + 24, 80)
    assert amount(4333000, "B") == "4.33 MB"
    assert amount(12) == "12"
