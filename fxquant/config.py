"""`Config`: the options of a compile, checked when it is made."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fxquant import errors
from fxquant.calibration import Calibration
from fxquant.schemes import Recipe, get_scheme
from fxquant.schemes.recipe import AUTO, is_alpha, is_threshold

DEFAULT_SKIP = ("lm_head", "*.lm_head", "router", "*.router", "gate", "*.gate")
TARGETS = ("auto", "triton", "cpp", "torch")
COMPUTE_DTYPES = ("float16", "bfloat16", "float32", "int8")


@dataclass(frozen=True)
class Config:
    """What to do with the products of a model.

    Attributes:
        scheme: Name of the scheme for every product that no override names.
        skip: fnmatch patterns over module paths and parameter names to leave alone, added to the
            defaults (`DEFAULT_SKIP`: language-model heads, routers, gates).
        overrides: Pattern to scheme name or `Recipe`; the first that matches wins. An override
            also wins over a default skip pattern, never over one of `skip`.
        target: What computes: ``"auto"`` (Triton on GPUs, C++ on CPUs), ``"triton"``, ``"cpp"``
            or ``"torch"`` (torch operations that decode the weight and multiply).
        strict: A product against a parameter that is left alone, other than by a skip pattern, is
            an error.
        min_coverage: Share (0 to 1) of the products' weight elements, skipped ones not counted,
            that has to be quantized; less is an error.
        compute_dtype: Dtype of the dot products' operands; None takes the activation's. With
            ``"int8"`` activations of weight-only schemes are rounded to int8 too, with a scale for
            every token: faster, and wrong where few channels are far larger than the rest.
        alpha: SmoothQuant's migration strength in place of the scheme's: a number from 0 to 1,
            ``"auto"`` (the best on a grid, for each product), or a dict of patterns to either; the
            first that matches wins.
        threshold: LLM.int8()'s in place of the scheme's: magnitudes from here on are outliers.
        calibration: What `fxquant.calibrate` gave (or the path of its file, which is loaded), for
            the schemes that have to know activations beforehand.
        calibration_steps: In place of it: the first so many calls of each compiled graph run in
            full precision and are observed, then the graph is quantized.
        fuse: Take the work around products into their kernels; False leaves it to Inductor.
        verify: Check every kernel on its first inputs, and let torch compute in place of one that
            is wrong.
        dump: Folder to write every kernel to; None takes `FXQUANT_DUMP`, or writes none.
        inductor: Options handed on to Inductor.

    Raises:
        OptionError: An option has the wrong type or an impossible value.
    """

    scheme: str = "nf4"
    skip: tuple[str, ...] = ()
    overrides: Mapping[str, str | Recipe] = field(default_factory=dict)
    target: str = "auto"
    strict: bool = False
    min_coverage: float = 0.0
    compute_dtype: str | None = None
    alpha: float | str | Mapping[str, float | str] | None = None
    threshold: float | None = None
    calibration: Calibration | None = None
    calibration_steps: int = 0
    fuse: bool = True
    verify: bool = False
    dump: str | None = None
    inductor: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def from_options(cls, options: Mapping[str, Any] | Config | None) -> Config:
        """The config that ``torch.compile(..., options=...)`` means.

        Raises:
            OptionError: They are no options at all, or one is unknown, has the wrong type or an
                impossible value.
        """
        if isinstance(options, Config):
            return options
        if options is not None and not isinstance(options, Mapping):
            raise errors.ill_typed_options(options)
        known = [f.name for f in dataclasses.fields(cls)]
        for name in options or {}:
            if name not in known:
                raise errors.unknown_option(name, known)
        return cls(**(options or {}))

    def __post_init__(self) -> None:
        self._check_scheme()
        self._check_patterns()
        self._check_target()
        self._check_recipe_options()
        self._check_calibration()
        for name in ("strict", "fuse", "verify"):
            if not isinstance(getattr(self, name), bool):
                raise errors.ill_typed_option(name, getattr(self, name), "a bool")
        if isinstance(self.min_coverage, bool) or not isinstance(self.min_coverage, (int, float)):
            raise errors.ill_typed_option("min_coverage", self.min_coverage, "a number")
        if not 0 <= self.min_coverage <= 1:
            raise errors.bad_option_value("min_coverage", self.min_coverage, "from 0 to 1")
        if self.dump is not None:
            if not isinstance(self.dump, str) and not hasattr(self.dump, "__fspath__"):
                raise errors.ill_typed_option("dump", self.dump, "a folder")
            object.__setattr__(self, "dump", str(self.dump))
        if not isinstance(self.inductor, Mapping):
            raise errors.ill_typed_option("inductor", self.inductor, "a dict of Inductor's options")

    def _check_scheme(self) -> None:
        if not isinstance(self.scheme, str):
            raise errors.ill_typed_option("scheme", self.scheme, "the name of a scheme")
        get_scheme(self.scheme)

    def _check_patterns(self) -> None:
        if isinstance(self.skip, str) or not isinstance(self.skip, (list, tuple)):
            raise errors.ill_typed_option("skip", self.skip, "a list of patterns")
        if not all(isinstance(pattern, str) for pattern in self.skip):
            raise errors.ill_typed_option("skip", self.skip, "a list of patterns")
        object.__setattr__(self, "skip", tuple(self.skip))
        if not isinstance(self.overrides, Mapping):
            raise errors.ill_typed_option("overrides", self.overrides, "a dict of patterns")
        for pattern, choice in self.overrides.items():
            if not isinstance(pattern, str) or not isinstance(choice, (str, Recipe)):
                raise errors.ill_typed_option(
                    "overrides", {pattern: choice}, "a dict of patterns to scheme names or recipes"
                )
            if isinstance(choice, str):
                get_scheme(choice)

    def _check_recipe_options(self) -> None:
        alphas = self.alpha if isinstance(self.alpha, Mapping) else {"*": self.alpha}
        for pattern, alpha in alphas.items():
            if not isinstance(pattern, str):
                raise errors.ill_typed_option("alpha", self.alpha, "a dict of patterns to numbers")
            if alpha is not None and not is_alpha(alpha):
                expected = f"a number from 0 to 1, {AUTO!r}, or a dict of patterns to these"
                raise errors.bad_option_value("alpha", alpha, expected)
        if self.threshold is not None and not is_threshold(self.threshold):
            raise errors.bad_option_value("threshold", self.threshold, "a number above 0")

    def _check_calibration(self) -> None:
        given: object = self.calibration
        steps = self.calibration_steps
        if isinstance(given, (str, os.PathLike)):
            object.__setattr__(self, "calibration", Calibration.load(given))
        elif given is not None and not isinstance(given, Calibration):
            expected = "what fxquant.calibrate gave, or the path of its file"
            raise errors.ill_typed_option("calibration", given, expected)
        if isinstance(steps, bool) or not isinstance(steps, int):
            raise errors.ill_typed_option("calibration_steps", steps, "a number of calls")
        if steps < 0 or (steps and given is not None):
            expected = "0 with a calibration" if steps > 0 else "0 or more"
            raise errors.bad_option_value("calibration_steps", steps, expected)

    def _check_target(self) -> None:
        if not isinstance(self.target, str):
            raise errors.ill_typed_option("target", self.target, "the name of a target")
        if self.target not in TARGETS:
            raise errors.bad_option_value("target", self.target, f"one of {', '.join(TARGETS)}")
        dtype = self.compute_dtype
        if dtype is not None and not isinstance(dtype, str):
            dtype = str(dtype).removeprefix("torch.")
            object.__setattr__(self, "compute_dtype", dtype)
        if dtype is not None and dtype not in COMPUTE_DTYPES:
            raise errors.bad_option_value(
                "compute_dtype", self.compute_dtype, f"None or one of {', '.join(COMPUTE_DTYPES)}"
            )
