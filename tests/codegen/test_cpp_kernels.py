"""Printed C++ kernels against the reference, on every instruction set that this machine runs."""

from __future__ import annotations

import copy
import functools
import math
import os
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fxquant.codegen import KernelSpec, bounds, reference
from fxquant.codegen.cpp.isa import ISAS
from fxquant.codegen.cpp.plan import SUPER_ROWS, Plan
from fxquant.codegen.epilogue import FLOAT_DTYPES
from fxquant.codegen.spec import WeightOperand
from fxquant.formats import pack
from fxquant.runtime import toolchain
from tests.bounds import assert_close_within
from tests.codegen import cpp_harness, harness
from tests.codegen.cpp_harness import FEW, MANY, Builder
from tests.codegen.cpp_specs import EVERYWHERE, SPECS
from tests.codegen.specs import int8_specs, specs

pytestmark = pytest.mark.skipif(
    toolchain.compiler() is None and not os.environ.get("CI"), reason=toolchain.NOT_FOUND
)
ISA_NAMES = cpp_harness.isas()
ROWS = (1, 2, 3, 5, 16, 17, 40, 130, SUPER_ROWS + 1, SUPER_ROWS + 32)
"""The last are more than a kernel takes at a time: by one row, which is no panel yet, and more."""
SEEN = 300
"""Rows that pick an input each show one wrong code of these."""
OUTLIERS = (3, 31, 32, 64, 650)
"""The last is blocks away from the others: scales of scales change in between."""


def isas_of(number: int, name: str) -> list[str]:
    """Where a spec is built: everywhere, or on the best and, every other, on one of the rest.

    Where the tile unit is no part of a kernel its text is that of the vectors alone.
    """
    plain = cpp_harness.vector_isas()
    plans = {isa: Plan(SPECS[name], ISAS[isa]) for isa in ISA_NAMES if isa not in plain}
    tiles = [isa for isa, plan in plans.items() if plan.uses_tiles or plan.has_thirds]
    if name in EVERYWHERE:
        return tiles + plain
    return tiles[:1] + plain[: not tiles] + plain[1:][number // 2 % 2 :][: number % 2]


HAND_PICKED = [(name, isa) for number, name in enumerate(SPECS) for isa in isas_of(number, name)]
WHOLE = [
    *((name, isas_of(0, name)[0]) for name in EVERYWHERE),
    *(("int8_int8", isa) for isa in ISA_NAMES[1:]),
    *(("nf4_bf16", isa) for isa in ISA_NAMES[1:-1]),
]
"""Every height of panels for every way to multiply; compilers take longest for portable floats."""
CODES = int8_specs().map(lambda spec: replace(spec, x_dtype="int8", outliers=None))
DRAWN = [
    *cpp_harness.drawn(specs(FLOAT_DTYPES), 3),
    *cpp_harness.drawn(int8_specs(), 3),
    *cpp_harness.drawn(CODES, 2),
]


@pytest.fixture(scope="module")
def builder() -> Iterator[Builder]:
    made = Builder({(SPECS[name], isa) for name, isa in WHOLE})
    threads = torch.get_num_threads()
    for name, isa in HAND_PICKED:
        made.start(SPECS[name], isa)
    # The reference is small: threads would only wait for each other beside compilers.
    torch.set_num_threads(1)
    yield made
    torch.set_num_threads(threads)
    made.close()


class Case:
    """A weight, an activation, what the reference makes of them and how far one may be off.

    Made for the most rows; fewer are its first ones, where no row but row 0 makes outliers.
    """

    def __init__(self, spec: KernelSpec, isa: str, x: Tensor, seed: int = 0) -> None:
        self.spec, self.x = spec, x
        self.tensors = harness.stored(spec.weight.encoding, spec.weight.shape, seed)
        self.extra = harness.operands(spec, x.shape[-2], seed + 2)
        self.want = reference.run(spec, x, self.tensors, self.extra)
        self.bound = bounds.allowed(spec, x, self.tensors, self.extra)

    def operands(self, rows: int) -> list[Tensor]:
        """The further operands for the first rows."""
        made = list(self.extra)
        for number, operand in enumerate(self.spec.epilogue.operands):
            if "m" in operand.dims:
                axis = operand.dims.index("m")
                made[number] = made[number].narrow(axis, 0, rows).contiguous()
        if self.spec.is_quantized:
            made[-1] = made[-1][..., :rows].contiguous()
        return made

    def check(self, got: Tensor) -> None:
        """The first rows are what they must be."""
        rows = got.shape[-2]
        want, bound = self.want[..., :rows, :], self.bound[..., :rows, :]
        assert_close_within(got, want, bound)

    def is_off(self, got: Tensor) -> bool:
        """Whether any element is further off than it may be."""
        return bool(((got.double() - self.want.double()).abs() > self.bound).any())


def case(spec: KernelSpec, isa: str, rows: int) -> Case:
    """A case of one's own to change; instruction sets that multiply alike have the same."""
    path = Plan(spec, ISAS[isa]).path
    alike = next(name for name in ISA_NAMES if Plan(spec, ISAS[name]).path == path)
    return copy.deepcopy(_case(spec, alike, rows))


@functools.cache
def _case(spec: KernelSpec, isa: str, rows: int) -> Case:
    known = [column for column in OUTLIERS if spec.outliers and column < spec.weight.k]
    return Case(spec, isa, cpp_harness.rows_of(spec, rows, outliers=tuple(known)))


@pytest.mark.parametrize(("name", "isa"), HAND_PICKED)
def test_every_variant_number_of_rows_and_of_threads(name: str, isa: str, builder: Builder) -> None:
    spec, kernel = SPECS[name], builder.kernel(SPECS[name], isa)
    counts = ROWS if spec.weight.k < 1000 else ROWS[:6]
    if name not in EVERYWHERE:
        counts = counts[:8]
    one = case(spec, isa, counts[-1])
    prepared = [kernel.prepare(one.tensors, threads) for threads in (1, 2)]
    for number, rows in enumerate(counts):
        x, extra = one.x[..., :rows, :].contiguous(), one.operands(rows)
        for variant in (FEW, MANY):
            results = [
                kernel.run(prepared[(number + threads) % 2], x, extra, variant, threads)
                for threads in (1, 2)
            ]
            one.check(results[0])
            assert torch.equal(*results), "the number of threads is seen in the result"


@pytest.mark.parametrize("number", range(len(DRAWN)))
def test_drawn_specs(number: int, builder: Builder) -> None:
    spec, isa = DRAWN[number], ISA_NAMES[number % len(ISA_NAMES)]
    for later in range(number, len(DRAWN)):
        builder.start(DRAWN[later], ISA_NAMES[later % len(ISA_NAMES)])
    kernel = builder.kernel(spec, isa)
    for rows in (0, 1, 4, 19):
        one = Case(spec, isa, harness.activation(spec, rows, rows), rows)
        prepared = kernel.prepare(one.tensors)
        for variant in (FEW, MANY):
            one.check(kernel.run(prepared, one.x, one.extra, variant, 2))


LAYOUTS = {
    "unaligned": lambda new, e, m, k: new(e * m * k + 1)[1:].view(e, m, k),
    "odd rows": lambda new, e, m, k: new(e, m, k + 1)[..., 1:],
    "every third column": lambda new, e, m, k: new(e, m, 3 * k)[..., 1::3],
    "turned": lambda new, e, m, k: new(e, k, m).transpose(1, 2),
    "rows first": lambda new, e, m, k: new(m, e, k).transpose(0, 1),
    "one row for all": lambda new, e, m, k: new(e, 1, k).expand(e, m, k),
    "one number for all": lambda new, e, m, k: new(1, 1, 1).expand(e, m, k),
    "one batch for all": lambda new, e, m, k: new(1, m, k).expand(e, m, k),
}


@pytest.mark.parametrize("isa", ISA_NAMES)
@pytest.mark.parametrize("name", ["nf4_bf16", "int8_int8", "nf4_int8_outliers", "codes_int8"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_of_x(layout: str, name: str, isa: str, builder: Builder) -> None:
    spec = SPECS[name]
    kernel, weight = builder.kernel(spec, isa), spec.weight
    new = functools.partial(torch.randn, dtype=getattr(torch, spec.x_dtype))
    if spec.is_quantized:
        new = lambda *shape: torch.randint(-127, 128, shape, dtype=torch.int8)  # noqa: E731
    for rows in (1, 3, 40):
        x = LAYOUTS[layout](new, weight.batch or 1, rows, weight.k)
        one = Case(spec, isa, x if weight.batch else x[0])
        prepared = kernel.prepare(one.tensors)
        for variant in (FEW, MANY):
            one.check(kernel.run(prepared, one.x, one.extra, variant, 2))


@pytest.mark.parametrize("isa", ISA_NAMES)
@pytest.mark.parametrize("name", EVERYWHERE)
def test_a_row_that_is_not_finite_spoils_no_other(name: str, isa: str, builder: Builder) -> None:
    spec = SPECS[name]
    kernel, one = builder.kernel(spec, isa), case(spec, isa, 20)
    prepared = kernel.prepare(one.tensors)
    for variant in (FEW, MANY):
        plain = kernel.run(prepared, one.x, one.extra, variant, 2)
        for bad in (torch.nan, torch.inf, -torch.inf):
            x, extra = one.x.clone(), list(one.extra)
            if spec.is_quantized:
                extra[-1] = extra[-1].clone()
                extra[-1][..., 7] = bad
            else:
                x[..., 7, 5] = bad
            if spec.outliers is not None and not math.isnan(bad):
                x[..., 0, 5] = 40  # the column is an outlier whatever stands in the row
                plain = kernel.run(prepared, torch.where(x.isfinite(), x, 1), one.extra, variant)
            got = kernel.run(prepared, x, extra, variant, 2)
            assert not got[..., 7, :].isfinite().any()
            got[..., 7, :] = plain[..., 7, :] = 0
            assert torch.equal(got, plain)


@pytest.mark.parametrize("isa", ISA_NAMES)
@pytest.mark.parametrize("name", ["nf4_bf16", "int8_int8", "fp4_f32_odd"])
@pytest.mark.parametrize("size", [0.0, 1e-45, 1e-40, 1e-38, 1e-30, 1e30])
def test_rows_of_any_magnitude(size: float, name: str, isa: str, builder: Builder) -> None:
    spec = SPECS[name]
    kernel = builder.kernel(spec, isa)
    x = harness.activation(spec, 18)
    x[..., ::2, :] *= size
    one = Case(spec, isa, x)
    prepared = kernel.prepare(one.tensors)
    for variant in (FEW, MANY):
        one.check(kernel.run(prepared, x, one.extra, variant, 2))


@pytest.mark.parametrize("isa", ISA_NAMES)
@pytest.mark.parametrize("name", EVERYWHERE)
def test_blocks_of_zeros(name: str, isa: str, builder: Builder) -> None:
    """Scales of 0, where the encoding keeps them, and codes that all are 0."""
    spec = SPECS[name]
    kernel, one = builder.kernel(spec, isa), case(spec, isa, 20)
    shape = spec.weight.shape
    dense = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    dense[..., : shape[-1] // 2] = 0
    dense[..., :1, :] = 0
    one.tensors = pack(dense, spec.weight.encoding).tensors()
    one.want = reference.run(spec, one.x, one.tensors, one.extra)
    one.bound = bounds.allowed(spec, one.x, one.tensors, one.extra)
    prepared = kernel.prepare(one.tensors)
    for variant in (FEW, MANY):
        one.check(kernel.run(prepared, one.x, one.extra, variant, 2))


@pytest.mark.parametrize("isa", ISA_NAMES)
def test_the_largest_sums_of_bytes(isa: str, builder: Builder) -> None:
    spec = SPECS["int8_int8_long"]
    kernel, one = builder.kernel(spec, isa), case(spec, isa, 3)
    one.x[:] = torch.tensor([1.0, -1.0, 0.5])[:, None]
    one.tensors[0].view(2, -1)[:] = torch.tensor([127, -127])[:, None]
    one.want = reference.run(spec, one.x, one.tensors, [])
    one.bound = bounds.allowed(spec, one.x, one.tensors, [])
    prepared = kernel.prepare(one.tensors)
    for variant in (FEW, MANY):
        one.check(kernel.run(prepared, one.x, [], variant))


def _first_read(weight: WeightOperand, name: str) -> int:
    """An element of a part before which nothing is read."""
    encoding = weight.encoding
    if name == "codes":
        return weight.offset * encoding.bits // 8
    return weight.offset // encoding.block[0] if name == "scales" and encoding.is_flat else 0


def changed_parts(spec: KernelSpec, tensors: list[Tensor]) -> Iterator[tuple[str, list[Tensor]]]:
    """The stored weight with one element of one part changed, of every part."""
    weight, names = spec.weight, spec.weight.encoding.parts
    dense = reference.operand(weight, tensors, torch.float32)
    for part, name in enumerate(names):
        start = _first_read(weight, name)
        for place in range(start, tensors[part].numel()):
            changed = [tensor.clone() for tensor in tensors]
            flat = changed[part].view(-1)
            flat[place] = flat[place] * 1.5 if flat.is_floating_point() else flat[place] ^ 16
            moved = reference.operand(weight, changed, torch.float32) != dense
            if bool(moved[..., : SEEN - 1].any()):
                break
        else:
            raise AssertionError(f"no {name} matter")
        yield name, changed


@pytest.mark.parametrize("name", SPECS)
def test_one_wrong_code_or_scale_is_seen(name: str, builder: Builder) -> None:
    """The bounds tell apart what a kernel makes of one code, scale or zero point that differs."""
    spec, isa = SPECS[name], ISA_NAMES[0]
    kernel = builder.kernel(spec, isa)
    one = case(spec, isa, min(spec.weight.k + 1, SEEN))
    if spec.outliers is not None and spec.outliers.columns is not None:
        one.extra[-2][:] = torch.arange(30, 30 + spec.outliers.columns)
        one.want = reference.run(spec, one.x, one.tensors, one.extra)
        one.bound = bounds.allowed(spec, one.x, one.tensors, one.extra)
    one.check(kernel.run(kernel.prepare(one.tensors), one.x, one.extra))
    for part, changed in changed_parts(spec, one.tensors):
        prepared = kernel.prepare(changed)
        for variant in (FEW, MANY):
            got = kernel.run(prepared, one.x, one.extra, variant)
            assert one.is_off(got), f"one wrong element of the {part} is not seen"


@pytest.mark.parametrize("name", [name for name in SPECS if SPECS[name].outliers])
def test_outliers_that_are_left_out_are_seen(name: str, builder: Builder) -> None:
    spec, isa = SPECS[name], ISA_NAMES[0]
    kernel, one = builder.kernel(spec, isa), case(spec, isa, 20)
    found = spec.outliers.columns is None
    columns = [c for c in OUTLIERS if c < spec.weight.k] if found else one.extra[-2].tolist()
    without = one.x.clone()
    without[..., columns] = 0
    one.want = reference.run(spec, without, one.tensors, one.extra)
    assert one.is_off(kernel.run(kernel.prepare(one.tensors), one.x, one.extra))


def test_without_openmp(builder: Builder) -> None:
    """Without barriers the compiler may move reads past writes that it takes for others."""
    spec, isa = SPECS["nf4_bf16"], ISA_NAMES[0]
    kernel, one = builder.kernel(spec, isa, openmp=False), case(spec, isa, 40)
    prepared = kernel.prepare(one.tensors)
    for variant in (FEW, MANY):
        one.check(kernel.run(prepared, one.x, one.extra, variant))
