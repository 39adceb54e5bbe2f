"""A whole model through interpreted Triton kernels: backend, launcher and cache included.

Triton reads ``TRITON_INTERPRET`` when it is imported, hence a process of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

SCRIPT = """
import sys
import torch
from torch import nn
import fxquant
from fxquant.runtime.store import STORE
from fxquant.testing import run_and_get_kernels

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Linear(48, 80)
        self.experts = nn.Parameter(torch.randn(2, 80, 33) / 9)
        self.mix = nn.Parameter(torch.randn(33, 64) / 6)

    def forward(self, x):
        x = nn.functional.silu(self.up(x))
        return torch.bmm(torch.stack([x, x * 2]), self.experts).sum(0) @ self.mix

torch.manual_seed(0)
dtype = getattr(torch, sys.argv[1])
model = Model().eval().requires_grad_(False).to(dtype)
compiled = torch.compile(model, backend="fxquant", dynamic=True, options={"target": "triton"})
for rows in (1, 3, 16, 20):
    x = torch.randn(rows, 48, dtype=dtype)
    out, kernels = run_and_get_kernels(compiled, x)
    twin = Model().eval().requires_grad_(False).to(dtype)
    for own, other in zip(model.parameters(), twin.parameters()):
        packed = STORE.packed_from(own)
        other.copy_(own if packed is None else packed.dequantize())
    torch.testing.assert_close(out, twin(x), rtol=float(sys.argv[2]), atol=float(sys.argv[2]))
assert [kernel.target for kernel in kernels] == ["triton"] * 3, kernels
assert all(not kernel.note for kernel in kernels)
rows = fxquant.report(model).rows
assert len(rows) == 3 and all(row.kernel.startswith("triton:") for row in rows), rows
assert "fallback" not in str(fxquant.report(model))
print("ok")
"""


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", "1e-5"), ("float16", "5e-3")])
def test_model_runs_on_interpreted_kernels(dtype: str, tolerance: str, tmp_path: Path) -> None:
    folder = {"FXQUANT_CACHE_DIR": str(tmp_path / "cache"), "FXQUANT_DUMP": str(tmp_path / "dump")}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, dtype, tolerance],
        env={**os.environ, "TRITON_INTERPRET": "1", **folder},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.strip() == "ok"
    assert len(list((tmp_path / "dump").glob("triton_*.py"))) == 3
    assert not list((tmp_path / "dump").glob("torch_*.py"))
    assert len(list((tmp_path / "cache" / "triton").iterdir())) == 3


ACTIVATIONS = """
import torch
from torch import nn
import fxquant
from fxquant.formats import Encoding
from fxquant.schemes import Activation, OutlierColumns, Recipe
from fxquant.testing import run_and_get_kernels

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(48, 32) for _ in range(3))

    def forward(self, x):
        return self.a(x), self.b(x), self.c(x)

torch.manual_seed(0)
channel = Encoding(8, block=(1, -1))
recipes = {
    "c": Recipe(channel, Activation(), outliers=OutlierColumns(6.0)),
    "*": Recipe(channel, Activation("static")),
}
model = Model().eval().requires_grad_(False)
x = torch.randn(5, 48).clamp(-2.5, 2.5)
x[2, 7] = x[1, 9] = 6.5
statistics = fxquant.calibrate(model, [x], progress=False)
outs, notes = [], []
for target in ("triton", "torch"):
    torch._dynamo.reset()
    twin = Model().eval().requires_grad_(False)
    twin.load_state_dict(model.state_dict())
    options = {"overrides": recipes, "calibration": statistics, "target": target}
    compiled = torch.compile(twin, backend="fxquant", options=options)
    with torch.no_grad():
        compiled(x)
        out, kernels = run_and_get_kernels(compiled, 2 * x)
    assert [kernel.target for kernel in kernels] == [target] * 3, kernels
    outs.append(out)
    notes.append([row.notes for row in fxquant.report(twin).rows])
for out in outs[1:]:
    # Both products of the same integers; outliers in float16 may be a rounding apart.
    torch.testing.assert_close(out[:2], outs[0][:2], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out[2], outs[0][2], rtol=5e-3, atol=5e-3)
counted = [("saturated elements: 2",)] * 2 + [("outlier columns: 2.0 a call in 2 calls",)]
assert notes == [counted, [*counted[:2], ()]], notes
print("ok")
"""


def test_activations_are_rounded_and_counted_alike_on_triton_and_torch() -> None:
    done = subprocess.run(
        [sys.executable, "-c", ACTIVATIONS],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.strip() == "ok"
