"""Specs that C++ kernels are tested on, each picked for what is hard about it."""

from __future__ import annotations

from fxquant.codegen.epilogue import Epilogue, EpilogueNode, EpilogueOperand
from fxquant.codegen.spec import KernelSpec, Outliers, WeightOperand
from fxquant.formats import Encoding

NF4 = Encoding(4, "nf4", (64,), scale=Encoding(8, "dynamic8", (256,), offset=True))
CHANNELS = Encoding(8, block=(1, -1))
BOOK = tuple((code - 100) ** 3 / 1e6 for code in range(256))
EVERY = ("", "e", "m", "n", "em", "en", "mn", "emn")
GATED = (
    EpilogueNode("aten.mul.Tensor", ("%acc", "%in0")),
    EpilogueNode("aten.sigmoid.default", ("%0",)),
    EpilogueNode("aten.add.Tensor", ("%1", "%in1"), (("alpha", 2),)),
)


def spec(
    name: str,
    encoding: Encoding | WeightOperand,
    shape: tuple[int, ...] = (),
    *,
    compute: str = "float32",
    x: str = "",
    out: str = "",
    epilogue: Epilogue | None = None,
    outliers: Outliers | None = None,
    transposed: bool = False,
) -> KernelSpec:
    """A spec of a whole parameter, or of part of one; the result has the dtype of x or its own."""
    weight = encoding
    if isinstance(weight, Encoding):
        weight = WeightOperand.whole(weight, shape, transposed=transposed)
    x = x or compute
    return KernelSpec(weight, x, compute, out or x, epilogue or Epilogue(), name, outliers)


def _every_operand() -> Epilogue:
    dtypes = ("float32", "float16", "bfloat16", "bool")
    operands = [EpilogueOperand(dims, dtypes[i % 4]) for i, dims in enumerate(EVERY)]
    nodes = [EpilogueNode("aten.add.Tensor", ("%acc", "%in0"))]
    nodes += [
        EpilogueNode("aten.add.Tensor", (f"%{i - 1}", f"%in{i}")) for i in range(1, len(EVERY))
    ]
    return Epilogue(tuple(operands), tuple(nodes))


# What stands in a name: the weight's levels, the dtype of the product, what is special.
SPECS = {
    one.name: one
    for one in (
        # 1100 scales in blocks of 256: the scale of a scale changes in the midst of tiles and rows.
        spec("nf4_bf16", NF4, (100, 704), compute="bfloat16", epilogue=Epilogue.bias("bfloat16")),
        spec("nf4_f32_batched", NF4, (3, 70, 192), epilogue=Epilogue.bias("float32", "en")),
        spec(
            "int8_int8",
            CHANNELS,
            (77, 331),
            compute="int8",
            x="float32",
            epilogue=Epilogue.bias("float16"),
        ),
        spec(
            "nf4_int8_outliers",
            NF4,
            (2, 70, 704),
            compute="int8",
            x="bfloat16",
            outliers=Outliers("bfloat16", threshold=6.0),
        ),
        spec(
            "int8_int8_given_outliers",
            CHANNELS,
            (70, 200),
            compute="int8",
            x="float16",
            epilogue=Epilogue(
                (EpilogueOperand("n", "float32"), EpilogueOperand("mn", "float16")), GATED
            ),
            outliers=Outliers("float16", columns=70),
        ),
        spec(
            "book8_int8_outliers",
            Encoding(8, BOOK, (32,)),
            (66, 96),
            compute="int8",
            x="float32",
            outliers=Outliers("float32", threshold=6.0),
        ),
        spec(
            "zero4_f16", Encoding(4, block=(1, 32), zero_point=True), (70, 160), compute="float16"
        ),
        spec(
            "zero8_bf16",
            Encoding(8, block=(1, 128), zero_point=True),
            (65, 300),
            compute="bfloat16",
        ),
        spec(
            "zero8_int8",
            Encoding(8, block=(64,), zero_point=True),
            (66, 256),
            compute="int8",
            x="float32",
        ),
        spec(
            "int2_f16_value_of_qkv",
            WeightOperand(
                Encoding(2, block=(32,), full_range=True),
                (3 * 96, 160),
                batch=None,
                n=96,
                k=160,
                strides=(0, 160, 1),
                offset=96 * 160,
            ),
            compute="float16",
        ),
        spec(
            "book8_bf16_e4m3",
            Encoding(8, BOOK, (64,), scale=Encoding(8, "e4m3", (256,))),
            (40, 320),
            compute="bfloat16",
            x="float32",
        ),
        spec("fp4_f32_odd", Encoding(4, "fp4", (64,)), (33, 77)),
        spec(
            "zero4_bf16_odd",
            Encoding(4, block=(16,), zero_point=True),
            (77, 70),
            compute="bfloat16",
            transposed=True,
        ),
        spec(
            "nf4_int8_odd",
            NF4,
            (33, 77),
            compute="int8",
            x="float32",
            outliers=Outliers("float16", threshold=6.0),
        ),
        spec("nf2_f32_operands", Encoding(2, "nf2", (16,)), (2, 65, 48), epilogue=_every_operand()),
        spec("int8_f32_one", Encoding(8, block=(1, -1)), (1, 1)),
        spec(
            "int8_int8_odd",
            Encoding(8, block=(64,)),
            (33, 77),
            compute="int8",
            x="float16",
            outliers=Outliers("float16", threshold=6.0),
        ),
        # Codes of x: in place where k is whole tiles, padded, and one by one.
        spec(
            "codes_int8",
            CHANNELS,
            (77, 320),
            compute="int8",
            x="int8",
            out="float32",
            epilogue=Epilogue.bias("float16"),
        ),
        spec(
            "codes_nf4_batched",
            NF4,
            (2, 70, 704),
            compute="int8",
            x="int8",
            out="bfloat16",
            epilogue=Epilogue.bias("float32", "en"),
        ),
        spec(
            "codes_zero8",
            Encoding(8, block=(64,), zero_point=True),
            (66, 200),
            compute="int8",
            x="int8",
            out="float16",
        ),
        spec(
            "codes_fp4_odd",
            Encoding(4, "fp4", (64,)),
            (33, 77),
            compute="int8",
            x="int8",
            out="float32",
        ),
        # A row ends in the midst of a block.
        spec("groups_int8", Encoding(8, block=(1, 128)), (70, 320), compute="int8", x="float32"),
        # More products of bytes than a 32-bit sum holds.
        spec("int8_int8_long", CHANNELS, (2, 33000), compute="int8", x="float32"),
    )
}

EVERYWHERE = (
    "nf4_bf16",
    "int8_int8",
    "nf4_int8_outliers",
    "codes_int8",
    "fp4_f32_odd",
    "int8_int8_long",
)
"""Built for every instruction set; the others for one or two."""
