import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fxquant import errors
from fxquant.codegen.epilogue import Epilogue, EpilogueNode, EpilogueOperand, EpilogueResult
from fxquant.codegen.header import Header
from fxquant.codegen.spec import KernelSpec, Outliers, WeightOperand
from fxquant.formats import Encoding
from tests.codegen.specs import int8_specs, joined_specs, specs

FP4 = Encoding(4, "fp4")


@given(st.one_of(specs(), int8_specs(), joined_specs()))
def test_json_is_an_exact_inverse_and_canonical(spec):
    text = spec.to_json()
    again = KernelSpec.from_json(text)
    assert again == spec
    assert hash(again) == hash(spec)
    assert again.to_json() == text


def test_whole_and_fractional_numbers_are_written_alike():
    one = EpilogueNode("aten.mul.Tensor", ("%acc", 2))
    other = EpilogueNode("aten.mul.Tensor", ("%acc", 2.0))
    assert one == other
    assert repr(one) == repr(other)


def test_infinity_survives_json():
    node = EpilogueNode("aten.clamp.default", ("%acc", float("-inf"), 1.0))
    weight = WeightOperand.whole(FP4, (4, 16), transposed=False)
    spec = KernelSpec(weight, "float32", "float32", "float32", Epilogue((), (node,)))
    assert KernelSpec.from_json(spec.to_json()) == spec


@pytest.mark.parametrize(
    "fields",
    [
        {"offset": 1},
        {"offset": -1},
        {"n": 0},
        {"k": 17},
        {"strides": (0, 17, 1)},
        {"strides": (1, 16, 1)},
        {"strides": (0, -16, 1)},
        {"shape": (0, 16)},
        {"batch": 0},
    ],
)
def test_operand_outside_the_stored_tensor_is_refused(fields):
    operand = WeightOperand.whole(FP4, (4, 16), transposed=False)
    with pytest.raises(errors.KernelError, match="kernel spec's weight"):
        dataclasses.replace(operand, **fields)


@pytest.mark.parametrize("reference", ["%in1", "%1", "%0", "%x", "%"])
def test_epilogue_refers_only_to_what_is_there(reference):
    node = EpilogueNode("aten.add.Tensor", ("%acc", reference))
    with pytest.raises(errors.KernelError, match="earlier node"):
        Epilogue((EpilogueOperand("n", "float32"),), (node,))


@pytest.mark.parametrize(
    "make",
    [
        lambda: EpilogueOperand("nm", "float32"),
        lambda: EpilogueOperand("n", "int32"),
        lambda: EpilogueNode("add", ("%acc",)),
        lambda: KernelSpec(
            WeightOperand.whole(FP4, (4, 16), transposed=False), "float64", "float32", "float32"
        ),
        lambda: KernelSpec(
            WeightOperand.whole(FP4, (4, 16), transposed=False),
            "float32",
            "float32",
            "float32",
            Epilogue.bias("float32", "en"),
        ),
        lambda: KernelSpec.from_json("{"),
        lambda: KernelSpec.from_json('{"weight": 1, "epilogue": 2}'),
        lambda: KernelSpec.from_json("[]"),
    ],
)
def test_malformed_specs_are_one_clear_sentence(make):
    with pytest.raises(errors.KernelError, match=r"kernel spec.*\.$"):
        make()


def test_header_holds_the_spec_and_where_it_is_used():
    weight = WeightOperand.whole(FP4, (4, 16), transposed=False)
    spec = KernelSpec(weight, "float32", "float32", "float32")
    text = Header(("layers.0.q", "layers.1.q"), "fp4").comment(spec)
    written = text.partition("defines:\n")[2].partition("\n\n")[0]
    assert json.loads(written) == json.loads(spec.to_json())
    weight = "Weight: [4, 16], 4 bits fp4 in blocks of 64"
    for fact in ("layers.1.q", "Scheme: fp4", '"encoding": {', weight):
        assert fact in text


def int8(outliers=None, compute="int8"):
    weight = WeightOperand.whole(FP4, (4, 16), transposed=False)
    return KernelSpec(weight, "float32", compute, "float32", outliers=outliers)


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (lambda: int8(compute="uint8"), "compute_dtype"),
        (lambda: dataclasses.replace(int8(), x_dtype="int4"), "x_dtype"),
        (lambda: dataclasses.replace(int8(compute="float32"), x_dtype="int8"), "compute_dtype"),
        (lambda: dataclasses.replace(int8(), out_dtype="int8"), "out_dtype"),
        (lambda: int8(Outliers("float16", 6.0), compute="float32"), "outliers"),
        (lambda: int8(Outliers("float16", columns=17)), "outliers.columns"),
        (lambda: Outliers("int8", 6.0), "outliers.dtype"),
        (lambda: Outliers("float16"), "outliers.threshold, columns"),
        (lambda: Outliers("float16", 6.0, 1), "outliers.threshold, columns"),
        (lambda: Outliers("float16", 0.0), "outliers.threshold"),
        (lambda: Outliers("float16", float("nan")), "outliers.threshold"),
        (lambda: Outliers("float16", float("inf")), "outliers.threshold"),
        (lambda: Outliers("float16", "6"), "outliers.threshold"),
        (lambda: Outliers("float16", threshold=True), "outliers.threshold"),
        (lambda: Outliers("float16", columns=0), "outliers.columns"),
        (lambda: Outliers("float16", columns=2.0), "outliers.columns"),
    ],
)
def test_malformed_int8_specs_name_the_field(make, field):
    with pytest.raises(errors.KernelError, match=rf"kernel spec's {field} must be .*\.$"):
        make()


def test_outliers_of_a_text_are_checked():
    text = int8(Outliers("float16", 6.0)).to_json()
    for wrong in ('"outliers":{"dtype":1}', '"outliers":[1]', '"outliers":"threshold"'):
        start, end = text.index('"outliers"'), text.index(',"weight"')
        with pytest.raises(errors.KernelError, match=r"kernel spec.*\.$"):
            KernelSpec.from_json(text[:start] + wrong + text[end:])


def test_what_has_no_outliers_is_written_as_before():
    assert "outliers" not in int8().to_json()
    assert int8(Outliers("float16", 6)) == int8(Outliers("float16", 6.0))
    assert int8(Outliers("float16", 6)).to_json() == int8(Outliers("float16", 6.0)).to_json()
    distinct = {
        int8(),
        int8(Outliers("float16", 6.0)),
        int8(Outliers("float16", 7.0)),
        int8(Outliers("bfloat16", 6.0)),
        int8(Outliers("float16", columns=6)),
    }
    assert len({spec.to_json() for spec in distinct}) == len(distinct) == 5


def test_int8_and_outliers_in_words():
    said = {
        None: "out[m, 4] = x[m, 16] @ weight.T in int8 (float32 to float32)",
        Outliers("bfloat16", 6.0): (
            "out[m, 4] = x[m, 16] @ weight.T in int8, columns with any abs(x) >= 6.0 in bfloat16 "
            "(float32 to float32)"
        ),
        Outliers("float16", columns=3): (
            "out[m, 4] = x[m, 16] @ weight.T in int8, 3 given columns in float16 "
            "(float32 to float32)"
        ),
    }
    for outliers, words in said.items():
        spec = int8(outliers)
        assert spec.describe() == words
        text = Header().comment(spec)
        assert "Activation: rounded to int8, with a scale for every row\n" in text
        assert ("Outliers: " in text) == (outliers is not None)
    assert "int8" not in Header().comment(int8(compute="float32"))


def test_header_says_the_encoding_in_words():
    scales = Encoding(8, "dynamic8", (256,), offset=True)
    said = {
        Encoding(4, "nf4", scale=scales): (
            "4 bits nf4 in blocks of 64, scales 8 bits dynamic8 in blocks of 256"
        ),
        Encoding(8, block=(1, -1)): "8 bits uniform in blocks of 1xall",
        Encoding(2, (-1.0, 0.0, 0.5, 1.0)): "2 bits with levels of its own in blocks of 64",
    }
    for encoding, words in said.items():
        weight = WeightOperand.whole(encoding, (16, 64), transposed=False)
        text = Header().comment(KernelSpec(weight, "float32", "float32", "float32"))
        assert f"Weight: [16, 64], {words}\n" in text


def test_epilogue_has_to_use_the_sums():
    node = EpilogueNode("aten.neg.default", ("%in0",))
    with pytest.raises(errors.KernelError, match="made of the sums"):
        Epilogue((EpilogueOperand("n", "float32"),), (node,))


def test_sums_and_results_that_are_not_there_are_refused():
    weight = WeightOperand.whole(FP4, (4, 16), transposed=False)
    gate = Epilogue((), (EpilogueNode("aten.mul.Tensor", ("%acc", "%acc1")),))
    assert gate.sums == 2
    assert Epilogue().sums == 1
    assert KernelSpec(weight, "float32", "float32", "float32", gate, weights=2).weights == 2
    with pytest.raises(errors.KernelError, match="weights"):
        KernelSpec(weight, "float32", "float32", "float32", gate)
    with pytest.raises(errors.KernelError, match="result"):
        Epilogue((EpilogueOperand("n", "float32"),), (), (EpilogueResult("%in0", "float32"),))
    with pytest.raises(errors.KernelError, match="argument"):
        Epilogue((), (), (EpilogueResult("%0", "float32"),))
    with pytest.raises(errors.KernelError, match="dtype"):
        EpilogueResult("%acc", "int8")
