"""The rules of smoothing: scales, and what is made with them, as functions of the parameters.

Nothing here holds a parameter: a rule names positions among Dynamo's inputs, and is evaluated for
whatever arrives there. What several rules need is computed once (`sources.evaluate`).
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fxquant.calibration import Calibration, SiteStats
from fxquant.codegen.spec import WeightOperand
from fxquant.formats import Encoding, PackedWeight
from fxquant.passes.alpha import best_alpha
from fxquant.passes.sources import Rule, Tools, evaluate, key_of
from fxquant.schemes.recipe import AUTO, Activation

LEAST = 1e-5
"""What a scale is not below."""


@dataclass(frozen=True)
class Consumer:
    """A weight that multiplies a smoothed activation.

    Attributes:
        index: Its position among Dynamo's inputs.
        name: Its path.
        operand: Where the logical weight lies in it.
        encoding: How a weight ``[n, k]`` is packed.
        activation: How the activation is quantized, or None.
    """

    index: int
    name: str
    operand: WeightOperand
    encoding: Encoding
    activation: Activation | None = None

    def matrix(self, inputs: Sequence[Any]) -> Tensor:
        """The weight, ``[e, n, k]``, in its own dtype."""
        dense = inputs[self.index].detach().contiguous()
        where = self.operand
        return torch.as_strided(dense, where.sizes, where.strides, where.offset)


@dataclass(frozen=True, eq=False)
class Migration:
    """SmoothQuant's scale (arXiv:2211.10438, equation 4), joint over the consumers.

    ``s_j = max|X_j| ** alpha / max|W_j| ** (1 - alpha)``; 1 where either maximum is 0, and no
    less than `LEAST`. The maximum of W is over the rows of all consumers. Gives float32 ``[k]``.

    Attributes:
        consumers: The weights.
        alpha: From 0 to 1, or ``"auto"``.
        calibration: Says ``max|X_j|``, for the parameters that arrive.
        label: Channels with equal labels get their largest scale; None where each has its own.
    """

    consumers: tuple[Consumer, ...]
    alpha: float | str
    calibration: Calibration
    label: tuple[int, ...] | None = None

    @property
    def indices(self) -> tuple[int, ...]:
        """The consumers' positions."""
        return tuple(dict.fromkeys(consumer.index for consumer in self.consumers))

    def compute(self, inputs: Sequence[Any], tools: Tools) -> Tensor:  # noqa: ARG002
        """The scales.

        Raises:
            CalibrationError: A consumer has no statistics, or of another width.
        """
        stats = self.stats(inputs)
        weights = [consumer.matrix(inputs) for consumer in self.consumers]
        device = weights[0].device
        x = torch.stack([found.amax for found in stats]).amin(0).to(device)
        peaks = [torch.maximum(w.amax((0, 1)), -w.amin((0, 1))).float() for w in weights]
        w = torch.stack(peaks).amax(0)
        if self.alpha != AUTO:
            return self._tied(migrated(x, w, float(self.alpha)))
        choices = [
            (weight, consumer.encoding, consumer.activation)
            for weight, consumer in zip(weights, self.consumers, strict=True)
        ]
        alpha = best_alpha(lambda a: self._tied(migrated(x, w, a)), choices, stats[0])
        return self._tied(migrated(x, w, alpha))

    def stats(self, inputs: Sequence[Any]) -> list[SiteStats]:
        """The consumers' statistics.

        Raises:
            CalibrationError: One has none, or of another width.
        """
        return [
            self.calibration.require(inputs[c.index], c.name, c.operand.k) for c in self.consumers
        ]

    def _tied(self, scale: Tensor) -> Tensor:
        if self.label is None:
            return scale
        label = torch.tensor(self.label, device=scale.device)
        return torch.zeros_like(scale).scatter_reduce(0, label, scale, "amax")[label]

    def key(self, number: Mapping[int, int]) -> Hashable:
        """See `Rule.key`."""
        consumers = tuple(
            (number[c.index], c.name, c.operand, c.encoding, c.activation) for c in self.consumers
        )
        return (consumers, self.alpha, self.calibration.digest, self.label)


def migrated(x: Tensor, w: Tensor, alpha: float) -> Tensor:
    """Equation 4 of SmoothQuant, for the largest magnitudes of each channel of X and W."""
    scale = x.pow(alpha) / w.pow(1 - alpha)
    return torch.where((x > 0) & (w > 0), scale, 1.0).clamp(min=LEAST)


@dataclass(frozen=True, eq=False)
class Gamma:
    """Outlier Suppression's scale (arXiv:2209.13325, section 4.1): the weight of a norm.

    ``s_j = |gamma_j|``, 1 where that is 0, and no less than `LEAST`. Gives float32 ``[k]``.

    Attributes:
        index: The norm's weight.
        place: For each channel, the number of its element; -1 where it has none and s is 1.
    """

    index: int
    place: tuple[int, ...]

    @property
    def indices(self) -> tuple[int, ...]:
        """The norm's weight."""
        return (self.index,)

    def compute(self, inputs: Sequence[Any], tools: Tools) -> Tensor:  # noqa: ARG002
        """The scales."""
        gamma = inputs[self.index].detach().float().abs().reshape(-1)
        place = torch.tensor(self.place, device=gamma.device)
        scale = torch.where(place < 0, 1.0, gamma[place.clamp(min=0)])
        return torch.where(scale > 0, scale, 1.0).clamp(min=LEAST)

    def key(self, number: Mapping[int, int]) -> Hashable:
        """See `Rule.key`."""
        return (number[self.index], self.place)


@dataclass(frozen=True, eq=False)
class Spread:
    """A scale on the positions of a value: ``scale[pattern]``, 1 where the pattern is -1.

    Attributes:
        scale: The rule that gives ``[k]``.
        pattern: int64, of any shape.
        inverse: Gives 1 / scale instead.
    """

    scale: Rule
    pattern: Tensor
    inverse: bool = False

    @property
    def indices(self) -> tuple[int, ...]:
        """The scale's."""
        return self.scale.indices

    def compute(self, inputs: Sequence[Any], tools: Tools) -> Tensor:
        """float32, of the pattern's shape."""
        scale = evaluate(self.scale, inputs, tools)
        pattern = self.pattern.to(scale.device)
        out = torch.where(pattern < 0, 1.0, scale[pattern.clamp(min=0)])
        return out.reciprocal() if self.inverse else out

    def key(self, number: Mapping[int, int]) -> Hashable:
        """See `Rule.key`."""
        return (key_of(self.scale, number), _frozen(self.pattern), self.inverse)


@dataclass(frozen=True, eq=False)
class Folded:
    """A vector parameter divided by scales: the weight or bias of a norm, the bias of a product.

    Attributes:
        index: The vector.
        spreads: Scales on its elements.
    """

    index: int
    spreads: tuple[Spread, ...]

    @property
    def indices(self) -> tuple[int, ...]:
        """The vector and what the scales are made of."""
        return _united((self.index,), *(spread.indices for spread in self.spreads))

    def compute(self, inputs: Sequence[Any], tools: Tools) -> Tensor:
        """In the vector's dtype and shape."""
        vector = inputs[self.index].detach()
        out = vector.float()
        for spread in self.spreads:
            out = out / spread.compute(inputs, tools).to(out.device)
        return out.to(vector.dtype)

    def key(self, number: Mapping[int, int]) -> Hashable:
        """See `Rule.key`."""
        return (number[self.index], tuple(spread.key(number) for spread in self.spreads))


@dataclass(frozen=True, eq=False)
class Part:
    """The part of a parameter that one product reads, and its scales.

    Attributes:
        operand: Where it lies.
        columns: A rule for ``[k]`` that the inputs' columns are multiplied by, or None.
        rows: Scales ``[n]`` that the outputs' rows are divided by.
    """

    operand: WeightOperand
    columns: Rule | None
    rows: tuple[Spread, ...] = ()


@dataclass(frozen=True, eq=False)
class ScaledWeight:
    """A parameter times its columns' scales, by its rows', packed.

    Attributes:
        index: The parameter.
        name: Its path.
        encoding: How it is packed.
        parts: What is scaled in it; parts have no element in common.
    """

    index: int
    name: str
    encoding: Encoding
    parts: tuple[Part, ...]

    @property
    def indices(self) -> tuple[int, ...]:
        """The parameter and what the scales are made of."""
        rules = [part.columns for part in self.parts if part.columns is not None]
        rows = [spread for part in self.parts for spread in part.rows]
        return _united((self.index,), *(rule.indices for rule in [*rules, *rows]))

    def compute(self, inputs: Sequence[Any], tools: Tools) -> PackedWeight:
        """Packed.

        Raises:
            WeightError: The parameter cannot be encoded.
            CalibrationError: See `Migration`.
        """
        return tools.pack(self.dense(inputs, tools), self.encoding, self.name)

    def dense(self, inputs: Sequence[Any], tools: Tools) -> Tensor:
        """What is packed: float32, contiguous, of the parameter's shape."""
        parameter = inputs[self.index].detach()
        dense = torch.empty_like(
            parameter, dtype=torch.float32, memory_format=torch.contiguous_format
        )
        dense.copy_(parameter)
        for part in self.parts:
            where = part.operand
            matrix = torch.as_strided(dense, where.sizes, where.strides, where.offset)
            if part.columns is not None:
                matrix.mul_(evaluate(part.columns, inputs, tools).to(dense.device))
            for spread in part.rows:
                matrix.div_(spread.compute(inputs, tools).to(dense.device)[:, None])
        return dense

    def key(self, number: Mapping[int, int]) -> Hashable:
        """See `Rule.key`."""
        parts = tuple(
            (
                part.operand,
                None if part.columns is None else key_of(part.columns, number),
                tuple(spread.key(number) for spread in part.rows),
            )
            for part in self.parts
        )
        return (number[self.index], self.name, self.encoding, parts)


def _frozen(pattern: Tensor) -> Hashable:
    return (tuple(pattern.shape), tuple(pattern.flatten().tolist()))


def _united(*groups: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(dict.fromkeys(index for group in groups for index in group))
