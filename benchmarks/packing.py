"""How fast weights are packed, beside bitsandbytes: ``python -m benchmarks.packing``.

Rates are bytes of bfloat16 input a second on one core. Contenders take turns, so that a noisy
neighbour disturbs them alike; medians are shown. The result is written to ``benchmarks/results``.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from datetime import datetime, timezone
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from fxquant.formats import Encoding, pack
from fxquant.schemes import schemes

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "numpy", "bitsandbytes", "fxquant")


def contenders(weight: torch.Tensor) -> dict[str, Callable[[], object]]:
    """What is timed, by name."""
    found: dict[str, Callable[[], object]] = {
        f"fxquant {name}": partial(pack, weight, scheme.recipe.weight)
        for name, scheme in schemes().items()
    }
    found["fxquant int4, groups of 128"] = partial(pack, weight, Encoding(4, block=(1, 128)))
    if find_spec("bitsandbytes") is None:
        return found
    from bitsandbytes.functional import quantize_4bit

    for kind, double in (("nf4", True), ("fp4", False)):
        found[f"bitsandbytes {kind}"] = partial(
            quantize_4bit, weight, quant_type=kind, compress_statistics=double
        )
    return found


def measure(
    timed: dict[str, Callable[[], object]], repeats: int, console: Console
) -> dict[str, float]:
    """The median seconds of each contender, all of them once a turn."""
    seconds: dict[str, list[float]] = {name: [] for name in timed}
    for turn in track(range(repeats + 1), "packing", console=console):
        for name, run in timed.items():
            start = time.perf_counter()
            run()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def circumstances() -> dict[str, Any]:
    """Device, versions and commit, to put beside numbers."""
    installed = {name: version(name) for name in PACKAGES if find_spec(name) is not None}
    versions = {"python": platform.python_version(), **installed}
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parent,
    ).stdout.strip()
    return {
        "device": processor(),
        "threads": torch.get_num_threads(),
        "versions": versions,
        "commit": commit,
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def processor() -> str:
    """The processor's name."""
    listed = Path("/proc/cpuinfo")
    names = listed.read_text().splitlines() if listed.exists() else []
    found = [line.split(":", 1)[1].strip() for line in names if line.startswith("model name")]
    return found[0] if found else platform.processor()


def main() -> None:
    """Measures, prints a table and writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--size", type=int, default=4096, help="rows and columns (default 4096)")
    parser.add_argument("--repeats", type=int, default=11, help="turns (default 11)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(options.size, options.size, generator=generator).bfloat16()
    console = Console()
    medians = measure(contenders(weight), options.repeats, console)

    table = Table(title=f"Packing a {options.size} x {options.size} bfloat16 weight, one core")
    table.add_column("contender")
    for heading in ("ms", "GB/s"):
        table.add_column(heading, justify="right")
    rows = []
    for name, seconds in sorted(medians.items(), key=lambda pair: pair[1]):
        rate = weight.nbytes / seconds / 1e9
        table.add_row(name, f"{seconds * 1e3:.1f}", f"{rate:.3f}")
        rows.append({"name": name, "seconds": seconds, "gigabytes_per_second": rate})
    console.print(table)
    RESULTS.mkdir(exist_ok=True)
    target = RESULTS / "packing.json"
    result = {**circumstances(), "shape": list(weight.shape), "rows": rows}
    target.write_text(json.dumps(result, indent=2) + "\n")
    console.print(f"written to {target}")


if __name__ == "__main__":
    main()
