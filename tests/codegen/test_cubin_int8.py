"""Printed int8 kernels, built for GPUs that are not there: integers on the matrix unit, and fit."""

import pytest

from fxquant.codegen.epilogue import Epilogue
from fxquant.codegen.quantize import QuantizeSpec
from fxquant.codegen.spec import KernelSpec, Outliers
from fxquant.codegen.triton.gpu import FAMILIES
from fxquant.formats import Encoding
from fxquant.runtime import cubin
from tests.codegen import harness
from tests.codegen.test_cubin import ANY_MATRIX, IS_TRITON_3_8, MATRIX, WIDE

INT8 = Encoding(8, block=(1, -1))
NF4 = Encoding(4, "nf4", (64,), scale=Encoding(8, "dynamic8", (256,), offset=True))
FOUND = Outliers("bfloat16", threshold=6.0)
PRODUCTS = {
    "w8a8": (INT8, None),
    "codes": (INT8, None),
    "w4a8": (Encoding(4, block=(1, 128), zero_point=True), None),
    "found": (NF4, FOUND),
    "gathered": (INT8, FOUND),
    "given": (INT8, Outliers("bfloat16", columns=41)),
    "exact": (INT8, Outliers("float32", threshold=6.0)),
    "short": (Encoding(8, block=(16,)), None),
    "turned": (Encoding(8, block=(-1, 1)), None),
}
# Before 3.8 Triton has no integer product for Blackwell's own matrix unit: it takes the one before.
BLACKWELL = "UTCIMMA" if IS_TRITON_3_8 else "IMMA"
INTEGERS = {"sm_80": "IMMA", "sm_90": "IGMMA", "sm_100": BLACKWELL, "gfx942": "v_mfma_i32_.*"}
FLOATS = {**MATRIX, "sm_100": "UTCHMMA|HMMA", "gfx942": "v_mfma_f32_.*"}
# What a correctly rounded quotient takes, and one that is off by two does not.
DIVISION = {**dict.fromkeys(("sm_80", "sm_90", "sm_100"), "FCHK"), "gfx942": "v_div_fixup_f32"}
CASES = [
    *(("w8a8", target, rows) for target in cubin.TARGETS for rows in (16, 128)),
    *(("w4a8", target, 128) for target in cubin.TARGETS),
    *(("found", target, 128) for target in cubin.TARGETS),
    *(("gathered", "sm_90", rows) for rows in (128, 2048)),
    ("gathered", "sm_80", 512),
    *(("given", target, 128) for target in ("sm_80", "sm_100")),
    *(("exact", target, 64) for target in ("sm_80", "sm_100")),
    *(("short", target, 64) for target in ("sm_90", "sm_100")),
    *(("turned", target, 128) for target in ("sm_90", "sm_100")),
    ("found", "sm_100", 16),
    ("codes", "sm_90", 128),
]


@pytest.fixture(scope="module")
def modules(tmp_path_factory):
    folder = tmp_path_factory.mktemp("printed")
    made = {}
    for name, (encoding, outliers) in PRODUCTS.items():
        weight = harness.whole(encoding, 4096, 4096, transposed=name == "turned")
        x = "int8" if name == "codes" else "bfloat16"
        bias = Epilogue.bias("bfloat16")
        spec = KernelSpec(weight, x, "int8", "bfloat16", bias, name, outliers)
        for target, gpu in FAMILIES.items():
            made[name, target] = harness.load(spec, folder, interpreted=False, gpu=gpu)
    for name, way in {"rows": ("token",), "whole": ("tensor", True), "fixed": ("static",)}.items():
        spec = QuantizeSpec(4096, "bfloat16", *way, name=name)
        made |= dict.fromkeys(
            ((name, target) for target in FAMILIES), harness.load(spec, folder, interpreted=False)
        )
    return made


def build(module, found, target):
    """The machine code of one kernel, which has to fit."""
    binary = cubin.compile_for(target, module, found)
    processor = FAMILIES[target].processor
    assert 0 < binary.registers <= processor.most_registers
    assert binary.spills == 0
    assert binary.shared_bytes <= processor.program_bytes
    assert binary.occupancy * processor.warps >= 8
    return binary


@pytest.mark.parametrize(("name", "target", "rows"), CASES)
def test_products(modules, name, target, rows):
    module = modules[name, target]
    binary = build(module, harness.build_for(module, rows), target)
    integers, floats = binary.count(INTEGERS[target]), binary.count(FLOATS[target])
    if name == "exact":
        # Tiles are too small for the matrix unit that wants 64 outputs.
        integers = binary.count(r"I(G)?MMA")
    if name == "short":
        assert binary.count(ANY_MATRIX[target]) == 0, "matrix units would round float32 to tf32"
        return
    assert integers > 0
    if name == "w8a8":
        assert binary.count(WIDE) > 0
    assert (floats > 0) == (name in ("found", "gathered", "given"))
    assert binary.count(ANY_MATRIX[target]) == integers + floats
    assert binary.count(DIVISION[target]) > 0


@pytest.mark.parametrize(
    ("name", "step", "target"),
    [
        *(("rows", "_quantize", target) for target in cubin.TARGETS),
        *(("whole", step, target) for step in ("_peaks", "_quantize") for target in ("sm_90",)),
        *(("fixed", "_quantize", target) for target in ("sm_80", "gfx942")),
        *(("found", step, "sm_90") for step in ("_find", "_find_many", "_quantize", "_gather")),
        *(("found", step, "gfx942") for step in ("_find_many", "_quantize", "_gather")),
        *(("given", step, "sm_100") for step in ("_mark", "_gather")),
    ],
)
def test_steps_before_a_product(modules, name, step, target):
    module = modules[name, target]
    (found,) = (b for b in cubin.builds(module) if b.name.endswith(step))
    binary = build(module, found, target)
    assert binary.count(ANY_MATRIX[target]) == 0
    assert (binary.count(DIVISION[target]) > 0) == (step == "_quantize")


def test_a_product_of_codes_has_no_steps(modules):
    names = [b.name for b in cubin.builds(modules["codes", "sm_90"])]
    assert all(name.startswith(("codes_gemm", "codes_reduce")) for name in names)
    names = [b.name for b in cubin.builds(modules["found", "sm_90"])]
    assert names[-4:] == ["found_find", "found_find_many", "found_quantize", "found_gather"]
