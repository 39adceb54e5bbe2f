import dataclasses
import json

import pytest
from hypothesis import given

from fxquant import errors
from fxquant.codegen.header import Header
from fxquant.codegen.spec import (
    Epilogue,
    EpilogueNode,
    EpilogueOperand,
    KernelSpec,
    WeightOperand,
)
from fxquant.formats import Encoding
from tests.codegen.specs import specs

FP4 = Encoding(4, "fp4")


@given(specs())
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
