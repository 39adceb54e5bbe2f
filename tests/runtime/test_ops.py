"""The operators: rules, gradients and refusals, on their own."""

from __future__ import annotations

import dataclasses
import warnings

import pytest
import torch
from torch import Tensor

from fxquant import errors
from fxquant.codegen import reference
from fxquant.codegen.epilogue import Epilogue
from fxquant.codegen.spec import KernelSpec, Outliers, WeightOperand
from fxquant.formats import PackedWeight, pack
from fxquant.runtime import launch, ops
from fxquant.schemes import get_scheme
from tests.bounds import assert_close_within, product_bound

pytestmark = pytest.mark.usefixtures("few_heights")

assert ops  # imported for its registrations


def opcheck(op: torch._ops.OpOverload, args: tuple[object, ...]) -> None:
    """torch's own, which from 2.14 on reads the gradients of copies that it made."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf")
        torch.library.opcheck(op, args)


def spec_of(packed: PackedWeight, *, bias: bool = False, dtype: str = "float32") -> KernelSpec:
    operand = WeightOperand.whole(packed.encoding, tuple(packed.shape), transposed=False)
    epilogue = Epilogue.bias(dtype) if bias else Epilogue()
    return KernelSpec(operand, dtype, dtype, dtype, epilogue)


def packed_weight(*shape: int) -> PackedWeight:
    torch.manual_seed(0)
    return pack(torch.randn(shape), get_scheme("nf4").recipe.weight)


@pytest.mark.parametrize("shape", [(5, 48), (2, 3, 48), (48,), (0, 48)])
@pytest.mark.parametrize("bias", [False, True])
def test_linear_obeys_the_rules_of_operators(shape: tuple[int, ...], bias: bool) -> None:
    packed = packed_weight(33, 48)
    x = torch.randn(shape, requires_grad=True)
    extra = [torch.randn(33, requires_grad=True)] if bias else []
    text = spec_of(packed, bias=bias).to_json()
    args = (x, packed.tensors(), extra, text)
    opcheck(torch.ops.fxquant.linear.default, (*args, -1))
    expected = torch.nn.functional.linear(x, packed.dequantize(), *extra)
    torch.testing.assert_close(torch.ops.fxquant.linear(*args, -1), expected)


def test_dequantize_and_table_obey_the_rules_of_operators() -> None:
    packed = packed_weight(7, 33)
    args = (packed.tensors(), str(packed.encoding), [7, 33], torch.bfloat16)
    opcheck(torch.ops.fxquant.dequantize.default, args)
    assert torch.equal(torch.ops.fxquant.dequantize(*args), packed.dequantize(torch.bfloat16))
    args = ([0.5, 1.5, 2.5, 3.5], [2, 2], torch.device("cpu"))
    opcheck(torch.ops.fxquant.table.default, args)
    torch.ops.fxquant.table(*args).zero_()
    assert torch.ops.fxquant.table(*args).tolist() == [[0.5, 1.5], [2.5, 3.5]]


def test_gradients_of_a_batched_product_with_a_batched_bias() -> None:
    packed = packed_weight(2, 9, 16)
    spec = dataclasses.replace(spec_of(packed), epilogue=Epilogue.bias("float32", "en"))
    x = torch.randn(2, 5, 16, dtype=torch.float32, requires_grad=True)
    bias = torch.randn(2, 9, requires_grad=True)
    weight = packed.dequantize()

    def by_op(x: Tensor, bias: Tensor) -> Tensor:
        return torch.ops.fxquant.linear(x, packed.tensors(), [bias], spec.to_json(), -1)

    def by_hand(x: Tensor, bias: Tensor) -> Tensor:
        return torch.baddbmm(bias[:, None], x, weight.transpose(1, 2))

    torch.testing.assert_close(by_op(x, bias), by_hand(x, bias))
    seed = torch.randn(2, 5, 9)
    got = torch.autograd.grad(by_op(x, bias), (x, bias), seed)
    wanted = torch.autograd.grad(by_hand(x, bias), (x, bias), seed)
    torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("compute", ["float32", "int8"])
def test_gradients_of_rows_that_belong_to_one_matrix_each(compute: str) -> None:
    packed = packed_weight(3, 9, 16)
    spec = dataclasses.replace(spec_of(packed, bias=True), compute_dtype=compute, grouped=True)
    x = torch.randn(7, 16, requires_grad=True)
    bias = torch.randn(9, requires_grad=True)
    ends = torch.tensor([2, 2, 6], dtype=torch.int32)
    weight = packed.dequantize()
    args = (x, packed.tensors(), [bias, ends], spec.to_json(), -1)
    out = torch.ops.fxquant.linear(*args)
    by_hand = torch.cat([x[:2] @ weight[0].T, x[2:6] @ weight[2].T, torch.zeros(1, 9)]) + bias
    seed = torch.randn(7, 9)
    got = torch.autograd.grad(out, (x, bias), seed)
    torch.testing.assert_close(got, torch.autograd.grad(by_hand, (x, bias), seed))
    assert got[0][6].count_nonzero() == 0
    opcheck(torch.ops.fxquant.linear.default, args)


OUTLIERS = [None, Outliers("float32", threshold=2.0), Outliers("float16", columns=3)]


@pytest.mark.parametrize("outliers", OUTLIERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(33, 48), (2, 33, 48)])
def test_gradients_pass_straight_through_the_rounding_to_int8(
    shape: tuple[int, ...], dtype: torch.dtype, outliers: Outliers | None
) -> None:
    """The gradient is that of the decoded weight, given columns in their own 16 bits."""
    packed = packed_weight(*shape)
    batched = len(shape) == 3
    name = str(dtype).removeprefix("torch.")
    spec = dataclasses.replace(
        spec_of(packed, dtype=name),
        compute_dtype="int8",
        outliers=outliers,
        epilogue=Epilogue.bias(name, "en" if batched else "n"),
    )
    x = torch.randn(2, 5, 48, dtype=dtype, requires_grad=True)
    bias = torch.randn(shape[:-1], dtype=dtype, requires_grad=True)
    extra = [bias]
    weight = packed.dequantize().to(dtype)
    if outliers is not None and outliers.columns is not None:
        columns = torch.tensor([7, 1, 40], dtype=torch.int32)
        apart = torch.randn(*shape[:-1], 3).half()
        extra += [columns, apart]
        weight[..., columns.long()] = apart.to(dtype)
    args = (x, packed.tensors(), extra, spec.to_json())
    out = torch.ops.fxquant.linear(*args, -1)
    seed = torch.randn_like(out)
    got = torch.autograd.grad(out, (x, bias), seed)
    by_hand = torch.matmul(x, weight.transpose(-1, -2)) + (bias[:, None] if batched else bias)
    wanted = torch.autograd.grad(by_hand, (x, bias), seed)
    torch.testing.assert_close(got, wanted)
    # It would be another one without the columns that stand apart.
    codes_only = torch.matmul(seed, packed.dequantize().to(dtype))
    differs = not torch.allclose(got[0], codes_only, rtol=1e-2, atol=1e-2)
    assert differs == (outliers is OUTLIERS[2])
    if dtype == torch.float32:
        opcheck(torch.ops.fxquant.linear.default, (*args, -1))


def test_operands_on_two_devices_are_refused_by_name() -> None:
    packed = packed_weight(9, 16)
    with pytest.raises(errors.DeviceError, match=r"linear: the activation is on meta and the pack"):
        launch.run(torch.empty(2, 16, device="meta"), packed.tensors(), [], _text(packed))


def _text(packed: PackedWeight) -> str:
    return spec_of(packed).to_json()


def test_each_target_computes_the_same_without_a_gpu() -> None:
    packed = packed_weight(9, 16)
    x, spec = torch.randn(3, 16), spec_of(packed)
    wanted = reference.run(spec, x, packed.tensors(), [])
    args = (x, packed.tensors(), [], spec.to_json())
    assert torch.equal(torch.ops.fxquant.launch(*args, "torch"), wanted)
    by_cpp = torch.ops.fxquant.launch(*args, "cpp")
    assert torch.equal(torch.ops.fxquant.launch(*args, "auto"), by_cpp)
    assert torch.equal(torch.ops.fxquant.linear(*args, -1), by_cpp)
    bound = product_bound(x, packed.dequantize(), torch.float32)
    assert_close_within(by_cpp, wanted.double(), 2 * bound)


def test_a_launch_obeys_the_rules_of_operators() -> None:
    packed = packed_weight(9, 16)
    args = (torch.randn(3, 16), packed.tensors(), [], _text(packed), "torch")
    opcheck(torch.ops.fxquant.launch.default, args)
    sizes = torch.ops.fxquant.launch(torch.randn(0, 16), *args[1:]).shape
    assert sizes == (0, 9)
