"""Modes and graphs inside graphs: autocast, checkpointing, cond, training, transforms."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from fxquant.formats import pack
from fxquant.schemes import get_scheme
from tests.passes.harness import Captured, compare, run

pytestmark = pytest.mark.usefixtures("few_heights")

K, N = 64, 48


def frozen(model: nn.Module) -> nn.Module:
    return model.requires_grad_(False)


class Two(nn.Module):
    def __init__(self, body=None):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(K, N), nn.Linear(N, K, bias=False)
        self.body = body

    def plain(self, x):
        return self.b(torch.relu(self.a(x)))

    def forward(self, x):
        return self.body(self, x) if self.body else self.plain(x)


def gradients(model, x, **options):
    """Runs with grad, compiled and in eager on decoded weights; compares results and gradients."""
    torch._dynamo.reset()
    captured = Captured(autograd=True, **options)
    compiled = torch.compile(model, backend=captured.backend, fullgraph=True)
    results = []
    for function in (compiled, model):
        given = x.clone().requires_grad_()
        if function is model:
            with captured.decoded(), torch.enable_grad():
                out = function(given)
                out.square().sum().backward()
        else:
            out = function(given)
            out.square().sum().backward()
        results.append((out.detach(), given.grad))
        grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        results[-1] += tuple(grads)
        model.zero_grad()
    compare(results[0], results[1])
    return captured


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_around(dtype):
    x = torch.randn(5, K)
    torch._dynamo.reset()
    model, captured = Two(), Captured()
    compiled = torch.compile(model, backend=captured.backend, fullgraph=True)
    with torch.no_grad(), torch.autocast("cpu", dtype=dtype):
        got = compiled(x)
        with captured.decoded():
            wanted = model(x)
    compare(got, wanted)
    assert got.dtype == dtype
    assert len(captured.sites) == 2


def test_autocast_inside():
    def body(self, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = self.a(x)
            with torch.autocast("cpu", enabled=False):
                y = y.float() + self.a(x)
            z = torch.einsum("mk,nk->mn", y, self.b.weight) + y @ self.b.weight.T
        return z + self.b(y)

    captured = run(Two(body), torch.randn(5, K))
    assert len(captured.sites) == 5
    assert {site.node.meta["val"].dtype for site in captured.sites} == {
        torch.bfloat16,
        torch.float32,
    }


def test_inference_mode():
    torch._dynamo.reset()
    model, captured = Two(), Captured()
    compiled = torch.compile(model, backend=captured.backend, fullgraph=True)
    with torch.inference_mode():
        got = compiled(torch.ones(3, K))
    with torch.no_grad(), captured.decoded():
        compare(got, model(torch.ones(3, K)))
    assert len(captured.sites) == 2


def test_trainable_is_refused_and_stays_trainable():
    captured = gradients(Two(), torch.randn(5, K))
    assert captured.sites == []
    assert all("trainable" in refusal.reason for refusal in captured.losses)
    assert len(captured.losses) == 2


def test_no_grad_inside_a_training_graph():
    def body(self, x):
        with torch.no_grad():
            y = self.a(x)
        return self.b(y)

    captured = gradients(Two(lambda self, x: body(self, x) + x), torch.randn(5, K))
    assert [site.parameter.name for site in captured.sites] == ["a.weight"]
    assert len(captured.losses) == 1


def test_frozen_weights_pass_gradients_through():
    model = Two()
    model.a.weight.requires_grad_(False)
    model.b.weight.requires_grad_(False)
    captured = gradients(model, torch.randn(5, K))
    assert len(captured.sites) == 2


@pytest.mark.parametrize("train", [False, True])
def test_checkpoint(train):
    def body(self, x):
        x = x + checkpoint(self.plain, x, use_reentrant=False)
        return x + checkpoint(self.plain, x, use_reentrant=False)

    model = frozen(Two(body))
    if train:
        captured = gradients(model, torch.randn(5, K))
    else:
        captured = run(model, torch.randn(5, K), dynamic=True)
    assert len(captured.sites) == 4
    assert len(captured.packed) == 2
    inputs = captured.contexts[0].gm.graph.find_nodes(op="placeholder")
    assert not any(node.target.endswith("parameters_weight_") for node in inputs)


def test_checkpoint_of_a_view_made_outside():
    def body(self, x):
        weight = self.b.weight.T
        return checkpoint(lambda y: torch.sin(y @ weight), self.a(x), use_reentrant=False)

    captured = gradients(frozen(Two(body)), torch.randn(5, K))
    assert len(captured.sites) == 2


def test_nested_checkpoint_and_other_use():
    def inner(self, x):
        return torch.relu(self.a(x)) + self.a.weight.sum()

    def body(self, x):
        def outer(y):
            return checkpoint(lambda z: inner(self, z), y * 2, use_reentrant=False)

        return self.b(checkpoint(outer, x, use_reentrant=False))

    captured = run(frozen(Two(body)), torch.randn(5, K), tol=1.0)
    assert len(captured.sites) == 2


def test_cond():
    def body(self, x):
        return torch.cond(x.sum() > 0, self.a, lambda y: self.a(y.sin()) * 2, (x,))

    x = torch.rand(5, K)
    for given in (x, -x):
        captured = run(Two(body), given)
        assert len(captured.sites) == 2
        assert len(captured.packed) == 1


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return x @ w

    @staticmethod
    def backward(ctx, grad):
        x, w = ctx.saved_tensors
        return grad @ w.T, 2 * x.T @ grad


# Dynamo itself instantiates a Function when it traces one.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_custom_autograd_function_keeps_its_gradient():
    def body(self, x):
        return Doubled.apply(self.plain(x), self.a.weight.T)

    model = Two(body)
    model.b.weight.requires_grad_(False)
    captured = gradients(model, torch.randn(5, K))
    assert [site.parameter.name for site in captured.sites] == ["b.weight"]
    assert any("autograd_function_apply" in refusal.reason for refusal in captured.losses)


def test_in_place_ops_and_batch_norm():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv1d(K, N, 1)
            self.norm = nn.BatchNorm1d(N)

        def forward(self, x):
            y = self.conv(x)
            y.mul_(2).add_(1)
            y[:, 0] = 0
            return self.norm(y)

    model = Model()
    captured = Captured()
    x = torch.randn(4, K, 9)
    compiled = torch.compile(model, backend=captured.backend, fullgraph=True)
    mean = model.norm.running_mean.clone()
    with torch.no_grad():
        got = compiled(x)
        after = model.norm.running_mean.clone()
        assert not torch.equal(mean, after)
        model.norm.running_mean.copy_(mean)
        with captured.decoded():
            compare(got, model(x))
        torch.testing.assert_close(after, model.norm.running_mean)
    assert len(captured.sites) == 1


def test_weight_written_in_the_graph_is_left_alone():
    def body(self, x):
        y = self.a(x)
        self.a.weight.mul_(0.5)
        return self.b(y + F.linear(x, self.a.weight))

    model = Two(body)
    twin = Two(body)
    captured = Captured()
    x = torch.randn(5, K)
    with torch.no_grad():
        torch._dynamo.reset()
        got = torch.compile(model, backend=captured.backend, fullgraph=True)(x)
        assert torch.equal(model.a.weight, twin.a.weight * 0.5)
        twin.b.weight.copy_(next(dense for _, dense in captured.dense.values()))
        compare(got, twin(x))
    assert [site.parameter.name for site in captured.sites] == ["b.weight"]
    assert sum("written to" in refusal.reason for refusal in captured.losses) == 2


def test_vmap_is_left_alone():
    def body(self, x):
        return self.b(torch.vmap(lambda row: self.a.weight @ row)(x))

    captured = run(Two(body), torch.randn(5, K))
    assert [site.parameter.name for site in captured.sites] == ["b.weight"]


def test_tied_embedding_keeps_the_dense_weight():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(100, K)
            self.head = nn.Linear(K, 100, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self, i):
            return self.head(self.embedding(i))

    torch._dynamo.reset()
    model, captured = Tied(), Captured()
    i = torch.randint(0, 100, (2, 7))
    with torch.no_grad():
        got = torch.compile(model, backend=captured.backend, fullgraph=True)(i)
        dense = next(dense for _, dense in captured.dense.values())
        compare(got, F.linear(model.embedding(i), dense))
    assert len(captured.sites) == 1
    sources = captured.contexts[0].sources
    assert sum(isinstance(source, int) for source in sources) == 2


class PackedTwo(Two):
    def __init__(self, body):
        super().__init__(body)
        encoding = get_scheme("nf4").recipe.weight
        self.a.weight = nn.Parameter(pack(self.a.weight.detach(), encoding), requires_grad=False)


@pytest.mark.parametrize("dynamic", [False, True])
def test_packed_parameters(dynamic):
    def body(self, x):
        return self.b(self.a(x) + x @ self.a.weight.T) + self.a.weight.sum(0) + self.a.weight[3]

    model = PackedTwo(body)
    captured = run(model, torch.randn(5, K), dynamic=dynamic, scheme="int8")
    assert sorted(site.scheme for site in captured.sites) == ["int8", "packed", "packed"]
    targets = [node.target for node in captured.contexts[0].gm.graph.nodes]
    assert targets.count(torch.ops.fxquant.dequantize.default) == 1


def test_packed_parameter_in_a_checkpoint():
    def body(self, x):
        return self.b(checkpoint(lambda y: self.a(y) + self.a.weight.sum(), x, use_reentrant=False))

    captured = run(frozen(PackedTwo(body)), torch.randn(5, K))
    assert len(captured.sites) == 2


def test_dynamic_batch_compiles_once():
    torch._dynamo.reset()
    model, captured = Two(), Captured()
    compiled = torch.compile(model, backend=captured.backend, dynamic=True, fullgraph=True)
    with torch.no_grad():
        for rows in (3, 5, 17, 64):
            x = torch.randn(rows, K)
            got = compiled(x)
            with captured.decoded():
                compare(got, model(x))
    assert len(captured.contexts) == 1
    assert len(captured.packed) == 2


class Broken(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(K, K)

    def forward(self, x):
        x = self.inner(x)
        torch._dynamo.graph_break()
        return x + self.inner(x.relu())


def test_one_graph_for_many_blocks_reads_the_weights_of_each():
    """Dynamo reuses a graph for other parameters: it does not guard on which one it passes."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model, captured = nn.Sequential(Broken(), Broken(), Broken()), Captured()
    compiled = torch.compile(model, backend=captured.backend)
    x = torch.randn(3, K)
    with torch.no_grad():
        for _ in range(2):
            got = compiled(x)
            with captured.decoded():
                compare(got, model(x))
    assert len(captured.packed) == 3
    assert len(captured.contexts) < 6


def test_a_parameter_passed_as_an_argument_is_not_baked_in():
    torch._dynamo.reset()
    captured = Captured()
    compiled = torch.compile(lambda x, w: x @ w, backend=captured.backend, fullgraph=True)
    x = torch.randn(3, K)
    weights = [nn.Parameter(torch.randn(K, N), requires_grad=False) for _ in range(2)]
    for weight in weights:
        got = compiled(x, weight)
        compare(got, x @ captured.dense[id(weight)][1])
    assert len(captured.packed) == 2
