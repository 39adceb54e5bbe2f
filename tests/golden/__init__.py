"""Printed kernels that are reviewed like source: ``make golden`` prints them again."""

from __future__ import annotations

from pathlib import Path

from fxquant.codegen import Header, cpp, triton
from fxquant.codegen.cpp.isa import AMX, AVX2, AVX512, PORTABLE
from fxquant.codegen.cpp.sections import divided
from fxquant.codegen.epilogue import Epilogue, EpilogueNode, EpilogueOperand, EpilogueResult
from fxquant.codegen.quantize import QuantizeSpec
from fxquant.codegen.spec import KernelSpec, Outliers, WeightOperand
from fxquant.codegen.triton.gpu import FAMILIES
from fxquant.formats import Encoding
from tests.codegen import prologues

ROWS = QuantizeSpec(
    384,
    "bfloat16",
    name="layer_norm_quantize_384",
    prologue=prologues.layer_norm("bfloat16"),
)
FOLDER = Path(__file__).parent
NF4 = Encoding(4, "nf4", (64,), scale=Encoding(8, "dynamic8", (256,), offset=True))
GATED = Epilogue(
    (EpilogueOperand("n", "bfloat16"), EpilogueOperand("mn", "bfloat16")),
    (
        EpilogueNode("aten.add.Tensor", ("%acc", "%in0")),
        EpilogueNode("aten.gelu.default", ("%0",), (("approximate", "tanh"),)),
        EpilogueNode("aten.add.Tensor", ("%1", "%in1")),
    ),
)


SWIGLU = Epilogue(
    (),
    (
        EpilogueNode("aten.silu.default", ("%acc",)),
        EpilogueNode("aten.mul.Tensor", ("%0", "%acc1")),
    ),
)
QKV = Epilogue(
    (EpilogueOperand("n", "float32"),) * 3,
    (
        EpilogueNode("aten.add.Tensor", ("%acc1", "%in1")),
        EpilogueNode("aten.add.Tensor", ("%acc2", "%in2")),
        EpilogueNode("aten.add.Tensor", ("%acc", "%in0")),
    ),
    (EpilogueResult("%0", "float32"), EpilogueResult("%1", "float32")),
)


def _spec(
    name: str, weight: WeightOperand, dtype: str = "bfloat16", epilogue: Epilogue | None = None
) -> KernelSpec:
    return KernelSpec(weight, dtype, dtype, dtype, epilogue or Epilogue(), name)


def _whole(encoding: Encoding, *shape: int, transposed: bool = False) -> WeightOperand:
    return WeightOperand.whole(encoding, shape, transposed=transposed)


BIAS = Epilogue.bias("bfloat16")
SPECS = (
    _spec("nf4_linear_1536x384_bias_gelu_add", _whole(NF4, 1536, 384), epilogue=GATED),
    _spec("nf4_experts_8x256x128", _whole(NF4, 8, 256, 128)),
    _spec("fp4_linear_33x77_odd", _whole(Encoding(4, "fp4"), 33, 77), "float32"),
    _spec("int4_linear_512x512_group", _whole(Encoding(4, block=(1, 128)), 512, 512), "float16"),
)

INT8_SPECS = (
    KernelSpec(
        _whole(Encoding(8, block=(1, -1)), 384, 1536),
        *("bfloat16", "int8", "bfloat16"),
        BIAS,
        "llm_int8_linear_384x1536_bias",
        Outliers("bfloat16", threshold=6.0),
    ),
    KernelSpec(
        _whole(Encoding(4, block=(1, 128), zero_point=True), 512, 512),
        *("int8", "int8", "float16"),
        name="w4a8_linear_512x512_group",
    ),
)

# Codes are decoded by what a vendor's GPUs are quick at.
GPUS = ("sm_90", "gfx942")

# Each is printed for both targets: what differs is how, not what.
PAIRS = (
    (_spec("nf4_linear_384x1536_bias", _whole(NF4, 384, 1536), epilogue=BIAS), AVX512),
    (_spec("nf4_linear_384x1536_bias", _whole(NF4, 384, 1536), epilogue=BIAS), AVX2),
    (
        KernelSpec(
            _whole(Encoding(8, block=(1, -1)), 384, 384),
            *("float32", "int8", "float32"),
            name="int8_linear_384x384_channel",
        ),
        PORTABLE,
    ),
    (QuantizeSpec(1536, "bfloat16", "tensor", clipped=True, name="quantize_1536_tensor"), AVX2),
    (ROWS, AVX512),
    (
        KernelSpec(
            _whole(NF4, 5632, 2048),
            *("bfloat16", "bfloat16", "bfloat16"),
            SWIGLU,
            "nf4_gate_up_5632x2048_silu",
            weights=2,
        ),
        AMX,
    ),
    (
        KernelSpec(
            _whole(Encoding(8, block=(1, -1)), 384, 384),
            *("int8", "int8", "float32"),
            QKV,
            "w8a8_query_key_value_384x384",
            weights=3,
        ),
        AVX2,
    ),
)


def texts() -> dict[str, str]:
    """The text of every golden file, by its name."""
    found = {}
    for spec in (*SPECS, *INT8_SPECS, *(spec for spec, _ in PAIRS)):
        found[f"kernel_{spec.name}.py"] = triton.render(spec, _header(spec))
    for gpu in GPUS:
        spec = PAIRS[0][0]
        found[f"kernel_{spec.name}_{gpu}.py"] = triton.render(spec, _header(spec), FAMILIES[gpu])
    for spec, isa in PAIRS:
        main, sections = divided(cpp.render(spec, _header(spec), isa))
        found.update({f"kernel_{spec.name}_{isa.name}.cpp": main, **sections})
    return found


def printed() -> list[Path]:
    """The golden files that are there."""
    return [*FOLDER.glob("kernel_*"), *FOLDER.glob("*.h")]


def _header(spec: KernelSpec | QuantizeSpec) -> Header:
    return Header(("golden",), spec.name.split("_")[0])
