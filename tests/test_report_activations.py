"""What the report says of activations: how they are quantized, where, and what was counted."""

from __future__ import annotations

import gc
import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxquant
from fxquant import errors
from fxquant.codegen import KernelSpec, QuantizeSpec
from fxquant.codegen.spec import Outliers
from fxquant.formats import Encoding
from fxquant.report import QUANTIZED, Report, Row, gauge, remember
from fxquant.runtime import launch
from fxquant.schemes import Activation, OutlierColumns, Recipe
from fxquant.testing import run_and_get_kernels
from tests.helpers import TwoLayers, compile_, frozen

pytestmark = pytest.mark.usefixtures("few_heights", "fresh")
PER_CHANNEL = Encoding(8, block=(1, -1))


class Pair(nn.Module):
    """Two products of one activation."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(64, 64), nn.Linear(64, 32)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.a(x), self.b(x)


def rows_of(model: nn.Module) -> dict[str, Row]:
    return {row.module: row for row in fxquant.report(model).rows}


def counted(model: nn.Module) -> list[list[str]]:
    return [[n for n in row.notes if "elements" in n] for row in rows_of(model).values()]


def static(calibration: Any, target: str = "auto") -> dict[str, Any]:
    recipe = Recipe(PER_CHANNEL, Activation("static"))
    return {"overrides": {"*": recipe}, "calibration": calibration, "target": target}


@pytest.mark.parametrize("target", ["cpp", "torch"])
@torch.no_grad()
def test_what_saturates_is_counted_for_every_model(target: str, tmp_path: Path) -> None:
    first, second = frozen(Pair()), frozen(Pair())
    x = torch.randn(2, 5, 64)
    x[0, 0, 0] = 9.0
    options = static(fxquant.calibrate(first, [x], progress=False), target)
    compiled = compile_(first, dump=str(tmp_path), **options)
    compiled(x)
    (written,) = tmp_path.glob(f"{target}_quantize_a_b_*.json")
    assert json.loads(written.read_text())["kind"] == "quantize"
    (source,) = [f for f in tmp_path.glob(written.stem + ".*") if f != written]
    assert "Modules: a, b" in source.read_text()
    assert counted(first) == [["saturated elements: 0"]] * 2
    x[1, 2, :7] = torch.tensor([9.5, -9.5, 10, -99, 1e4, 9, -9])
    for calls in (1, 2):
        compiled(x)
        assert counted(first) == [[f"saturated elements: {5 * calls}"]] * 2
    row = rows_of(first)["b"]
    assert row.activation == "int8 static"
    assert " after " + target + ":quantize_64_static" in row.kernel
    # The other model saw nothing beyond 99, and its own counter is 0.
    other = static(fxquant.calibrate(second, [x.clamp(-99, 99)], progress=False), target)
    compile_(second, **other)(x)
    assert counted(second) == [["saturated elements: 1"]] * 2
    assert counted(first) == [["saturated elements: 10"]] * 2


@torch.no_grad()
def test_blocks_that_share_a_graph_have_counters_of_their_own() -> None:
    blocks = frozen(nn.Sequential(*[nn.Linear(64, 64) for _ in range(3)]))
    found = fxquant.calibrate(blocks, [torch.randn(5, 64)], progress=False)
    options = static(found)
    torch._dynamo.utils.counters.clear()
    for number, block in enumerate(blocks):
        x = torch.zeros(4, 64)
        x[:, : 2 * number] = found.stats[f"{number}.weight"].amax.max() * 1.5
        compile_(block, **options)(x)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert counted(blocks) == [[f"saturated elements: {count}"] for count in (0, 8, 16)]


@torch.no_grad()
def test_columns_of_outliers_are_a_mean_of_the_calls() -> None:
    recipe = Recipe(PER_CHANNEL, Activation(), outliers=OutlierColumns(6.0))
    model = frozen(TwoLayers())
    compiled = compile_(model, overrides={"*": recipe}, target="cpp")
    x = torch.full((3, 128), 0.25)
    compiled(x)
    x[1, 5] = x[2, 5] = x[0, 77] = 7.0
    compiled(x)
    rows = rows_of(model)
    assert rows["up"].activation == "int8 per token, columns from 6 in float16"
    assert rows["up"].notes == ("outlier columns: 1.0 a call in 2 calls",)
    assert rows["down"].notes == ("outlier columns: 0.0 a call in 2 calls",)
    compiled(x)
    assert rows_of(model)["up"].notes == ("outlier columns: 1.3 a call in 3 calls",)


class Three(nn.Module):
    """Query, key and value of one activation."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(64, 48) for _ in range(3))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.q(x), self.k(x), self.v(x)


@torch.no_grad()
def test_outliers_of_three_products_are_looked_for_once_and_counted_for_each() -> None:
    model, x = frozen(Three()), torch.full((3, 64), 0.25)
    x[1, 5] = x[2, 5] = x[0, 33] = 7.0
    compiled = compile_(model, scheme="llm_int8", target="cpp")
    got, kernels = run_and_get_kernels(compiled, x)
    (kernel,) = kernels
    assert isinstance(kernel.spec, KernelSpec)
    assert (kernel.spec.weights, kernel.spec.outliers is not None) == (3, True)
    assert kernel.source.count("void mark_outliers(const Call& call") == 1
    for calls in (1, 2):
        notes = [row.notes for row in fxquant.report(model).rows]
        assert notes == [(f"outlier columns: 2.0 a call in {calls} calls",)] * 3
        compiled(x)
    torch._dynamo.reset()
    apart, kernels = run_and_get_kernels(compile_(model, scheme="llm_int8", fuse=False), x)
    assert [kernel.spec.weights for kernel in kernels] == [1]
    for one, other in zip(got, apart, strict=True):
        assert torch.equal(one, other)


@torch.no_grad()
def test_known_columns_of_three_products_are_the_same_ones() -> None:
    model, x = frozen(Three()), torch.randn(9, 64)
    x[:, [3, 40]] *= 40
    calibration = fxquant.calibrate(model, [x], progress=False)
    options = {"scheme": "llm_int8_static", "calibration": calibration, "target": "cpp"}
    got, (kernel,) = run_and_get_kernels(compile_(model, **options), x)
    assert isinstance(kernel.spec, KernelSpec)
    assert kernel.spec.weights == 3
    assert kernel.spec.outliers == Outliers("float16", columns=8)
    torch._dynamo.reset()
    apart = compile_(model, **options, fuse=False)(x)
    for one, other, exact in zip(got, apart, model(x), strict=True):
        assert torch.equal(one, other)
        # Of the 62 columns left a step is amax / 127 < 4 / 127, of the weight 1 / 8 / 127.
        assert (one - exact).abs().max() < 0.05
    rows = fxquant.report(model).rows
    assert [row.notes for row in rows] == [("2 of 64 columns in float16",)] * 3


def test_weights_alone_say_nothing_of_activations() -> None:
    model = frozen(nn.Linear(64, 64))
    compile_(model)(torch.randn(3, 64))
    found = fxquant.report(model)
    assert [(row.activation, row.notes) for row in found.rows] == [("", ())]
    assert "activation" not in str(found)


def test_integers_that_an_option_asks_for_are_named() -> None:
    model = frozen(nn.Linear(64, 64))
    compile_(model, compute_dtype="int8")(torch.randn(3, 64))
    found = fxquant.report(model)
    assert [row.activation for row in found.rows] == ["int8 per token"]
    assert "activation" in str(found)


def test_forms_show_activations_and_notes() -> None:
    notes = ("1/s into the <norm>", "saturated elements: 3")
    row = Row("a", "a.weight", (4, 4), QUANTIZED, "x", activation="int8 static", notes=notes)
    found = Report((row, Row("b", "b.weight", (4, 4), QUANTIZED)))
    for text in (*notes, "int8 static"):
        assert text in str(found)
    data = json.loads(found.to_json())["rows"]
    assert [d["notes"] for d in data] == [list(notes), []]
    assert [d["activation"] for d in data] == ["int8 static", ""]
    page = found.to_html()
    assert "<div class=what>1/s into the &lt;norm&gt;</div>" in page
    assert "<div class=what>saturated elements: 3</div>" in page
    assert "<td>int8 static</td>" in page


def test_a_gauge_is_read_at_every_report_and_dies_with_the_parameter() -> None:
    model, values = nn.Linear(4, 4), iter(("once", "twice", ""))
    row = Row("lin", "weight", (4, 4), QUANTIZED, notes=("kept",))
    remember([(row, model.weight)], [model.weight])
    gauge(row, model.weight, lambda: "replaced")
    gauge(row, model.weight, lambda: next(values))
    for notes in (("kept", "once"), ("kept", "twice"), ("kept",)):
        assert [found.notes for found in fxquant.report(model).rows] == [notes]
    alive = weakref.ref(model.weight)
    del model
    gc.collect()
    assert alive() is None


@torch.no_grad()
def test_a_kernel_that_a_target_does_not_print(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """That kernel falls to torch, the products stay; the log and the report say so."""
    render = launch.cpp.render

    def printed(spec: launch.Spec, *args: Any) -> str:
        if isinstance(spec, QuantizeSpec):
            raise errors.not_printed("cpp", "scope 'tensor'")
        return render(spec, *args)

    launch._build_once.cache_clear()
    monkeypatch.setattr(launch.cpp, "render", printed)
    model, x = frozen(TwoLayers()), torch.randn(3, 128)
    recipe = Recipe(PER_CHANNEL, Activation("tensor"))
    out, kernels = run_and_get_kernels(compile_(model, overrides={"*": recipe}), x)
    launch._build_once.cache_clear()
    # Half a step of every input, amax / 254 * sum |w|, is at most 4 % of the largest output of a
    # product; these chain two.
    wanted = model(x)
    assert (out - wanted).abs().max() <= 2 * 0.042 * wanted.abs().max()
    assert sorted(kernel.target for kernel in kernels) == ["cpp", "cpp", "torch", "torch"]
    for name, k in (("up", 128), ("down", 64)):
        kernel = rows_of(model)[name].kernel
        assert kernel.startswith("cpp:int8xint8_linear_")
        said = f" after torch:quantize_{k}_per_tensor (torch operations: target 'cpp' prints no"
        assert said in kernel
    warned = [r for r in caplog.records if "prints no kernel" in r.getMessage()]
    assert len(warned) == 2, "once for each kernel"
