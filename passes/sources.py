"""Where the inputs of a rewritten graph come from.

An input is described by the positions of the parameters that it is made of, since one graph serves
many parameters (`fxquant.runtime.graph` says why): whoever runs the graph makes it of what arrives
there. A packed parameter is the plain case. A `Rule` is the general one: any function of several
parameters, such as a weight times a scale that all consumers of its activation agree on.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from fxquant.formats import Encoding, PackedWeight

Remember = Callable[[Hashable, Sequence[Tensor], Callable[[], Any]], Any]
"""``(key, parameters, make) -> what make gives``, made again only when a parameter has changed."""


@dataclass(frozen=True)
class Tools:
    """What a rule may use.

    Attributes:
        pack: ``(tensor, encoding, name) -> PackedWeight``.
        remember: Keeps results for as long as the parameters that they were made of.
    """

    pack: Callable[[Tensor, Encoding, str], PackedWeight]
    remember: Remember


class Rule(Protocol):
    """How to make an input of parameters. It holds positions, never the parameters."""

    @property
    def indices(self) -> tuple[int, ...]:
        """Positions among Dynamo's inputs of the parameters that it reads, each once."""

    def compute(self, inputs: Sequence[Any], tools: Tools) -> Any:
        """The result: a tensor or a `PackedWeight`, or a part of other rules' results.

        Args:
            inputs: Dynamo's.
            tools: For packing and for results that several rules share.
        """

    def key(self, number: Mapping[int, int]) -> Hashable:
        """What tells it from other rules on the same parameters.

        Args:
            number: What to call each position, so that equal rules of two graphs have equal keys.
        """


def evaluate(rule: Rule, inputs: Sequence[Any], tools: Tools) -> Any:
    """What a rule gives, computed once for the parameters that are there."""
    number = {index: position for position, index in enumerate(rule.indices)}
    key = key_of(rule, number)
    parameters = [inputs[index] for index in rule.indices]
    return tools.remember(key, parameters, lambda: rule.compute(inputs, tools))


def key_of(rule: Rule, number: Mapping[int, int]) -> Hashable:
    """What tells a rule from all others on the same parameters; `number` as in `Rule.key`."""
    return (type(rule).__name__, rule.key(number))


@dataclass(frozen=True, eq=False)
class PackedPart:
    """One tensor of a packed parameter.

    Attributes:
        index: The parameter's position among Dynamo's inputs.
        part: Position of the tensor among ``Encoding.parts``.
        tensor: The tensor that was packed at compile time.
        encoding: How the parameter is encoded.
        name: The parameter's name.
    """

    index: int
    part: int
    tensor: Tensor
    encoding: Encoding
    name: str


@dataclass(frozen=True, eq=False)
class DerivedPart:
    """A tensor that a rule makes, or one tensor of what it packs.

    Attributes:
        rule: How it is made.
        part: Position of the tensor among ``Encoding.parts``; 0 where the rule gives a tensor.
        tensor: The tensor at compile time.
        packs: Of which parameter the rule packs the values, with the encoding and the name; None
            where it does not pack.
    """

    rule: Rule
    part: int
    tensor: Tensor
    packs: tuple[int, Encoding, str] | None = None
