"""How the peers quantize a whole model: `nn.Linear` modules replaced, or their weights."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn

SKIPPED = "lm_head"


def bitsandbytes_nf4(model: nn.Module) -> nn.Module:
    """Every linear module but the head as bitsandbytes' NF4, double-quantized, bf16 inside."""
    import bitsandbytes

    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if not isinstance(child, nn.Linear) or name == SKIPPED:
                continue
            packed: Any = bitsandbytes.nn.Linear4bit(
                child.in_features,
                child.out_features,
                bias=child.bias is not None,
                compute_dtype=torch.bfloat16,
                quant_type="nf4",
                device="meta",
            )
            packed.weight = bitsandbytes.nn.Params4bit(
                child.weight.data, requires_grad=False, quant_type="nf4", compress_statistics=True
            )
            packed.bias = child.bias
            setattr(parent, name, packed.to("cpu"))
    return model.eval()


def bitsandbytes_repacked(model: nn.Module) -> nn.Module:
    """As `bitsandbytes_nf4`, with what the first call of each module does to its weight done.

    It repacks the weight for the AVX512 kernel, which compiled code would do within its graph.
    """
    import bitsandbytes

    packed = bitsandbytes_nf4(model)
    for module in packed.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            module(torch.zeros(1, module.in_features, dtype=torch.bfloat16))
    return packed


def fbgemm_dynamic(model: nn.Module) -> nn.Module:
    """Every linear module as PyTorch's dynamic int8."""
    from torch.ao.quantization import per_channel_dynamic_qconfig, quantize_dynamic

    torch.backends.quantized.engine = "fbgemm"
    with warnings.catch_warnings():
        # PyTorch says that these tensors will go; they are what there is.
        warnings.simplefilter("ignore")
        return quantize_dynamic(model, {nn.Linear: per_channel_dynamic_qconfig})


def torchao_int8(model: nn.Module) -> nn.Module:
    """Every linear module's weight as torchao's int8, activations quantized at run time."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    quantize_(model, Int8DynamicActivationInt8WeightConfig())
    return model
