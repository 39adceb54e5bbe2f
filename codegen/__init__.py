"""From a `KernelSpec` to source text.

Knows nothing of models, graphs or autograd. `spec` says what a kernel computes, `reference`
defines it by executing it with torch, `indexing` and `pointwise` hold what the targets share, and
every target is one folder with a ``render(spec, header) -> str``, registered here.
"""

from __future__ import annotations

from collections.abc import Callable

from fxquant.codegen import reference, triton
from fxquant.codegen.header import Header
from fxquant.codegen.spec import KernelSpec

RENDERERS: dict[str, Callable[[KernelSpec, Header], str]] = {
    "torch": reference.render,
    "triton": triton.render,
}

__all__ = ["RENDERERS", "Header", "KernelSpec", "reference", "triton"]
