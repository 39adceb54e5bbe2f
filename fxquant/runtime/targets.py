"""Which target serves a graph: what the options ask for against what this machine has."""

from __future__ import annotations

import dataclasses
import functools
import logging
import os
import shutil
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch

from fxquant import errors
from fxquant.codegen import Header
from fxquant.runtime import launch, rates, toolchain, tuning
from fxquant.runtime.cpp import usable_threads

LOG = logging.getLogger("fxquant.targets")


@dataclass(frozen=True)
class Choice:
    """The targets of one graph, or of one kernel.

    Attributes:
        asked: The target whose kernels are printed and dumped.
        runs: The target that computes.
        note: Why it is not the one that was meant, or ``""``.
    """

    asked: str
    runs: str
    note: str = ""


def choose(option: str, device: torch.device) -> Choice:
    """Resolves `Config.target` for tensors of a device; logs every fallback, each once.

    What was asked for by name and cannot run is printed all the same, and the device's usual
    target computes.
    """
    usual = launch.usual_target(device)
    wanted = usual if option == "auto" else option
    note = launch.obstacle(wanted, device)
    if not note:
        return Choice(wanted, wanted)
    instead = "torch" if launch.obstacle(usual, device) else usual
    _warn(f"target {wanted!r} cannot run here ({note}): target {instead!r} runs instead")
    return Choice(wanted if option == wanted else instead, instead, note)


@functools.lru_cache(maxsize=64)
def _warn(message: str) -> None:
    LOG.warning(message)


def identity(choice: Choice) -> tuple[str, ...]:
    """What tells the code that is compiled for a choice from other code."""
    chain = toolchain.toolchain() if choice.runs == "cpp" else None
    return (choice.asked, choice.runs, repr(chain))


def build(choice: Choice, specs: Mapping[str, Header], device: torch.device) -> dict[str, Choice]:
    """Builds the kernels of a graph.

    Args:
        choice: Of the graph.
        specs: As JSON, each with whom its kernel serves.
        device: Where the graph runs.

    Returns:
        The choice for each kernel: what a target prints no kernel for, and C++ that cannot be
        built, falls to ``"torch"``.

    Raises:
        KernelError: Another target prints no kernel for a spec.
        FolderError: The kernel cache cannot be written.
    """

    def build_one(text: str) -> Choice:
        try:
            launch.prepare(text, choice.runs, specs[text], device)
        except errors.CompilerError as error:
            return dataclasses.replace(choice, runs="torch", note=error.reason)
        except errors.KernelError as error:
            if choice.runs != "cpp" and not isinstance(error, errors.NotPrintedError):
                raise
            if choice.runs != "cpp":
                _warn(f"target 'torch' runs instead of {choice.runs!r}: {error}")
            return Choice("torch", "torch", str(error))
        return choice

    if choice.runs == "cpp":
        _measure_machine()
        with ThreadPoolExecutor(_cores()) as pool:
            found = dict(zip(specs, pool.map(build_one, specs), strict=True))
    else:
        found = {text: build_one(text) for text in specs}
    if tuning.is_on():
        for text, chosen in found.items():
            launch.tune(text, chosen.runs, device)
    return found


def _measure_machine() -> None:
    """Measures the machine's rates, if need be, while nothing compiles beside it."""
    chain = toolchain.toolchain()
    if chain is not None:
        rates.rates(chain, usable_threads(openmp=chain.openmp))


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def inductor_missing(device: torch.device) -> str:
    """What Inductor lacks to compile for a device, or ``""``."""
    if device.type == "cpu":
        return toolchain.obstacle()
    if device.type == "cuda" and not launch.has_triton():
        return "the triton package is not installed"
    return ""


def inductor_patches() -> dict[str, Any]:
    """Inductor's options that make it take our compiler where ``$CXX`` does not run."""
    found, named = toolchain.compiler(), os.environ.get(toolchain.CXX)
    if found is None or not named or shutil.which(named) == found.path:
        return {}
    return {"cpp.cxx": (found.path,)}
