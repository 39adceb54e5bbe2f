"""Every tile that the cost model ranks high, and that tuning may choose, on a real GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fxquant.codegen import KernelSpec, bounds
from fxquant.codegen.epilogue import Epilogue, EpilogueNode
from fxquant.codegen.indexing import WeightIndex
from fxquant.codegen.spec import Outliers, WeightOperand
from fxquant.codegen.triton.plan import plan_for
from fxquant.codegen.triton.tiles import BUCKETS, GEMV_ROWS
from fxquant.formats import Encoding
from fxquant.runtime import tiles
from fxquant.runtime.device import gpu
from tests.codegen import harness

DEVICE, DTYPE = "cuda", "bfloat16"
SHAPE, EXPERTS = (2048, 4096), (4, 512, 1024)
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU"),
]

NF4 = Encoding(4, "nf4", (64,), scale=Encoding(8, "dynamic8", (256,), offset=True))
INT8 = Encoding(8, block=(1, -1))
GATED = Epilogue(
    (),
    (
        EpilogueNode("aten.silu.default", ("%acc",)),
        EpilogueNode("aten.mul.Tensor", ("%0", "%acc1")),
    ),
)


def spec_of(name: str) -> KernelSpec:
    encoding = NF4 if name in ("nf4", "nf4, bias", "gate and up", "experts") else INT8
    operand = WeightOperand.whole(
        encoding, EXPERTS if name == "experts" else SHAPE, transposed=False
    )
    integers = name in ("w8a8", "codes", "llm_int8")
    return KernelSpec(
        operand,
        "int8" if name == "codes" else DTYPE,
        "int8" if integers else DTYPE,
        DTYPE,
        {"nf4, bias": Epilogue.bias(DTYPE), "gate and up": GATED}.get(name, Epilogue()),
        "on_device",
        Outliers(DTYPE, threshold=4.0) if name == "llm_int8" else None,
        weights=2 if name == "gate and up" else 1,
        grouped=name == "experts",
    )


NAMES = ("nf4", "nf4, bias", "gate and up", "experts", "int8", "w8a8", "codes", "llm_int8")


CASES = [
    *((name, most) for name in NAMES for most in BUCKETS),
    *((name, most) for name in ("nf4", "nf4, bias", "gate and up") for most in GEMV_ROWS),
]


@pytest.mark.parametrize(("name", "most"), CASES)
def test_results_are_within_what_the_spec_allows(name: str, most: int, tmp_path: Path) -> None:
    spec = spec_of(name)
    module = harness.load(spec, tmp_path, interpreted=DEVICE == "cpu", gpu=gpu())
    # No tile is met by all rows, and a started one is cut off.
    rows = max(1, most - 3 if most > 4 else most) if most <= 256 else most // 2 + 5
    if spec.grouped:
        rows *= spec.weight.batch or 1
    parts = [
        part.to(DEVICE)
        for number in range(spec.weights)
        for part in harness.stored(spec.weight.encoding, spec.weight.shape, number)
    ]
    x = harness.activation(spec, rows).to(DEVICE)
    extra = [value.to(DEVICE) for value in harness.operands(spec, rows)]
    seen = torch.tensor(bounds.spread(rows, 48), device=DEVICE)
    (right,) = bounds.enclosures(spec, x, parts, extra, seen)
    candidates = plan_for(spec, WeightIndex.of(spec.weight), gpu()).variants.get(most, ())
    if not candidates:
        pytest.skip("no tiles of their own")
    entries = [tiles.variant(module, tile) for tile in candidates]
    for tile, entry in zip(candidates, entries, strict=True):
        module.VARIANTS.clear()
        module.VARIANTS[most] = entry
        out = module.run(x, parts, extra)
        found = out.index_select(-2, seen).double()
        assert bool(((right.low <= found) & (found <= right.high)).all()), tile
        assert torch.equal(out, module.run(x, parts, extra)), f"not deterministic: {tile}"
