"""More rows than are worked off at a time: each block by one thread, or each by all of them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from fxquant.codegen.cpp.plan import SUPER_ROWS
from tests.codegen import cpp_harness, harness
from tests.codegen.cpp_harness import FEW, MANY, Builder
from tests.codegen.cpp_specs import SPECS

NAMES = ("nf4_bf16", "int8_int8_given_outliers", "nf4_int8_outliers")
ISA = cpp_harness.isas()[0]


@pytest.fixture(scope="module")
def builder() -> Iterator[Builder]:
    found = Builder()
    for name in NAMES:
        found.start(SPECS[name], ISA)
    yield found
    found.close()


@pytest.mark.parametrize("variant", [FEW, MANY])
@pytest.mark.parametrize("name", NAMES)
def test_any_number_of_threads_gives_the_same_bits(
    builder: Builder, name: str, variant: int
) -> None:
    """Four blocks: for one thread in turns, for two and four apart, for five together."""
    spec = SPECS[name]
    kernel, rows = builder.kernel(spec, ISA), 3 * SUPER_ROWS + 3
    found = spec.outliers is not None and spec.outliers.threshold is not None
    x = cpp_harness.rows_of(spec, rows, outliers=(3, 77) if found else ())
    extra = harness.operands(spec, rows)
    prepared = kernel.prepare(harness.stored(spec.weight.encoding, spec.weight.shape))
    first, *others = (
        kernel.run(prepared, x, extra, variant=variant, threads=threads) for threads in (1, 2, 4, 5)
    )
    for other in others:
        assert torch.equal(first, other)
