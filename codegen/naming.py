"""What kernels are called, after the modules of the model that they serve."""

from __future__ import annotations

import keyword
import re
from collections.abc import Sequence

_MOST_WORDS, _MOST_TAILS = 3, 4
_LONGEST = 60
_UNTOLD = {"join", "bias", "per", "token", "tensor", "static", "clipped"}
"""Words of a spec's name that say nothing about what follows the product."""


def name_for(modules: Sequence[str], spec_name: str, *, weights: int = 1) -> str:
    """A name for a kernel: ``mlp_gate_up_silu``.

    It is made of the last words of the modules' paths, without the numbers of layers, and of what
    is fused. Several modules give what their paths have in common, and where they differ if that
    is short. Equal arguments give equal names; the name is no part of what a kernel means.

    Args:
        modules: Paths of the modules that the kernel serves, as in ``"layers.0.mlp.gate_proj"``.
        spec_name: What the kernel does, as `KernelSpec.name` says it.
        weights: How many weights it multiplies with.

    Returns:
        An identifier; `spec_name` where the paths have no words.
    """
    tails = list(dict.fromkeys(tail for tail in map(_tail, modules) if tail))
    words = _common(tails)
    if not words:
        return spec_name
    fused = _fused(spec_name)
    if weights > 1 and len(fused) > 1:
        fused = [word for word in fused if word != "mul"]
    if "quantize" in spec_name.split("_"):
        words = [*spec_name.partition("quantize")[0].strip("_").split("_"), "quantize", *words]
    found = (
        re.sub(r"\W+", "_", "_".join(filter(None, [*words, *fused])))
        .strip("_")[:_LONGEST]
        .rstrip("_")
    )
    if not found.isidentifier() or keyword.iskeyword(found):
        found = f"kernel_{found}"
    return found


def _tail(path: str) -> tuple[str, ...]:
    """The words after the last number of a path, three at most: ``("mlp", "gate")``."""
    parts = [part for part in path.split(".") if part]
    numbers = [place for place, part in enumerate(parts) if part.isdecimal()]
    after = parts[numbers[-1] + 1 :] if numbers else parts
    if not after:
        after = [part for part in parts if not part.isdecimal()]
    words = tuple(part for part in after if part not in ("_orig_mod", "module"))[-_MOST_WORDS:]
    *before, last = words or ("",)
    return (*before, re.sub(r"_(proj|projection)$", "", last)) if last else ()


def _common(tails: Sequence[tuple[str, ...]]) -> list[str]:
    """One name for several paths: what they begin with, and what they end in if that is short."""
    if not tails:
        return []
    shared: list[str] = []
    for words in zip(*tails, strict=False):
        if len(set(words)) > 1:
            break
        shared.append(words[0])
    rest = list(dict.fromkeys("_".join(tail[len(shared) :]) for tail in tails))
    rest = [word for word in rest if word]
    if not shared and len(rest) > 2:
        return []
    if len(rest) > _MOST_TAILS:
        return [*shared, "shared"]
    return [*shared, *rest]


def _fused(spec_name: str) -> list[str]:
    """What follows the product, from the words behind the sizes of a spec's name."""
    words = spec_name.split("_")
    sizes = [place for place, word in enumerate(words) if re.fullmatch(r"\d+(x\d+)*", word)]
    behind = words[sizes[-1] + 1 :] if sizes else []
    return [word for word in behind if word not in _UNTOLD and not word.endswith("outliers")]
