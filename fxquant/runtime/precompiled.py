"""Headers of kernels, parsed once: that is a third of what a compiler does for a kernel."""

from __future__ import annotations

import functools
import logging
import os
import subprocess
import threading
from pathlib import Path

from fxquant.runtime import cache

LOG = logging.getLogger("fxquant.toolchain")
NAME = "headers.h"
GCC = "Free Software Foundation"
"""In what g++ says of itself; other compilers precompile in other ways."""
_BUILDING = threading.Lock()


def arguments(command: tuple[str, ...], version: str, headers: str, limit_s: float) -> list[str]:
    """What makes g++ take headers from a precompiled file; sources include them as ever.

    Args:
        command: The compiler and the arguments that sources are compiled with.
        version: What the compiler says of itself.
        headers: Lines that include them.
        limit_s: Seconds that the compiler has.

    Returns:
        Nothing where that does not work: kernels are the same without, and take longer.
    """
    if GCC not in version:
        return []
    # Kernels are built side by side, and all of them wait for the same headers.
    with _BUILDING:
        found = _find(command, version, headers, limit_s, cache.root())
        if found is not None and not found.is_file():
            _find.cache_clear()
            found = _find(command, version, headers, limit_s, cache.root())
    return [] if found is None else ["-include", str(found)]


@functools.lru_cache(maxsize=16)
def _find(
    command: tuple[str, ...],
    version: str,
    headers: str,
    limit_s: float,
    root: Path,  # noqa: ARG001
) -> Path | None:
    """The header whose precompiled form lies beside it; one for each root of the cache."""

    def run(*arguments: str) -> None:
        subprocess.run([*command, *arguments], capture_output=True, check=True, timeout=limit_s)

    def build(folder: Path) -> None:
        path = folder / NAME
        path.write_text(headers, encoding="utf-8")
        run("-x", "c++-header", str(path), "-o", f"{path}.gch")
        # Some systems keep g++ from mapping the file where it has to lie: that is an error then.
        run("-include", str(path), "-fsyntax-only", "-x", "c++", os.devnull)

    try:
        key = cache.key_of(*command, version, headers)
        return cache.get_or_build("headers", key, build) / NAME
    except (OSError, subprocess.SubprocessError) as error:
        LOG.info("kernels are compiled without precompiled headers: %s", error)
        return None
