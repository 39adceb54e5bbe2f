"""Printing a spec gives the reviewed text; ``make golden`` accepts a change."""

import pytest

from tests.golden import FOLDER, printed, texts

TEXTS = texts()


@pytest.mark.parametrize("name", TEXTS)
def test_kernel_is_the_reviewed_one(name):
    reviewed = (FOLDER / name).read_text(encoding="utf-8")
    assert TEXTS[name] == reviewed, "the printed kernel changed: run `make golden` and review it"


def test_no_file_is_left_over():
    assert {path.name for path in printed()} == set(TEXTS)


@pytest.mark.parametrize("name", TEXTS)
def test_page_width(name):
    assert max(map(len, TEXTS[name].splitlines())) <= 100
