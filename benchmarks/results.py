"""Writes results down, with the circumstances under which they were measured."""

from __future__ import annotations

import dataclasses
import json
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from importlib.metadata import distributions, version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks.machine import Rates, processor

FOLDER = Path(__file__).parent / "results"
PACKAGES = ("torch", "triton", "numpy", "bitsandbytes", "torchao", "transformers", "fxquant")


def circumstances(rates: Rates | None = None) -> dict[str, Any]:
    """Device, versions, commit and time, to put beside numbers.

    Args:
        rates: What the machine was measured to do.
    """
    known = {found.metadata["Name"] for found in distributions()}
    installed = {name: version(name) for name in PACKAGES if name in known}
    found: dict[str, Any] = {
        "device": processor(),
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version(), **installed},
        "commit": _commit(),
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    return found if rates is None else {**found, "rates": dataclasses.asdict(rates)}


def write(path: Path, result: Mapping[str, Any]) -> None:
    """Writes a result as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def merged(
    path: Path, found: Mapping[str, Any], measured: Sequence[Mapping[str, Any]]
) -> list[Mapping[str, Any]]:
    """Cases that were just measured, after those in a file that were measured before.

    Args:
        path: The file; it may not be there.
        found: The circumstances now: cases of another device or number of threads are dropped.
        measured: Each with its name as ``"case"``.
    """
    before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if any(before.get(key) != found[key] for key in ("device", "threads")):
        return list(measured)
    again = {case["case"] for case in measured}
    return [*(case for case in before["cases"] if case["case"] not in again), *measured]


def console() -> Console:
    """A console that is wide enough for the tables where the output is a file."""
    return Console(width=None if sys.stdout.isatty() else 140)


def _commit() -> str:
    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", *arguments],
            capture_output=True,
            text=True,
            check=False,
            cwd=Path(__file__).parent,
        )
        return done.stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no")
    return git("rev-parse", "HEAD") + (" with changes" if changed else "")
