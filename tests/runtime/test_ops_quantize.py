"""The operators that round rows to int8: rules, equal integers, refused gradients, counters."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import Tensor

from fxquant import errors
from fxquant.codegen import RENDERERS, Header, KernelSpec, quantize
from fxquant.codegen.epilogue import Epilogue
from fxquant.codegen.quantize import QuantizeSpec
from fxquant.codegen.spec import Outliers, WeightOperand
from fxquant.formats import Encoding, PackedWeight, pack
from fxquant.runtime import counted, counters, launch, ops, targets

assert ops  # imported for its registrations

K = 48
INT8 = Encoding(8, block=(1, -1))
SPECS = [
    QuantizeSpec(K, "float32"),
    QuantizeSpec(K, "bfloat16", "tensor"),
    QuantizeSpec(K, "float16", "static"),
    QuantizeSpec(K, "float32", "tensor", clipped=True),
    QuantizeSpec(K, "float32", clipped=True),
]


def operands(spec: QuantizeSpec, *leading: int) -> tuple[Tensor, list[Tensor]]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(*leading, K, generator=generator).to(getattr(torch, spec.x_dtype))
    return x, [torch.tensor([1.5])] if spec.has_limit else []


def weight() -> PackedWeight:
    return pack(torch.randn(9, K, generator=torch.Generator().manual_seed(1)), INT8)


def product(x_dtype: str, *, outliers: Outliers | None = None, bias: bool = False) -> str:
    operand = WeightOperand.whole(INT8, (9, K), transposed=False)
    epilogue = Epilogue.bias("float32") if bias else Epilogue()
    return KernelSpec(operand, x_dtype, "int8", "float32", epilogue, outliers=outliers).to_json()


@pytest.mark.parametrize("spec", SPECS, ids=QuantizeSpec.describe)
def test_rows_obey_the_rules_of_operators(spec: QuantizeSpec) -> None:
    args = (*operands(spec, 2, 3), spec.to_json())
    torch.library.opcheck(torch.ops.fxquant.quantize.default, args)
    torch.library.opcheck(torch.ops.fxquant.launch_quantize.default, (*args, "torch"))


@pytest.mark.parametrize("leading", [(), (0,), (5,), (2, 3)])
@pytest.mark.parametrize("spec", SPECS, ids=QuantizeSpec.describe)
def test_every_target_finds_the_same_integers(spec: QuantizeSpec, leading: tuple[int, ...]) -> None:
    x, extra = operands(spec, *leading)
    wanted = quantize.run(spec, x, extra)
    with torch.device("meta"):
        shapes = torch.ops.fxquant.quantize(x.to("meta"), extra, spec.to_json())
    for target in ("auto", "cpp", "torch"):
        got = torch.ops.fxquant.launch_quantize(x, extra, spec.to_json(), target)
        for found, want, shape in zip(got, wanted, shapes, strict=True):
            assert torch.equal(found, want)
            assert (found.shape, found.dtype) == (shape.shape, shape.dtype)


def test_a_spec_says_its_kind() -> None:
    for spec in (SPECS[0], KernelSpec.from_json(product("int8"))):
        parsed = launch.parse(spec.to_json())
        assert parsed == spec
        assert type(parsed) is type(spec)
        for target in RENDERERS:
            kernel = launch.make_kernel(spec, target, Header(("a.b",)))
            assert kernel.spec == spec
            assert "a.b" in kernel.source
    with pytest.raises(errors.KernelError, match="not a kernel spec"):
        launch.parse_spec(SPECS[0].to_json())
    with pytest.raises(errors.KernelError, match="not a kernel spec"):
        launch.parse_quantize(product("int8"))


def test_rows_have_no_gradient_and_say_so() -> None:
    spec, packed = SPECS[0], weight()
    x, bias = torch.randn(3, K, requires_grad=True), torch.randn(9, requires_grad=True)
    codes, amax = torch.ops.fxquant.quantize(x, [], spec.to_json())
    assert not codes.requires_grad
    args = (packed.tensors(), [bias, amax], product("int8", bias=True))
    with pytest.raises(errors.KernelError, match=r"has no gradient: train with .*\.$"):
        torch.ops.fxquant.linear(codes, *args, -1).sum().backward()
    # That of a bias is no concern of the rows.
    codes, amax = torch.ops.fxquant.quantize(x.detach(), [], spec.to_json())
    args = (packed.tensors(), [bias, amax], product("int8", bias=True))
    (grad,) = torch.autograd.grad(torch.ops.fxquant.linear(codes, *args, -1).sum(), bias)
    assert grad.tolist() == [3.0] * 9
    with torch.no_grad():
        torch.ops.fxquant.quantize(x, [], spec.to_json())


@pytest.mark.parametrize("target", ["cpp", "torch"])
def test_what_lies_beyond_a_limit_is_counted(target: str) -> None:
    for spec in SPECS:
        x, extra = operands(spec, 4, 5)
        x[0, 0, 0] = float("nan")
        if not spec.has_limit:
            torch.ops.fxquant.launch_quantize(x, extra, spec.to_json(), target)
            continue
        limit = extra[0]
        assert counted.saturated(limit) == 0
        for _ in range(2):
            _, amax = torch.ops.fxquant.launch_quantize(x, extra, spec.to_json(), target)
        beyond = int((x.float().abs() > amax[..., None]).sum())
        assert counted.saturated(limit) == 2 * beyond
        # A tensor that is not finite is lost, not saturated.
        assert (beyond > 0) == (spec.scope != "tensor")
        with torch.inference_mode():
            torch.ops.fxquant.launch_quantize(x, extra, spec.to_json(), target)
        assert counted.saturated(limit) == 3 * beyond
        assert counted.saturated(torch.tensor([1.5])) == 0


def test_a_counter_dies_with_its_tensor() -> None:
    before = len(counters._COUNTERS)
    limit = torch.tensor([1.0])
    counter = counters.of(limit, 1)
    assert counters.of(limit, 1) is counter
    assert counters.read(limit) == [0]
    assert len(counters._COUNTERS) == before + 1
    del limit
    gc.collect()
    assert len(counters._COUNTERS) == before


def test_columns_of_outliers_are_counted() -> None:
    packed, text = weight(), product("float32", outliers=Outliers("float16", threshold=6.0))
    codes = packed.tensors()[0]
    args = (packed.tensors(), [], text)
    x = torch.full((4, K), 0.5)
    assert counted.outlier_counts(text, codes) is None
    torch.ops.fxquant.launch(x, *args, "torch")
    assert counted.outlier_counts(text, codes) is None, "torch code does not count"
    for row, column in ((0, 3), (3, 3), (2, 7), (1, 40)):
        x[row, column] = -6.0
    for rows in (4, 1):
        torch.ops.fxquant.launch(x[:rows], *args, "cpp")
    assert counted.outlier_counts(text, codes) == (2, 3 + 1)
    assert counted.outlier_counts(text, weight().tensors()[0]) is None


@pytest.fixture
def triton_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton is what tensors here usually take, and prints nothing."""

    def refuse(*_: object) -> str:
        raise errors.not_printed("triton", "compute_dtype 'int8'")

    monkeypatch.setattr(launch.triton, "render", refuse)
    monkeypatch.setattr(launch, "usual_target", lambda _: "triton")
    monkeypatch.setattr(launch, "obstacle", lambda *_: "")
    targets._warn.cache_clear()


@pytest.mark.usefixtures("triton_refuses")
def test_a_target_that_prints_no_kernel_leaves_it_to_torch(
    caplog: pytest.LogCaptureFixture,
) -> None:
    spec = QuantizeSpec(K, "float32", name="quantize_not_printed")
    headers = {spec.to_json(): Header(), product("float32"): Header()}
    asked = targets.Choice("triton", "triton")
    found = targets.build(asked, headers, torch.device("cpu"))
    targets.build(asked, headers, torch.device("cpu"))
    for choice in found.values():
        assert (choice.asked, choice.runs) == ("torch", "torch")
        assert choice.note.startswith("target 'triton' prints no kernel for a spec with compute_")
    assert caplog.text.count("target 'torch' runs instead of 'triton'") == 1
    x = torch.randn(3, K)
    codes, _ = torch.ops.fxquant.quantize(x, [], spec.to_json())
    assert torch.equal(codes, quantize.run(spec, x, [])[0])


@pytest.mark.usefixtures("triton_refuses")
def test_other_failures_of_a_target_are_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> str:
        raise errors.no_pointwise_op("aten.sort", "triton", [])

    monkeypatch.setattr(launch.triton, "render", fail)
    spec = QuantizeSpec(K, "float32", name="quantize_fails")
    with pytest.raises(errors.KernelError, match=r"aten\.sort"):
        targets.build(
            targets.Choice("triton", "triton"), {spec.to_json(): Header()}, torch.device("cpu")
        )
    with pytest.raises(errors.KernelError, match=r"aten\.sort"):
        torch.ops.fxquant.quantize(torch.randn(3, K), [], spec.to_json())
