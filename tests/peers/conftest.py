"""bitsandbytes is optional, and looks for what is not there when it is imported."""

from __future__ import annotations

import warnings

import pytest


@pytest.fixture(scope="session")
def bnb():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("bitsandbytes")
