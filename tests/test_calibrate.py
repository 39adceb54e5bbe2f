"""Calibration: what it sees against forward hooks, on every kind of model and batch."""

from __future__ import annotations

import io
import logging
import sys
from collections import UserDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn.functional import linear

from fxquant import errors
from fxquant.calibrate import calibrate as calibrate_with_bar
from fxquant.calibration import SAMPLE, Calibration
from tests.calibrating import (
    BATCHES,
    Counter,
    Hooked,
    calibrate,
    check,
    check_like_hooks,
    state_of,
)
from tests.helpers import TwoLayers

pytestmark = pytest.mark.usefixtures("fresh")


def test_values_are_those_that_hooks_see() -> None:
    model = TwoLayers()
    check_like_hooks(model.eval(), BATCHES, model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_counted_in_float32(dtype: torch.dtype) -> None:
    model = TwoLayers().to(dtype).eval()
    check_like_hooks(model, [batch.to(dtype) for batch in BATCHES], model)


def test_under_autocast_the_rounded_activation_counts() -> None:
    model = TwoLayers().eval()
    with torch.autocast("cpu", torch.bfloat16):
        found = calibrate(model, BATCHES).stats
    rows = torch.cat(BATCHES).bfloat16().float()
    check(found["up.weight"], rows)
    # Not the activation as it was before.
    assert not torch.equal(found["up.weight"].amax, torch.cat(BATCHES).abs().amax(0))


def test_second_moments_on_request() -> None:
    model = TwoLayers().eval()
    assert calibrate(model, BATCHES).stats["up.weight"].moments is None
    found = calibrate(model, BATCHES, moments=True).stats["up.weight"].moments
    x = torch.cat(BATCHES).double()
    assert found is not None
    # A float32 sum of 12 products in any order: 12 roundings of at most the sum of magnitudes.
    bound = 12 * 2**-24 * (x.abs().T @ x.abs())
    assert ((found.double() - x.T @ x).abs() <= bound).all()


class Forms(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(16, 4)

    def forward(self, x: Tensor, scale: float = 1.0, *, shift: float = 0.0) -> Tensor:
        return self.fc(x * scale + shift)


X = torch.randn(6, 16)


@pytest.mark.parametrize(
    ("batch", "rows"),
    [
        (X, X),
        ((X, 2.0), X * 2),
        ([X, 2.0], X * 2),
        ({"x": X, "shift": 1.0}, X + 1),
        (UserDict(x=X, scale=3.0), X * 3),
        (lambda model: model(X, shift=2.0), X + 2),
    ],
    ids=["tensor", "tuple", "list", "dict", "UserDict", "callable"],
)
def test_any_form_of_a_batch(batch: Any, rows: Tensor) -> None:
    check(calibrate(Forms(), [batch]).stats["fc.weight"], rows)
    check(calibrate(Forms(), iter([batch, batch])).stats["fc.weight"], torch.cat([rows, rows]))


def test_a_function_works_as_well() -> None:
    fc = nn.Linear(16, 4)
    found = calibrate(lambda x: fc(x) + 1, [X, lambda model: model(X)])
    stats = found.of(fc.weight, "fc.weight")
    assert stats is not None
    check(stats, torch.cat([X, X]))


def test_more_tokens_than_the_sample_holds() -> None:
    fc = nn.Linear(4, 4)
    rows = torch.arange(40_000).float().repeat(4, 1).T.contiguous()
    found = calibrate(fc, list(rows.split(3001))).stats["weight"]
    again = calibrate(fc, list(rows.split(3001))).stats["weight"]
    check(found, rows)
    assert torch.equal(found.token_amax, again.token_amax)
    sample = found.token_amax
    assert len(sample) == SAMPLE
    assert len(sample.unique()) == SAMPLE
    # Ten groups of 4000 tokens each: a fair draw of 4096 tokens out of 40000 puts 410 into each
    # with a standard deviation of 19; five of them are missed once in a million draws.
    counts = torch.histc(sample, 10, 0, 40_000)
    assert ((counts - SAMPLE / 10).abs() < 5 * 19).all()
    # A stride through the tokens would meet one place of each sequence of 128.
    places = torch.histc(sample % 128, 128, 0, 128)
    assert (places > 0).all()


# --- how a model may be compiled and called --------------------------------------------------


class Ranks(nn.Module):
    """As many graphs as ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return self.fc(x)


def test_graph_breaks_recompiles_and_dynamic_shapes() -> None:
    model = Ranks().eval()
    batches = [torch.randn(*[2] * rank, 3, 4) for rank in range(4)]
    # More graphs than Dynamo's limit lets a user have.
    with torch._dynamo.config.patch(recompile_limit=2):
        check_like_hooks(model, [*batches, torch.randn(7, 4), torch.randn(9, 4)], model)


class Shared(nn.Module):
    """A module called twice, a tied weight, and a block of one class three times."""

    breaks = False

    def __init__(self, compiled: Callable[[nn.Module], Any] = lambda block: block) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 128)
        self.blocks = nn.ModuleList([compiled(TwoLayers()) for _ in range(3)])
        self.head = nn.Linear(128, 10, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = x + block(x)
            if self.breaks:
                # Dynamo gives up on a frame that breaks in a loop, and goes on in what it calls.
                torch._dynamo.graph_break()
        torch._dynamo.graph_break()
        return self.head(x + self.blocks[0](x))


TOKENS = torch.arange(10).reshape(2, 5)


def test_shared_modules_and_tied_weights() -> None:
    model = Shared().eval()
    wanted = Hooked(model).stats(lambda: model(TOKENS))
    found = calibrate(model, [TOKENS])
    assert found.stats.keys() == wanted.keys() | {"embed.weight"}
    for name, rows in wanted.items():
        check(found.stats[name], rows)
    assert found.stats["blocks.0.up.weight"].tokens == 20
    assert found.stats["embed.weight"] is found.stats["head.weight"]


@pytest.mark.parametrize("breaks", [False, True])
def test_blocks_compiled_one_by_one(breaks: bool) -> None:
    torch.manual_seed(0)
    plain = Shared().eval()
    wanted = Hooked(plain).stats(lambda: plain(TOKENS))
    counter = Counter()
    torch.manual_seed(0)
    model = Shared(lambda block: torch.compile(block, backend=counter, fullgraph=True)).eval()
    model.breaks = breaks
    with torch.no_grad():
        model(TOKENS)
    graphs = counter.graphs
    found = calibrate(model, [TOKENS])
    # In a frame that Dynamo gave up on, the head is not compiled, nor would it be quantized.
    outside = set() if breaks else {"head.weight", "embed.weight"}
    assert found.stats.keys() == wanted.keys() - {"head.weight"} | outside
    for name in found.stats.keys() & wanted.keys():
        check(found.stats[name], wanted[name])
    with torch.no_grad():
        model(TOKENS)
    assert counter.graphs == graphs
    block = model.blocks[1]
    # A graph that serves all blocks knows each weight by the parameter that arrives.
    assert found.of(block.up.weight, "up.weight") is found.stats["blocks.1.up.weight"]


class Spellings(nn.Module):
    """Products that are no Linears, and what goes into each."""

    def __init__(self) -> None:
        super().__init__()
        self.mixed = nn.MultiheadAttention(16, 2, batch_first=True)
        self.encoder = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.experts = nn.Parameter(torch.randn(3, 16, 8))
        self.plain = nn.Parameter(torch.randn(16, 8))
        self.conv = nn.Conv2d(16, 4, 1)
        self.matrix = nn.Parameter(torch.randn(5, 16))

    def forward(self, x: Tensor) -> list[Tensor]:
        image = x[:, None].movedim(-1, 1)
        return [
            self.mixed(x, x, x)[0],
            self.encoder(x),
            torch.bmm(x[:, :1].expand(3, 4, 16), self.experts),
            x @ self.plain,
            linear(x, self.plain.T),
            torch.einsum("btk,nk->btn", x, self.matrix),
            self.conv(image),
            torch.matmul(self.matrix, x[0].T),
        ]


def test_products_in_every_spelling() -> None:
    model = Spellings().eval()
    x = torch.randn(3, 7, 16)
    found = calibrate(model, [x]).stats
    rows = x.reshape(-1, 16)
    check(found["mixed.in_proj_weight"], rows)
    check(found["encoder.self_attn.in_proj_weight"], rows)
    check(found["conv.weight"], rows)
    check(found["experts"], x[:, :1].expand(3, 4, 16).reshape(-1, 16))
    check(found["plain"], torch.cat([rows, rows]))
    check(found["matrix"], torch.cat([rows, x[0]]))
    inside = {"mixed.out_proj", "encoder.self_attn.out_proj", "encoder.linear1", "encoder.linear2"}
    assert {f"{name}.weight" for name in inside} <= found.keys()
    assert len(found["encoder.linear2.weight"].amax) == 32


class Bodies(nn.Module):
    """Products inside higher-order ops."""

    def __init__(self) -> None:
        super().__init__()
        self.saved, self.left, self.right = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.utils.checkpoint.checkpoint(self.saved, x, use_reentrant=False)
        return torch.cond(x.sum() > 0, self.left, self.right, (x,))


def test_inside_checkpointing_and_cond() -> None:
    model, x = Bodies(), torch.randn(6, 8)
    model.saved.bias.data.fill_(9)
    found = calibrate(model, [x]).stats
    check(found["saved.weight"], x)
    # Only the branch that ran has seen anything.
    assert "right.weight" not in found
    check(found["left.weight"], model.saved(x).detach())


def test_a_transformers_model_that_generates() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=32, n_embd=16, n_layer=2, n_head=2, n_positions=32, eos_token_id=None
    )
    model = transformers.GPT2LMHeadModel(config).eval()
    prompt = torch.arange(1, 5).unsqueeze(0)

    def run(m: Any) -> Tensor:
        return m.generate(prompt, max_new_tokens=4, do_sample=False, pad_token_id=0)

    tokens = run(model)
    found = calibrate(torch.compile(model, backend="eager"), [run]).stats
    kinds = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    names = {f"transformer.h.{i}.{kind}.weight" for i in range(2) for kind in kinds}
    assert found.keys() == {*names, "transformer.wte.weight", "lm_head.weight"}
    # The prompt, then one token a step, of which the last one is not run.
    assert all(found[name].tokens == 4 + 3 for name in names)
    assert torch.equal(run(model), tokens)


# --- the modes it says something about -------------------------------------------------------


def test_train_mode_is_kept_and_said(caplog: pytest.LogCaptureFixture) -> None:
    model = TwoLayers().train()
    with caplog.at_level(logging.WARNING, "fxquant.calibrate"):
        calibrate(model, BATCHES)
    assert "train mode" in caplog.text
    assert model.training
    caplog.clear()
    calibrate(model.eval(), BATCHES)
    assert not caplog.records


def test_a_model_without_products(caplog: pytest.LogCaptureFixture) -> None:
    assert calibrate(nn.GELU().eval(), [X]).stats == {}
    assert "no product against a parameter in 1 batches" in caplog.text


def test_the_bar_can_be_seen_and_turned_off(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = nn.Linear(16, 4).eval()
    calibrate_with_bar(model, [X])
    # Nothing goes to a file that standard error is redirected to.
    assert capsys.readouterr() == ("", "")
    terminal = Console(file=io.StringIO(), force_terminal=True)
    module = sys.modules["fxquant.calibrate"]
    monkeypatch.setattr(module, "Console", lambda **_: terminal)
    calibrate_with_bar(model, [X], progress=False)
    assert terminal.file.getvalue() == ""
    calibrate_with_bar(model, [X, X])
    assert "calibrating" in terminal.file.getvalue()
    assert "2/2" in terminal.file.getvalue()


# --- errors ----------------------------------------------------------------------------------


def refused(match: str, batches: Any, model: nn.Module | None = None) -> None:
    model = model or Forms().eval()
    before = state_of(model)
    with pytest.raises(errors.CalibrationError, match=match) as caught:
        calibrate(model, batches)
    assert "\n" not in str(caught.value)
    assert str(caught.value).endswith(".")
    assert state_of(model) == before


def test_batches_that_are_none() -> None:
    refused("without batches", [])
    refused("without batches", iter(()))
    refused(r"are one Tensor: .* \[batch\]", X)
    refused(r"are one dict: .* \[batch\]", {"x": X})


def test_batches_that_the_model_does_not_take() -> None:
    refused("batch 1: it is a str", [X, "text"])
    refused("batch 0: the model does not take it .*'tokens'", [{"x": X, "tokens": X}])
    refused("batch 0: the model does not take it .*too many positional", [(X, 1.0, 2.0)])
    # What goes wrong inside the model stays its own error.
    with pytest.raises((RuntimeError, TypeError), match=r"size|shape"):
        calibrate(Forms().eval(), [torch.randn(2, 17)])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_activations_that_are_no_numbers(bad: float) -> None:
    x = torch.randn(5, 128)
    x[1, 3] = bad
    refused("of 'up.weight' hold NaN or Inf in batch 1", [BATCHES[0], x], TwoLayers().eval())


def test_public_names() -> None:
    import fxquant

    assert fxquant.calibrate is calibrate_with_bar
    assert fxquant.Calibration is Calibration
