"""Plan: which recipe each site gets, by the options."""

from __future__ import annotations

import dataclasses
import fnmatch
import math
from collections.abc import Iterable

from fxquant import errors
from fxquant.config import DEFAULT_SKIP, Config
from fxquant.formats import Encoding, PackedWeight
from fxquant.passes import products
from fxquant.passes.context import SKIPPED, Context, LinearSite, PassReport, Refusal
from fxquant.schemes import Recipe, get_scheme


def plan(ctx: Context) -> PassReport:
    """Sets scheme, recipe and encoding of every site, and drops those to be left alone.

    Raises:
        CoverageError: `strict` or `min_coverage` is not met.
    """
    kept = []
    encodings: dict[int, tuple[str, Recipe, Encoding]] = {}
    for site in ctx.sites:
        skip = _skipped(ctx.config, site)
        if skip is not None:
            ctx.refusals.append(_refusal(site, f"the skip pattern {skip!r} matches", SKIPPED))
            continue
        key = id(site.parameter.value)
        if key not in encodings:
            encodings[key] = _choose(ctx.config, site)
        site.scheme, site.recipe, encoding = encodings[key]
        site.operand = dataclasses.replace(site.operand, encoding=encoding)
        reason = _too_small(site, encoding)
        if reason is not None:
            ctx.refusals.append(_refusal(site, reason))
        else:
            kept.append(site)
    ctx.sites = kept
    _check_coverage(ctx)
    return PassReport("plan", len(kept), f"{len(kept)} products to quantize")


def _names(site: LinearSite) -> tuple[str, ...]:
    """What patterns are matched against: the module, the parameter, and the parameter's module."""
    name = site.parameter.name
    return tuple({site.module: 0, name: 0, name.rpartition(".")[0]: 0})


def _first(patterns: Iterable[str], site: LinearSite) -> str | None:
    for pattern in patterns:
        if any(name and fnmatch.fnmatchcase(name, pattern) for name in _names(site)):
            return pattern
    return None


def _skipped(config: Config, site: LinearSite) -> str | None:
    """The pattern that leaves a site alone, or None."""
    asked = _first(config.skip, site)
    if asked is not None:
        return asked
    if _first(config.overrides, site) is not None or isinstance(site.parameter.value, PackedWeight):
        return None
    return _first(DEFAULT_SKIP, site)


def _choose(config: Config, site: LinearSite) -> tuple[str, Recipe, Encoding]:
    """Name, recipe and encoding for a parameter; a packed one keeps what it has."""
    value = site.parameter.value
    if isinstance(value, PackedWeight):
        return "packed", Recipe(value.encoding), value.encoding
    pattern = _first(config.overrides, site)
    choice = config.scheme if pattern is None else config.overrides[pattern]
    if isinstance(choice, Recipe):
        scheme, recipe = "custom", choice
    else:
        scheme, recipe = choice, get_scheme(choice).recipe
    return scheme, recipe, recipe.weight.oriented(value.ndim, site.n_dims, site.k_dims)


def _too_small(site: LinearSite, encoding: Encoding) -> str | None:
    """Why packing a parameter would save nothing, or None."""
    value = site.parameter.value
    if isinstance(value, PackedWeight):
        return None
    packed = packed_bytes(encoding, tuple(value.shape))
    dense = value.numel() * value.element_size()
    if packed < dense:
        return None
    return f"it is too small: {dense} bytes dense would be {packed} packed"


def packed_bytes(encoding: Encoding, shape: tuple[int, ...]) -> int:
    """Bytes that a tensor of that shape takes when encoded."""
    numel = math.prod(shape)
    if encoding.is_flat:
        extent = numel if encoding.block[0] == -1 else encoding.block[0]
        blocks = math.ceil(numel / extent)
    else:
        extents = (*([1] * (len(shape) - len(encoding.block))), *encoding.block)
        pairs = zip(shape, extents, strict=True)
        blocks = math.prod(1 if extent == -1 else math.ceil(size / extent) for size, extent in pairs)
    total = math.ceil(numel * encoding.bits / 8) + (blocks if encoding.zero_point else 0)
    if encoding.scale is None:
        return total + 4 * blocks
    offset = 4 if encoding.scale.offset else 0
    return total + packed_bytes(encoding.scale, (blocks,)) + offset


def _refusal(site: LinearSite, reason: str, kind: str | None = None) -> Refusal:
    found = Refusal(
        reason=reason,
        where=site.where,
        module=site.module,
        op=products.name(site.node),
        shape=tuple(site.parameter.value.shape),
        parameter=site.parameter.name,
    )
    return found if kind is None else dataclasses.replace(found, kind=kind)


def _check_coverage(ctx: Context) -> None:
    lost = [refusal for refusal in ctx.refusals if refusal.is_loss]
    reasons = [f"{r.module or r.parameter} ({r.where or r.op}): {r.reason}" for r in lost]
    if lost and ctx.config.strict:
        raise errors.products_left_alone(reasons)
    done = sum(site.parameter.value.numel() for site in ctx.sites)
    total = done + sum(math.prod(refusal.shape) for refusal in lost)
    share = done / total if total else 1.0
    if share < ctx.config.min_coverage:
        raise errors.coverage_too_low(share, ctx.config.min_coverage, reasons)
