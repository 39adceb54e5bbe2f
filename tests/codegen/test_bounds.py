"""Enclosures: every right result lies inside, and what is wrong does not."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fxquant.codegen import bounds, reference
from fxquant.codegen.epilogue import FLOAT_DTYPES, Epilogue, EpilogueNode, EpilogueOperand
from fxquant.codegen.intervals import UNIT, Interval, around, call
from fxquant.codegen.spec import KernelSpec, Outliers
from fxquant.formats import Encoding
from tests.codegen import harness
from tests.codegen.specs import int8_specs, joined_specs, specs
from tests.codegen.test_pointwise import CASES, make

INT8 = Encoding(8, block=(1, -1))
NF4 = Encoding(4, "nf4", (64,), scale=Encoding(8, "dynamic8", (256,), offset=True))
ANY = st.one_of(
    specs(FLOAT_DTYPES),
    int8_specs(),
    int8_specs().map(lambda spec: replace(spec, x_dtype="int8", outliers=None)),
    joined_specs(FLOAT_DTYPES),
)


def parts_of(spec, seed):
    found = []
    for number in range(spec.weights):
        found += harness.stored(spec.weight.encoding, spec.weight.shape, seed + 10 * number)
    return found


def call_of(spec, rows, seed=0):
    tensors = parts_of(spec, seed)
    return harness.activation(spec, rows, seed + 1), tensors, harness.operands(spec, rows, seed + 2)


def results_of(spec, x, tensors, extra):
    found = reference.run(spec, x, tensors, extra)
    return found if spec.epilogue.more else (found,)


@settings(max_examples=150, deadline=None)
@given(ANY, st.sampled_from((0, 1, 3)), st.integers(0, 2**16))
def test_the_reference_lies_inside(spec, rows, seed):
    x, tensors, extra = call_of(spec, rows, seed)
    found = bounds.enclosures(spec, x, tensors, extra)
    for got, enclosure in zip(results_of(spec, x, tensors, extra), found, strict=True):
        assert not enclosure.excess(got.reshape(enclosure.low.shape)).any()


@pytest.mark.parametrize("name", CASES)
def test_ops_of_neighbouring_sums_lie_inside(name):
    """Sums that are off by as much as they may be, through every op of the table in float32."""
    spec = make(CASES[name])
    exact = torch.randn(40, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    error, operand = exact.abs() * 1e-3, torch.linspace(-2, 2, 16)
    operand[3] = exact[0, 3]
    values = {"%acc": around(exact, error), "%in0": Interval(operand.double(), operand.double())}
    for number, node in enumerate(spec.epilogue.nodes):
        values[f"%{number}"] = call(node, values)
    found = values[spec.epilogue.result]
    for share in (-0.999, -0.5, 0, 0.7, 0.999):
        plain = {"%acc": (exact + share * error).float(), "%in0": operand}
        for number, node in enumerate(spec.epilogue.nodes):
            _, op, overload = node.op.split(".")
            args = [plain.get(v, v) if isinstance(v, str) else v for v in node.args]
            named = {k: getattr(torch, v) if k == "dtype" else v for k, v in node.kwargs}
            plain[f"%{number}"] = getattr(getattr(torch.ops.aten, op), overload)(*args, **named)
        assert not found.excess(plain[spec.epilogue.result]).any()
    assert found.excess(plain[spec.epilogue.result] + 9).all(), "anything lies inside"


@pytest.mark.parametrize(
    "op", ["maximum.default", "atan2.default", "fmod.Tensor", "pow.Tensor_Tensor"]
)
def test_numbers_where_aten_wants_tensors(op):
    exact = torch.linspace(0.2, 3, 16, dtype=torch.float64)
    values = {"%acc": around(exact, 1e-6 * exact)}
    found = call(EpilogueNode(f"aten.{op}", ("%acc", 0.7)), values)
    name, overload = op.split(".")
    right = getattr(getattr(torch.ops.aten, name), overload)(exact.float(), torch.tensor(0.7))
    assert not found.excess(right).any()
    assert found.excess(right + 9).all()


def test_which_zero_a_sum_is_stays_open():
    values = {"%acc": around(torch.zeros(2).double(), torch.zeros(2).double())}
    angle = call(EpilogueNode("aten.atan2.default", ("%acc", -1.0)), values)
    assert not angle.excess(torch.tensor([3.1415927, -3.1415927])).any()
    sign = call(EpilogueNode("aten.signbit.default", ("%acc",)), values)
    assert not sign.low.any()
    assert sign.high.all()


def test_uncertain_comparisons_allow_both_choices_and_certain_ones_one():
    values = {"%acc": around(torch.tensor([0.0, 1.0, -1.0]), torch.full((3,), 0.1))}
    for number, node in enumerate(
        (
            EpilogueNode("aten.gt.Scalar", ("%acc", 0)),
            EpilogueNode("aten.where.ScalarOther", ("%0", "%acc", 50.0)),
        )
    ):
        values[f"%{number}"] = call(node, values)
    found = values["%1"]
    assert not found.excess(torch.tensor([0.05, 1.0, 50.0])).any()
    assert not found.excess(torch.tensor([50.0, 0.95, 50.0])).any()
    assert found.excess(torch.tensor([51.0, 50.0, -1.0])).all()


def test_what_cannot_be_bounded_is_anything_and_nan_is_nan():
    through_zero = around(torch.tensor([0.0, 2.0]), torch.tensor([0.1, 0.1]))
    found = call(EpilogueNode("aten.reciprocal.default", ("%acc",)), {"%acc": through_zero})
    assert not found.excess(torch.tensor([1e9, 0.5])).any()
    assert not found.excess(torch.tensor([torch.nan, 0.5])).any()
    assert found.excess(torch.tensor([1e9, torch.nan]))[1] == torch.inf
    lost = around(torch.tensor([torch.nan]), torch.tensor([0.0]))
    assert not lost.excess(torch.tensor([torch.nan])).any()
    assert lost.excess(torch.tensor([1.0])).all()


@pytest.mark.parametrize("compute", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("encoding", [NF4, INT8], ids=["nf4", "int8"])
def test_wrong_results_lie_outside(encoding, compute):
    """A row that picks an input tells one wrong code; a row of any numbers a lost input."""
    x_dtype = "float32" if compute == "int8" else compute
    epilogue = Epilogue(
        (EpilogueOperand("n", "float32"),),
        (
            EpilogueNode("aten.add.Tensor", ("%acc", "%in0")),
            EpilogueNode("aten.gelu.default", ("%0",)),
        ),
    )
    spec = KernelSpec(harness.whole(encoding, 48, 128), x_dtype, compute, "float32", epilogue)
    x, tensors, extra = call_of(spec, 6)
    x[1], x[1, 70] = 0, 1
    (found,) = bounds.enclosures(spec, x, tensors, extra)
    changed = [tensor.clone() for tensor in tensors]
    code = changed[0].view(-1)[(7 * 128 + 70) * encoding.bits // 8]
    code ^= 0x44
    wrong = reference.run(spec, x, changed, extra)
    assert found.excess(wrong)[1, 7] > 0
    assert not found.excess(wrong)[:, :7].any()
    without = x.clone()
    without[:, -1] = 0
    assert (found.excess(reference.run(spec, without, tensors, extra)) > 0).any()


def test_chosen_rows_are_those_of_all():
    """Outliers are found in rows that are not looked at."""
    spec = KernelSpec(
        harness.whole(INT8, 24, 64),
        *("float32", "int8", "float32"),
        Epilogue.bias("float32"),
    )
    x, tensors, extra = call_of(spec, 30)
    x[17, 5] = 40
    for asked in (spec, replace(spec, outliers=Outliers("float16", threshold=6.0))):
        (every,) = bounds.enclosures(asked, x, tensors, extra)
        rows = torch.tensor(bounds.spread(30, 8))
        (some,) = bounds.enclosures(asked, x, tensors, extra, rows)
        assert torch.equal(some.low, every.low[rows])
        assert torch.equal(some.high, every.high[rows])


def test_spread_has_the_first_and_the_last_rows():
    assert bounds.spread(5, 8) == [0, 1, 2, 3, 4]
    rows = bounds.spread(1000, 64)
    assert len(set(rows)) == 64
    assert rows[0] == 0
    assert rows[-16:] == list(range(984, 1000))


def test_bounds_are_narrow():
    """Of float32 sums: k + 10 roundings of the magnitude, no more."""
    spec = KernelSpec(harness.whole(NF4, 16, 256), *["float32"] * 3)
    x, tensors, extra = call_of(spec, 4)
    (found,) = bounds.enclosures(spec, x, tensors, extra)
    dense = reference.operand(spec.weight, tensors, torch.float32).double()
    magnitude = x.double().abs() @ dense.abs().t()
    assert ((found.high - found.low) <= 2 * (256 + 12) * UNIT * magnitude + 1e-30).all()
