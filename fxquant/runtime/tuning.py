"""Which skeleton of a C++ kernel runs for how many rows: tuned, or else by the cost model."""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fxquant.codegen.cpp import cost
from fxquant.codegen.cpp.plan import Plan
from fxquant.codegen.spec import KernelSpec
from fxquant.formats.check import expected_parts
from fxquant.runtime import cache, toolchain
from fxquant.runtime.cpp import CppKernel, usable_threads
from fxquant.runtime.rates import rates

LOG = logging.getLogger("fxquant.tuning")
ENVIRONMENT = "FXQUANT_TUNE"
FILE = "tuned.json"
ROWS = (1, 4, 16, 32, 64, 128, 256)
LIMIT_S = 1.0


def is_on() -> bool:
    """Whether kernels without a result are to be tuned: ``FXQUANT_TUNE`` is set, and not to 0."""
    return os.environ.get(ENVIRONMENT, "") not in ("", "0")


def few_rows(chain: toolchain.Toolchain, spec: KernelSpec, library: Path) -> int:
    """Up to how many rows the skeleton for few rows is to run.

    Args:
        chain: What the kernel was built with.
        spec: Of the kernel.
        library: The kernel; a result of tuning lies beside it, and counts whenever it is there.
    """
    threads = usable_threads(openmp=chain.openmp)
    found, how = _stored(library).get(_machine(threads)), "as tuned"
    if found is None:
        plan, how = Plan(spec, chain.isa), "by the cost model"
        found = cost.threshold(plan, rates(chain, threads), threads) if plan.is_regular else 0
    LOG.info("kernel %s decodes in registers for %s, %s", spec.name, _described(found), how)
    return found


def tune(chain: toolchain.Toolchain, kernel: CppKernel) -> None:
    """Times both skeletons, unless that was done, sets the kernel's threshold and keeps it.

    Takes about a second. Nothing else should run meanwhile.
    """
    if not Plan(kernel.spec, chain.isa).is_regular:
        return
    threads = usable_threads(openmp=chain.openmp)
    stored, machine = _stored(kernel.library), _machine(threads)
    if machine in stored:
        return
    kernel.few_rows = best_threshold(_times(kernel))
    path = kernel.library.with_name(FILE)
    try:
        cache.write_atomically(path, json.dumps({**stored, machine: kernel.few_rows}, indent=1))
    except OSError as error:
        LOG.warning("what tuning found cannot be written to %s: %s", path, error)
    found = _described(kernel.few_rows)
    LOG.info("kernel %s decodes in registers for %s, tuned now", kernel.spec.name, found)


def best_threshold(times: Mapping[int, tuple[float, float]]) -> int:
    """The threshold that loses least, in ratios, over some numbers of rows.

    Args:
        times: For each number of rows the seconds that few rows and many rows take.
    """
    rows = sorted(times)
    gains = [math.log(times[m][1] / times[m][0]) for m in rows]
    best = max(range(len(rows) + 1), key=lambda count: sum(gains[:count]))
    return 0 if best == 0 else cost.ALL_ROWS if best == len(rows) else rows[best - 1]


def tuned_kernels() -> int:
    """How many kernels of the cache have results."""
    return sum(1 for _ in (cache.root() / "cpp").glob(f"*/{FILE}"))


def _described(found: int) -> str:
    return "any number of rows" if found == cost.ALL_ROWS else f"up to {found} rows"


def _machine(threads: int) -> str:
    return f"{toolchain.cpu_name()}, {threads} threads"


def _stored(library: Path) -> dict[str, int]:
    """Thresholds by machine, as they were kept."""
    path = library.with_name(FILE)
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        return {machine: _number_of_rows(found) for machine, found in data.items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, AttributeError) as error:
        LOG.warning("results of tuning %s cannot be read (%s): they are not used", path, error)
        return {}


def _number_of_rows(found: Any) -> int:
    if not isinstance(found, int) or not 0 <= found <= cost.ALL_ROWS:
        raise ValueError(f"{found!r} is no number of rows")
    return found


def _times(kernel: CppKernel) -> dict[int, tuple[float, float]]:
    """The best seconds of each skeleton, in turns, for every number of rows."""
    spec = kernel.spec
    weight = random_weight(spec)
    batch = [spec.batch] if spec.batch is not None else []
    best = {rows: [math.inf, math.inf] for rows in ROWS}
    calls: list[tuple[int, Tensor, Sequence[Tensor]]] = []
    for rows in ROWS:
        x = torch.randn(*batch, rows, spec.weight.k).to(getattr(torch, spec.x_dtype))
        operands = kernel.operands(rows)
        if spec.grouped:
            operands[-1].fill_(rows)  # all are of the first matrix
        calls.append((rows, x, operands))
    kernel.run(calls[0][1], weight, calls[0][2])  # repacks the weight
    deadline = time.perf_counter() + LIMIT_S
    while True:
        for rows, x, extra in calls:
            for variant, most in enumerate((rows, 0)):
                kernel.few_rows = most
                start = time.perf_counter()
                kernel.run(x, weight, extra)
                now = time.perf_counter()
                best[rows][variant] = min(best[rows][variant], now - start)
            if now > deadline and all(few < math.inf for few, _ in best.values()):
                return {rows: (few, many) for rows, (few, many) in best.items()}


def random_weight(spec: KernelSpec) -> list[Tensor]:
    """Stored tensors with random codes: time does not depend on what they stand for."""
    weight, generator = spec.weight, torch.Generator().manual_seed(0)
    tensors = []
    for name, (size, dtype) in expected_parts(weight.encoding, weight.shape).items():
        made: Any = torch.ones(size, dtype=dtype)
        if name == "codes":
            made = torch.randint(0, 127, size, dtype=dtype, generator=generator)
        tensors.append(made)
    return tensors * spec.weights
