"""Printed C++ kernels of several weights and several results, against the reference."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from fxquant.codegen import KernelSpec, bounds, reference
from fxquant.codegen.epilogue import Epilogue
from fxquant.codegen.spec import FLOAT_DTYPES
from fxquant.runtime import toolchain
from tests.bounds import assert_close_within
from tests.codegen import cpp_harness, harness
from tests.codegen.cpp_harness import FEW, MANY, Builder
from tests.codegen.cpp_joined import EVERYWHERE, SPECS, alone, stored
from tests.codegen.specs import joined_specs

pytestmark = pytest.mark.skipif(
    toolchain.compiler() is None and not os.environ.get("CI"), reason=toolchain.NOT_FOUND
)
ISA_NAMES = cpp_harness.isas()
HAND_PICKED = [
    (name, isa) for name in SPECS for isa in (ISA_NAMES if name in EVERYWHERE else ISA_NAMES[:1])
]
DRAWN = cpp_harness.drawn(joined_specs(FLOAT_DTYPES), 4)
ROWS = (0, 1, 2, 5, 17, 40, 130)
BIASED = ("qkv_codes", "qkv_int8_in_call", "qkv_found", "qkv_given")


@pytest.fixture(scope="module")
def builder() -> Iterator[Builder]:
    made = Builder()
    threads = torch.get_num_threads()
    for name, isa in HAND_PICKED:
        made.start(SPECS[name], isa)
    torch.set_num_threads(1)
    yield made
    torch.set_num_threads(threads)
    made.close()


class Case:
    """Weights, an activation, what the reference makes of them and how far one may be off."""

    def __init__(self, spec: KernelSpec, rows: int, seed: int = 0) -> None:
        self.stored = stored(spec, seed)
        self.tensors = [tensor for one in self.stored for tensor in one]
        self.x = harness.activation(spec, rows, seed + 1)
        self.extra = harness.operands(spec, rows, seed + 2)
        self.want = results(reference.run(spec, self.x, self.tensors, self.extra))
        self.bounds = results(bounds.allowed(spec, self.x, self.tensors, self.extra))

    def check(self, got: Any) -> None:
        for ours, theirs, bound in zip(results(got), self.want, self.bounds, strict=True):
            assert ours.dtype == theirs.dtype
            assert_close_within(ours, theirs, bound)

    def off(self, got: Any) -> list[bool]:
        """Of each result whether any element is further off than it may be."""
        return [
            bool(((ours.double() - theirs.double()).abs() > bound).any())
            for ours, theirs, bound in zip(results(got), self.want, self.bounds, strict=True)
        ]


def results(out: Any) -> list[Tensor]:
    return [out] if isinstance(out, Tensor) else list(out)


@pytest.mark.parametrize(("name", "isa"), HAND_PICKED)
def test_every_variant_number_of_rows_and_of_threads(name: str, isa: str, builder: Builder) -> None:
    spec, kernel = SPECS[name], builder.kernel(SPECS[name], isa)
    for rows in ROWS:
        one = Case(spec, rows)
        prepared = kernel.prepare(one.tensors, 2)
        for variant in (FEW, MANY):
            got = [
                results(kernel.run(prepared, one.x, one.extra, variant, threads))
                for threads in (1, 2)
            ]
            one.check(got[0])
            for first, second in zip(*got, strict=True):
                assert torch.equal(first, second), "the number of threads is seen in the result"


@pytest.mark.parametrize("number", range(len(DRAWN)))
def test_drawn_specs(number: int, builder: Builder) -> None:
    spec, isa = DRAWN[number], ISA_NAMES[number % len(ISA_NAMES)]
    for later in range(number, len(DRAWN)):
        builder.start(DRAWN[later], ISA_NAMES[later % len(ISA_NAMES)])
    kernel = builder.kernel(spec, isa)
    for rows in (0, 1, 4, 19):
        one = Case(spec, rows, rows)
        prepared = kernel.prepare(one.tensors)
        for variant in (FEW, MANY):
            one.check(kernel.run(prepared, one.x, one.extra, variant, 2))


@pytest.mark.parametrize("name", BIASED)
def test_each_result_is_that_of_a_kernel_of_its_own(name: str, builder: Builder) -> None:
    """The same instructions in the same order: bit for bit."""
    spec, isa, rows = SPECS[name], ISA_NAMES[0], 19
    one = Case(spec, rows)
    kernel, biases, beside = builder.kernel(spec, isa), one.extra[:3], one.extra[3:]
    given = spec.outliers is not None and spec.outliers.columns is not None
    for variant in (FEW, MANY):
        got = kernel.run(kernel.prepare(one.tensors), one.x, one.extra, variant, 2)
        for number, weight in ((0, 1), (1, 2), (2, 0)):
            result = got[(number + 1) % 3]
            dtype = str(result.dtype).removeprefix("torch.")
            single = alone(spec, Epilogue.bias(spec.epilogue.operands[0].dtype), dtype)
            own = builder.kernel(single, isa)
            own_beside = [beside[0], beside[1 + weight]] if given else beside
            extra = [biases[number], *own_beside]
            want = own.run(own.prepare(one.stored[weight]), one.x, extra, variant)
            assert torch.equal(result, want)


@pytest.mark.parametrize("name", SPECS)
def test_weights_in_another_order_are_seen(name: str, builder: Builder) -> None:
    spec, isa = SPECS[name], ISA_NAMES[0]
    kernel, one = builder.kernel(spec, isa), Case(spec, 20)
    turned = [tensor for tensors in one.stored[::-1] for tensor in tensors]
    for variant in (FEW, MANY):
        assert any(one.off(kernel.run(kernel.prepare(turned), one.x, one.extra, variant)))


def test_one_result_that_is_another_is_seen(builder: Builder) -> None:
    spec, isa = SPECS["qkv_codes"], ISA_NAMES[0]
    kernel, one = builder.kernel(spec, isa), Case(spec, 20)
    query, key, value = kernel.run(kernel.prepare(one.tensors), one.x, one.extra)
    assert one.off([query, value.to(key.dtype), key.float()]) == [False, True, True]


def test_one_row_is_as_among_many(builder: Builder) -> None:
    """A panel of one row is a line as it lies, where the activation is taken as it is."""
    spec, isa = SPECS["gate_nf4_bf16"], ISA_NAMES[0]
    kernel, one = builder.kernel(spec, isa), Case(spec, 1)
    prepared = kernel.prepare(one.tensors)
    unaligned = torch.cat([one.x.new_zeros(1), one.x.flatten()])[1:].view_as(one.x)
    want = kernel.run(prepared, one.x, one.extra)
    assert torch.equal(kernel.run(prepared, unaligned, one.extra), want)
