"""Printed kernels on a real GPU: each dtype against the reference, and CUDA graphs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import fxquant
from fxquant.codegen import KernelSpec, reference
from fxquant.codegen.epilogue import Epilogue
from fxquant.codegen.spec import WeightOperand
from fxquant.formats import Encoding
from fxquant.runtime.device import gpu
from fxquant.runtime.store import STORE
from fxquant.schemes import get_scheme
from tests.codegen import harness

DEVICE = "cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU"),
]

ENCODINGS = {
    "nf4": get_scheme("nf4").recipe.weight,
    "fp4": get_scheme("fp4").recipe.weight,
    "int8": get_scheme("int8").recipe.weight,
    "int4 groups": Encoding(4, block=(1, 128)),
    "int2": Encoding(2, block=(64,), full_range=True),
}
SHAPES = [(4096, 4096), (1000, 1027), (8, 256, 512)]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", ENCODINGS)
def test_kernel_equals_the_reference(
    name: str, shape: tuple[int, ...], dtype: str, tmp_path: Path
) -> None:
    encoding = ENCODINGS[name]
    operand = WeightOperand.whole(encoding, shape, transposed=False)
    epilogue = Epilogue.bias(dtype, "n" if operand.batch is None else "en")
    spec = KernelSpec(operand, dtype, dtype, dtype, epilogue, "on_device")
    parts = [part.to(DEVICE) for part in harness.stored(encoding, shape)]
    module = harness.load(spec, tmp_path, interpreted=DEVICE == "cpu", gpu=gpu())
    weight = reference.operand(operand, parts, getattr(torch, dtype)).double()
    for rows in (0, 1, 2, 3, 16, 33, 200):
        x = harness.activation(spec, rows).to(DEVICE)
        extra = [value.to(DEVICE) for value in harness.operands(spec, rows)]
        out = module.run(x, parts, extra)
        exact = x.double() @ weight.transpose(-1, -2)
        exact = exact + (extra[0] if operand.batch is None else extra[0][:, None]).double()
        bound = harness.bound(spec, x, weight, extra, decoded_apart=True)
        assert out.shape == exact.shape
        assert bool(((out.double() - exact).abs() <= bound).all()), rows
        assert torch.equal(out, module.run(x, parts, extra)), "split-K is deterministic"


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_model_under_the_backend(mode: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(512, 2048), nn.GELU(), nn.Linear(2048, 512))
    model = model.eval().requires_grad_(requires_grad=False).to(DEVICE, torch.bfloat16)
    compiled = torch.compile(model, backend="fxquant", mode=mode)
    for rows in (1, 16, 100):
        x = torch.randn(rows, 512, device=DEVICE, dtype=torch.bfloat16)
        for _ in range(3):
            out = compiled(x).clone()
        hidden = x
        for module in model:
            if isinstance(module, nn.Linear):
                packed = STORE.packed_from(module.weight)
                assert packed is not None
                hidden = nn.functional.linear(hidden, packed.dequantize(), module.bias)
            else:
                hidden = module(hidden)
        # Three roundings to bfloat16 (2**-9 each) on sums of random sign, and twice that to spare.
        torch.testing.assert_close(out, hidden, rtol=6 * 2**-9, atol=6 * 2**-9)
    rows = fxquant.report(model).rows
    assert len(rows) == 2
    assert all(row.kernel.startswith("triton:") for row in rows)
