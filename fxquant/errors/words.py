"""Lists in sentences."""

from __future__ import annotations

from collections.abc import Iterable


def listed(names: Iterable[object]) -> str:
    """Names with commas."""
    return ", ".join(str(name) for name in names)


def some(names: Iterable[str], limit: int = 3) -> str:
    """The first names, quoted, and how many more there are."""
    found = [repr(name) for name in names]
    more = f" and {len(found) - limit} more" if len(found) > limit else ""
    return ", ".join(found[:limit]) + more
