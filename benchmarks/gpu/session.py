"""One run of the benchmark: tests, kernels compiled ahead, products, a decoder, the report."""

from __future__ import annotations

import argparse
import functools
import gc
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, wait
from importlib.util import find_spec
from typing import Any, TypeVar

import torch
from rich.table import Table

from benchmarks import results, targets
from benchmarks.contenders import make_activation, relative_error
from benchmarks.gpu import decoder, products
from benchmarks.gpu.device import Device, Rates
from benchmarks.gpu.peers import CUBLAS, missing, peers
from benchmarks.gpu.products import Contender, Prepared
from benchmarks.gpu.tree import ROOT
from benchmarks.timing import Run
from fxquant.runtime import tiles
from fxquant.runtime.device import gpu

# What the targets are about comes first.
SHAPES = ((8192, 8192), (4096, 4096), (28672, 8192))
ROWS = (1, 4, 16, 64, 128, 512, 2048)
BATCHES = (1, 16)
# Seconds: the tests are cut off there, and a decoder is not begun with less left.
TESTS_S, DECODER_S, TUNING_S = 200.0, 60.0, 60.0
_WORKERS = 12
Found = TypeVar("Found")


class Session:
    """Collects what was measured, and stops at a deadline.

    Args:
        device: What is measured.
        options: Of the command line.
        deadline: Of `time.monotonic`.
    """

    def __init__(self, device: Device, options: argparse.Namespace, deadline: float) -> None:
        self.device, self.options, self.deadline = device, options, deadline
        self.console = results.console()
        self.shapes = SHAPES if device.is_gpu else ((64, 128),)
        self.rows = ROWS if device.is_gpu else (1, 32)
        self.cases: list[dict[str, Any]] = []
        self.decoders: list[dict[str, Any]] = []
        self.failures: list[str] = []
        self.left_out: list[str] = []

    def run(self) -> int:
        """All of it; 0 if everything of ours worked."""
        tests = self._tests()
        if self.options.only_tests:
            return int(tests["status"] != "passed")
        rates = self.device.rates()
        self._say(
            f"{self.device.facts['device']}: reads {rates.read / 1e9:.0f} GB/s; "
            + ", ".join(f"{unit} {rate / 1e12:.0f} T/s" for unit, rate in rates.flops.items())
        )
        self._compile()
        if self.options.tune is not None and self.device.is_gpu:
            self._tune()
        # Every number of rows is a graph of its own for who is compiled.
        with torch._dynamo.config.patch(recompile_limit=1024, accumulated_recompile_limit=1024):
            for shape in self.shapes:
                self._products(shape, rates)
                self._write(rates, tests)
            if not self.options.skip_decoder:
                self._decoders()
        self.console.print(targets.table(self._write(rates, tests)))
        for line in (*self.failures, *(f"not measured: {name}" for name in self.left_out)):
            self._say(line)
        self._say(f"written to {self.options.output}")
        failed = any(failure.startswith("fxquant") for failure in self.failures)
        return int(failed or tests.get("status") not in ("passed", "skipped"))

    def _write(self, rates: Rates, tests: dict[str, Any]) -> list[dict[str, Any]]:
        """What there is by now, so that who is cut off keeps it; gives the judged targets."""
        judged = [target.judge(self._seconds) for target in targets.GPU]
        circumstances = {**results.circumstances(), **self.device.facts}
        written = {
            **circumstances,
            "is_gpu_measurement": self.device.is_gpu,
            "rates": {"read": rates.read, "flops": rates.flops},
            "tests": tests,
            "cases": self.cases,
            "decoders": self.decoders,
            "targets": judged,
            "not_importable": missing(),
            "failures": self.failures,
            "left_out": self.left_out,
        }
        results.write(self.options.output, written)
        return judged

    def _say(self, line: str) -> None:
        self.console.print(line, highlight=False, markup=False)

    def _left(self) -> float:
        return self.deadline - time.monotonic()

    def _tried(self, name: str, action: Callable[[], Found]) -> Found | None:
        """What an action gives; None if it fails: what the others do is worth knowing."""
        try:
            return action()
        except Exception as error:  # noqa: BLE001 - of any kind, from any package
            reason = traceback.format_exception_only(type(error), error)[-1].strip()
            self.failures.append(f"{name} failed: {reason.splitlines()[0][:300]}")
            self._say(self.failures[-1])
            return None

    # --- tests ---

    def _tests(self) -> dict[str, Any]:
        """The GPU tests, in processes of their own."""
        if self.options.skip_tests or not self.device.is_gpu:
            return {"status": "skipped"}
        if not find_spec("pytest"):
            return {"status": "skipped", "why": "pytest is not installed"}
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
        # Links to packages (`tree`) count only where the checkout is not put before them.
        command += ["--import-mode=importlib", f"--rootdir={ROOT}", "-c", f"{ROOT}/pyproject.toml"]
        # Warnings of the packages there are no errors of ours.
        command += ["-W", "default", f"{ROOT}/tests/gpu"]
        if find_spec("xdist"):
            command += ["-n", str(min(_WORKERS, os.cpu_count() or 1))]
        self._say("running the GPU tests")
        start = time.monotonic()
        limit = self._left() if self.options.only_tests else TESTS_S
        try:
            done = subprocess.run(
                command,
                cwd=tempfile.gettempdir(),
                capture_output=True,
                text=True,
                timeout=limit,
                check=False,
            )
        except subprocess.TimeoutExpired:
            self._say(f"the GPU tests were cut off after {limit:.0f} s")
            return {"status": "cut off", "seconds": limit}
        lines = (done.stdout + done.stderr).strip().splitlines()
        self._say("\n".join(lines[-15 if done.returncode == 0 else -400 :]))
        return {
            "status": "passed" if done.returncode == 0 else "failed",
            "seconds": time.monotonic() - start,
            "summary": next((line for line in lines if re.search(r"\d (passed|failed)", line)), ""),
            "failed": [line for line in lines if line.startswith(("FAILED", "ERROR"))],
        }

    # --- products ---

    def _compile(self) -> None:
        """All kernels, side by side; what fails here fails again where it is timed."""
        if not self.device.is_gpu:
            return
        self._say("compiling the kernels")
        context = multiprocessing.get_context("spawn")
        workers = min(_WORKERS, os.cpu_count() or 1)
        jobs = [
            (name, shape, rows)
            for name in products.schemes()
            for shape in self.shapes
            for rows in self.rows
        ]
        with ProcessPoolExecutor(workers, mp_context=context) as pool:
            tuned = self.options.tune is not None
            futures = [pool.submit(products.compile_all, *job, candidates=tuned) for job in jobs]
            done, late = wait(futures, timeout=max(self._left() - DECODER_S, 1.0))
            for future in late:
                future.cancel()
        failed = sum(future.exception() is not None for future in done)
        self._say(f"{len(done) - failed} of {len(jobs)} variants compiled ahead")

    def _tune(self) -> None:
        """Chooses tiles by timing them, and writes the table."""
        for shape in self.shapes:
            for name in products.schemes():
                case = f"fxquant {name}, {shape[0]}x{shape[1]}, tuned tiles"
                if self._left() < TUNING_S + DECODER_S:
                    self.left_out.append(case)
                else:
                    self._tried(case, functools.partial(products.tune, name, shape))
        written = tiles.write_table(gpu(), self.options.tune)
        self._say(f"tiles as tuned written to {written}")

    @torch.inference_mode()
    def _products(self, shape: tuple[int, int], rates: Rates) -> None:
        """Everyone with one weight."""
        n, k = shape
        torch._dynamo.reset()
        generator = torch.Generator(self.device.torch).manual_seed(0)
        weight = torch.randn(n, k, device=self.device.torch, generator=generator)
        weight = (weight * k**-0.5).to(torch.bfloat16)
        ready: dict[str, tuple[Contender, Prepared]] = {}
        for contender in (*products.ours(self.device.target), *peers()):
            name = f"{contender.name}, {n}x{k}"
            prepared = self._tried(name, lambda made=contender: made.prepare(weight))
            if prepared is not None:
                ready[contender.name] = contender, prepared
        for rows in self.rows:
            case = targets.case_name(shape, rows)
            if self._left() < DECODER_S:
                self.left_out.append(case)
                continue
            self._measure(case, weight, rows, ready, rates)
        del ready
        gc.collect()

    def _measure(
        self,
        case: str,
        weight: torch.Tensor,
        rows: int,
        ready: dict[str, tuple[Contender, Prepared]],
        rates: Rates,
    ) -> None:
        runs: dict[str, Run] = {}
        lines: dict[str, dict[str, Any]] = {}
        checks: dict[str, Callable[[], float]] = {}
        n, k = weight.shape
        for name, made in ready.items():
            if rows >= made[0].least_rows:
                found = self._tried(
                    f"{name}, {case}", lambda made=made: self._checked(*made, weight, rows)
                )
                if found is not None:
                    runs[name], lines[name], checks[name] = found
        timed = self.device.interleave(runs, self.options.rounds) if runs else {}
        for name, timing in timed.items():
            # What a graph reads may be gone by now: then something else was timed.
            if self._tried(f"{name}, {case}, after its calls,", checks[name]) is None:
                del lines[name]
                continue
            contender, prepared = ready[name]
            moved = prepared.weight_bytes + rows * (n + k) * 2
            shares = rates.shares(moved, 2.0 * rows * n * k, contender.unit, timing.median)
            lines[name] |= {
                "median_us": timing.median * 1e6,
                "quartiles_us": [timing.low * 1e6, timing.high * 1e6],
                "rounds": timing.rounds,
                **shares,
            }
        self.cases.append({"case": case, "contenders": list(lines.values())})
        self.console.print(table(self.cases[-1]))

    def _checked(
        self, contender: Contender, prepared: Prepared, weight: torch.Tensor, rows: int
    ) -> tuple[Run, dict[str, Any], Callable[[], float]]:
        """A call to time, if it gives the product, and what says whether it still does.

        Raises:
            RuntimeError: It computes something else.
        """
        x = make_activation(rows, weight.shape[1], outliers=contender.outliers)
        x = x.to(self.device.torch, torch.bfloat16)
        given = prepared.given(x)

        def checked(run: Run) -> float:
            error = relative_error(run(), x.float() @ weight.float().t())
            if not error <= contender.tolerance:
                raise RuntimeError(f"error {error:.3f}, above {contender.tolerance}")
            return error

        error = checked(lambda: prepared.call(*given))
        run, graphed = self.device.captured(lambda: prepared.call(*given))
        line = {"name": contender.name, "error": error, "cuda_graph": graphed}
        return run, line, lambda: checked(run)

    # --- a decoder ---

    def _decoders(self) -> None:
        shape = decoder.Shape() if self.device.is_gpu else decoder.SMALL
        for batch in BATCHES:
            for name in decoder.builders(self.device.target):
                case = f"{name}, decoder, batch {batch}"
                if self._left() < DECODER_S:
                    self.left_out.append(case)
                    continue
                found = self._tried(
                    case,
                    lambda name=name, batch=batch: decoder.measure(
                        self.device, shape, name, batch, self.options.rounds
                    ),
                )
                if found is not None:
                    self.decoders.append(found)
                    self._say(
                        f"{case}: {found['tokens_per_second']:.0f} tokens/s, "
                        f"peak {found['peak_bytes'] / 2**30:.2f} GiB"
                    )

    def _seconds(self, target: targets.Target, name: str) -> float | None:
        """Looks up medians for `targets`."""
        for case in self.cases:
            for line in case["contenders"]:
                if case["case"] == target.case and line["name"] == name:
                    return float(line["median_us"]) / 1e6
        return None


def table(case: dict[str, Any]) -> Table:
    """One case for the terminal, the fastest first."""
    shown = Table(title=case["case"])
    shown.add_column("contender")
    for heading in ("us", "quartiles", "of bandwidth", "of throughput", "error", "over cuBLAS"):
        shown.add_column(heading, justify="right")
    lines: Sequence[dict[str, Any]] = sorted(case["contenders"], key=lambda x: x["median_us"])
    against = next((line["median_us"] for line in lines if line["name"] == CUBLAS), None)
    for line in lines:
        low, high = line["quartiles_us"]
        shown.add_row(
            line["name"] + ("" if line["cuda_graph"] else " (no graph)"),
            f"{line['median_us']:.1f}",
            f"{low:.1f} - {high:.1f}",
            f"{line['bandwidth_share']:.0%}",
            f"{line['throughput_share']:.0%}",
            f"{line['error']:.4f}",
            "" if against is None else f"{against / line['median_us']:.2f}x",
            style="bold" if line["name"].startswith("fxquant") else "",
        )
    return shown
