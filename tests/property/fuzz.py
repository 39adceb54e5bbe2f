"""Differential fuzzing: ``python -m tests.property.fuzz --minutes 10 [--seed 0] [--target cpp]``.

Every seed is a random graph (`random_graphs`), compiled with and without fusing and called; its
results have to lie where `enclosing` says that those of its decoded weights do. Exits with 1 when
one does not, or when a compile fails: the seed, the smallest graph that still fails, and a folder
with its kernels are printed.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass

import torch

import fxquant
from tests.property import enclosing
from tests.property.random_graphs import Plan, RandomGraph, draw, given

DTYPES = {
    "cpp": ("float32", "bfloat16"),
    "torch": ("float32", "bfloat16"),
    # The interpreter multiplies bfloat16 as integers.
    "triton": ("float32", "float16"),
}
SHRINK_SECONDS = 90.0
LOOSE = 0.1
"""A bound of this share of the largest result says little."""


@dataclass
class Tally:
    """What was looked at.

    Attributes:
        graphs: Compiles.
        results: Tensors that were compared.
        loose: Those whose bound is wide.
        quantized: Products that ran on packed weights.
    """

    graphs: int = 0
    results: int = 0
    loose: int = 0
    quantized: int = 0


def choices() -> list[dict[str, bool]]:
    """The options that must not make a difference."""
    names = {field.name for field in dataclasses.fields(fxquant.Config)}
    return [{"fuse": True}, {"fuse": False}] if "fuse" in names else [{}]


def wrong(plan: Plan, target: str, tally: Tally, dump: str | None = None) -> str:
    """What is wrong with a plan's results, or ``""``.

    Args:
        plan: The graph.
        target: What computes.
        tally: Counts.
        dump: A folder for its kernels.
    """
    for extra in choices():
        torch._dynamo.reset()
        model = RandomGraph(plan)
        state = {name: value.clone() for name, value in model.named_buffers()}
        options = {"scheme": plan.scheme, "target": target, "dump": dump, **extra}
        dynamic = True if len(plan.rows) > 1 else None
        compiled = torch.compile(model, backend="fxquant", options=options, dynamic=dynamic)
        tally.graphs += 1
        for rows in plan.rows:
            _restore(model, state)
            x = given(plan, rows)
            with torch.no_grad():
                results = compiled(x)
            _restore(model, state)
            said = _compare(model, x, results, tally)
            if said:
                return f"{said} ({rows} rows, {extra})"
        report = fxquant.report(model).quantized
        tally.quantized += len(report)
    return ""


def _restore(model: torch.nn.Module, state: dict[str, torch.Tensor]) -> None:
    for name, value in model.named_buffers():
        value.copy_(state[name])


def _compare(
    model: torch.nn.Module, x: torch.Tensor, results: Sequence[torch.Tensor], tally: Tally
) -> str:
    found = enclosing.enclose(model, enclosing.weights_of(model), x)
    for number, (got, enclosure) in enumerate(zip(results, found, strict=True)):
        if got.shape != enclosure.low.shape:
            return f"result {number} has shape {tuple(got.shape)}"
        tally.results += 1
        excess = enclosure.excess(got)
        reach = got.double().nan_to_num().abs().max().clamp_min(1e-30)
        tally.loose += int(bool((enclosure.high - enclosure.low).median() > LOOSE * reach))
        if bool((excess > 0).any()):
            place = int(excess.argmax())
            ends = [float(end.flatten()[place]) for end in (enclosure.low, enclosure.high)]
            value = float(got.flatten()[place])
            return (
                f"result {number} is {value:.7g} and should lie in {ends[0]:.7g} .. {ends[1]:.7g}"
            )
    return ""


def failure(plan: Plan, target: str, tally: Tally, dump: str | None = None) -> str:
    """As `wrong`; also what a compile or a call raised."""
    try:
        return wrong(plan, target, tally, dump)
    except Exception:  # noqa: BLE001 - whatever a graph raises is what is looked for
        return traceback.format_exc(limit=-4)


def shrunk(plan: Plan, target: str) -> Plan:
    """A plan with as few steps and inputs as still fail."""
    until, tally = time.monotonic() + SHRINK_SECONDS, Tally()
    if len(plan.rows) > 1:
        for rows in plan.rows:
            shorter = dataclasses.replace(plan, rows=(rows,))
            if failure(shorter, target, tally):
                plan = shorter
                break
    number = len(plan.ops)
    while number > 0 and time.monotonic() < until:
        number -= 1
        ops = (*plan.ops[:number], *plan.ops[number + 1 :])
        shorter = dataclasses.replace(plan, ops=ops)
        if ops and failure(shorter, target, tally):
            plan = shorter
    return plan


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs for some minutes; gives the exit code."""
    parser = argparse.ArgumentParser(prog="tests.property.fuzz", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=0, help="the first one")
    parser.add_argument("--graphs", type=int, default=sys.maxsize, help="stop after so many")
    parser.add_argument("--target", choices=list(DTYPES), default="cpp")
    options = parser.parse_args(arguments)
    if options.target == "triton" and os.environ.get("TRITON_INTERPRET") != "1":
        # Triton reads it when it is imported.
        os.environ["TRITON_INTERPRET"] = "1"
        given_ = sys.argv[1:] if arguments is None else list(arguments)
        os.execv(sys.executable, [sys.executable, "-m", "tests.property.fuzz", *given_])
    until, tally, seed = time.monotonic() + 60 * options.minutes, Tally(), options.seed
    found = 0
    while time.monotonic() < until and seed - options.seed < options.graphs:
        plan = draw(seed, DTYPES[options.target])
        said = failure(plan, options.target, tally)
        if said:
            found += 1
            _say(f"seed {seed}: {said}")
            smallest = shrunk(plan, options.target)
            folder = tempfile.mkdtemp(prefix=f"fxquant-fuzz-{seed}-")
            _say(f"  smallest: {smallest}\n  {failure(smallest, options.target, tally, folder)}")
            _say(f"  kernels: {folder}")
        seed += 1
    _say(
        f"seeds {options.seed} to {seed - 1} on {options.target}: {tally.graphs} graphs, "
        f"{tally.quantized} products, {tally.results} results ({tally.loose} with wide bounds), "
        f"{found} wrong"
    )
    return 1 if found else 0


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
