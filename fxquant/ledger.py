"""What a compile leaves for `fxquant.report` and `fxquant.release_weights`."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping

from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from fxquant.formats import PackedWeight, anchor_of
from fxquant.passes.context import Context, LinearSite
from fxquant.report import LEFT_ALONE, QUANTIZED, Row, remember
from fxquant.runtime import launch
from fxquant.runtime.graph import Slot
from fxquant.runtime.store import STORE
from fxquant.runtime.targets import Choice

LOG = logging.getLogger("fxquant.report")


class Ledger:
    """The rows of one graph, filed for the model that was compiled and for every later one.

    Args:
        ctx: The graph after the pipeline.
        choices: What computes each spec.
    """

    def __init__(self, ctx: Context, choices: Mapping[str, Choice]) -> None:
        self.rows: dict[int, list[Row]] = {}
        for site in ctx.sites:
            self.rows.setdefault(site.parameter.index, []).append(
                _row(site, choices[site.spec_json])
            )
        bound = ctx.parameters.values()
        self.values = {b.index: b.value for b in bound}
        self.names = {b.name: b.value for b in bound}
        self.refusals = ctx.refusals
        self.filed: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self.read_dense = {source for source in ctx.sources if isinstance(source, int)}

    def file(self) -> None:
        """Files the compile itself, and logs what was left alone."""
        rows = [(row, self.values[index]) for index, rows in self.rows.items() for row in rows]
        refused = [
            (
                Row(r.module, r.parameter, r.shape, LEFT_ALONE, reason=r.reason, where=r.where),
                self.names.get(r.parameter),
            )
            for r in self.refusals
        ]
        remember([*rows, *refused], self.values.values())
        for value in self.values.values():
            self.filed[anchor_of(value)] = True
        for index in self.read_dense & self.values.keys():
            STORE.keep(self.values[index])
        LOG.info("%d products quantized, %d left alone", len(rows), len(refused))
        lost = [r for r in self.refusals if r.is_loss]
        if lost and not rows:
            LOG.warning(
                "none of the %d products against parameters was quantized, the first because %s",
                len(lost),
                lost[0].reason,
            )
        for r in self.refusals:
            LOG.info("left alone: %s (%s): %s", r.module or r.parameter, r.where, r.reason)
        # A parameter of the model must not outlive it because its graph does.
        self.values, self.names = {}, {}

    def meet(self, slot: Slot, parameter: Tensor, packed: PackedWeight) -> None:
        """Files a parameter that the graph serves, unless the compile itself has."""
        error = STORE.error_db(packed)
        own = self.rows.get(slot.index, [])
        rows = [dataclasses.replace(row, error_db=error) for row in own]
        if rows == own and anchor_of(parameter) in self.filed:
            return
        remember([(row, parameter) for row in rows], [parameter])
        if slot.index in self.read_dense:
            STORE.keep(parameter)


def _row(site: LinearSite, choice: Choice) -> Row:
    assert site.packed is not None, "the pack pass ran"
    said = ["dequantize + matmul fallback"] if choice.runs == "torch" else []
    said += [choice.note] if choice.note else []
    return Row(
        module=site.module,
        parameter=site.parameter.name,
        shape=tuple(site.parameter.value.shape),
        status=QUANTIZED,
        scheme=site.scheme,
        bits=site.packed.bits_per_weight,
        error_db=STORE.error_db(site.packed),
        kernel=f"{choice.runs}:{launch.parse_spec(site.spec_json).name}"
        + (f" ({': '.join(said)})" if said else ""),
        where=site.where,
    )
