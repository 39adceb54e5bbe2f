"""Files of named tensors with a few lines of metadata: safetensors, written whole or not at all."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import safetensors
import safetensors.torch
from torch import Tensor

from fxquant import errors


def write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Writes a file beside its place and renames it.

    Raises:
        FolderError: The file cannot be written.
    """
    temporary = None
    try:
        handle, temporary = tempfile.mkstemp(
            dir=path.parent, prefix=f".{path.name}.", suffix=".tmp"
        )
        os.close(handle)
        safetensors.torch.save_file(tensors, temporary, metadata)
        Path(temporary).replace(path)
    except (OSError, safetensors.SafetensorError) as cause:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        raise errors.unwritable_file(path, cause) from cause


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a file, on the CPU, and its metadata.

    Raises:
        CheckpointError: The file is missing, cut short, or no safetensors file.
    """
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            return {name: file.get_tensor(name) for name in file.keys()}, metadata  # noqa: SIM118
    except (OSError, ValueError, TypeError, safetensors.SafetensorError) as cause:
        raise errors.unreadable_checkpoint(path, cause) from cause
