"""Drawn spellings, shapes, dtypes, views, casts and sharing: compiled equals decoded eager."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from tests.passes.harness import Captured, compare

pytestmark = pytest.mark.usefixtures("few_heights")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Drawn:
    """One product, its parameter stored in some way."""

    n: int
    k: int
    dtype: torch.dtype
    stored: str
    spelling: str
    bias: bool
    lead: tuple[int, ...]
    dynamic: bool
    tied: bool
    scheme: str


STORED = ("nk", "kn", "slice", "chunk", "3-D", "step", "expert", "strided memory")
SPELLINGS = ("linear", "matmul", "einsum", "left", "addmm", "conv1d", "cast linear")

draws = st.builds(
    Drawn,
    n=st.integers(5, 70),
    k=st.integers(5, 70),
    dtype=st.sampled_from(DTYPES),
    stored=st.sampled_from(STORED),
    spelling=st.sampled_from(SPELLINGS),
    bias=st.booleans(),
    lead=st.lists(st.integers(0, 4), min_size=1, max_size=3).map(tuple),
    dynamic=st.booleans(),
    tied=st.booleans(),
    scheme=st.sampled_from(("nf4", "fp4", "int8")),
)


def stored(case: Drawn) -> torch.Tensor:
    shape = {
        "nk": (case.n, case.k),
        "kn": (case.k, case.n),
        "slice": (case.n + 3, case.k + 2),
        "chunk": (2 * case.n, case.k),
        "3-D": (1, case.n, case.k),
        "step": (case.n, 2 * case.k),
        "expert": (3, case.k, case.n),
        "strided memory": (case.k, case.n),
    }[case.stored]
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(case.dtype)
    return values.T if case.stored == "strided memory" else values


def logical(case: Drawn, w: torch.Tensor) -> torch.Tensor:
    """The parameter as ``[n, k]``."""
    return {
        "nk": lambda: w,
        "kn": lambda: w.T,
        "slice": lambda: w[2:-1, 1:-1],
        "chunk": lambda: w.chunk(2)[1],
        "3-D": lambda: w.squeeze(0),
        "step": lambda: w[:, 1::2],
        "expert": lambda: w[1].transpose(0, 1),
        "strided memory": lambda: w,
    }[case.stored]()


class Model(nn.Module):
    def __init__(self, case: Drawn) -> None:
        super().__init__()
        self.case = case
        self.weight = nn.Parameter(stored(case))
        if case.tied:
            self.other = nn.Module()
            self.other.weight = self.weight
        self.bias = nn.Parameter(torch.ones(case.n).to(case.dtype)) if case.bias else None

    def product(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        spelling, bias = self.case.spelling, self.bias
        if spelling == "linear":
            return F.linear(x, weight, bias)
        if spelling == "cast linear":
            return F.linear(x.float(), weight.float()).to(x.dtype)
        if spelling == "einsum":
            return torch.einsum("...k,nk->...n", x, weight)
        if spelling == "left":
            return (weight @ x.mT).mT if x.ndim > 1 else weight @ x
        if spelling == "addmm":
            rows = x.reshape(-1, x.shape[-1])
            return torch.addmm(rows[:, :1] if bias is None else bias, rows, weight.t())
        if spelling == "matmul":
            out = x @ weight.T
            return out if bias is None else out + bias
        rows = x.reshape(-1, x.shape[-1])
        return F.conv1d(rows[..., None], weight[..., None], bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.product(x, logical(self.case, self.weight))
        if self.case.tied:
            out = out + self.product(x.neg() * 2, logical(self.case, self.other.weight))
        return out


@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(draws)
def test_compiled_equals_decoded_eager(case: Drawn) -> None:
    torch._dynamo.reset()
    captured = Captured(scheme=case.scheme)
    model = Model(case)
    compiled = torch.compile(model, backend=captured.backend, dynamic=case.dynamic, fullgraph=True)
    x = torch.randn(*case.lead, case.k, generator=torch.Generator().manual_seed(1)).to(case.dtype)
    with torch.no_grad():
        got = compiled(x)
        with captured.decoded():
            compare(got, model(x))
    if captured.losses:
        assert all("too small" in refusal.reason for refusal in captured.losses)
    else:
        assert len(captured.sites) == 1 + case.tied
        assert len(captured.packed) == 1
