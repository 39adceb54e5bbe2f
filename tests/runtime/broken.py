"""Printers with a defect: bias and all that follows are left out, a tensor's scale is a row's."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fxquant.codegen import RENDERERS, KernelSpec, cpp
from fxquant.codegen.epilogue import Epilogue
from fxquant.codegen.quantize import QuantizeSpec


def install(patch: pytest.MonkeyPatch) -> None:
    """Breaks the printers of both targets."""
    whole, triton = cpp.render, RENDERERS["triton"]
    patch.setattr(cpp, "render", lambda spec, *rest: whole(_wrong(spec), *rest))
    patch.setitem(RENDERERS, "triton", lambda spec, header: triton(_wrong(spec), header))


def _wrong(spec: KernelSpec | QuantizeSpec) -> KernelSpec | QuantizeSpec:
    if isinstance(spec, QuantizeSpec):
        return replace(spec, scope="token")
    return replace(spec, epilogue=Epilogue())
