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
