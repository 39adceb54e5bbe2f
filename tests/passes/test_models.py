"""Whole modules and models: attention, transformers' layers, language models."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.passes.harness import Captured, compare, run

D = 64


def frozen(model: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model.requires_grad_(False)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("weights", [False, True])
def test_self_attention(batch_first, train, weights):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(D, 4, batch_first=batch_first)

        def forward(self, x):
            # torch's fast and slow paths lay the output out differently. Dynamo captures the slow
            # one, and in torch 2.11 does not lay its output out as the fast one.
            out, probabilities = self.attention(x, x, x, need_weights=weights)
            return out.contiguous(), probabilities

    model = frozen(Model()).train(train)
    captured = run(model, torch.randn(2, 5, D), grad=train, tol=1e-4)
    names = sorted(site.parameter.name for site in captured.sites)
    assert names == ["attention.in_proj_weight", "attention.out_proj.weight"]
    assert captured.losses == []


@pytest.mark.parametrize("option", ["add_zero_attn", "add_bias_kv"])
def test_attention_that_makes_tensors_of_its_own(option):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(D, 4, batch_first=True, **{option: True})

        def forward(self, x):
            return self.attention(x, x, x)[0].contiguous()

    captured = run(frozen(Model()), torch.randn(2, 5, D), tol=1e-4)
    assert len(captured.sites) == 2
    assert captured.losses == []


@pytest.mark.parametrize("dims", [None, 48])
def test_cross_attention_chunks_one_parameter(dims):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(D, 4, kdim=dims, vdim=dims, batch_first=True)

        def forward(self, x, y):
            return self.attention(x, y, y)

    inputs = torch.randn(2, 5, D), torch.randn(2, 7, dims or D)
    captured = run(frozen(Model()), *inputs, tol=1e-4)
    shapes = {site.operand.shape for site in captured.sites}
    assert len(captured.sites) == (4 if dims else 3)
    assert ((3 * D, D) in shapes) == (dims is None)
    assert len(captured.packed) == (4 if dims else 2)
    assert captured.losses == []


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("train", [False, True])
def test_encoder_layer(norm_first, activation, train):
    layer = nn.TransformerEncoderLayer(
        D, 4, 128, dropout=0.0, activation=activation, norm_first=norm_first, batch_first=True
    )
    model = frozen(layer).train(train)
    captured = run(model, torch.randn(2, 5, D), tol=1e-4)
    assert len(captured.sites) == 4
    assert captured.losses == []


@pytest.mark.parametrize("kind", ["source", "padding", "both"])
def test_encoder_layer_with_masks(kind):
    layer = frozen(nn.TransformerEncoderLayer(D, 4, 128, batch_first=True)).eval()
    source = torch.ones(5, 5).triu(1).bool() if kind != "padding" else None
    padding = torch.zeros(2, 5).bool() if kind != "source" else None
    if padding is not None:
        padding[1, 3:] = True

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, x, source, padding):
            return self.layer(x, src_mask=source, src_key_padding_mask=padding)

    captured = run(Model(), torch.randn(2, 5, D), source, padding, tol=1e-4)
    assert len(captured.sites) == 4


def language_model(name):
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 99}
    if name == "gpt2":
        config = transformers.GPT2Config(n_embd=D, n_layer=2, n_head=4, n_positions=64, **sizes)
        return transformers.GPT2LMHeadModel(config)
    sizes |= {
        "hidden_size": D,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
    }
    if name == "llama":
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))
    config = transformers.MixtralConfig(num_local_experts=4, **sizes)
    return transformers.MixtralForCausalLM(config)


def logits_of(model, captured, ids):
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=captured.backend)
    with torch.no_grad():
        got = compiled(ids, use_cache=False).logits
        with captured.decoded():
            wanted = model(ids, use_cache=False).logits
    return got, wanted


def test_llama():
    model, captured = frozen(language_model("llama")).eval(), Captured()
    got, wanted = logits_of(model, captured, torch.randint(0, 99, (2, 7)))
    compare(got, wanted, 1e-4)
    assert len(captured.sites) == 14
    assert {refusal.module for refusal in captured.refusals if refusal.kind == "skipped"} == {
        "lm_head"
    }
    assert captured.losses == []
    assert captured.sites[0].parameter.name == "model.layers.0.self_attn.q_proj.weight"
    assert captured.sites[0].module == "model.layers.0.self_attn.q_proj"
    names = {spec.split('"name":"')[1].split('"')[0] for spec in map(_spec, captured.sites)}
    assert names == {f"nf4_linear_{size}" for size in ("32x64", "64x64", "64x96", "96x64")}
    assert len({_spec(site) for site in captured.sites}) <= 7


def _spec(site):
    return site.spec_json


def test_gpt2_conv1d_and_tied_head():
    model, captured = frozen(language_model("gpt2")).eval(), Captured()
    got, wanted = logits_of(model, captured, torch.randint(0, 99, (2, 7)))
    compare(got, wanted, 1e-4)
    assert len(captured.sites) == 8
    assert captured.losses == []
    assert all(site.operand.strides[1] == 1 for site in captured.sites)


# What transformers asks about versions is behind a cache that Dynamo looks through.
@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
@pytest.mark.parametrize("experts", ["grouped_mm", "batched_mm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mixtral(experts, dtype):
    model, captured = frozen(language_model("mixtral")).eval().to(dtype), Captured()
    model.config._experts_implementation = experts
    got, wanted = logits_of(model, captured, torch.randint(0, 99, (2, 7)))
    # In bfloat16 some 40 values on the way are rounded, by half of 2**-8 each.
    compare(got, wanted, 1e-4 if dtype == torch.float32 else 20 * 2**-8)
    names = [site.parameter.name.removeprefix("model.layers.") for site in captured.sites]
    parts = ("q_proj.weight", "k_proj.weight", "v_proj.weight", "o_proj.weight")
    per_layer = [f"self_attn.{part}" for part in parts]
    per_layer += ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    assert names == [f"{layer}.{name}" for layer in range(2) for name in per_layer]
    assert captured.losses == []
    assert {refusal.kind for refusal in captured.refusals} == {"skipped"}
    assert sum("grouped_4x" in _spec(site) for site in captured.sites) == 4
