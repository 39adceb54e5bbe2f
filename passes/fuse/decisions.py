"""What fusing decided, for the report."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Decision:
    """One thing that was fused, or was not.

    Attributes:
        kind: ``"epilogue"``, ``"join"`` or ``"prologue"``.
        sites: The products that it is about, by their positions among the graph's sites.
        done: Whether it was fused.
        reason: A clause: what was fused, where the fusion ends and why.
    """

    kind: str
    sites: tuple[int, ...]
    done: bool
    reason: str


SITES = "fxquant_sites"
"""The key of a node's meta: the products behind it, by their positions among the graph's sites."""
