"""`Header`: what a printed kernel says on top of itself."""

from __future__ import annotations

import functools
import json
import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from fxquant.codegen.spec import KernelSpec
from fxquant.formats import Encoding

_MOST_PLACES = 4


class Describable(Protocol):
    """A spec of either kind."""

    @property
    def name(self) -> str:
        """What the kernel does, as an identifier."""

    def describe(self) -> str:
        """One line for people."""

    def to_json(self) -> str:
        """Canonical text."""


@dataclass(frozen=True)
class Header:
    """What a printed kernel says about where it is used; no part of the kernel's meaning.

    Attributes:
        modules: Paths of the modules whose products it computes.
        scheme: Name of the scheme.
        where: ``file:line`` of the model's source, of each module.
        work: What a call has to read and to do, in a few words.
    """

    modules: tuple[str, ...] = ()
    scheme: str = ""
    where: tuple[str, ...] = ()
    work: str = ""

    def comment(self, spec: Describable) -> str:
        """The docstring that a printed Python module starts with."""
        # With spaces, so that lines break between values and every name can be searched for.
        text = json.dumps(json.loads(spec.to_json()))
        wrap = functools.partial(textwrap.wrap, width=96, break_on_hyphens=False)
        lines = [
            f'"""{spec.name}.',
            "",
            *textwrap.wrap(f"{spec.describe()}.", 98),
            "",
            "Printed by fxquant. The spec, which fxquant.codegen.reference defines:",
            *wrap(text, initial_indent="  ", subsequent_indent="  "),
            "",
            *(_operands_of(spec) if isinstance(spec, KernelSpec) else ()),
        ]
        said = {
            "Scheme": (self.scheme,),
            "Modules": layers(self.modules),
            "Source": self.where[:_MOST_PLACES],
            "A call": (self.work,),
        }
        for title, values in said.items():
            if any(values):
                lines += wrap(f"{title}: {', '.join(values)}", subsequent_indent="  ")
        return "\n".join([*lines, '"""']).replace('\n\n"""', '\n"""')


def layers(modules: Sequence[str]) -> list[str]:
    """Paths, those of one module in many layers as one: ``layers.{0..23}.mlp.gate_proj``."""
    groups: dict[str, list[str]] = {}
    for path in modules:
        groups.setdefault(re.sub(r"\d+", "#", path, count=1), []).append(path)
    found = []
    for pattern, paths in groups.items():
        numbers = [int(re.search(r"\d+", path)[0]) for path in paths if "#" in pattern]  # type: ignore[index]
        if len(paths) > 2 and numbers == list(range(numbers[0], numbers[0] + len(paths))):
            found.append(pattern.replace("#", f"{{{numbers[0]}..{numbers[-1]}}}", 1))
        else:
            found += paths
    return found


def _operands_of(spec: KernelSpec) -> list[str]:
    """What a product's operands are, a line each."""
    weight = spec.weight
    lines = [f"Weight: {list(weight.shape)}, {_in_words(weight.encoding)}"]
    if spec.is_quantized:
        lines.append("Activation: int8, quantized before, with amax of every row")
    elif spec.compute_dtype == "int8":
        lines.append("Activation: rounded to int8, with a scale for every row")
    if spec.outliers is not None:
        lines.append(f"Outliers: {spec.outliers.describe()}")
    return lines


def _in_words(encoding: Encoding) -> str:
    """``4 bits nf4 in blocks of 64, scales 8 bits dynamic8 in blocks of 256``."""
    levels = encoding.levels if isinstance(encoding.levels, str) else "with levels of its own"
    block = "x".join("all" if size == -1 else str(size) for size in encoding.block)
    text = f"{encoding.bits} bits {levels} in blocks of {block}"
    return text if encoding.scale is None else f"{text}, scales {_in_words(encoding.scale)}"
