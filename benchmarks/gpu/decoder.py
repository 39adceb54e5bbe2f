"""A decoder of Llama's shape with random weights, a token at a time, with a static cache.

In plain torch, because nothing else is sure to be there. Blocks are compiled one by one: Dynamo
reuses the graph of the first for all. Embedding and head stay in bfloat16 for everyone.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

import fxquant
from benchmarks.gpu.device import Device

BF16 = torch.bfloat16
LEAST_COSINE = 0.9
"""Of compiled logits to those of the same weights in eager mode, which round elsewhere."""


@dataclass(frozen=True)
class Shape:
    """Sizes of a decoder; as they are, those of Llama 3 with 8 billion weights."""

    vocabulary: int = 128_256
    hidden: int = 4096
    inner: int = 14_336
    layers: int = 32
    heads: int = 32
    kv_heads: int = 8
    length: int = 256

    @property
    def head(self) -> int:
        """Channels of one head."""
        return self.hidden // self.heads


SMALL = Shape(64, 64, 128, 2, 4, 2, 16)
"""For rehearsals."""


class Block(nn.Module):
    """Attention with grouped keys and values, and a gated pair of products."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        width, kv = shape.hidden, shape.kv_heads * shape.head
        self.norm_in, self.norm_mid = nn.RMSNorm(width, 1e-5), nn.RMSNorm(width, 1e-5)
        self.q, self.o = (nn.Linear(width, width, bias=False) for _ in range(2))
        self.k, self.v = (nn.Linear(width, kv, bias=False) for _ in range(2))
        self.gate, self.up = (nn.Linear(width, shape.inner, bias=False) for _ in range(2))
        self.down = nn.Linear(shape.inner, width, bias=False)

    def forward(
        self, x: Tensor, cache: tuple[Tensor, Tensor], position: Tensor, turn: Tensor, seen: Tensor
    ) -> Tensor:
        """One token of every sequence.

        Args:
            x: ``[batch, 1, hidden]``.
            cache: Keys and values, ``[batch, kv_heads, length, head]``; written at `position`.
            position: ``[1]``, int64.
            turn: Cosines and sines of the position, ``[2, head]``.
            seen: ``[1, 1, 1, length]``, which positions there are.
        """
        shape, (keys, values) = self.shape, cache
        batch = x.shape[0]
        inner = self.norm_in(x)
        heads = (batch, 1, -1, shape.head)
        q = _turned(self.q(inner).view(heads).transpose(1, 2), turn)
        k = _turned(self.k(inner).view(heads).transpose(1, 2), turn)
        keys.index_copy_(2, position, k)
        values.index_copy_(2, position, self.v(inner).view(heads).transpose(1, 2))
        mixed = nn.functional.scaled_dot_product_attention(
            q, keys, values, attn_mask=seen, enable_gqa=True
        )
        x = x + self.o(mixed.transpose(1, 2).reshape(batch, 1, shape.hidden))
        inner = self.norm_mid(x)
        return x + self.down(nn.functional.silu(self.gate(inner)) * self.up(inner))


def _turned(x: Tensor, turn: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    swapped = torch.cat((-x[..., half:], x[..., :half]), -1)
    return x * turn[0] + swapped * turn[1]


class Decoder:
    """Makes a token a call; everything it keeps stays in place, so that a graph can replay it."""

    def __init__(
        self, shape: Shape, batch: int, device: torch.device, finish: Callable[[Block], Any]
    ) -> None:
        generator = torch.Generator(device).manual_seed(0)
        self.shape = shape

        def drawn(*size: int) -> Tensor:
            made = torch.empty(size, dtype=BF16, device=device)
            return made.normal_(0.0, size[-1] ** -0.5, generator=generator)

        self.blocks: list[Callable[..., Tensor]] = []
        self.plain: list[Block] = []
        for _ in range(shape.layers):
            with torch.device("meta"):
                block = Block(shape).to(BF16)
            block = block.to_empty(device=device).requires_grad_(requires_grad=False).eval()
            for parameter in block.parameters():
                parameter.data.copy_(drawn(*parameter.shape) if parameter.ndim == 2 else 1.0)
            self.blocks.append(finish(block))
            self.plain.append(block)
        self.embedding, self.head = (drawn(shape.vocabulary, shape.hidden) for _ in range(2))
        cache = (batch, shape.kv_heads, shape.length, shape.head)
        self.caches = [
            (
                torch.zeros(cache, dtype=BF16, device=device),
                torch.zeros(cache, dtype=BF16, device=device),
            )
            for _ in range(shape.layers)
        ]
        speeds = 500_000.0 ** (-torch.arange(0, shape.head, 2, device=device) / shape.head)
        angles = torch.outer(torch.arange(shape.length, device=device), speeds).repeat(1, 2)
        self.turns = torch.stack((angles.cos(), angles.sin()), 1).to(BF16)
        self.places = torch.arange(shape.length, device=device)
        self.tokens = torch.zeros(batch, 1, dtype=torch.long, device=device)
        self.position = torch.zeros(1, dtype=torch.long, device=device)
        self.logits = torch.empty(0)

    def step(self, blocks: list[Any] | None = None) -> None:
        """The next token of every sequence, the greedy choice."""
        x = nn.functional.embedding(self.tokens, self.embedding)
        turn = self.turns.index_select(0, self.position)[0]
        seen = (self.places <= self.position)[None, None, None]
        for block, cache in zip(blocks or self.blocks, self.caches, strict=True):
            x = block(x, cache, self.position, turn, seen)
        x = nn.functional.rms_norm(x, (self.shape.hidden,), eps=1e-5)
        self.logits = nn.functional.linear(x[:, -1], self.head)
        self.tokens.copy_(self.logits.argmax(-1, keepdim=True))
        self.position.copy_((self.position + 1) % self.shape.length)

    def cosine(self) -> float:
        """Of the first token's logits, compiled, to those of the same weights in eager mode."""
        found = []
        for blocks in (self.blocks, self.plain):
            self.tokens.zero_()
            self.position.zero_()
            self.step(blocks)
            found.append(self.logits.float())
        return float(nn.functional.cosine_similarity(*found).mean())


def _inductor(block: Block) -> Any:
    return torch.compile(block, dynamic=False)


def _fxquant(scheme: str, target: str) -> Callable[[Block], Any]:
    def finish(block: Block) -> Any:
        fxquant.quantize_(block, fxquant.Config(scheme=scheme))
        options = {"scheme": scheme, "target": target}
        return torch.compile(block, backend="fxquant", dynamic=False, options=options)

    return finish


def builders(target: str) -> dict[str, Callable[[Block], Any]]:
    """Who decodes."""
    return {
        "inductor bf16": _inductor,
        **{f"fxquant {scheme}": _fxquant(scheme, target) for scheme in ("nf4", "w8a8")},
    }


@torch.inference_mode()
def measure(device: Device, shape: Shape, name: str, batch: int, rounds: int) -> dict[str, Any]:
    """Tokens a second and the peak of the memory while decoding.

    Raises:
        RuntimeError: The compiled blocks compute something else than the plain ones.
    """
    gc.collect()
    torch._dynamo.reset()
    decoder = Decoder(shape, batch, device.torch, builders(device.target)[name])
    cosine = decoder.cosine()
    if not cosine >= LEAST_COSINE:
        raise RuntimeError(f"logits have cosine {cosine:.3f} to those of the same weights in eager")
    device.forget_peak()
    run, graphed = device.captured(decoder.step)
    timed = device.interleave({name: run}, rounds)[name]
    return {
        "case": f"decoder, batch {batch}",
        "name": name,
        "shape": asdict(shape),
        "tokens_per_second": batch / timed.median,
        "median_us": timed.median * 1e6,
        "quartiles_us": [timed.low * 1e6, timed.high * 1e6],
        "rounds": timed.rounds,
        "cuda_graph": graphed,
        "cosine": cosine,
        "peak_bytes": device.peak_memory(),
    }
