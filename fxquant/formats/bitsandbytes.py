"""The names and shapes under which bitsandbytes stores a 4-bit weight.

For a parameter ``w``: ``w`` (codes, uint8, ``[bytes, 1]``), ``w.absmax`` (float32, or uint8 codes
when double-quantized), ``w.quant_map``, ``w.nested_absmax``, ``w.nested_quant_map``, and
``w.quant_state.bitsandbytes__nf4``: JSON as a uint8 tensor. The numbers are ours bit for bit; only
the places differ.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fxquant.formats.codebooks import codebooks
from fxquant.formats.decode import levels
from fxquant.formats.encoding import Encoding
from fxquant.formats.packed import PackedWeight

STATE = "quant_state.bitsandbytes__"
TYPES = ("nf4", "fp4")
PLAIN_KEYS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")


def can_store(encoding: Encoding) -> bool:
    """Whether bitsandbytes can read weights in this encoding."""
    inner = encoding.scale
    return (
        encoding.levels in TYPES
        and encoding.is_flat
        and encoding.block != (-1,)
        and (
            inner is None or (inner.levels == "dynamic8" and inner.offset and inner.block != (-1,))
        )
    )


def to_tensors(weight: PackedWeight) -> dict[str, Tensor]:
    """A weight as bitsandbytes stores it: suffix (``""`` for the codes) to tensor."""
    encoding, inner = weight.encoding, weight.encoding.scale
    parts = dict(zip(encoding.parts, weight.tensors(), strict=True))
    state: dict[str, Any] = {
        "quant_type": encoding.levels,
        "blocksize": encoding.block[0],
        "dtype": str(weight.dtype).removeprefix("torch."),
        "shape": list(weight.shape),
    }
    out = {"": parts["codes"].view(-1, 1), "absmax": parts["scales"], "quant_map": _map(encoding)}
    if inner is not None:
        state["nested_blocksize"] = inner.block[0]
        state["nested_dtype"] = "float32"
        state["nested_offset"] = parts["offset"].item()
        out["nested_absmax"] = parts["nested"]
        out["nested_quant_map"] = _map(inner)
    text = json.dumps(state).encode()
    out[f"{STATE}{encoding.levels}"] = torch.tensor(list(text), dtype=torch.uint8)
    return out


def from_tensors(tensors: Mapping[str, Tensor]) -> PackedWeight:
    """The weight that `to_tensors`, or bitsandbytes, stored.

    Args:
        tensors: Suffix to tensor, with exactly one ``quant_state`` among them.

    Raises:
        KeyError, ValueError, TypeError: Something is missing or does not read.
    """
    (state_key,) = [key for key in tensors if key.startswith(STATE)]
    state = json.loads(bytes(tensors[state_key].tolist()))
    inner = None
    parts = [tensors[""].reshape(-1).view(torch.uint8), tensors["absmax"]]
    if "nested_absmax" in tensors:
        book = _levels(tensors["nested_quant_map"], ("dynamic8", "e4m3"))
        inner = Encoding(8, book, (int(state["nested_blocksize"]),), offset=True)
        parts += [tensors["nested_absmax"], torch.tensor(float(state["nested_offset"]))]
    encoding = Encoding(
        4, _levels(tensors["quant_map"], TYPES), (int(state["blocksize"]),), scale=inner
    )
    dtype = getattr(torch, state["dtype"])
    return PackedWeight(parts, encoding, [int(size) for size in state["shape"]], dtype)


def _map(encoding: Encoding) -> Tensor:
    return torch.tensor(levels(encoding), dtype=torch.float32)


def _levels(table: Tensor, names: tuple[str, ...]) -> str | tuple[float, ...]:
    """The codebook's name if it is one of these bit for bit, else the levels themselves."""
    found = table.to(torch.float32).tolist()
    for name in names:
        if torch.tensor(codebooks()[name].levels).tolist() == found:
            return name
    return tuple(found)
