"""Writes kernels out for people to read: one source file each, with its spec beside it."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from fxquant import errors
from fxquant.codegen.cpp.sections import divided
from fxquant.runtime import cache, index
from fxquant.runtime.launch import SUFFIXES, Kernel

ENVIRONMENT = "FXQUANT_DUMP"


def folder(option: str | None) -> Path | None:
    """Where to write: the option, else `FXQUANT_DUMP`, else nowhere."""
    named = option or os.environ.get(ENVIRONMENT)
    return Path(named) if named else None


def check(where: Path, variable: str) -> None:
    """Makes the folder and tries to write in it, to fail before the work and not after it.

    Args:
        where: The folder.
        variable: What names it, for the message.

    Raises:
        FolderError: The folder cannot be made or written.
    """
    try:
        where.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=where):
            return
    except OSError as error:
        raise errors.unwritable_folder("dump", where, variable, error) from error


def write(where: Path, kernels: Sequence[Kernel]) -> list[Path]:
    """Writes ``<target>_<name>_<key>.py`` (``.cpp``) and the same with ``.json`` for each kernel.

    What C++ kernels share lies in headers beside them, and so does an index of all that was dumped
    to the folder.

    Returns:
        The source files.

    Raises:
        FolderError: The folder cannot be made or written.
    """
    written, shared = [], dict[str, str]()
    try:
        where.mkdir(parents=True, exist_ok=True)
        for kernel in kernels:
            key = cache.key_of(kernel.target, kernel.spec.to_json())[:8]
            name = f"{kernel.target}_{kernel.name}_{key}{SUFFIXES[kernel.target]}"
            path = where / index.file_of(where, kernel, name)
            main = kernel.source
            if kernel.target == "cpp":
                main, sections = divided(main)
                shared |= sections
            cache.write_atomically(path, main)
            spec = json.dumps(json.loads(kernel.spec.to_json()), indent=2)
            cache.write_atomically(path.with_suffix(".json"), spec + "\n")
            written.append(path)
        for file, text in shared.items():
            cache.write_atomically(where / file, text)
        index.add(
            where, [(path.name, kernel) for path, kernel in zip(written, kernels, strict=True)]
        )
    except OSError as error:
        raise errors.unwritable_folder("dump", where, f"{ENVIRONMENT} or `dump`", error) from error
    return written


def sources(where: Path) -> list[Path]:
    """The kernels that lie in a folder, by name."""
    kernels = (path for path in where.glob("*") if path.name.split("_")[0] in SUFFIXES)
    return sorted(path for path in kernels if path.suffix in SUFFIXES.values())
