"""C++ kernels of grouped products against the reference of every matrix alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from fxquant.codegen.epilogue import Epilogue, EpilogueNode, EpilogueOperand
from fxquant.codegen.spec import FLOAT_DTYPES, KernelSpec, Outliers, WeightOperand
from fxquant.formats import Encoding
from tests.codegen import cpp_harness, grouped, harness
from tests.codegen.cpp_harness import FEW, MANY, Builder
from tests.codegen.cpp_specs import CHANNELS, GATED, NF4

SILU = Epilogue(
    (),
    (
        EpilogueNode("aten.silu.default", ("%acc",)),
        EpilogueNode("aten.mul.Tensor", ("%0", "%acc1")),
    ),
)
RESIDUAL = Epilogue((EpilogueOperand("n", "float32"), EpilogueOperand("mn", "float16")), GATED)


def made(
    encoding: Encoding, shape: tuple[int, int, int], dtypes: tuple[str, str, str], **more: object
) -> KernelSpec:
    weight = WeightOperand.whole(encoding, shape, transposed=False)
    x, compute, out = dtypes
    return KernelSpec(weight, x, compute, out, grouped=True, **more)  # type: ignore[arg-type]


SPECS = {
    # Rows that are lines as they are, and a scale of scales that changes inside of a matrix.
    "nf4_bf16": made(NF4, (4, 70, 128), ("bfloat16",) * 3),
    "nf4_f32": made(NF4, (3, 33, 77), ("float32",) * 3, epilogue=RESIDUAL),
    "nf4_f32_regular": made(NF4, (3, 70, 128), ("float32",) * 3, epilogue=SILU, weights=2),
    "int8_in_call": made(CHANNELS, (3, 130, 192), ("float32", "int8", "float32")),
    "int8_codes": made(CHANNELS, (5, 66, 128), ("int8", "int8", "float16"), epilogue=RESIDUAL),
    "nf4_codes_two": made(NF4, (3, 64, 128), ("int8", "int8", "float32"), epilogue=SILU, weights=2),
    "found_outliers": made(
        *(NF4, (3, 70, 128), ("float32", "int8", "float32")), outliers=Outliers("float16", 2.5)
    ),
    "given_outliers": made(
        *(CHANNELS, (3, 70, 96), ("float32", "int8", "float32")),
        outliers=Outliers("float16", columns=8),
    ),
    "gathered_scales": made(Encoding(4, block=(16,)), (3, 20, 24), ("float16",) * 3),
}
ISA = cpp_harness.isas()[0]


@pytest.fixture(scope="module")
def builder() -> Iterator[Builder]:
    found = Builder()
    for spec in SPECS.values():
        found.start(spec, ISA)
    yield found
    found.close()


def check(kernel: cpp_harness.Kernel, x: Tensor, extra: list[Tensor], **how: int) -> None:
    spec = kernel.spec
    tensors = harness.stored(spec.weight.encoding, spec.weight.shape)
    got = kernel.run(kernel.prepare(tensors * spec.weights), x, extra, **how)
    grouped.check(spec, x, tensors * spec.weights, extra, got=got)


@pytest.mark.parametrize("kind", grouped.KINDS)
@pytest.mark.parametrize("name", SPECS)
def test_equals_every_matrix_alone(builder: Builder, name: str, kind: str) -> None:
    spec = SPECS[name]
    kernel = builder.kernel(spec, ISA)
    for rows, variant, threads in (
        (1, FEW, 1),
        (1, MANY, 2),
        (9, FEW, 2),
        (23, MANY, 2),
        (0, FEW, 1),
    ):
        x, extra = harness.activation(spec, rows), harness.operands(spec, rows)
        extra[-1] = grouped.ends_of(kind, rows, spec.weight.batch or 1)
        check(kernel, x, extra, variant=variant, threads=threads)


@pytest.mark.parametrize("name", ["nf4_bf16", "int8_codes"])
@pytest.mark.parametrize("variant", [FEW, MANY])
def test_more_rows_than_are_worked_off_at_once(builder: Builder, name: str, variant: int) -> None:
    """Also one row more: it is a line, and not a panel."""
    spec = SPECS[name]
    for ends in ([0, 769, 770, 771, 771], [2, 2, 771, 771, 771]):
        x, extra = harness.activation(spec, 771), harness.operands(spec, 771)
        extra[-1] = torch.tensor(ends[: spec.weight.batch], dtype=torch.int32)
        check(builder.kernel(spec, ISA), x, extra, variant=variant, threads=2)


def test_strides_and_ends_beyond_the_rows(builder: Builder) -> None:
    """What does not keep to the rules reads and writes nothing else."""
    spec = SPECS["nf4_bf16"]
    kernel = builder.kernel(spec, ISA)
    x = harness.activation(spec, 6).T.contiguous().T
    extra = [torch.tensor([2, 3, 3, 6], dtype=torch.int32)]
    check(kernel, x, extra)
    tensors = harness.stored(NF4, spec.weight.shape)
    prepared = kernel.prepare(tensors)
    beyond = kernel.run(prepared, x, [torch.tensor([4, 1, 99, 100], dtype=torch.int32)])
    clipped = kernel.run(prepared, x, [torch.tensor([4, 4, 6, 6], dtype=torch.int32)])
    assert torch.equal(beyond, clipped)


def test_drawn(builder: Builder) -> None:
    specs = cpp_harness.drawn(grouped.grouped_specs(FLOAT_DTYPES), 6)
    specs = [dataclasses.replace(spec, name=f"drawn{n}") for n, spec in enumerate(specs)]
    for spec in specs:
        builder.start(spec, ISA)
    for spec in specs:
        for kind, variant in (("even", FEW), ("one", MANY), ("tail", FEW)):
            x, extra = harness.activation(spec, 11), harness.operands(spec, 11)
            extra[-1] = grouped.ends_of(kind, 11, spec.weight.batch or 1)
            check(builder.kernel(spec, ISA), x, extra, variant=variant)
