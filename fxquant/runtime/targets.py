"""Which target serves a graph: what the options ask for against what this machine has."""

from __future__ import annotations

import functools
import logging
from dataclasses import dataclass

import torch

from fxquant.runtime import launch

LOG = logging.getLogger("fxquant.targets")


@dataclass(frozen=True)
class Choice:
    """The targets of one graph.

    Attributes:
        asked: The target whose kernels are printed and dumped: ``"triton"`` or ``"torch"``.
        runs: The target that computes.
        note: Why the two differ, or ``""``.
    """

    asked: str
    runs: str
    note: str = ""


def choose(option: str, device: torch.device) -> Choice:
    """Resolves `Config.target` for tensors of a device; logs every fallback."""
    if option == "torch" or (option == "auto" and device.type != "cuda"):
        return Choice("torch", "torch")
    if launch.runs_triton(device):
        return Choice("triton", "triton")
    if device.type == "cuda":
        note = "the triton package is not installed: pip install 'fxquant[triton]'"
    else:
        note = f"Triton kernels need a GPU and these tensors are on {device.type}"
    LOG.warning("target 'triton' cannot run here (%s): target 'torch' runs instead", note)
    asked = "triton" if option == "triton" else "torch"
    return Choice(asked, "torch", note)


@functools.lru_cache(maxsize=1)
def cxx_compiler() -> str | None:
    """The C++ compiler that Inductor would take for the CPU, None without one."""
    from torch._inductor import cpp_builder, exc

    try:
        return str(cpp_builder.get_cpp_compiler())
    except exc.InvalidCxxCompiler:
        return None


def inductor_missing(device: torch.device) -> str:
    """What Inductor lacks to compile for a device, or ``""``."""
    if device.type == "cpu" and cxx_compiler() is None:
        return "no C++ compiler was found (install g++, or set CXX)"
    if device.type == "cuda" and not launch.has_triton():
        return "the triton package is not installed"
    return ""
