"""Schemes: named recipes, one short file per paper."""

from fxquant import errors
from fxquant.schemes.fp4 import FP4
from fxquant.schemes.int8 import INT8
from fxquant.schemes.llm_int8 import LLM_INT8, LLM_INT8_STATIC
from fxquant.schemes.nf4 import NF4
from fxquant.schemes.outlier_suppression import OUTLIER_SUPPRESSION
from fxquant.schemes.recipe import Activation, OutlierColumns, Recipe, Scheme, Smoothing
from fxquant.schemes.smoothquant import SMOOTHQUANT, SMOOTHQUANT_LEVELS
from fxquant.schemes.w8a8 import W8A8
from fxquant.schemes.zeroquant import ZEROQUANT, ZEROQUANT_W4A8

__all__ = [
    "Activation",
    "OutlierColumns",
    "Recipe",
    "Scheme",
    "Smoothing",
    "get_scheme",
    "schemes",
]

_SCHEMES = {
    scheme.name: scheme
    for scheme in (
        NF4,
        FP4,
        INT8,
        W8A8,
        SMOOTHQUANT,
        *SMOOTHQUANT_LEVELS,
        LLM_INT8,
        LLM_INT8_STATIC,
        ZEROQUANT,
        ZEROQUANT_W4A8,
        OUTLIER_SUPPRESSION,
    )
}


def schemes() -> dict[str, Scheme]:
    """The schemes by name, the default first."""
    return dict(_SCHEMES)


def get_scheme(name: str) -> Scheme:
    """The scheme of that name.

    Raises:
        OptionError: There is none.
    """
    if name not in _SCHEMES:
        raise errors.unknown_scheme(name, _SCHEMES)
    return _SCHEMES[name]
