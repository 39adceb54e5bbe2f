"""How much memory a decoder takes, beside other packages: ``python -m benchmarks.memory``.

The decoder is that of `benchmarks.models` (Llama's shape, 1.1 billion random weights), and makes
five tokens. Each contender has a process of its own, from which are read, by the kernel's counts
and without what was resident before the model was made: what stays after the tokens, and the most
at any time after the weights were packed. What a compiler leaves in the process is part of it.
Written to ``benchmarks/results/memory.json``. Linux only.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from benchmarks import results
from benchmarks.models import BUILDERS, DECODED, Decoder, make_llama
from benchmarks.ours import require_kernels
from benchmarks.peers import quiet

STATUS, PEAK = Path("/proc/self/status"), Path("/proc/self/clear_refs")
TOKENS = 5


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, prints the table and writes the JSON."""
    options = _options(arguments)
    if not STATUS.exists():
        raise SystemExit("This benchmark reads /proc/self/status, which Linux has.")
    if options.child:
        print(json.dumps(measure(options.child, options.layers)))
        return
    console = results.console()
    lines = []
    for name in options.contenders:
        with console.status(name):
            lines.append(_in_a_process(name, options.layers))
    table = Table(title=f"decoder of {options.layers} layers, MB")
    for heading in ("contender", "weights", "after the tokens", "at most since packing"):
        table.add_column(heading, justify="left" if heading == "contender" else "right")
    for line in lines:
        numbers = (line["weights_mb"], line["resident_mb"], line["peak_mb"])
        bold = "bold" if line["name"].startswith("fxquant") else ""
        table.add_row(line["name"], *(f"{number:.0f}" for number in numbers), style=bold)
    console.print(table)
    results.write(options.output, {**results.circumstances(), "contenders": lines})
    console.print(f"written to {options.output}")


def measure(name: str, layers: int) -> dict[str, Any]:
    """One contender, in this process.

    Args:
        name: One of `DECODED`.
        layers: Of the decoder.
    """
    quiet()
    if name.startswith("fxquant"):
        require_kernels()
    before = _now("VmRSS")
    dense = make_llama(layers)
    config = dense.config
    weights = sum(p.nbytes for p in dense.parameters())
    built = BUILDERS[name][1](dense)
    del dense
    _give_back()
    packed = _now("VmRSS") - before
    PEAK.write_text("5")  # the peak starts anew
    decoder = Decoder(built, config, TOKENS)
    for _ in range(TOKENS):
        decoder()
    peak = _now("VmHWM") - before
    _give_back()
    return {
        "name": name,
        "weights_mb": weights / 1e6,
        "packed_mb": packed / 1e6,
        "resident_mb": (_now("VmRSS") - before) / 1e6,
        "peak_mb": peak / 1e6,
    }


def _give_back() -> None:
    """Has the allocator return what is free."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def _now(field: str) -> int:
    """A count of this process, in bytes."""
    (line,) = [line for line in STATUS.read_text().splitlines() if line.startswith(f"{field}:")]
    return int(line.split()[1]) * 1024


def _in_a_process(name: str, layers: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.memory", "--child", name, "--layers", str(layers)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{name} failed:\n{done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--contenders", nargs="+", choices=DECODED, default=list(DECODED))
    parser.add_argument("--layers", type=int, default=22, help="of the decoder (default 22)")
    parser.add_argument("--quick", action="store_true", help="2 layers")
    parser.add_argument("--child", choices=DECODED, help=argparse.SUPPRESS)
    parser.add_argument(
        "--output", type=Path, default=results.FOLDER / "memory.json", help="where to write"
    )
    options = parser.parse_args(arguments)
    options.layers = 2 if options.quick else options.layers
    return options


if __name__ == "__main__":
    main()
