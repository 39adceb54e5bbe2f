"""Launches in Inductor's code: functions that need no dispatcher, ops for the profiler."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._inductor.utils import run_and_get_code

from fxquant import errors
from fxquant.codegen.epilogue import Epilogue
from fxquant.codegen.spec import KernelSpec, WeightOperand
from fxquant.runtime import direct
from tests.helpers import TwoLayers, compile_, decoded, frozen
from tests.runtime import printed

pytest.importorskip("torch._inductor.codegen.custom_extern_kernel_codegen")
pytestmark = pytest.mark.usefixtures("few_heights", "fresh")


def ops_seen(run: object, *args: Tensor) -> set[str]:
    """The ops of ours that a profile shows."""
    with torch.profiler.profile() as found:
        run(*args)  # type: ignore[operator]
    return {event.key for event in found.key_averages() if event.key.startswith("fxquant::")}


@torch.no_grad()
@pytest.mark.parametrize("scheme", ["nf4", "w8a8"])
def test_code_calls_functions_and_a_profile_shows_ops(scheme: str) -> None:
    model, x = frozen(TwoLayers()), torch.randn(3, 128)
    compiled = compile_(model, scheme=scheme, inductor={"force_disable_caches": True})
    out, (code,) = run_and_get_code(compiled, x)
    assert "fxquant_direct.launch(" in code
    assert "torch.ops.fxquant.launch.default(" not in code
    assert ops_seen(compiled, x) >= {"fxquant::launch"}
    assert torch.equal(compiled(x), out)


@torch.no_grad()
def test_bodies_of_higher_order_ops_find_the_functions() -> None:
    model = frozen(TwoLayers())

    def run(x: Tensor) -> Tensor:
        return torch.cond(x.sum() > 0, model.up, lambda x: model.up(-x) * 2, (x,))

    compiled = compile_(run, inductor={"force_disable_caches": True})
    for x in (torch.rand(3, 128), -torch.rand(3, 128)):
        twin = decoded(model)
        expected = twin.up(x) if x.sum() > 0 else twin.up(-x) * 2
        torch.testing.assert_close(compiled(x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("x", "extra", "said"),
    [
        (torch.randn(3, 41), [printed.bias()], r"x must be float32 .*40\], got .*\[3, 41\]"),
        (torch.randn(3, 40).half(), [printed.bias()], "x must be float32"),
        (torch.randn(3, 40), [printed.bias()[1:]], "operand 0 must be 24 elements"),
        (torch.randn(3, 40), [], "the number of operands must be 1"),
    ],
)
def test_wrong_operands_are_refused_as_by_the_op(x: Tensor, extra: list[Tensor], said: str) -> None:
    encoding = printed.ENCODINGS["int8"]
    operand = WeightOperand.whole(encoding, (24, 40), transposed=False)
    spec = KernelSpec(operand, *["float32"] * 3, Epilogue.bias("float32"), name="printed")
    weight = printed.weight(printed.kernel(encoding)).tensors()
    args = (x, weight, extra, spec.to_json(), "cpp")
    for call in (direct.FUNCTIONS["launch"], torch.ops.fxquant.launch.default):
        with pytest.raises(errors.KernelError, match=said):
            call(*args)
