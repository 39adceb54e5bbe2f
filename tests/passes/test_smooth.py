"""Smoothing alone: where scales go, where they must not, and what that changes: nothing."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn

from fxquant import errors
from fxquant.formats import pack
from fxquant.schemes import get_scheme
from tests.passes.smooth_harness import Drawn, Smoothed, run

D, H = 32, 48
X = torch.randn(2, 5, D)


class Block(nn.Module):
    """Parameters to write small models with."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.LayerNorm(D)
        self.a, self.b = nn.Linear(D, H), nn.Linear(D, H)
        self.down = nn.Linear(H, D)
        self.square = nn.Parameter(torch.randn(D, D))
        self.kernel = nn.Parameter(torch.randn(D, D, 3))
        self.gamma = nn.Parameter(torch.randn(D))
        self.register_buffer("gain", torch.rand(D) + 0.5)
        nn.init.normal_(self.norm.weight)
        nn.init.normal_(self.norm.bias)
        self.requires_grad_(requires_grad=False)


def of(forward) -> Smoothed:
    """Smooths a forward over a `Block`."""
    model = Block()
    return run(lambda x: forward(model, x), X)


def rms(m: Block, x: Tensor) -> Tensor:
    variance = x.to(torch.float32).pow(2).mean(-1, keepdim=True)
    return m.gamma * (x * torch.rsqrt(variance + 1e-6)).to(x.dtype)


def spelled_out(m: Block, x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * m.gamma + m.norm.bias


NORMS = {
    "layer_norm": lambda m, x: m.norm(x),
    "without bias": lambda m, x: F.layer_norm(x, (D,), m.gamma),
    "rms_norm": lambda m, x: F.rms_norm(x, (D,), m.gamma),
    "rms written out": rms,
    "layer norm written out": spelled_out,
    "one plus gamma": lambda m, x: F.rms_norm(x, (D,)) * (1.0 + m.gamma.float()),
    "a buffer": lambda m, x: F.rms_norm(x, (D,)) * m.gain,
    "layer scale": lambda m, x: torch.tanh(x) * m.gamma,
}


@pytest.mark.parametrize("norm", NORMS)
def test_into_a_norm_however_it_is_written(norm) -> None:
    def forward(m: Block, x: Tensor) -> Tensor:
        y = NORMS[norm](m, x)
        return m.a(y) + m.b(y.contiguous())

    both = of(forward)
    assert len(both.folded()) == 2
    assert both.sites[0].in_scale is both.sites[1].in_scale
    assert all("joint with" in note for note in both.notes.values())


ROWS = {
    "linear": lambda m, x: m.down(m.a(x)),
    "relu": lambda m, x: m.down(F.relu(m.a(x))),
    "leaky relu, dropout, views": lambda m, x: m.down(
        F.dropout(F.leaky_relu(m.a(x)), 0.5, training=False).view(10, 6, 8).flatten(1)
    ),
    "gated": lambda m, x: m.down(m.b(x) * F.silu(m.a(x))),
    "gated the other way round": lambda m, x: m.down(F.gelu(m.a(x)) * m.b(x)),
    "a sum": lambda m, x: m.down(m.a(x) + m.b(x)),
    "divided by a token's value": lambda m, x: m.down(m.a(x) / x.abs().sum(-1, keepdim=True)),
    "by keyword": lambda m, x: m.down(torch.add(input=m.a(x), other=m.b(x)).mul(other=m.gain[0])),
    "a bias of its own": lambda m, x: m.down(x @ m.a.weight.T + m.a.bias),
    "mixed by einsum": lambda m, x: m.down(
        torch.einsum("ij,bjhd->bihd", x[0] @ x[0].mT, m.a(x).unflatten(-1, (4, 12))).flatten(2)
    ),
    "heads": lambda m, x: m.down(
        (x[..., :1, None] * m.a(x).unflatten(-1, (4, 12)))
        .transpose(1, 2)
        .transpose(1, 2)
        .flatten(2)
    ),
}


@pytest.mark.parametrize("form", ROWS)
def test_into_the_rows_of_the_product_that_makes_it(form) -> None:
    found = of(ROWS[form])
    assert "1/s folded into" in next(n for name, n in found.notes.items() if "down" in name)
    assert any(site.scaled.parts[0].rows for site in found.sites if site.node is not None)


def then(made, use):
    """A forward that reads one value several times."""
    return lambda m, x: use(m, made(m, x))


def normed(m: Block, x: Tensor) -> Tensor:
    return m.norm(x)


def wide(m: Block, x: Tensor) -> Tensor:
    return m.a(x)


NOT = {
    "another reader": (then(normed, lambda m, y: m.a(y).sum() + y), "add reads layer_norm too"),
    "an output": (then(normed, lambda m, y: (m.a(y), y)), "output reads layer_norm too"),
    "residual": (then(normed, lambda m, y: y + m.a(y)[..., :D]), "add reads layer_norm"),
    "written in place": (then(normed, lambda m, y: (m.a(y), y.add_(1))), "add_"),
    "a view of it written": (then(normed, lambda m, y: (m.a(y), y[0].mul_(2))), "layer_norm too"),
    "an input": (lambda m, x: m.a(x), "it is an input of the graph"),
    "not homogeneous": (lambda m, x: m.down(F.gelu(m.a(x))), "gelu does not commute"),
    "shifted": (lambda m, x: m.down(m.a(x) + 1.0), "does not commute"),
    "squared": (then(wide, lambda m, y: m.down(y * y)), "does not commute"),
    "a token's factor": (lambda m, x: m.a(m.norm(x).mean(-1, keepdim=True).expand(2, 5, D)), ""),
    "a product that is not quantized": (
        lambda m, x: m.a(F.conv1d(x.mT, m.kernel, padding=1).mT),
        "conv1d is not quantized",
    ),
    "mixed channels": (lambda m, x: m.down(m.a(x).softmax(-1)), "softmax does not commute"),
    "a floor": (lambda m, x: m.down(torch.div(m.a(x), 2, rounding_mode="floor")), "div"),
    "relu in place": (then(wide, lambda m, y: (m.down(F.relu(y, inplace=True)), y)), "commute"),
    "a batch of activations": (
        lambda m, x: m.down((m.a(x[:1]).expand(2, 5, H) + m.a(x)).exp()),
        "exp does not commute",
    ),
}


@pytest.mark.parametrize("form", NOT)
def test_what_must_not_be_folded_is_multiplied_in_the_graph(form) -> None:
    forward, reason = NOT[form]
    found = of(forward)
    site = found.sites[-1] if "down" in found.sites[-1].parameter.name else found.sites[0]
    note = " ".join(site.notes)
    assert "1/s multiplied in the graph" in note
    assert reason in note


# By form: the forward, and whether what is multiplied was rounded to 16 bits before.
IN_16_BITS = {
    "gelu": (lambda m, x: m.down(F.gelu(m.a(x), approximate="tanh")), False),
    "a gate of its own": (lambda m, x: m.down(F.silu(m.a(x)) * F.silu(m.b(x))), False),
    "two products": (then(wide, lambda m, y: m.down(z := F.silu(y)) + m.down(z)), False),
    "read by another": (then(wide, lambda m, y: (m.down(z := F.gelu(y)), z)), True),
    "by keyword": (lambda m, x: m.down(torch.mul(F.silu(m.a(x)), other=F.silu(m.b(x)))), False),
    "in place": (then(wide, lambda m, y: m.down(F.silu(y, inplace=True))), True),
    "written to": (then(wide, lambda m, y: m.down(F.gelu(y).mul_(2))), True),
    "made of what is written to": (then(wide, lambda m, y: (m.down(F.gelu(y)), y.add_(1))), True),
    "of other dtypes": (lambda m, x: m.down(m.a(x).exp() * torch.arange(48)), True),
    "softmax": (lambda m, x: m.down(m.a(x).softmax(-1)), True),
}


@pytest.mark.parametrize("form", IN_16_BITS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_16_bits_are_multiplied_before_they_are_rounded(form, dtype) -> None:
    forward, is_rounded = IN_16_BITS[form]
    model = Block().to(dtype)
    found = run(lambda x: forward(model, x), X.to(dtype), tol=40 * torch.finfo(dtype).eps)
    assert any("down" in name for name in found.multiplied())
    (graph,) = [ctx.gm.graph for ctx in found.contexts]
    times = [node for node in graph.nodes if "inverse_scale" in str(node.args[1:])]
    assert times[-1].args[0].meta["val"].dtype == (dtype if is_rounded else torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_size_that_is_multiplied_by_is_no_tensor(dtype) -> None:
    model = Block().to(dtype)

    def forward(x):
        return model.down(F.silu(model.a(x)) * x.shape[1])

    found = run(forward, X.to(dtype), tol=40 * torch.finfo(dtype).eps, dynamic=True)
    assert any("down" in name for name in found.multiplied())


def test_products_that_read_a_value_before_and_after_a_write() -> None:
    def forward(m, x):
        y = torch.tanh(x)
        first = m.a(y)
        y.mul_(3)
        return first + m.b(y)

    found = of(forward)
    assert len(found.multiplied()) == 2
    assert found.sites[0].in_scale is found.sites[1].in_scale


class Attention(nn.Module):
    """Heads, of which several may share keys and values."""

    def __init__(self, shared: int, how: str) -> None:
        super().__init__()
        self.how, self.shared = how, shared
        self.q, self.k, self.v = nn.Linear(D, D), nn.Linear(D, 8 * shared), nn.Linear(D, 8 * shared)
        self.o = nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (-1, 8)).transpose(1, 2) for f in (self.q, self.k, self.v))
        if self.how == "sdpa gqa":
            out = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        else:
            k, v = self._spread(k), self._spread(v)
            if self.how == "sdpa":
                out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            else:
                out = (q @ k.transpose(-1, -2)).softmax(-1) @ v
        return self.o(out.transpose(1, 2).reshape(x.shape))

    def _spread(self, x: Tensor) -> Tensor:
        times = 4 // self.shared
        if self.how == "repeat":
            return x.repeat_interleave(times, 1)
        wide = x[:, :, None].expand(x.shape[0], self.shared, times, *x.shape[2:])
        return wide.reshape(x.shape[0], 4, *x.shape[2:])


@pytest.mark.parametrize("how", ["sdpa gqa", "sdpa", "written out", "repeat"])
@pytest.mark.parametrize(("shared", "dynamic"), [(1, False), (2, True), (4, False)])
def test_values_to_the_output_of_attention(how, shared, dynamic) -> None:
    torch.manual_seed(0)
    model = Attention(shared, how).requires_grad_(requires_grad=False)
    found = run(model, X, dynamic=dynamic)
    assert found.folded() == ["o.weight"]
    assert "the rows of v" in found.notes["o.weight"]
    ctx = found.contexts[0]
    site = next(site for site in ctx.sites if site.parameter.name == "o.weight")
    scale = site.in_scale.compute(_inputs(ctx, model), ctx.tools).view(4, 8)
    assert len(scale.unique(dim=0)) == shared
    assert scale.view(shared, 4 // shared, 8).std(1, unbiased=False).max() == 0


def _inputs(ctx, model):
    by_index = {bound.index: bound.value for bound in ctx.parameters.values()}
    return [by_index.get(i) for i in range(max(by_index) + 1)]


def test_the_scale_is_equation_4_and_joint() -> None:
    model = Block()
    found = run(lambda x: m_sum(model, torch.tanh(x)), X, alpha=0.3)
    weights = {"a": model.a.weight, "b": model.b.weight}
    ctx = found.contexts[0]
    inputs = _inputs(ctx, model)
    scale = ctx.sites[0].in_scale.compute(inputs, ctx.tools)
    stats = [Drawn().require(weight, "", D).amax for weight in weights.values()]
    x = torch.minimum(*stats)
    w = torch.maximum(*(weight.abs().amax(0) for weight in weights.values()))
    torch.testing.assert_close(scale, x**0.3 / w**0.7)


def m_sum(m: Block, y: Tensor) -> Tensor:
    return m.a(y) + m.b(y)


def test_channels_without_a_magnitude_keep_scale_1() -> None:
    model = Block()
    model.a.weight[:, 3] = 0
    found = run(lambda x: model.a(torch.tanh(x)), X, smoothed=Smoothed(Drawn(zeros=0.3)))
    ctx = found.contexts[0]
    scale = ctx.sites[0].in_scale.compute(_inputs(ctx, model), ctx.tools)
    dead = Drawn(zeros=0.3).require(model.a.weight, "", D).amax == 0
    assert 0 < int(dead.sum()) < D
    assert bool((scale[dead] == 1).all())
    assert scale[3] == 1


def test_originals_stay_as_they_are() -> None:
    model = Block()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    run(lambda x: model.down(F.relu(model.a(model.norm(x)))), X)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_parts_of_one_weight_get_scales_of_their_own() -> None:
    attention = nn.MultiheadAttention(D, 4, batch_first=True).requires_grad_(requires_grad=False)
    found = run(lambda x, y: attention(x, y, y)[0], X, torch.randn(2, 7, D))
    q, kv, out = found.sites
    assert q.scaled is kv.scaled
    assert {part.columns for part in q.scaled.parts} == {q.in_scale, kv.in_scale}
    assert "the rows of in_proj" in " ".join(out.notes)


def test_a_weight_of_two_products_has_two_packings_where_they_differ() -> None:
    own = nn.Linear(D, D).requires_grad_(requires_grad=False)
    found = run(lambda x: own(torch.tanh(own(torch.sin(x)))), X)
    first, second = found.sites
    assert first.scaled is not second.scaled
    again = run(lambda x: own(F.relu(own(torch.sin(x)))), X)
    assert not any("folded" in note for site in again.sites for note in site.notes), (
        "the rows are read by another product too"
    )


def test_packed_weights_and_other_recipes_are_left() -> None:
    model = Block()
    model.a.weight = nn.Parameter(
        pack(model.a.weight, get_scheme("int8").recipe.weight), requires_grad=False
    )
    found = run(lambda x: m_sum(model, model.norm(x)), X, smoothed=Smoothed(), tol=0.5)
    packed, other = found.sites
    assert packed.in_scale is None
    assert packed.scaled is None
    assert "linear reads layer_norm too" in " ".join(other.notes)


@pytest.mark.parametrize("trained", ["norm.weight", "norm.bias", "a.bias"])
def test_trained_vectors_keep_their_gradient(trained) -> None:
    model = Block()
    model.get_parameter(trained).requires_grad_()
    smoothed = Smoothed()
    torch._dynamo.reset()

    def forward(x: Tensor) -> Tensor:
        return model.down(F.relu(model.a(model.norm(x))))

    x = torch.randn(2, 5, D, requires_grad=True)
    torch.compile(forward, backend=smoothed.backend)(x).sum().backward()
    got = model.get_parameter(trained).grad.clone(), x.grad.clone()
    model.zero_grad()
    x.grad = None
    forward(x).sum().backward()
    torch.testing.assert_close(
        got, (model.get_parameter(trained).grad, x.grad), rtol=1e-4, atol=1e-4
    )
    assert len(smoothed.folded()) == 2


def test_inside_activation_checkpointing() -> None:
    model = Block()

    def inner(x: Tensor) -> Tensor:
        return model.down(F.relu(model.a(model.norm(x))))

    found = run(
        lambda x: torch.utils.checkpoint.checkpoint(inner, x, use_reentrant=False),
        X.clone().requires_grad_(),
        grad=True,
    )
    assert len(found.folded()) == 2


def test_without_statistics_it_says_what_to_do() -> None:
    smoothed = Smoothed()
    object.__setattr__(smoothed.config, "calibration", None)
    model = Block()
    with pytest.raises(Exception, match="needs statistics of the activation of 'weight'") as info:
        torch.compile(model.a, backend=smoothed.backend)(X)
    assert isinstance(info.value.inner_exception, errors.CalibrationError)


def test_inside_the_branches_of_cond() -> None:
    model = Block()

    def forward(x: Tensor) -> Tensor:
        def one(y: Tensor) -> Tensor:
            return model.down(F.relu(model.a(model.norm(y))))

        def other(y: Tensor) -> Tensor:
            return model.down(F.gelu(model.b(y)))

        return torch.cond(x.sum() > 0, one, other, (x,))

    for x in (X.abs(), -X.abs()):
        found = run(forward, x)
        assert len(found.sites) == 4
        assert all(site.in_scale is not None for site in found.sites)


def test_under_autocast() -> None:
    """Some 10 roundings to bfloat16 on the way, and a few more for the scales."""
    model = Block()

    def forward(x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return model.down(F.relu(model.a(model.norm(x))))

    found = run(forward, X, tol=20 * torch.finfo(torch.bfloat16).eps)
    assert len(found.folded()) == 2
