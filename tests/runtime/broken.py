"""Printers with a defect: bias and all that follows are left out, a tensor's scale is a row's."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest

from fxquant.codegen import RENDERERS, KernelSpec, cpp, triton
from fxquant.codegen.epilogue import Epilogue
from fxquant.codegen.quantize import QuantizeSpec


def install(patch: pytest.MonkeyPatch) -> None:
    """Breaks the printers of both targets."""
    for module in (cpp, triton):
        whole = module.render
        broken = functools.partial(lambda whole, spec, *rest: whole(_wrong(spec), *rest), whole)
        patch.setattr(module, "render", broken)
    patch.setitem(RENDERERS, "triton", triton.render)


def _wrong(spec: KernelSpec | QuantizeSpec) -> KernelSpec | QuantizeSpec:
    if isinstance(spec, QuantizeSpec):
        return replace(spec, scope="token")
    return spec if spec.epilogue.more else replace(spec, epilogue=Epilogue())
