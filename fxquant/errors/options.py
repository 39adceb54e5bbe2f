"""Options and recipes."""

from __future__ import annotations

from collections.abc import Iterable

from fxquant.errors.kinds import OptionError
from fxquant.errors.words import listed


def unknown_option(name: str, known: Iterable[str]) -> OptionError:
    """An option that `Config` does not have."""
    return OptionError(f"unknown fxquant option {name!r}: the options are {listed(known)}.")


def ill_typed_options(value: object) -> OptionError:
    """Something in the place of all options that is neither a dict nor a `Config`."""
    return OptionError(
        "fxquant's options must be a dict such as {'scheme': 'nf4'} or an fxquant.Config, "
        f"got {value!r} of type {type(value).__name__}."
    )


def ill_typed_option(name: str, value: object, expected: str) -> OptionError:
    """An option whose value has the wrong type."""
    return OptionError(
        f"fxquant option {name!r} must be {expected}, got {value!r} of type {type(value).__name__}."
    )


def bad_option_value(name: str, value: object, expected: str) -> OptionError:
    """An option whose value has the right type and cannot be used."""
    return OptionError(f"fxquant option {name!r} must be {expected}, got {value!r}.")


def unknown_scheme(name: str, known: Iterable[str]) -> OptionError:
    """A scheme that is not registered."""
    return OptionError(f"unknown quantization scheme {name!r}: the schemes are {listed(known)}.")


def smoothing_needs_a_graph(scheme: str, name: str) -> OptionError:
    """A scheme with smoothing where only modules are seen."""
    return OptionError(
        f"quantize_ cannot use the scheme {scheme!r} for {name!r}: it moves scales into what makes "
        f"the activation, which only a compile sees; use torch.compile(model, backend='fxquant', "
        f"options={{'scheme': {scheme!r}, ...}})."
    )
