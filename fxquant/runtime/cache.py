"""The kernel cache: built files by content key, written atomically, checked when read.

An entry is a folder ``<root>/<target>/<key>`` with the built files and a ``manifest.json`` of their
SHA-256 sums. The key covers the source text, the fxquant version and the toolchain, so a stale
entry is never found. A damaged entry is a miss: it is set aside, a warning is logged, and it is
built again.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from fxquant import errors

LOG = logging.getLogger("fxquant.cache")
MANIFEST = "manifest.json"
ENVIRONMENT = "FXQUANT_CACHE_DIR"


def root() -> Path:
    """Where entries are kept: `FXQUANT_CACHE_DIR`, or the user's cache folder."""
    named = os.environ.get(ENVIRONMENT)
    if named:
        return Path(named)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "fxquant"


def key_of(*parts: str) -> str:
    """A key for everything that an entry depends on."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part.encode())
    return digest.hexdigest()[:32]


def code_of(source: str) -> str:
    """A kernel's text without what it says on top of itself, which names modules and lines."""
    if source.startswith('"""'):
        return source.partition('"""\n')[2] or source
    lines = source.splitlines(keepends=True)
    head = next((place for place, line in enumerate(lines) if line[:2] != "//"), 0)
    return "".join(lines[head:])


@functools.lru_cache(maxsize=8)
def fingerprint(*packages: ModuleType) -> str:
    """Changes with the source of packages: what a cache of their results has to know.

    A version number does not do: between two releases the source moves and the number stays.
    """
    files = [path for package in packages for path in Path(package.__path__[0]).rglob("*.py")]
    return key_of(*(path.read_text(encoding="utf-8") for path in sorted(files)))


def get_or_build(target: str, key: str, build: Callable[[Path], None]) -> Path:
    """The folder of an entry, built when it is missing or damaged.

    Args:
        target: Name of the target, the first level of folders.
        key: What `key_of` gave.
        build: Writes the entry's files into the folder that it is given.

    Raises:
        FolderError: The cache folder cannot be written.
    """
    entry = root() / target / key
    if _is_sound(entry):
        return entry
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{key}-", dir=entry.parent))
    except OSError as error:
        raise errors.unwritable_folder("kernel cache", entry.parent, ENVIRONMENT, error) from error
    try:
        build(scratch)
        sums = {path.name: _checksum(path) for path in sorted(scratch.iterdir())}
        (scratch / MANIFEST).write_text(json.dumps(sums, indent=1))
        return _publish(scratch, entry)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _publish(scratch: Path, entry: Path) -> Path:
    """Renames a finished folder into place; another process that was faster wins."""
    for _ in range(8):
        with contextlib.suppress(OSError):
            scratch.rename(entry)
            return entry
        if _is_sound(entry):
            return entry
        LOG.warning("kernel cache entry %s is damaged: building it again", entry)
        aside = Path(tempfile.mkdtemp(prefix=".damaged-", dir=entry.parent))
        with contextlib.suppress(OSError):
            entry.rename(aside / entry.name)
        shutil.rmtree(aside, ignore_errors=True)
    raise errors.unwritable_folder("kernel cache", entry, ENVIRONMENT, "it cannot be replaced")


def _checksum(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _is_sound(entry: Path) -> bool:
    try:
        sums = json.loads((entry / MANIFEST).read_text())
        return bool(sums) and all(_checksum(entry / name) == want for name, want in sums.items())
    except (OSError, ValueError, AttributeError):
        return False


def write_atomically(path: Path, text: str) -> None:
    """Writes a text file by way of a temporary file in the same folder."""
    handle, scratch = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        Path(scratch).replace(path)
    except BaseException:
        Path(scratch).unlink(missing_ok=True)
        raise
