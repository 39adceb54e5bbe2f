"""Products in few bits beside those of other packages: ``python -m benchmarks.linear``.

Everyone in one process, interleaved, from cold caches; medians and quartiles. The table says how
far each is from the roofline of the machine (the larger of bytes over DRAM rate and multiply-adds
over the dot product's rate, both measured in the same run), and in the end whether each ratio that
was asked for was reached. Written to ``benchmarks/results/linear.json`` and ``linear.svg``.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from rich.table import Table

from benchmarks import chart, results, targets
from benchmarks.contenders import (
    Contender,
    Prepared,
    chosen,
    make_activation,
    make_weight,
    relative_error,
)
from benchmarks.machine import Machine, Rates
from benchmarks.ours import ours, require_kernels
from benchmarks.peers import peers
from benchmarks.timing import Run, Timing, interleave

SHAPES = (targets.SQUARE, targets.TALL, (4096, 11008))
ROWS = (1, 4, 16, 128, 512)
ROUNDS = 21
Copies = dict[str, list[Prepared]]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, prints the tables, writes the JSON and the chart."""
    options = _options(arguments)
    everyone = [*ours(), *peers()]
    contenders = chosen(everyone, options.contenders)
    if any(contender in contenders for contender in everyone[: len(ours())]):
        require_kernels()
    console = results.console()
    machine = Machine(torch.get_num_threads(), quick=options.quick)
    rates = machine.rates()
    console.print(_about(machine, rates), highlight=False)
    cases = []
    # Every copy of a compiled contender, at every number of rows, is one more graph.
    limits = torch._dynamo.config.patch(recompile_limit=1024, accumulated_recompile_limit=1024)
    with limits:
        for shape in options.shapes:
            weight = make_weight(*shape)
            with console.status(f"{shape[0]}x{shape[1]}: packing"):
                prepared = {c.name: _copies(c, weight, machine) for c in contenders}
            for rows in options.rows:
                case = _measure(
                    contenders,
                    prepared,
                    weight,
                    rows=rows,
                    rounds=options.rounds,
                    machine=machine,
                    rates=rates,
                )
                cases.append(case)
                console.print(_table(case))
            del prepared
            gc.collect()
    judged = [target.judge(_seconds(cases)) for target in targets.LINEAR]
    console.print(targets.table(judged))
    found = results.circumstances(rates)
    results.write(options.output, {**found, "cases": cases, "targets": judged})
    console.print(f"written to {options.output}")
    if chart.draw_linear(cases, found, options.output.with_suffix(".svg")):
        console.print(f"and {options.output.with_suffix('.svg')}")


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--shapes", nargs="+", type=_shape, help="outputs x inputs, as 4096x4096")
    parser.add_argument("--rows", nargs="+", type=int, help="rows of the activation")
    parser.add_argument(
        "--contenders", nargs="+", default=["*"], help="patterns of names, as 'torch*'"
    )
    parser.add_argument("--rounds", type=int, default=None, help=f"default {ROUNDS}")
    parser.add_argument(
        "--quick", action="store_true", help="one shape, two row counts, 5 rounds, warmer caches"
    )
    parser.add_argument(
        "--output", type=Path, default=results.FOLDER / "linear.json", help="where to write"
    )
    options = parser.parse_args(arguments)
    options.shapes = options.shapes or (SHAPES[:1] if options.quick else SHAPES)
    options.rows = options.rows or ((1, 16) if options.quick else ROWS)
    options.rounds = options.rounds or (5 if options.quick else ROUNDS)
    return options


def _shape(text: str) -> tuple[int, int]:
    n, k = (int(size) for size in text.split("x"))
    return n, k


def _copies(contender: Contender, weight: torch.Tensor, machine: Machine) -> list[Prepared]:
    """The weight as often as it takes to be larger than the caches when the copies take turns."""
    first = contender.prepare(weight)
    count = math.ceil(machine.cache_bytes / first.weight_bytes)
    # Weights too small for that are evicted all the same.
    return [first, *(contender.prepare(weight) for _ in range(min(max(count, 2), 8) - 1))]


@torch.inference_mode()
def _measure(
    contenders: Sequence[Contender],
    prepared: Copies,
    weight: torch.Tensor,
    *,
    rows: int,
    rounds: int,
    machine: Machine,
    rates: Rates,
) -> dict[str, Any]:
    """One case: a weight's shape and a number of rows."""
    n, k = weight.shape
    torch._dynamo.reset()
    runs: dict[str, list[Run]] = {}
    errors = {}
    for contender in contenders:
        x, errors[contender.name] = _check(contender, prepared[contender.name][0], weight, rows)
        runs[contender.name] = [_bound(copy, x) for copy in prepared[contender.name]]
    reads: list[float] = []
    with Progress(transient=True) as progress:
        task = progress.add_task(targets.case_name((n, k), rows), total=rounds)
        timed = interleave(
            runs,
            rounds,
            lambda: reads.append(machine.evict()),
            lambda: progress.advance(task),
        )
    # The DRAM rate of these very minutes: what neighbours leave varies.
    rates = dataclasses.replace(rates, read=statistics.median(reads))
    lines = []
    for contender in contenders:
        moved = prepared[contender.name][0].weight_bytes
        moved += rows * (n + k) * contender.x_dtype.itemsize
        least = rates.least_seconds(moved, rows * n * k, contender.unit)
        lines.append(
            {
                **_times(timed[contender.name]),
                "name": contender.name,
                "weight_bytes": prepared[contender.name][0].weight_bytes,
                "roofline_share": least / timed[contender.name].median,
                "error": errors[contender.name],
            }
        )
    return {
        "case": targets.case_name((n, k), rows),
        "shape": [n, k],
        "rows": rows,
        "read_rate": rates.read,
        "contenders": lines,
    }


def _bound(prepared: Prepared, x: torch.Tensor) -> Run:
    return lambda: prepared.product(x)


def _times(timing: Timing) -> dict[str, Any]:
    return {
        "median_us": timing.median * 1e6,
        "quartiles_us": [timing.low * 1e6, timing.high * 1e6],
        "rounds": timing.rounds,
    }


def _check(
    contender: Contender, prepared: Prepared, weight: torch.Tensor, rows: int
) -> tuple[torch.Tensor, float]:
    """Its activation, and the error of its result: who computes something else is not timed.

    Raises:
        SystemExit: The result is wrong.
    """
    exact = make_activation(rows, weight.shape[1], outliers=contender.outliers)
    x = exact.to(contender.x_dtype)
    error = relative_error(prepared.product(x), contender.finish(x.float() @ weight.T))
    if not error <= contender.tolerance:
        raise SystemExit(
            f"{contender.name} is off by {error:.3f} (Frobenius norm, relative) at M={rows}, more "
            f"than {contender.tolerance}: it does not compute the product, so it is not timed."
        )
    return x, error


def _seconds(cases: Sequence[dict[str, Any]]) -> targets.Seconds:
    """Looks up medians for `targets`."""

    def find(target: targets.Target, name: str) -> float | None:
        case = next((case for case in cases if case["case"] == target.case), None)
        lines = {} if case is None else {line["name"]: line for line in case["contenders"]}
        if case is not None and name == targets.READING and target.ours in lines:
            return float(lines[target.ours]["weight_bytes"] / case["read_rate"])
        return lines[name]["median_us"] / 1e6 if name in lines else None

    return find


def _about(machine: Machine, rates: Rates) -> str:
    dots = ", ".join(f"{unit} {rate / 1e9:.0f} G" for unit, rate in rates.dots.items())
    return (
        f"{results.circumstances()['device']}, {machine.threads} threads: reads "
        f"{rates.read / 1e9:.1f} GB/s; multiply-adds a second: {dots}"
    )


def _table(case: dict[str, Any]) -> Table:
    shown = Table(title=f"{case['case']} (reads {case['read_rate'] / 1e9:.1f} GB/s)")
    shown.add_column("contender")
    for heading in ("us", "quartiles", "of roofline", "error", "speed-up"):
        shown.add_column(heading, justify="right")
    medians = {line["name"]: line["median_us"] for line in case["contenders"]}
    for line in sorted(case["contenders"], key=lambda line: line["median_us"]):
        low, high = line["quartiles_us"]
        shown.add_row(
            line["name"],
            f"{line['median_us']:.0f}",
            f"{low:.0f} - {high:.0f}",
            f"{line['roofline_share']:.0%}",
            f"{line['error']:.4f}",
            _speed_up(line["name"], medians),
            style="bold" if line["name"].startswith("fxquant") else "",
        )
    return shown


def _speed_up(name: str, medians: dict[str, float]) -> str:
    """Against the peers that the targets name, as far as they were timed."""
    peers_of = dict.fromkeys(t.against for t in targets.LINEAR if t.ours == name)
    known = [peer for peer in peers_of if peer in medians]
    return ", ".join(f"{medians[peer] / medians[name]:.2f}x {peer}" for peer in known)


if __name__ == "__main__":
    main()
