"""Graph to graph: Dynamo's graph in, the same graph on packed weights out.

`PIPELINE` is the order, `OBSERVATION` that of calibration. Each pass is a function of a `Context`
in a file of its own; what must hold after each is in `verify.py`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from fxquant.passes import values
from fxquant.passes.bind import bind
from fxquant.passes.context import Context, PassReport
from fxquant.passes.match import match
from fxquant.passes.normalize import normalize
from fxquant.passes.observe import observe
from fxquant.passes.pack import pack
from fxquant.passes.plan import plan
from fxquant.passes.smooth import smooth
from fxquant.passes.verify import aliases, verify

__all__ = ["OBSERVATION", "PIPELINE", "run_pipeline"]

LOG = logging.getLogger("fxquant.passes")

Pass = Callable[[Context], PassReport]
PIPELINE: tuple[Pass, ...] = (normalize, bind, match, plan, smooth, pack)
OBSERVATION: tuple[Pass, ...] = (normalize, bind, match, observe)


def run_pipeline(ctx: Context, steps: Sequence[Pass] | None = None) -> None:
    """Runs every pass, and verifies the graph after each.

    Args:
        ctx: A graph and its inputs. Afterwards `ctx.gm` takes `ctx.inputs`, which come from
            `ctx.sources`; `ctx.sites` and `ctx.refusals` say what was done.
        steps: The passes, in order; None is `PIPELINE`.

    Raises:
        CoverageError: `strict` or `min_coverage` is not met.
        WeightError: A weight cannot be encoded.
        PassError: A pass broke the graph: a defect.
    """
    before = None
    for step in PIPELINE if steps is None else steps:
        report = step(ctx)
        if before is None:
            # Dynamo's own nodes have no `val`: the copy that `normalize` makes is compared with.
            before = aliases(ctx.gm)
        verify(report.name, ctx, before)
        LOG.debug("%s: %s", report.name, report.summary)
    values.show(ctx.gm)
