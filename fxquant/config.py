"""`Config`: the options of a compile, checked when it is made."""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fxquant import errors
from fxquant.schemes import Recipe, get_scheme

DEFAULT_SKIP = ("lm_head", "*.lm_head", "router", "*.router", "gate", "*.gate")
TARGETS = ("auto", "triton", "cpp", "torch")
COMPUTE_DTYPES = ("float16", "bfloat16", "float32")


@dataclass(frozen=True)
class Config:
    """What to do with the products of a model.

    Attributes:
        scheme: Name of the scheme for every product that no override names.
        skip: fnmatch patterns over module paths (and parameter paths) to leave alone, added to the
            defaults (`DEFAULT_SKIP`: language-model heads, routers, gates).
        overrides: Pattern to scheme name or `Recipe`; the first that matches wins. An override
            also wins over a *default* skip pattern, never over one of `skip`.
        target: What prints the kernels: ``"auto"`` (Triton on GPUs, torch on CPUs), ``"triton"``
            or ``"torch"``.
        strict: Any product against a parameter that is left alone, other than by `skip`, is an
            error.
        min_coverage: Share (0 to 1) of the products' weight elements, not counting skipped ones,
            that has to be quantized; less is an error.
        compute_dtype: Dtype of the dot products' operands; None takes the activation's.
        dump: Folder to write every kernel to; None for none (`FXQUANT_DUMP` is the default).
        inductor: Options handed on to Inductor.

    Raises:
        OptionError: An option is unknown, has the wrong type or an impossible value.
    """

    scheme: str = "nf4"
    skip: tuple[str, ...] = ()
    overrides: Mapping[str, str | Recipe] = field(default_factory=dict)
    target: str = "auto"
    strict: bool = False
    min_coverage: float = 0.0
    compute_dtype: str | None = None
    dump: str | None = None
    inductor: Mapping[str, Any] = field(default_factory=dict)
