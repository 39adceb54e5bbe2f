"""Plan: which recipe each site gets, by the options."""

from __future__ import annotations

import dataclasses
import fnmatch
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fxquant import errors
from fxquant.config import DEFAULT_SKIP, Config
from fxquant.formats import Encoding, PackedWeight
from fxquant.passes import products
from fxquant.passes.context import LEFT, SKIPPED, Context, LinearSite, PassReport, Refusal
from fxquant.schemes import Recipe, get_scheme


@dataclass(frozen=True)
class Decision:
    """What is done to one parameter.

    Attributes:
        scheme: Name of the scheme; ``"custom"`` for a recipe of the user's, ``"packed"`` for a
            parameter that arrived packed.
        recipe: What the scheme stands for.
        encoding: Of the parameter as it is stored.
        unsmoothed: Whether it was packed before, without the scales that the scheme asks for.
    """

    scheme: str
    recipe: Recipe
    encoding: Encoding
    unsmoothed: bool = False


@dataclass(frozen=True)
class Declined:
    """Why a parameter is left alone, and the kind of refusal that this is."""

    reason: str
    kind: str = LEFT


def plan(ctx: Context) -> PassReport:
    """Sets scheme, recipe and encoding of every site, and drops those to be left alone.

    Raises:
        CalibrationError: A recipe goes by statistics, and there is no calibration.
        CoverageError: `strict` or `min_coverage` is not met.
    """
    kept = []
    decided: dict[int, Decision] = {}
    for site in ctx.sites:
        value = site.parameter.value
        found = decide(ctx.config, value, _names(site), site.n_dims, site.k_dims)
        if isinstance(found, Declined):
            ctx.refusals.append(_refusal(site, found))
            continue
        decision = decided.setdefault(id(value), found)
        if decision.recipe.needs_calibration and ctx.config.calibration is None:
            raise errors.needs_calibration(decision.scheme, site.parameter.name)
        site.scheme, site.recipe = decision.scheme, decision.recipe
        if decision.unsmoothed:
            site.notes.append("not smoothed: the weight was packed before")
        site.operand = dataclasses.replace(site.operand, encoding=decision.encoding)
        kept.append(site)
    ctx.sites = kept
    lost = [refusal for refusal in ctx.refusals if refusal.is_loss and not _meant(ctx, refusal)]
    check_coverage(ctx.config, (site.parameter.value.numel() for site in kept), lost)
    return PassReport("plan", f"{len(kept)} products to quantize")


def _meant(ctx: Context, refusal: Refusal) -> bool:
    """Whether a skip pattern names a product that could not have been quantized anyway."""
    patterns = (*ctx.config.skip, *DEFAULT_SKIP)
    return _first(patterns, (refusal.module, refusal.parameter)) is not None


def decide(
    config: Config,
    value: Tensor,
    names: Sequence[str],
    n_dims: tuple[int, ...],
    k_dims: tuple[int, ...],
) -> Decision | Declined:
    """What the options say of one parameter.

    Args:
        config: The options.
        value: The parameter.
        names: What patterns are matched against: paths of the module and of the parameter.
        n_dims: Dimensions of the parameter that make up the outputs.
        k_dims: Dimensions that make up the inputs.
    """
    packed = isinstance(value, PackedWeight)
    skip = _first(config.skip, names)
    override = _first(config.overrides, names)
    if skip is None and override is None and not packed:
        skip = _first(DEFAULT_SKIP, names)
    if skip is not None:
        return Declined(f"the skip pattern {skip!r} matches", SKIPPED)
    choice = config.scheme if override is None else config.overrides[override]
    scheme = "custom" if isinstance(choice, Recipe) else choice
    recipe = choice if isinstance(choice, Recipe) else get_scheme(choice).recipe
    recipe = _adjusted(recipe, config, names)
    if isinstance(value, PackedWeight):
        # What was packed stays as it is; the activations are still the recipe's to say.
        kept = dataclasses.replace(recipe, weight=value.encoding, smoothing=None)
        return Decision("packed", kept, value.encoding, unsmoothed=recipe.smoothing is not None)
    encoding = recipe.weight.oriented(value.ndim, n_dims, k_dims)
    dense = value.numel() * value.element_size()
    small = packed_bytes(encoding, tuple(value.shape))
    if small >= dense:
        return Declined(f"it is too small: {dense} bytes dense would be {small} packed")
    return Decision(scheme, recipe, encoding)


def _adjusted(recipe: Recipe, config: Config, names: Sequence[str]) -> Recipe:
    """A recipe with what the options say in place of its own numbers."""
    alpha: Any = config.alpha
    if isinstance(alpha, Mapping):
        pattern = _first(alpha, names)
        alpha = None if pattern is None else alpha[pattern]
    if alpha is not None and recipe.smoothing is not None:
        recipe = dataclasses.replace(
            recipe, smoothing=dataclasses.replace(recipe.smoothing, alpha=alpha)
        )
    if config.threshold is not None and recipe.outliers is not None:
        outliers = dataclasses.replace(recipe.outliers, threshold=config.threshold)
        recipe = dataclasses.replace(recipe, outliers=outliers)
    return recipe


def _names(site: LinearSite) -> tuple[str, ...]:
    name = site.parameter.name
    return tuple({site.module: 0, name: 0, name.rpartition(".")[0]: 0})


def _first(patterns: Iterable[str], names: Iterable[str]) -> str | None:
    names = [name for name in names if name]
    for pattern in patterns:
        if any(fnmatch.fnmatchcase(name, pattern) for name in names):
            return pattern
    return None


def packed_bytes(encoding: Encoding, shape: tuple[int, ...]) -> int:
    """Bytes that a tensor of that shape takes when encoded."""
    numel = math.prod(shape)
    if encoding.is_flat:
        extent = numel if encoding.block[0] == -1 else encoding.block[0]
        blocks = math.ceil(numel / extent)
    else:
        extents = (*([1] * (len(shape) - len(encoding.block))), *encoding.block)
        counts = zip(shape, extents, strict=True)
        blocks = math.prod(1 if width == -1 else math.ceil(size / width) for size, width in counts)
    total = math.ceil(numel * encoding.bits / 8) + (blocks if encoding.zero_point else 0)
    if encoding.scale is None:
        return total + 4 * blocks
    offset = 4 if encoding.scale.offset else 0
    return total + packed_bytes(encoding.scale, (blocks,)) + offset


def check_coverage(config: Config, done: Iterable[int], lost: Sequence[Refusal]) -> None:
    """Holds what was done against `strict` and `min_coverage`.

    Args:
        config: The options.
        done: Elements of each weight that is quantized.
        lost: Products that are left alone and count.

    Raises:
        CoverageError: One of the two is not met.
    """
    reasons = [f"{r.module or r.parameter} ({r.where or r.op}): {r.reason}" for r in lost]
    if lost and config.strict:
        raise errors.products_left_alone(reasons)
    quantized = sum(done)
    total = quantized + sum(math.prod(refusal.shape) for refusal in lost)
    share = quantized / total if total else 1.0
    if share < config.min_coverage:
        raise errors.coverage_too_low(share, config.min_coverage, reasons)


def _refusal(site: LinearSite, declined: Declined) -> Refusal:
    return Refusal(
        reason=declined.reason,
        where=site.where,
        module=site.module,
        op=products.name(site.node),
        shape=tuple(site.parameter.value.shape),
        parameter=site.parameter.name,
        kind=declined.kind,
    )
