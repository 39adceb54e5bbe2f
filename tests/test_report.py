"""The report's sums, and its forms for people and for programs."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import nn

import fxquant
from fxquant.report import LEFT_ALONE, QUANTIZED, Report, Row, watch

pytestmark = pytest.mark.usefixtures("few_heights")


def row(module: str, shape: tuple[int, ...], *, bits: float = 4.0, parameter: str = "") -> Row:
    return Row(module, parameter or f"{module}.weight", shape, QUANTIZED, "nf4", bits, 20.0)


LEFT = Row(
    "head", "head.weight", (10, 30), LEFT_ALONE, reason="it is <too> & small", where="m.py:7"
)


def test_sums() -> None:
    found = Report((row("a", (20, 10)), row("b", (10, 10), bits=7.0), LEFT))
    assert [one.module for one in found.quantized] == ["a", "b"]
    assert found.left_alone == [LEFT]
    assert found.coverage == 300 / 600
    assert found.bits_per_weight == (200 * 4 + 100 * 7) / 300
    assert found.summary().startswith("fxquant: 2 of 3 products quantized (50.0% of their weights)")


def test_a_weight_of_two_products_counts_once_in_the_bits() -> None:
    tied = row("b", (20, 10), bits=7.0, parameter="a.weight")
    found = Report((row("a", (20, 10), bits=7.0), tied, row("c", (20, 10), bits=4.0)))
    assert found.bits_per_weight == 5.5


def test_nothing_to_report() -> None:
    found = fxquant.report(nn.Linear(4, 4))
    assert found.rows == ()
    assert (found.coverage, found.bits_per_weight) == (0.0, 0.0)
    assert "0 of 0 products" in str(found)
    assert json.loads(found.to_json())["rows"] == []


def test_a_table_of_the_first_products_says_how_many_there_are_beside_them() -> None:
    found = Report((row("a", (20, 10)), row("b", (10, 10)), LEFT))
    assert [*found.table(1).columns[0].cells] == ["a", "... 2 more products"]
    assert len([*found.table(3).columns[0].cells]) == len([*found.table().columns[0].cells]) == 3
    assert "1 more" not in str(found)


@pytest.mark.parametrize("shape", [(), (0,), (3, 0)])
def test_empty_shapes_have_no_elements(shape: tuple[int, ...]) -> None:
    assert row("a", shape).numel == 0


def test_forms() -> None:
    found = Report((row("layers.0", (20, 10)), LEFT))
    for text in ("layers.0", "20x10", "4.000", "20.0", "it is <too> & small (m.py:7)"):
        assert text in str(found)
    data = json.loads(found.to_json())
    assert data["rows"][1]["where"] == "m.py:7"
    assert data["rows"][0]["shape"] == [20, 10]
    assert math.isclose(data["coverage"], 200 / 500)
    page = found.to_html()
    for text in ("layers.0", ">20x10<", ">4.000<", ">20.0<", found.summary()):
        assert text in page
    assert "<div class=note>it is &lt;too&gt; &amp; small (m.py:7)</div>" in page
    assert "<too>" not in page


def test_brackets_in_names_are_printed_as_they_are() -> None:
    found = Report((row("blocks[0]", (20, 10)), Row("x", "", (4, 4), LEFT_ALONE, reason="[red]")))
    assert "blocks[0]" in str(found)
    assert "[red]" in str(found)


def test_a_compile_files_each_product_once(fresh: None) -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)).requires_grad_(requires_grad=False)
    with watch() as seen:
        compiled = torch.compile(model, backend="fxquant")
        for _ in range(2):
            compiled(torch.randn(2, 64))
    assert [one.module for one in seen] == ["0", "1"]
    with watch() as seen:
        model[1].weight.copy_(torch.randn(64, 64))
        compiled(torch.randn(2, 64))
    assert [one.module for one in seen] == ["1"], "packed again, with another error"
