"""How fast weights are packed, beside bitsandbytes: ``python -m benchmarks.packing``.

Rates are bytes of bfloat16 input a second, on one thread and on all. Contenders take turns, from
cold caches; medians and quartiles. Written to ``benchmarks/results/packing.json``.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

from benchmarks import results
from benchmarks.machine import Machine
from benchmarks.peers import quiet
from benchmarks.timing import Run, Timing, interleave
from fxquant.formats import Encoding, native, pack
from fxquant.schemes import get_scheme, schemes

JUDGED, REQUIRED = "fxquant nf4", 2e9
"""The contender that has to reach a rate on two threads, and the rate."""

Pack = Callable[[Tensor], object]


def contenders() -> dict[str, Pack]:
    """What is timed, by name."""
    encodings = {name: scheme.recipe.weight for name, scheme in schemes().items()}
    encodings["int4, groups of 128"] = Encoding(4, block=(1, 128))
    found: dict[str, Pack] = {
        f"fxquant {name}": partial(pack, encoding=encoding) for name, encoding in encodings.items()
    }
    found["fxquant nf4, torch code"] = _pack_with_torch
    if find_spec("bitsandbytes") is not None:
        from bitsandbytes.functional import quantize_4bit

        for kind, double in (("nf4", True), ("fp4", False)):
            found[f"bitsandbytes {kind}"] = partial(
                quantize_4bit, quant_type=kind, compress_statistics=double
            )
    return found


def _pack_with_torch(weight: Tensor) -> object:
    before = native.set_encoder(None)
    try:
        return pack(weight, get_scheme("nf4").recipe.weight)
    finally:
        native.set_encoder(before)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, prints the tables and writes the JSON."""
    options = _options(arguments)
    quiet()
    threads = torch.get_num_threads()
    console = results.console()
    cases = []
    for count in sorted({1, threads}):
        torch.set_num_threads(count)
        machine = Machine(count, quick=options.quick)
        cases.append(_measure(options.size, options.rounds, machine))
        console.print(_table(cases[-1]))
    torch.set_num_threads(threads)
    judged = _judge(cases)
    _say(judged, console)
    result = {**results.circumstances(), "cases": cases, "targets": judged}
    results.write(options.output, result)
    console.print(f"written to {options.output}")


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--size", type=int, default=4096, help="rows and columns (default 4096)")
    parser.add_argument("--rounds", type=int, help="default 7")
    parser.add_argument("--quick", action="store_true", help="3 rounds, warmer caches")
    parser.add_argument(
        "--output", type=Path, default=results.FOLDER / "packing.json", help="where to write"
    )
    options = parser.parse_args(arguments)
    options.rounds = options.rounds or (3 if options.quick else 7)
    return options


def _measure(size: int, rounds: int, machine: Machine) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(size, size, generator=generator).bfloat16() for _ in range(2)]
    runs: dict[str, list[Run]] = {
        name: [partial(run, weight) for weight in weights] for name, run in contenders().items()
    }
    with Progress(transient=True) as progress:
        task = progress.add_task(f"packing, {machine.threads} threads", total=rounds)
        timed = interleave(runs, rounds, machine.evict, lambda: progress.advance(task))
    lines = [_line(name, timing, weights[0].nbytes) for name, timing in timed.items()]
    return {"shape": [size, size], "threads": machine.threads, "contenders": lines}


def _line(name: str, timing: Timing, size: int) -> dict[str, Any]:
    return {
        "name": name,
        "median_ms": timing.median * 1e3,
        "quartiles_ms": [timing.low * 1e3, timing.high * 1e3],
        "rounds": timing.rounds,
        "bytes_per_second": size / timing.median,
    }


def _judge(cases: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Whether the rate that was asked for on two threads was reached, if it was measured."""
    return [
        {
            "case": f"packing {case['shape'][0]}x{case['shape'][1]}, {case['threads']} threads",
            "ours": line["name"],
            "sense": "at least",
            "required": REQUIRED,
            "measured": line["bytes_per_second"],
            "met": line["bytes_per_second"] >= REQUIRED,
        }
        for case in cases
        for line in case["contenders"]
        if case["threads"] == 2 and line["name"] == JUDGED
    ]


def _say(judged: Sequence[dict[str, Any]], console: Console) -> None:
    for line in judged:
        verdict = "met" if line["met"] else "not met"
        console.print(
            f"{line['case']}, {line['ours']}: {line['measured'] / 1e9:.2f} GB/s, "
            f"{line['sense']} {line['required'] / 1e9:.0f} asked for: {verdict}"
        )


def _table(case: dict[str, Any]) -> Table:
    size, threads = case["shape"][0], case["threads"]
    many = f"{threads} threads" if threads > 1 else "one thread"
    shown = Table(title=f"Packing a {size} x {size} bfloat16 weight, {many}")
    shown.add_column("contender")
    for heading in ("ms", "quartiles", "GB/s"):
        shown.add_column(heading, justify="right")
    for line in sorted(case["contenders"], key=lambda line: line["median_ms"]):
        low, high = line["quartiles_ms"]
        shown.add_row(
            line["name"],
            f"{line['median_ms']:.1f}",
            f"{low:.1f} - {high:.1f}",
            f"{line['bytes_per_second'] / 1e9:.3f}",
        )
    return shown


if __name__ == "__main__":
    main()
