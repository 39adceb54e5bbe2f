"""A model whose norms are made with their quantization: equal within rounding, in fewer kernels."""

from __future__ import annotations

import torch
import transformers
from torch import Tensor, nn
from torch._inductor import metrics

from fxquant.codegen.quantize import QuantizeSpec
from fxquant.testing import run_and_get_kernels
from tests.helpers import compile_, frozen


def bert() -> nn.Module:
    config = transformers.BertConfig(
        hidden_size=32,
        intermediate_size=48,
        vocab_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    return transformers.BertModel(config, add_pooling_layer=False)


def test_norms_are_made_where_they_are_quantized() -> None:
    torch.manual_seed(0)
    model = frozen(bert())
    ids = torch.randint(0, 64, (2, 7))

    def run(*, fuse: bool) -> tuple[Tensor, list[QuantizeSpec], int]:
        torch._dynamo.reset()
        metrics.reset()
        compiled = compile_(model, scheme="w8a8", fuse=fuse)
        with torch.no_grad():
            out, kernels = run_and_get_kernels(lambda: compiled(ids).last_hidden_state)
        specs = [kernel.spec for kernel in kernels if isinstance(kernel.spec, QuantizeSpec)]
        return out, specs, metrics.generated_kernel_count

    fused, made, few = run(fuse=True)
    plain, apart, many = run(fuse=False)
    assert made
    assert all(spec.prologue is not None and "layer_norm" in spec.name for spec in made)
    assert all(spec.prologue is None for spec in apart)
    assert few < many
    # A code next to a tie becomes the neighbour, of 127 steps; both are as far from the model.
    with torch.no_grad():
        exact = model(ids).last_hidden_state
    noise = (plain - exact).square().mean()
    assert (fused - plain).square().mean() < noise
    assert (fused - exact).square().mean() < 2 * noise
