"""Fused ops that hold several weights, written out as the ordinary ops they stand for.

`nn.TransformerEncoderLayer` and `nn.MultiheadAttention` call them in eval mode. They have no
gradient, hence no dropout.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_aten = torch.ops.aten


def transformer_encoder_layer(  # noqa: PLR0917 - aten's signature
    src: Tensor,
    embed_dim: int,
    num_heads: int,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    use_gelu: bool,
    norm_first: bool,
    eps: float,
    norm_weight_1: Tensor,
    norm_bias_1: Tensor | None,
    norm_weight_2: Tensor,
    norm_bias_2: Tensor | None,
    ffn_weight_1: Tensor,
    ffn_bias_1: Tensor | None,
    ffn_weight_2: Tensor,
    ffn_bias_2: Tensor | None,
    mask: Tensor | None = None,
    mask_type: int | None = None,
) -> Tensor:
    """`aten::_transformer_encoder_layer_fwd`: src ``[batch, time, embed_dim]`` to the same."""

    def norm(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.layer_norm(x, (embed_dim,), weight, bias, eps)

    def attention(x: Tensor) -> Tensor:
        return multi_head_attention(
            x, x, x, embed_dim, num_heads, qkv_weight, qkv_bias, proj_weight, proj_bias, mask,
            False, True, mask_type,
        )[0]  # fmt: skip

    def feed_forward(x: Tensor) -> Tensor:
        hidden = F.linear(x, ffn_weight_1, ffn_bias_1)
        hidden = F.gelu(hidden) if use_gelu else F.relu(hidden)
        return F.linear(hidden, ffn_weight_2, ffn_bias_2)

    if norm_first:
        src = src + attention(norm(src, norm_weight_1, norm_bias_1))
        return src + feed_forward(norm(src, norm_weight_2, norm_bias_2))
    src = norm(src + attention(src), norm_weight_1, norm_bias_1)
    return norm(src + feed_forward(src), norm_weight_2, norm_bias_2)


def multi_head_attention(  # noqa: PLR0917 - aten's signature
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim: int,
    num_heads: int,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    mask: Tensor | None = None,
    need_weights: bool = True,
    average_attn_weights: bool = True,
    mask_type: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """`aten::_native_multi_head_attention`: inputs ``[batch, time, embed_dim]``.

    Returns:
        The output and, if asked for, the attention weights (averaged over the heads, or by head).
    """
    if query is key and key is value:
        pieces = F.linear(query, qkv_weight, qkv_bias).chunk(3, -1)
    else:
        weights = qkv_weight.chunk(3)
        biases = (None, None, None) if qkv_bias is None else qkv_bias.chunk(3)
        inputs = (query, key, value)
        pieces = tuple(map(F.linear, inputs, weights, biases))
    q, k, v = (piece.unflatten(-1, (num_heads, -1)).transpose(1, 2) for piece in pieces)
    scores = torch.matmul(q * (1 / math.sqrt(embed_dim // num_heads)), k.transpose(-1, -2))
    if mask is not None:
        scores = scores.masked_fill(_spread(mask, mask_type), -math.inf)
    attention = torch.softmax(scores, -1)
    mixed = torch.matmul(attention, v).transpose(1, 2).flatten(-2)
    out = F.linear(mixed, proj_weight, proj_bias)
    if not need_weights:
        return out, None
    return out, attention.mean(1) if average_attn_weights else attention


def _spread(mask: Tensor, mask_type: int | None) -> Tensor:
    """A mask as a boolean that broadcasts to ``[batch, heads, time, time]``.

    Type 0 is ``[time, time]``, type 1 (padding) ``[batch, time]``, type 2 already has four
    dimensions.
    """
    mask = mask.to(torch.bool)
    if mask_type == 1:
        return mask[:, None, None, :]
    return mask


DECOMPOSITIONS: dict[Any, Callable[..., Any]] = {
    _aten._transformer_encoder_layer_fwd.default: transformer_encoder_layer,
    _aten._native_multi_head_attention.default: multi_head_attention,
}
