"""Hypothesis strategies: encodings, operands of odd sizes and strange strides, whole specs.

Activations are standard normal numbers.
"""

from __future__ import annotations

import math

from hypothesis import strategies as st

from fxquant.codegen.epilogue import (
    FLOAT_DTYPES,
    Epilogue,
    EpilogueNode,
    EpilogueOperand,
    EpilogueResult,
)
from fxquant.codegen.spec import KernelSpec, Outliers, WeightOperand
from fxquant.formats import Encoding

INTERPRETED_DTYPES = ("float16", "float32")
SCALES = (None, Encoding(8, "dynamic8", (32,), offset=True), Encoding(8, "e4m3", (256,)))


@st.composite
def encodings(draw: st.DrawFn) -> Encoding:
    """Codebooks and uniform levels of every width, flat and 2-D blocks."""
    bits = draw(st.sampled_from((2, 4, 8)))
    book = {2: "nf2", 4: "nf4", 8: "nf8"}[bits]
    block = draw(st.sampled_from(((16,), (64,), (1, 16), (1, -1), (-1, 1), (16, 16), (16, 1))))
    if draw(st.booleans()):
        return Encoding(bits, book, block, scale=draw(st.sampled_from(SCALES)))
    return Encoding(bits, block=block, zero_point=draw(st.booleans()))


@st.composite
def weights(draw: st.DrawFn) -> WeightOperand:
    """A whole parameter, transposed or not, with or without a batch, or a slice of one."""
    encoding = draw(encodings())
    rows, cols = draw(st.integers(1, 40)), draw(st.integers(1, 70))
    batch = draw(st.sampled_from((None, None, 1, 3)))
    shape = (rows, cols) if batch is None else (batch, rows, cols)
    whole = WeightOperand.whole(encoding, shape, transposed=draw(st.booleans()))
    if not draw(st.booleans()):
        return whole
    first_n, first_k = draw(st.integers(0, whole.n - 1)), draw(st.integers(0, whole.k - 1))
    step = draw(st.sampled_from((1, 2)))
    n = math.ceil((whole.n - first_n) / step)
    k = draw(st.integers(1, whole.k - first_k))
    e, sn, sk = whole.strides
    offset = first_n * sn + first_k * sk
    return WeightOperand(encoding, shape, batch, n, k, (e, step * sn, sk), offset)


@st.composite
def epilogues(
    draw: st.DrawFn, *, batched: bool, dtypes: tuple[str, ...] = INTERPRETED_DTYPES
) -> Epilogue:
    """Nothing, a bias, or a gated residual."""
    kind = draw(st.sampled_from(("none", "bias", "gated")))
    if kind == "none":
        return Epilogue()
    dtype = draw(st.sampled_from(dtypes))
    if kind == "bias":
        return Epilogue.bias(dtype, draw(st.sampled_from(("n", "en"))) if batched else "n")
    return Epilogue(
        (EpilogueOperand("n", dtype), EpilogueOperand("emn" if batched else "mn", dtype)),
        (
            EpilogueNode("aten.mul.Tensor", ("%acc", "%in0")),
            EpilogueNode("aten.sigmoid.default", ("%0",)),
            EpilogueNode("aten.add.Tensor", ("%1", "%in1"), (("alpha", 2),)),
        ),
    )


@st.composite
def specs(draw: st.DrawFn, dtypes: tuple[str, ...] = INTERPRETED_DTYPES) -> KernelSpec:
    """Whole specs in some dtypes, by default those that Triton's interpreter gets right."""
    weight = draw(weights())
    compute = draw(st.sampled_from(dtypes))
    x = draw(st.sampled_from((compute, "float32")))
    out = draw(st.sampled_from(dtypes))
    epilogue = draw(epilogues(batched=weight.batch is not None, dtypes=dtypes))
    return KernelSpec(weight, x, compute, out, epilogue, "drawn")


@st.composite
def outliers(draw: st.DrawFn, k: int, dtypes: tuple[str, ...] = FLOAT_DTYPES) -> Outliers | None:
    """None, by thresholds that most, some and no columns reach, and given columns."""
    dtype = draw(st.sampled_from(dtypes))
    kind = draw(st.sampled_from(("none", "threshold", "columns")))
    if kind == "threshold":
        return Outliers(dtype, threshold=draw(st.sampled_from((0.5, 2.0, 100.0))))
    if kind == "columns":
        return Outliers(dtype, columns=draw(st.integers(1, min(k, 9))))
    return None


@st.composite
def int8_specs(draw: st.DrawFn, dtypes: tuple[str, ...] = FLOAT_DTYPES) -> KernelSpec:
    """Specs whose activations are rounded to int8, with and without outliers."""
    weight = draw(weights())
    x, out = draw(st.sampled_from(dtypes)), draw(st.sampled_from(dtypes))
    epilogue = draw(epilogues(batched=weight.batch is not None))
    left_out = draw(outliers(weight.k, dtypes))
    return KernelSpec(weight, x, "int8", out, epilogue, "drawn", left_out)


@st.composite
def joined_specs(draw: st.DrawFn, dtypes: tuple[str, ...] = INTERPRETED_DTYPES) -> KernelSpec:
    """Several weights with one x: a gate and what it opens, or results of their own with a bias.

    Also one weight whose sums are a result beside what is made of them; float and int8 products,
    x with and without codes, with and without outliers.
    """
    weight = draw(weights())
    dtype, out = draw(st.sampled_from(dtypes)), draw(st.sampled_from(dtypes))
    x, compute = draw(st.sampled_from(((dtype, dtype), (dtype, "int8"), ("int8", "int8"))))
    rounds = compute == "int8" and x != "int8"
    left_out = draw(outliers(weight.k, dtypes)) if rounds else None
    full = "emn" if weight.batch is not None else "mn"
    kind = draw(st.sampled_from(("gate", "several", "both")))
    if kind == "gate":
        nodes = (
            EpilogueNode("aten.silu.default", ("%acc",)),
            EpilogueNode("aten.mul.Tensor", ("%0", "%acc1")),
        )
        more = (EpilogueResult("%acc1", draw(st.sampled_from(dtypes))),)
        epilogue = Epilogue((), nodes, more if draw(st.booleans()) else ())
        return KernelSpec(weight, x, compute, out, epilogue, "drawn", left_out, weights=2)
    if kind == "both":
        operand = EpilogueOperand(full, draw(st.sampled_from(dtypes)))
        nodes = (
            EpilogueNode("aten.add.Tensor", ("%acc", "%in0")),
            EpilogueNode("aten.relu.default", ("%0",)),
        )
        more = tuple(EpilogueResult(value, dtype) for value in ("%0", "%acc"))
        epilogue = Epilogue((operand,), nodes, more)
        return KernelSpec(weight, x, compute, out, epilogue, "drawn", left_out)
    biased = tuple(EpilogueOperand("n", dtype) for _ in range(3))
    sums = ("%acc1", "%acc2", "%acc")
    nodes = tuple(
        EpilogueNode("aten.add.Tensor", (name, f"%in{number}")) for number, name in enumerate(sums)
    )
    more = (EpilogueResult("%0", out), EpilogueResult("%1", dtype))
    epilogue = Epilogue(biased, nodes, more)
    if draw(st.booleans()):
        epilogue = Epilogue((), (), tuple(EpilogueResult(name, out) for name in sums[:2]))
    return KernelSpec(weight, x, compute, out, epilogue, "drawn", left_out, weights=3)
