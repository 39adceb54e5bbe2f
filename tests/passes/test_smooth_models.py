"""Smoothing of random transformers: what folds where, by data flow alone."""

from __future__ import annotations

import pytest
import torch

from tests.passes.smooth_harness import Smoothed, run
from tests.passes.test_models import frozen

transformers = pytest.importorskip("transformers")

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
}
TEXT = {**SIZES, "vocab_size": 99, "max_position_embeddings": 64}


def made(kind: str, **more):
    """A small random model without dropout, and a function of ids or pixels."""
    configs = {
        "llama": lambda: transformers.LlamaConfig(num_key_value_heads=2, **TEXT, **more),
        "mixtral": lambda: transformers.MixtralConfig(
            num_key_value_heads=2, num_local_experts=4, **TEXT, **more
        ),
        "gemma": lambda: transformers.GemmaConfig(
            num_key_value_heads=1, head_dim=8, **TEXT, **more
        ),
        "bert": lambda: transformers.BertConfig(**TEXT, **more),
        "opt": lambda: transformers.OPTConfig(
            hidden_size=32, word_embed_proj_dim=32, ffn_dim=48, num_hidden_layers=1,
            num_attention_heads=4, vocab_size=99, max_position_embeddings=64, **more,
        ),
        "gpt2": lambda: transformers.GPT2Config(
            n_embd=32, n_layer=1, n_head=4, n_positions=64, vocab_size=99,
            bos_token_id=0, eos_token_id=0, **more,
        ),
        "t5": lambda: transformers.T5Config(
            d_model=32, d_kv=8, d_ff=48, num_layers=1, num_decoder_layers=2, num_heads=4,
            vocab_size=99, decoder_start_token_id=0, **more,
        ),
        "vit": lambda: transformers.ViTConfig(image_size=32, patch_size=16, **SIZES, **more),
    }  # fmt: skip
    model = frozen(transformers.AutoModel.from_config(configs[kind]())).eval()
    if kind == "vit":
        return lambda pixels: model(pixels).last_hidden_state, torch.randn(2, 3, 32, 32)
    ids = torch.randint(1, 99, (2, 7))
    if kind == "t5":
        return lambda x: model(input_ids=x, decoder_input_ids=x, use_cache=False)[0], ids
    keys = {} if kind == "bert" else {"use_cache": False}
    return lambda x: model(x, **keys).last_hidden_state, ids


def named(found: Smoothed, text: str) -> list[str]:
    return [name for name in found.notes if text in name]


# By kind: what is folded into what makes it, and what is multiplied in the graph.
PLACES = {
    "llama": (["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"], []),
    "gemma": (["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"], []),
    "mixtral": (["q_proj", "k_proj", "v_proj", "o_proj", "down_proj"], ["gate_up_proj"]),
    "opt": (["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"], []),
    "gpt2": (["c_attn", "attn.c_proj", "c_fc"], ["mlp.c_proj"]),
    "t5": ([".q.", ".k.", ".v.", ".o.", ".wi.", ".wo."], []),
    "vit": (["q_proj", "k_proj", "v_proj", "o_proj", "fc1"], ["fc2", "patch_embeddings"]),
    "bert": (["attention.output"], ["query", "key", "value", "intermediate", ".output.dense"]),
}
JOINT = {
    "llama": [("q_proj", "k_proj"), ("q_proj", "v_proj"), ("gate_proj", "up_proj")],
    "opt": [("q_proj", "k_proj"), ("q_proj", "v_proj")],
    "bert": [("query", "key"), ("query", "value")],
    "vit": [("q_proj", "v_proj")],
    "t5": [("block.0.layer.1.EncDecAttention.k", "block.1.layer.1.EncDecAttention.v")],
}


@pytest.mark.parametrize("kind", PLACES)
def test_where_scales_go(kind: str) -> None:
    found = run(*made(kind))
    folded, multiplied = PLACES[kind]
    for text in folded:
        assert named(found, text)
        assert set(named(found, text)) <= set(found.folded())
    for text in multiplied:
        here = set(named(found, text)) - set(found.folded())
        assert here
        assert here <= set(found.multiplied())
    assert set(found.folded()) | set(found.multiplied()) == set(found.notes), "all are smoothed"
    for first, second in JOINT.get(kind, []):
        sites = {site.parameter.name: site for site in found.sites}
        for name, site in sites.items():
            other = sites.get(name.replace(first, second))
            assert first not in name or other is None or other.in_scale is site.in_scale


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_gamma_migrates_out_of_norms_and_is_multiplied_back_for_the_residual(kind: str) -> None:
    found = run(*made(kind), smoothed=Smoothed(gamma=True))
    parts = ["query", "key", "value", "intermediate"] if kind == "bert" else ["q_proj", "up_proj"]
    for text in parts:
        assert set(named(found, text)) <= set(found.folded())
        back = ["multiplied back for add" in found.notes[name] for name in named(found, text)]
        assert all(back) if kind == "bert" else not any(back)
    left = "output.dense" if kind == "bert" else "down_proj"
    assert all("not smoothed: " in found.notes[name] for name in named(found, left))


def test_a_cache_keeps_values_where_they_are() -> None:
    """What goes into a cache is seen from outside: it is not scaled."""
    config = transformers.LlamaConfig(num_key_value_heads=2, **TEXT)
    llama = frozen(transformers.AutoModel.from_config(config)).eval()

    def step(ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
        out = llama(ids, use_cache=True)
        return out.last_hidden_state, out.past_key_values.layers[0].values

    found = run(step, torch.randint(1, 99, (2, 7)))
    assert set(named(found, "o_proj")) <= set(found.multiplied())
    assert set(named(found, "down_proj")) <= set(found.folded())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_16_bits(dtype: torch.dtype) -> None:
    """Every value on the way is rounded once more: some 20 roundings of 2**-9, or 2**-12."""
    config = transformers.LlamaConfig(num_key_value_heads=2, **TEXT)
    llama = frozen(transformers.AutoModel.from_config(config)).eval().to(dtype)
    ids = torch.randint(1, 99, (2, 7))
    forward = lambda x: llama(x, use_cache=False).last_hidden_state  # noqa: E731
    found = run(forward, ids, tol=40 * torch.finfo(dtype).eps)
    assert len(found.folded()) == 7
