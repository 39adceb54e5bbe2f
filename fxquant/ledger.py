"""What a compile leaves for `fxquant.report` and `fxquant.release_weights`."""

from __future__ import annotations

import dataclasses
import functools
import logging
import weakref
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from fxquant.formats import PackedWeight, anchor_of
from fxquant.formats.codes import Codes, Place
from fxquant.kernels import Kernels
from fxquant.passes.context import Context, LinearSite
from fxquant.passes.sources import DerivedPart, Rule
from fxquant.passes.statistics import ColumnWeights
from fxquant.report import LEFT_ALONE, QUANTIZED, Row, gauge, remember
from fxquant.runtime import counted, counters, launch, verify
from fxquant.runtime.graph import Slot
from fxquant.runtime.store import STORE

LOG = logging.getLogger("fxquant.report")


class Ledger:
    """The rows of one graph, filed for the model that was compiled and for every later one.

    Args:
        ctx: The graph after the pipeline.
        kernels: What computes its products.
    """

    def __init__(self, ctx: Context, kernels: Kernels) -> None:
        self.rows: dict[int, list[Row]] = {}
        self.outliers: dict[int, list[tuple[Row, str]]] = {}
        self.limits: dict[Rule, list[tuple[Row, int]]] = {}
        self.verified: dict[int, list[tuple[Row, list[tuple[str, str]]]]] = {}
        for number, site in enumerate(ctx.sites):
            row, index = _row(site, number, kernels), site.parameter.index
            self.rows.setdefault(index, []).append(row)
            found = [(text, kernels.choices[text].runs) for text in kernels.of(number)]
            for text, runs in found[-1:]:
                if _finds_outliers(text) and runs != "torch":
                    self.outliers.setdefault(index, []).append((row, text))
            if kernels.verify:
                self.verified.setdefault(index, []).append((row, found))
            if site.limit is not None:
                self.limits.setdefault(site.limit, []).append((row, index))
        bound = ctx.parameters.values()
        self.values = {b.index: b.value for b in bound}
        self.names = {b.name: b.value for b in bound}
        self.refusals = ctx.refusals
        self.filed: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self.read_dense = {source for source in ctx.sources if isinstance(source, int)}
        # Columns that stay in 16 bits come from the original: decoded ones would be less exact.
        derived = [source for source in ctx.sources if isinstance(source, DerivedPart)]
        columns = [source.rule for source in derived if isinstance(source.rule, ColumnWeights)]
        self.read_dense |= {rule.observed.index for rule in columns}

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
        codes = packed.codes
        for row, text in self.outliers.get(slot.index, []):
            if not codes.held.is_cpu:
                counters.of(codes.held, 2)
            gauge(row, parameter, functools.partial(_mean_outliers, text, weakref.ref(codes)))
        for row, kernels in self.verified.get(slot.index, []):
            gauge(row, parameter, functools.partial(_set_aside, kernels), "verify")
        error = STORE.error_db(packed)
        own = self.rows.get(slot.index, [])
        for row in own:
            if row.kernel.startswith("cpp:"):
                gauge(row, parameter, functools.partial(_kept_twice, weakref.ref(codes)), "memory")
        rows = [dataclasses.replace(row, error_db=error) for row in own]
        if rows == own and anchor_of(parameter) in self.filed:
            return
        remember([(row, parameter) for row in rows], [parameter])
        if slot.index in self.read_dense:
            STORE.keep(parameter)

    def made(self, rule: Rule, inputs: Sequence[Any], result: Any) -> None:
        """Notes what a rule made of the parameters that arrived: counters belong to limits."""
        for row, index in self.limits.get(rule, []):
            counters.of(result, 1)
            gauge(row, inputs[index], functools.partial(_saturated, weakref.ref(result)))


def _finds_outliers(text: str) -> bool:
    outliers = launch.parse_spec(text).outliers
    return outliers is not None and outliers.threshold is not None


def _mean_outliers(text: str, codes: weakref.ref[Codes]) -> str:
    known = codes()
    counts = None if known is None else counted.outlier_counts(text, known.held)
    if counts is None:
        return ""
    calls, columns = counts
    return f"outlier columns: {columns / calls:.1f} a call in {calls} calls"


def _set_aside(kernels: Sequence[tuple[str, str]]) -> str:
    found = filter(None, (verify.set_aside_because(*kernel) for kernel in kernels))
    return "; ".join(f"set aside for torch: {reason}" for reason in found)


def _kept_twice(codes: weakref.ref[Codes]) -> str:
    known = codes()
    if known is None or known.place is not Place.FIXED:
        return ""
    return f"codes are kept in their stored form, too: {known.held.nbytes / 1e6:.2f} MB"


def _saturated(limit: weakref.ref[Tensor]) -> str:
    known = limit()
    return "" if known is None else f"saturated elements: {counted.saturated(known)}"


def _row(site: LinearSite, number: int, kernels: Kernels) -> Row:
    assert site.packed is not None, "the pack pass ran"
    *before, product = kernels.of(number) or [t for t in (site.quantize_json, site.spec_json) if t]
    kernel = _kernel(product, kernels, "dequantize + matmul fallback")
    for text in before:
        kernel += f" after {_kernel(text, kernels, 'torch operations')}"
    return Row(
        module=site.module,
        parameter=site.parameter.name,
        shape=tuple(site.parameter.value.shape),
        status=QUANTIZED,
        scheme=site.scheme,
        bits=site.packed.bits_per_weight,
        error_db=STORE.error_db(site.packed),
        kernel=kernel,
        where=site.where,
        activation=_activation(site),
        notes=tuple(site.notes),
        fused=tuple(kernels.fused(number)),
    )


def _kernel(text: str, kernels: Kernels, fallback: str) -> str:
    choice = kernels.choices.get(text, kernels.choice)
    said = [fallback] if choice.runs == "torch" else []
    said += filter(None, (choice.note, launch.remark(text, choice.runs)))
    return f"{choice.runs}:{launch.parse(text).name}" + (f" ({': '.join(said)})" if said else "")


def _activation(site: LinearSite) -> str:
    recipe, spec = site.recipe, launch.parse_spec(site.spec_json)
    if recipe is None or recipe.activation is None:
        # `compute_dtype` asks for it without a recipe.
        return "int8 per token" if spec.compute_dtype == "int8" else ""
    if spec.outliers is None:
        return str(recipe.activation)
    columns, threshold = spec.outliers.columns, spec.outliers.threshold
    which = f"columns from {threshold:g}" if columns is None else f"{columns} columns"
    return f"{recipe.activation}, {which} in {spec.outliers.dtype}"
