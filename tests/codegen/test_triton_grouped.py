"""Triton kernels of grouped products: interpreted against the reference of every matrix alone.

The interpreter multiplies bfloat16 as integers in ``tl.dot``, so these run in float16 and float32.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fxquant.codegen.epilogue import Epilogue, EpilogueNode, EpilogueOperand
from fxquant.codegen.spec import KernelSpec, Outliers, WeightOperand
from fxquant.codegen.triton.gpu import FAMILIES
from fxquant.formats import Encoding
from fxquant.runtime import cubin
from tests.codegen import grouped, harness
from tests.codegen.cpp_specs import CHANNELS, GATED, NF4
from tests.codegen.specs import INTERPRETED_DTYPES

RESIDUAL = Epilogue((EpilogueOperand("n", "float32"), EpilogueOperand("mn", "float16")), GATED)
SILU = Epilogue(
    (),
    (
        EpilogueNode("aten.silu.default", ("%acc",)),
        EpilogueNode("aten.mul.Tensor", ("%0", "%acc1")),
    ),
)
# NumPy, which the interpreter computes with, warns of what is defined here.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def made(
    encoding: Encoding, shape: tuple[int, int, int], dtypes: tuple[str, str, str], **more: object
) -> KernelSpec:
    weight = WeightOperand.whole(encoding, shape, transposed=False)
    x, compute, out = dtypes
    return KernelSpec(weight, x, compute, out, grouped=True, **more)  # type: ignore[arg-type]


SPECS = {
    "f16": made(NF4, (3, 32, 64), ("float16",) * 3, epilogue=RESIDUAL),
    # Shares of the inputs in programs of their own, which a second kernel adds.
    "split": made(NF4, (2, 16, 512), ("float32",) * 3),
    "int8_in_call": made(CHANNELS, (3, 40, 96), ("float32", "int8", "float32")),
    "int8_codes": made(CHANNELS, (4, 32, 64), ("int8", "int8", "float16"), epilogue=RESIDUAL),
    "two": made(NF4, (2, 16, 64), ("int8", "int8", "float32"), epilogue=SILU, weights=2),
    "zero_points": made(
        Encoding(4, block=(1, 32), zero_point=True), (3, 20, 64), ("float32", "int8", "float32")
    ),
    "found_outliers": made(
        *(NF4, (3, 24, 64), ("float32", "int8", "float32")), outliers=Outliers("float16", 2.5)
    ),
    "given_outliers": made(
        *(CHANNELS, (3, 24, 96), ("float32", "int8", "float32")),
        outliers=Outliers("float16", columns=8),
    ),
}


def check(module: object, spec: KernelSpec, rows: int, kind: str) -> None:
    tensors = harness.stored(spec.weight.encoding, spec.weight.shape) * spec.weights
    x, extra = harness.activation(spec, rows), harness.operands(spec, rows)
    extra[-1] = grouped.ends_of(kind, rows, spec.weight.batch or 1)
    got = module.run(x, tensors, extra)  # type: ignore[attr-defined]
    grouped.check(spec, x, tensors, extra, got=got)


@pytest.mark.parametrize("name", SPECS)
def test_equals_every_matrix_alone(tmp_path: Path, name: str) -> None:
    spec = SPECS[name]
    module = harness.load(spec, tmp_path, interpreted=True)
    for rows, kind in (
        (7, "even"),
        (5, "one"),
        (1, "single"),
        (6, "tail"),
        (3, "first"),
        (0, "none"),
    ):
        check(module, spec, rows, kind)
    check(module, spec, 40, "even")


@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    spec=grouped.grouped_specs(INTERPRETED_DTYPES),
    rows=st.sampled_from((1, 3, 9)),
    kind=st.sampled_from(grouped.KINDS),
)
def test_drawn(tmp_path: Path, spec: KernelSpec, rows: int, kind: str) -> None:
    check(harness.load(spec, tmp_path, interpreted=True), spec, rows, kind)


@pytest.mark.parametrize("target", cubin.TARGETS)
@pytest.mark.parametrize("compute", ["bfloat16", "int8"])
def test_fits_and_uses_the_matrix_unit(tmp_path: Path, compute: str, target: str) -> None:
    encoding = CHANNELS if compute == "int8" else NF4
    spec = made(encoding, (8, 1024, 1024), ("bfloat16", compute, "bfloat16"))
    module = harness.load(spec, tmp_path, interpreted=False, gpu=FAMILIES[target])
    binary = cubin.compile_for(target, module, harness.build_for(module, 64))
    assert binary.spills == 0
    # Of NVIDIA's, integers: IMMA and IGMMA.
    units = "[A-Z]*I[A-Z]*MMA|v_mfma_i32_.*" if compute == "int8" else "[A-Z]*MMA|v_mfma_f32_.*"
    assert binary.count(units) > 0
