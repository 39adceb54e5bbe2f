"""Which calls share a trace, and that what comes of a shared one is as if they had one each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch.multiprocessing.reductions import StorageWeakRef

from fxquant.passes import regions, traces, values
from fxquant.passes.state import State

N, K = 6, 8


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """Grows by one with every trace that is made."""
    made: list[None] = []
    make_fx = traces.make_fx

    def counting(*args: Any, **options: Any) -> Any:
        made.append(None)
        return make_fx(*args, **options)

    monkeypatch.setattr(traces, "make_fx", counting)
    return made


def graph_of(
    function: Callable[..., Any], *inputs: Tensor, dynamic: bool | None = None
) -> fx.GraphModule:
    """What Dynamo captures, with values."""
    found: list[fx.GraphModule] = []

    def keep(gm: fx.GraphModule, _: list[Any]) -> Callable[..., Any]:
        found.append(regions.copied(gm)[0].gm)
        return gm.forward

    torch._dynamo.reset()
    torch.compile(function, backend=keep, fullgraph=True, dynamic=dynamic)(*inputs)
    return found[0]


def all_traces(gm: fx.GraphModule) -> list[tuple[fx.Node, traces.Trace]]:
    """Of each call that reads a tensor, made one after the other."""
    shared, found = traces.Traces(), []
    with State() as state:
        for node in gm.graph.nodes:
            state.step(node)
            if isinstance(node.meta.get("val"), Tensor) and node.op != "placeholder":
                trace = shared.of(node)
                assert trace is not None
                assert_like_its_own(node, trace)
                found.append((node, trace))
    return found


def assert_like_its_own(node: fx.Node, trace: traces.Trace) -> None:
    own = traces.Traces().of(node)
    assert own is not None
    pairs = [*zip(own.gm.graph.nodes, trace.gm.graph.nodes, strict=True)]
    assert [a.target for a, _ in pairs] == [b.target for _, b in pairs]
    for a, b in pairs[:-1]:
        first, second = own.found[a], trace.found[b]
        assert (first.shape, first.stride(), first.dtype) == (
            second.shape, second.stride(), second.dtype,
        )  # fmt: skip
        assert _shared(first, node) == _shared(second, node)


def _shared(value: Tensor, node: fx.Node) -> list[bool]:
    """With which of a call's tensors a value shares memory."""
    given = [values.value(n) for n in node.all_input_nodes if isinstance(n.meta["val"], Tensor)]
    own = StorageWeakRef(value.untyped_storage())
    return [StorageWeakRef(tensor.untyped_storage()) == own for tensor in given]


WEIGHTS = [torch.randn(N, K) for _ in range(3)]


@pytest.mark.parametrize(
    "call",
    [
        F.linear,
        lambda x, w: x @ w.t(),
        lambda x, w: torch.einsum("mk,nk->mn", x, w),
        lambda x, w: w.view(2, -1).view(N, K).mT,
        lambda x, w: F.linear(x.to(torch.bfloat16), w.bfloat16()),
        lambda x, w: torch.addmm(x.narrow(1, 0, N), x, w.t(), beta=2),
    ],
)
def test_equal_calls_have_one_trace(call: Callable[..., Tensor], traced: list[None]) -> None:
    x = torch.randn(4, K)
    one = all_traces(graph_of(call, x, WEIGHTS[0]))
    alone = len(traced) - len(one)  # each is compared with one of its own
    traced.clear()
    three = all_traces(graph_of(lambda x, *ws: [call(x, w) for w in ws], x, *WEIGHTS))
    assert len(traced) - len(three) == alone
    assert len(three) >= 3 * len(one) - 2  # what reads x alone may be there once


@pytest.mark.parametrize(
    ("function", "weights"),
    [
        (lambda w, v: (w.t(), v.t()), (torch.randn(N, K), torch.randn(K, N))),
        (lambda w, v: (w.t(), v.t()), (torch.randn(N, K), torch.randn(N, K).double())),
        (lambda w, v: (w.reshape(-1), v.reshape(-1)), (WEIGHTS[0], torch.randn(2 * N, K)[::2])),
        (lambda w, v: (w.sum(0), v.sum(1)), (torch.randn(N, N), torch.randn(N, N))),
        (lambda w, v: (torch.add(w, v, alpha=1), torch.add(w, v, alpha=1.0)), WEIGHTS[:2]),
        (lambda w, v: (w.t(), v.clone()), WEIGHTS[:2]),
        (lambda w, v: (torch.add(w, v), torch.add(v, v)), WEIGHTS[:2]),
        (lambda w, v: (w[:2], v[2:]), WEIGHTS[:2]),
    ],
)
def test_other_calls_have_traces_of_their_own(
    function: Callable[..., Any], weights: tuple[Tensor, Tensor], traced: list[None]
) -> None:
    found = all_traces(graph_of(function, *weights))
    assert len(traced) == 2 * len(found) == 4


def test_autocast_tells_calls_apart(traced: list[None]) -> None:
    def function(x: Tensor, w: Tensor) -> list[Tensor]:
        out = [F.linear(x, w)]
        for dtype in (torch.bfloat16, torch.float16, torch.bfloat16):
            with torch.autocast("cpu", dtype=dtype):
                out.append(F.linear(x, w))
        return out

    found = all_traces(graph_of(function, torch.randn(4, K), WEIGHTS[0]))
    assert len(traced) - len(found) == 3
    results = [[v for v in trace.found.values() if v is not None] for _, trace in found]
    dtypes = [result[-1].dtype for result in results]
    assert dtypes == [torch.float32, torch.bfloat16, torch.float16, torch.bfloat16]


def test_symbolic_sizes_are_traced_each(traced: list[None]) -> None:
    def function(x: Tensor, w: Tensor) -> list[Tensor]:
        return [F.linear(x, w), F.linear(x, w)]

    found = all_traces(graph_of(function, torch.randn(4, K), WEIGHTS[0], dynamic=True))
    assert len(traced) == 2 * len(found)


def test_devices_without_autocast_share_traces(traced: list[None]) -> None:
    def function(x: Tensor, w: Tensor) -> list[Tensor]:
        return [F.linear(x, w), F.linear(x, w)]

    given = (torch.randn(4, K, device="meta"), WEIGHTS[0].to("meta"))
    found = all_traces(graph_of(function, *given))
    assert (len(found), len(traced)) == (2, 3)
