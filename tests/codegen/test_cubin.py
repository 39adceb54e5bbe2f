"""Printed kernels, built for GPUs that are not there: do they fit, and use the tensor cores?"""

import sys

import pytest
import triton
from packaging.version import Version

from fxquant import errors
from fxquant.codegen.epilogue import Epilogue, EpilogueNode, EpilogueResult
from fxquant.codegen.spec import KernelSpec
from fxquant.codegen.triton.gpu import FAMILIES
from fxquant.formats import Encoding
from fxquant.runtime import cubin
from tests.codegen import harness

NF4 = Encoding(4, "nf4", (64,), scale=Encoding(8, "dynamic8", (256,), offset=True))
GATED = Epilogue(
    (),
    (
        EpilogueNode("aten.silu.default", ("%acc",)),
        EpilogueNode("aten.mul.Tensor", ("%0", "%acc1")),
    ),
)
THREE = Epilogue((), (), tuple(EpilogueResult(f"%acc{i}", "bfloat16") for i in (1, 2)))
SPECS = {
    "nf4": (NF4, "bfloat16", Epilogue.bias("bfloat16")),
    "int8": (Encoding(8, block=(1, -1)), "bfloat16", Epilogue()),
    "int4": (Encoding(4, block=(1, 128)), "bfloat16", Epilogue()),
    "fp4": (Encoding(4, "fp4"), "float16", Epilogue()),
    "int2": (Encoding(2, block=(32,), full_range=True), "bfloat16", Epilogue()),
    "experts": (NF4, "bfloat16", Epilogue.bias("bfloat16", "en")),
    "channels": (Encoding(4, block=(1, -1)), "bfloat16", Epilogue()),
    "exact": (NF4, "float32", Epilogue()),
    "gate_up": (NF4, "bfloat16", GATED),
    "q_k_v": (NF4, "bfloat16", THREE),
}
WEIGHTS = {"gate_up": 2, "q_k_v": 3}
SHAPES = {"experts": (8, 1024, 1024)}
IS_TRITON_3_8 = Version(triton.__version__) >= Version("3.8")
# Loads of 16 bytes, of those that wait for them and those that go to shared memory meanwhile.
WIDE = r"LDG(STS)?\..*\.128|global_load_(dwordx4|b128)|buffer_load_(dwordx4|b128)"
# What products of 16-bit floats run on; and everything that a matrix unit can be asked to do.
MATRIX = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA", "gfx942": "v_mfma_.*"}
ANY_MATRIX = {**dict.fromkeys(MATRIX, "[A-Z]*MMA"), "gfx942": "v_mfma_.*"}
CASES = [
    *(("nf4", target, rows) for target in cubin.TARGETS for rows in (16, 128)),
    *(("nf4", "sm_90", rows) for rows in (32, 64)),
    *(("experts", target, 16) for target in cubin.TARGETS),
    *(("int8", target, 128) for target in cubin.TARGETS),
    *(("int8", target, 1) for target in ("sm_80", "sm_90")),
    *(("int4", target, 128) for target in cubin.TARGETS),
    *(("int2", target, 128) for target in ("sm_90", "gfx942")),
    *(("fp4", target, 128) for target in cubin.TARGETS),
    *(("exact", target, rows) for target, rows in (("sm_80", 1), ("sm_80", 64), ("sm_100", 16))),
    *(("gate_up", target, rows) for target in ("sm_80", "sm_90", "gfx942") for rows in (16, 128)),
    *(("q_k_v", target, 128) for target in ("sm_80", "sm_90", "sm_100")),
    ("q_k_v", "sm_90", 16),
    *(("exact", target, 64) for target in ("sm_90", "sm_100", "gfx942")),
]


@pytest.fixture(scope="module")
def modules(tmp_path_factory):
    folder = tmp_path_factory.mktemp("printed")
    made = {}
    for name, (encoding, dtype, epilogue) in SPECS.items():
        shape = SHAPES.get(name, (4096, 4096))
        weight = harness.whole(encoding, *shape)
        spec = KernelSpec(
            weight,
            *(dtype,) * 3,
            epilogue,
            f"{name}_{shape[-2]}x{shape[-1]}",
            weights=WEIGHTS.get(name, 1),
        )
        for target, gpu in FAMILIES.items():
            made[name, target] = harness.load(spec, folder, interpreted=False, gpu=gpu)
        made[name, "any"] = harness.load(spec, folder, interpreted=False)
    return made


def build_of(modules, name, target, rows):
    """The machine code for a number of rows, which has to fit, and what it was made of."""
    build = harness.build_for(modules[name, target], rows)
    binary = cubin.compile_for(target, modules[name, target], build)
    processor = FAMILIES[target].processor
    assert 0 < binary.registers <= processor.most_registers
    assert binary.spills == 0
    assert binary.shared_bytes <= processor.program_bytes
    return binary, build


@pytest.mark.parametrize(("name", "target", "rows"), CASES)
def test_fits_and_uses_the_matrix_unit(modules, name, target, rows):
    binary, build = build_of(modules, name, target, rows)
    # Two warps at least on every part of a processor that issues instructions.
    assert binary.occupancy * FAMILIES[target].processor.warps >= 8
    matrix = binary.count(MATRIX[target])
    any_matrix = binary.count(ANY_MATRIX[target])
    if "gemv" in build.name:
        assert any_matrix == 0
    elif name != "exact":
        assert matrix > 0
    elif target != "gfx942":
        assert any_matrix == 0, "NVIDIA's matrix units would round float32 to tf32"


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
def test_few_rows_stream_wide_words_that_stay_where_they_are(modules, target):
    """Codes come 16 bytes at a time; decoding eight takes 16 permutations and nothing slow.

    Those are 12 for the bytes and 4 that pair them. Unpacked, converted or shuffled is nothing; the
    matrix unit takes what was permuted. A quarter is to spare for what surrounds the loop.
    """
    binary, build = build_of(modules, "nf4", target, 16)
    weights = build.constants["BLOCK_N"] * build.constants["BLOCK_K"] / (32 * binary.warps)
    assert binary.count(WIDE) > 0
    assert 2 * weights <= binary.count("PRMT") <= 2.5 * weights
    assert binary.count(r"SHFL|F2F|I2F") == 0
    # Blackwell's programs hand a byte to one another, outside of the loop.
    handed = 1 if IS_TRITON_3_8 else 2
    assert binary.count(r"LDS\.U8|STS\.U8") == (handed if target == "sm_100" else 0)
    # Twelve warps or more: what hides the way to memory.
    assert binary.occupancy >= 12 / 64
    if target == "sm_100":
        return  # Decoding, not memory, is what takes longest there.
    # Little's law: bytes on their way on a processor, in the time of a load, at full bandwidth.
    gpu, flight = FAMILIES[target], build.options["num_stages"] - 1
    flight *= build.constants["BLOCK_N"] * build.constants["BLOCK_K"] // 2
    programs = binary.occupancy * gpu.processor.warps // binary.warps
    assert programs * flight >= gpu.latency * gpu.bandwidth / gpu.processors


def test_amd_looks_pairs_of_levels_up_in_shared_memory(modules):
    """Only the table is made by choosing: two codes of each thread, 15 choices each."""
    chosen = {}
    for target in ("gfx942", "any"):
        build = harness.build_for(modules["nf4", target], 64)
        binary = cubin.compile_for("gfx942", modules["nf4", target], build)
        weights = build.constants["BLOCK_N"] * build.constants["BLOCK_K"] // (64 * binary.warps)
        assert binary.spills == 0
        looked_up = binary.count("ds_read_b32") + 2 * binary.count("ds_read2(st64)?_b32")
        assert (looked_up >= weights / 2) == (target == "gfx942")
        chosen[target] = binary.count(r"v_cndmask_b32\w*") / weights
    assert chosen["gfx942"] < 15 / 2
    assert chosen["any"] > 15


@pytest.mark.parametrize("name", ["nf4", "int8", "int2", "channels", "gate_up", "experts"])
def test_hopper_finishes_a_step_before_the_next_weights_are_decoded(modules, name):
    """Products read decoded weights from registers while they are under way."""
    module = modules[name, "sm_90"]
    for most in (16, 128):
        binary = cubin.compile_for("sm_90", module, harness.build_for(module, most))
        assert binary.count("HGMMA") > 0
        assert binary.in_flight == 0


def test_what_is_printed_for_no_gpu_would_leave_products_under_way(modules):
    module = modules["experts", "any"]
    binary = cubin.compile_for("sm_90", module, harness.build_for(module, 128))
    assert binary.in_flight > 0


def test_the_portable_way_compiles_for_nvidia_too(modules):
    module = modules["nf4", "any"]
    build = harness.build_for(module, 16)
    binary = cubin.compile_for("sm_90", module, build)
    assert binary.spills == 0
    assert binary.count("HGMMA") > 0


def test_sum_over_a_split_is_built_too(tmp_path):
    spec = KernelSpec(
        harness.whole(NF4, 64, 4096), *["bfloat16"] * 3, Epilogue.bias("bfloat16"), "narrow"
    )
    module = harness.load(spec, tmp_path, interpreted=False)
    reductions = [build for build in cubin.builds(module) if "reduce" in build.name]
    assert reductions
    binary = cubin.compile_for("sm_90", module, reductions[-1])
    assert binary.spills == 0


def test_without_triton_it_is_one_clear_sentence(modules, monkeypatch):
    module = modules["nf4", "sm_90"]
    build = next(cubin.builds(module))
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(errors.KernelError, match="pip install"):
        cubin.compile_for("sm_90", module, build)
