"""From a spec to source text.

Knows nothing of models, graphs or autograd. `spec` says what a product computes and `reference`
defines it by executing it with torch; `quantize` does both for rows to int8. `indexing` and
`pointwise` hold what the targets share, and every target is one folder with a
``render(spec, header) -> str``, registered here.
"""

from __future__ import annotations

from collections.abc import Callable

from fxquant.codegen import quantize, reference, triton
from fxquant.codegen.header import Header
from fxquant.codegen.quantize import QuantizeSpec
from fxquant.codegen.spec import KernelSpec

Spec = KernelSpec | QuantizeSpec
"""What a kernel is printed for: a product, or rows of an activation to quantize."""


def _render_torch(spec: Spec, header: Header) -> str:
    if isinstance(spec, QuantizeSpec):
        return quantize.render(spec, header)
    return reference.render(spec, header)


RENDERERS: dict[str, Callable[[Spec, Header], str]] = {
    "torch": _render_torch,
    "triton": triton.render,
}

__all__ = ["RENDERERS", "Header", "KernelSpec", "QuantizeSpec", "Spec", "reference", "triton"]
