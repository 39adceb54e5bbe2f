"""What the files do that `fxquant.runtime.verify` writes: a kernel checked on stored operands."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fxquant import tensorfile
from fxquant.runtime import launch, verify


def main(spec: str, target: str, file: Path, operands: list[Any], device: str) -> int:
    """Prints and runs the kernel of a spec, checks it, and says what came out.

    Args:
        spec: As JSON.
        target: ``"cpp"`` or ``"triton"``.
        file: The operands' elements, a safetensors file.
        operands: A kernel's arguments: ``(name, shape, strides)`` for a tensor, or lists of these.
        device: Where to run, as in ``"cuda"``.

    Returns:
        The exit code: 1 if the kernel is wrong.

    Raises:
        KernelError: The target cannot compute the spec.
        CheckpointError: The file cannot be read.
    """
    tensors, _ = tensorfile.read(file)
    arguments = [_found(tensors, operand, device) for operand in operands]
    text = json.dumps(json.loads(spec), sort_keys=True, separators=(",", ":"))
    parsed = launch.parse(text)
    result = launch.runner_of(text, target, torch.device(device))(*arguments)
    failure = verify.check(parsed, arguments, result)
    if failure is None:
        sys.stdout.write(f"{parsed.name}: right\n")
        return 0
    error, most = failure.error, failure.allowed
    sys.stdout.write(f"{parsed.name}: off by {error:.3g} where {most:.3g} is allowed\n")
    return 1


def _found(tensors: dict[str, Tensor], operand: Any, device: str) -> Any:
    if isinstance(operand, list):
        return [_found(tensors, inner, device) for inner in operand]
    name, shape, strides = operand
    return torch.as_strided(tensors[name].to(device), shape, strides)
