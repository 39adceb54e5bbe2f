"""Runs the GPU tests and the GPU benchmark: ``python -m benchmarks.gpu``.

Needs nothing but a GPU, torch and Triton, no installation and no network, and ends within nine
minutes: what there is no time for is named, not measured. Every call is a CUDA graph where it can
be one; everyone in one process, interleaved, with L2 flushed before each call; medians and
quartiles, with the fractions of the bandwidth and of the matrix unit's throughput that were
measured in the same run. Written to ``benchmarks/results/gpu.json``.

``--tune FOLDER`` has the tiles of all products tuned first, and writes the table of results there;
as ``fxquant/tuned/`` of a checkout it comes with the package from then on.

``--rehearse`` runs the same on a CPU with tiny shapes and without our kernels: it shows that the
command works and is no GPU measurement.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.gpu.tree import ROOT, make_importable

LIMIT_S = 520.0
MISSING_DEVICE = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures, prints the tables and writes the JSON.

    Returns:
        0; 1 when a test failed or a contender of ours gave no result; 2 without a GPU.
    """
    began = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--rounds", type=int, default=31, help="times every contender is called")
    parser.add_argument("--limit", type=float, default=LIMIT_S, help="seconds for everything")
    parser.add_argument("--skip-tests", action="store_true", help="measure only")
    parser.add_argument("--only-tests", action="store_true", help="measure nothing")
    parser.add_argument("--skip-decoder", action="store_true", help="products only")
    parser.add_argument("--tune", type=Path, help="choose tiles by timing, and write them here")
    parser.add_argument("--rehearse", action="store_true", help="on a CPU; measures nothing")
    parser.add_argument("--output", type=Path, help="default benchmarks/results/gpu.json")
    options = parser.parse_args(arguments)

    make_importable()
    from benchmarks.gpu import device, session

    missing = "" if options.rehearse else device.obstacle()
    if missing:
        print(missing, file=sys.stderr)
        return MISSING_DEVICE
    if options.output is None:
        name = "gpu-rehearsal.json" if options.rehearse else "gpu.json"
        options.output = ROOT / "benchmarks" / "results" / name
    found = device.Rehearsal() if options.rehearse else device.Device()
    return session.Session(found, options, began + options.limit).run()


if __name__ == "__main__":
    sys.exit(main())
