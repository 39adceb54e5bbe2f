"""Every spelling of a product against a parameter, and what must not be taken for one."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.passes.harness import Captured, run

E, N, K = 3, 48, 64


class Spelled(nn.Module):
    def __init__(self, function, shape, dtype=torch.float32):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(shape, generator=generator).to(dtype))
        self.bias = nn.Parameter(torch.randn(N, generator=generator).to(dtype))
        self.function = function

    def forward(self, x):
        return self.function(x, self.weight, self.bias)


TWO_D = {
    "linear": ((5, K), (N, K), F.linear),
    "linear 3-D": ((2, 5, K), (N, K), F.linear),
    "linear vector": ((K,), (N, K), F.linear),
    "linear no bias": ((5, K), (N, K), lambda x, w, b: F.linear(x, w)),
    "linear cast": ((5, K), (N, K), lambda x, w, b: F.linear(x.half(), w.half()).float()),
    "linear of parameter": ((N, K), (5, K), lambda x, w, b: F.linear(w, x, b)),
    "mm": ((5, K), (K, N), lambda x, w, b: torch.mm(x, w)),
    "mm T": ((5, K), (N, K), lambda x, w, b: x.mm(w.T)),
    "@": ((2, 5, K), (K, N), lambda x, w, b: x @ w),
    "@ T": ((2, 5, K), (N, K), lambda x, w, b: x @ w.T),
    "@ mT": ((2, 5, K), (N, K), lambda x, w, b: x @ w.mT),
    "@ transpose": ((5, K), (N, K), lambda x, w, b: x @ w.transpose(0, 1)),
    "@ vector": ((K,), (K, N), lambda x, w, b: x @ w),
    "matmul 4-D": ((2, 2, 5, K), (K, N), lambda x, w, b: torch.matmul(x, w)),
    "W @ x": ((K, 7), (N, K), lambda x, w, b: w @ x),
    "W @ x view": ((K, 7), (N, K), lambda x, w, b: (w @ x).view(-1)),
    "W @ x 3-D": ((2, K, 7), (N, K), lambda x, w, b: w @ x),
    "W.T @ x": ((K, 7), (K, N), lambda x, w, b: w.T @ x),
    "W @ v": ((K,), (N, K), lambda x, w, b: w @ x),
    "mv": ((K,), (N, K), lambda x, w, b: torch.mv(w, x)),
    "addmv": ((K,), (N, K), lambda x, w, b: torch.addmv(b, w, x)),
    "addmm": ((5, K), (K, N), lambda x, w, b: torch.addmm(b, x, w)),
    "addmm t": ((5, K), (N, K), lambda x, w, b: torch.addmm(b, x, w.t())),
    "addmm scaled": ((5, K), (K, N), lambda x, w, b: torch.addmm(b, x, w, beta=0.5, alpha=2)),
    "addmm beta 0": ((5, K), (K, N), lambda x, w, b: torch.addmm(b, x, w, beta=0)),
    "addmm full": ((5, K), (K, N), lambda x, w, b: torch.addmm(x[:, :N], x, w)),
    "addmm W left": ((K, 7), (N, K), lambda x, w, b: torch.addmm(b[:7], w, x)),
    "einsum": ((2, 5, K), (N, K), lambda x, w, b: torch.einsum("bmk,nk->bmn", x, w)),
    "einsum T": ((2, 5, K), (K, N), lambda x, w, b: torch.einsum("bmk,kn->bnm", x, w)),
    "einsum heads": ((5, K), (4, 12, K), lambda x, w, b: torch.einsum("mk,hdk->mhd", x, w)),
    "inner": ((5, K), (N, K), lambda x, w, b: torch.inner(x, w)),
    "tensordot": ((5, K), (K, N), lambda x, w, b: torch.tensordot(x, w, dims=1)),
    "slice": ((5, 32), (N, K), lambda x, w, b: F.linear(x, w[:, 16:48])),
    "slice rows": ((5, K), (3 * N, K), lambda x, w, b: F.linear(x, w[N : 2 * N], b)),
    "chunk": ((5, K), (2 * N, K), lambda x, w, b: F.linear(x, w.chunk(2)[1], b)),
    "step": ((5, 32), (N, K), lambda x, w, b: F.linear(x, w[:, ::2])),
    "view": ((5, K), (4, 12, K), lambda x, w, b: F.linear(x, w.view(N, K), b)),
    "reshape": ((5, K), (4, 12, K), lambda x, w, b: F.linear(x, w.reshape(-1, K))),
    "reshape T": ((5, K), (N, K), lambda x, w, b: x @ w.T.contiguous().view(K, N)),
    "cast": ((5, K), (N, K), lambda x, w, b: F.linear(x.bfloat16(), w.to(torch.bfloat16))),
    "conv1d": ((2, K, 9), (N, K, 1), F.conv1d),
    "conv1d unbatched": ((K, 9), (N, K, 1), F.conv1d),
    "conv1d same": ((2, K, 9), (N, K, 1), lambda x, w, b: F.conv1d(x, w, b, padding="same")),
    "conv2d": ((2, K, 3, 5), (N, K, 1, 1), F.conv2d),
    "conv2d no bias": ((2, K, 3, 5), (N, K, 1, 1), lambda x, w, b: F.conv2d(x, w)),
    "patches": ((2, 4, 8, 12), (N, 4, 4, 4), lambda x, w, b: F.conv2d(x, w, b, stride=4)),
    "patches with a rest": ((2, 4, 9, 7), (N, 4, 4, 2), lambda x, w, b: F.conv2d(x, w, b, (4, 2))),
    "patches in 1-D": ((4, 50), (N, 4, 16), lambda x, w, b: F.conv1d(x, w, b, stride=16)),
    "patches in 3-D": (
        (1, 2, 4, 4, 8),
        (N, 2, 2, 2, 4),
        lambda x, w, b: F.conv3d(x, w, b, stride=(2, 2, 4), padding="valid"),
    ),
    "conv2d of linear": ((2, K, 3, 5), (N, K), lambda x, w, b: F.conv2d(x, w[..., None, None])),
    "both ways": ((5, K), (N, K), lambda x, w, b: F.linear(x, w) @ w),
}

THREE_D = {
    "bmm": ((E, 5, K), (E, K, N), lambda x, w, b: torch.bmm(x, w)),
    "bmm mT": ((E, 5, K), (E, N, K), lambda x, w, b: torch.bmm(x, w.mT)),
    "bmm W left": ((E, K, 7), (E, N, K), lambda x, w, b: torch.bmm(w, x)),
    "baddbmm": ((E, 5, K), (E, K, N), lambda x, w, b: torch.baddbmm(b, x, w)),
    "baddbmm scaled": (
        (E, 5, K), (E, K, N), lambda x, w, b: torch.baddbmm(b, x, w, beta=2.0, alpha=0.5),
    ),
    "matmul": ((E, 5, K), (E, K, N), lambda x, w, b: x @ w),
    "matmul broadcast": ((5, K), (E, K, N), lambda x, w, b: x @ w),
    "matmul one": ((1, 5, K), (E, K, N), lambda x, w, b: x @ w),
    "matmul vector": ((K,), (E, K, N), lambda x, w, b: x @ w),
    "matmul 4-D": ((2, E, 5, K), (E, K, N), lambda x, w, b: x @ w),
    "matmul 4-D one": ((2, 1, 5, K), (E, K, N), lambda x, w, b: x @ w),
    "matmul W left": ((2, E, K, 7), (E, N, K), lambda x, w, b: w @ x),
    "einsum": ((5, E, K), (E, K, N), lambda x, w, b: torch.einsum("mek,ekn->men", x, w)),
    "one expert": ((5, K), (E, K, N), lambda x, w, b: x @ w[1]),
    "experts": ((2, 5, K), (E, K, N), lambda x, w, b: torch.bmm(x, w[1:])),
    "one matrix": ((2, 5, K), (1, K, N), lambda x, w, b: torch.matmul(x, w)),
}  # fmt: skip


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", [*TWO_D, *(f"3-D {name}" for name in THREE_D)])
def test_matched(name: str, dynamic: bool) -> None:
    x_shape, w_shape, function = TWO_D[name] if name in TWO_D else THREE_D[name[4:]]
    x = torch.randn(x_shape, generator=torch.Generator().manual_seed(1))
    captured = run(Spelled(function, w_shape), x, dynamic=dynamic)
    assert len(captured.sites) == (2 if name == "both ways" else 1), captured.refusals
    assert captured.losses == []
    ctx = captured.contexts[0]
    for node in ctx.gm.graph.nodes:
        assert node not in ctx.parameters or node.users
    assert not any(site.parameter.node in ctx.regions[0].placeholders for site in ctx.sites)
    assert captured.sites[0].where.rpartition(":")[0] == __file__


@pytest.mark.parametrize("scheme", ["nf4", "fp4", "int8"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtypes_and_schemes(scheme: str, dtype: torch.dtype) -> None:
    x = torch.randn(5, K).to(dtype)
    for spelling in ("linear", "@", "W @ x view"):
        x_shape, w_shape, function = TWO_D[spelling]
        x = torch.randn(x_shape).to(dtype)
        captured = run(Spelled(function, w_shape, dtype), x, scheme=scheme)
        assert [site.scheme for site in captured.sites] == [scheme]


REFUSED = {
    "conv 3": ((2, K, 9), (N, K, 3), F.conv1d, "kernel of 3"),
    "patches apart": ((2, K, 9), (N, K, 2), lambda x, w, b: F.conv1d(x, w, b, 3), "stride 3"),
    "patches padded": ((2, K, 9), (N, K, 3), lambda x, w, b: F.conv1d(x, w, b, 3, 1), "padding"),
    "patches dilated": (
        (2, K, 9),
        (N, K, 2),
        lambda x, w, b: F.conv1d(x, w, b, 2, dilation=2),
        "dilation",
    ),
    "patches of strides": (
        (2, K, 9),
        (N, 3, K),
        lambda x, w, b: F.conv1d(x, w.transpose(1, 2), b, 3),
        "do not lie",
    ),
    "stride": ((2, K, 9), (N, K, 1), lambda x, w, b: F.conv1d(x, w, b, stride=2), "stride"),
    "padding": ((2, K, 9), (N, K, 1), lambda x, w, b: F.conv1d(x, w, b, padding=1), "padding"),
    "groups": ((2, K, 9), (N, K // 2, 1), lambda x, w, b: F.conv1d(x, w, b, groups=2), "groups"),
    "double": ((5, K), (N, K), lambda x, w, b: F.linear(x.double(), w.double()), "float64"),
    "strides": ((5, N), (N, K), lambda x, w, b: x @ w.T.reshape(N, K), "strides"),
    "merged": ((5, K), (4, K, 12), lambda x, w, b: torch.tensordot(x, w, ([1], [1])), "strides"),
    "integers": ((5, K), (K, N), lambda x, w, b: x @ w.to(torch.int8).to(x.dtype), "cast"),
    "float8": ((5, K), (K, N), lambda x, w, b: x @ w.to(torch.float8_e5m2).to(x.dtype), "cast"),
    "bits": ((5, K), (K, N), lambda x, w, b: x @ w.view(torch.int32).to(x.dtype), "cast"),
    "both": ((5, K), (K, K), lambda x, w, b: x + (w @ w)[:5], "both operands"),
    "small": ((5, 2), (1, 2), lambda x, w, b: F.linear(x, w), "too small"),
    "empty": ((5, K), (0, K), lambda x, w, b: F.linear(x, w), "empty"),
    "transposed": ((2, K, 9), (K, N, 1), lambda x, w, b: F.conv_transpose1d(x, w), "no quantized"),
    "bilinear": ((5, K), (N, K, K), lambda x, w, b: F.bilinear(x, x, w, b), "no quantized form"),
    "4-D": ((2, E, 5, K), (2, E, K, N), lambda x, w, b: x @ w, "4 dimensions"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    x_shape, w_shape, function, reason = REFUSED[name]
    captured = run(Spelled(function, w_shape), torch.randn(x_shape))
    assert captured.sites == []
    assert any(reason in refusal.reason for refusal in captured.refusals), captured.refusals
    assert captured.refusals[0].where.rpartition(":")[0] == __file__


NOT_PRODUCTS = {
    "activations": ((5, K), lambda x, w, b: x @ x.T),
    "computed weight": ((5, K), lambda x, w, b: F.linear(x, w * 2)),
    "pointwise": ((N, K), lambda x, w, b: x * w),
    "embedding": ((5, K), lambda x, w, b: F.embedding((x[:, 0] > 0).long(), w)),
    "norm": ((5, K), lambda x, w, b: F.layer_norm(x, (K,), w[0])),
}


@pytest.mark.parametrize("name", NOT_PRODUCTS)
def test_not_matched(name: str) -> None:
    x_shape, function = NOT_PRODUCTS[name]
    captured = run(Spelled(function, (N, K)), torch.randn(x_shape))
    assert captured.sites == []
    assert captured.losses == []
    assert all(refusal.kind == "not a parameter" for refusal in captured.refusals)


def test_complex_weight() -> None:
    model = Spelled(lambda x, w, b: x.to(torch.complex64) @ w, (K, N), torch.complex64)
    torch._dynamo.reset()
    captured = Captured()
    with torch.no_grad():
        torch.compile(model, backend=captured.backend)(torch.randn(5, K))
    assert captured.sites == []
    assert "complex64" in captured.losses[0].reason
