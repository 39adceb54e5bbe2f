"""What every test runs under: no network, no folders of the user's, warnings as errors."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator

import hypothesis
import pytest

# Set before anything imports torch or transformers.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.pop("FXQUANT_DUMP", None)
# More threads than cores: whoever spins at the end of a loop keeps those that it waits for from
# running, which makes small loops a hundred times as long.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Workers of pytest-xdist share the cache of the process that started them.
IS_WORKER = "PYTEST_XDIST_WORKER" in os.environ
# No run sees what another has left behind, in Inductor's cache neither.
CACHES: dict[str, str] = {}
if not IS_WORKER:
    for variable in ("FXQUANT_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR"):
        CACHES[variable] = tempfile.mkdtemp(prefix="fxquant-test-cache-")
    os.environ.update(CACHES)

# Compiling takes seconds, and shared machines are uneven: the timeout of pytest is the limit.
hypothesis.settings.register_profile("fxquant", deadline=None)
hypothesis.settings.register_profile("fxquant-ci", deadline=None, derandomize=True)
hypothesis.settings.load_profile("fxquant-ci" if os.environ.get("CI") else "fxquant")

# Warnings of other packages that no use of theirs avoids.
THIRD_PARTY_WARNINGS = (
    # Importing Inductor imports torch.utils.mkldnn, which is still written in TorchScript.
    "ignore:`torch.jit.script(_method)?` is deprecated:DeprecationWarning",
    # Triton 3.6's interpreter makes an int of an array of one element, which numpy 2.4 refuses.
    "ignore:Conversion of an array with ndim > 0 to a scalar:DeprecationWarning",
)


def pytest_configure(config: pytest.Config) -> None:
    """Adds the exceptions to ``filterwarnings = error``."""
    for line in THIRD_PARTY_WARNINGS:
        config.addinivalue_line("filterwarnings", line)


# Few tests and minutes of work: begun last, they would keep one process busy beside idle ones.
FIRST = (
    *("tests/test_demo.py", "tests/models/test_transformers.py", "tests/test_benchmarks.py"),
    *("tests/property/test_random_models.py", "tests/test_fallbacks.py"),
    "tests/test_triton_end_to_end.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the files that take longest first: `FIRST`, then those with the most tests."""
    files = [item.nodeid.partition("::")[0] for item in items]
    order = {file: (file not in FIRST, -count, file) for file, count in Counter(files).items()}
    items.sort(key=lambda item: order[item.nodeid.partition("::")[0]])


def pytest_sessionfinish() -> None:
    """Removes the caches of this run."""
    for folder in CACHES.values():
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def few_heights() -> Iterator[None]:
    """Kernels with panels of three heights, which take compilers less than half as long.

    For modules about what surrounds kernels. Those of all heights are the business of
    ``tests/codegen``; they run under the backend in ``tests/models/test_activations.py``, and
    wherever a test starts a process.
    """
    from fxquant.runtime import toolchain
    from tests.codegen.cpp_harness import with_few_heights

    few = {name: with_few_heights(isa) for name, isa in toolchain.ISAS.items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(toolchain, "ISAS", few)
        yield


@pytest.fixture
def fresh() -> None:
    """Nothing compiled before, and the same random numbers."""
    import torch

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    torch.manual_seed(0)
