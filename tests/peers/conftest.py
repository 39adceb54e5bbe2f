"""bitsandbytes is optional, and looks for what is not there when it is imported."""

from __future__ import annotations

import os
import warnings

import pytest


@pytest.fixture(scope="session")
def bnb():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if os.environ.get("CI"):
            # There the comparison has to run, not to be skipped.
            import bitsandbytes

            return bitsandbytes
        return pytest.importorskip("bitsandbytes")
