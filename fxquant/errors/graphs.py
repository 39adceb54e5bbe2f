"""What passes find."""

from __future__ import annotations

from collections.abc import Iterable

from fxquant.errors.kinds import CoverageError, PassError


def products_left_alone(reasons: Iterable[str]) -> CoverageError:
    """`strict` is set and products were left alone for other reasons than a skip pattern."""
    found = list(reasons)
    return CoverageError(
        f"strict=True, but {len(found)} products against parameters stay unquantized: "
        f"{'; '.join(found)}; add what is meant to stay to `skip`, or drop `strict`."
    )


def coverage_too_low(share: float, wanted: float, reasons: Iterable[str]) -> CoverageError:
    """Fewer weight elements are quantized than `min_coverage` asks for."""
    return CoverageError(
        f"only {share:.1%} of the weights in products are quantized, min_coverage asks for "
        f"{wanted:.1%}: {'; '.join(reasons)}; add what is meant to stay to `skip`, or lower "
        f"`min_coverage`."
    )


def broken_graph(name: str, reason: str) -> PassError:
    """A pass left a graph behind that fails verification."""
    return PassError(
        f"the pass {name!r} left a broken graph: {reason}; this is a defect of fxquant, please "
        f"report it with the model's code."
    )
