"""Printing a spec gives the reviewed text; ``make golden`` accepts a change."""

import pytest

from tests.golden import FOLDER, SPECS, render


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_kernel_is_the_reviewed_one(spec):
    reviewed = (FOLDER / f"kernel_{spec.name}.py").read_text(encoding="utf-8")
    assert render(spec) == reviewed, "the printed kernel changed: run `make golden` and review it"


def test_no_file_is_left_over():
    names = {path.stem.removeprefix("kernel_") for path in FOLDER.glob("kernel_*.py")}
    assert names == {spec.name for spec in SPECS}


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_page_width(spec):
    assert max(map(len, render(spec).splitlines())) <= 100
