"""The rules that go by calibration: limits of activations, and columns that stay in 16 bits.

As in `scales`, nothing here holds a parameter: statistics are looked up for whatever arrives.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fxquant.calibration import Calibration, SiteStats
from fxquant.codegen.spec import WeightOperand
from fxquant.formats import PackedWeight
from fxquant.passes.scales import ScaledWeight
from fxquant.passes.sources import Rule, Tools, evaluate, key_of

_QUANTILES = 64
_LEVELS = 127


@dataclass(frozen=True)
class Observed:
    """A product whose activation was observed.

    Attributes:
        index: Its weight's position among Dynamo's inputs.
        name: The weight's path.
        operand: Where the logical weight lies in it.
        calibration: Has the statistics.
        in_scale: What the activation's channels were divided by since, or None.
    """

    index: int
    name: str
    operand: WeightOperand
    calibration: Calibration
    in_scale: Rule | None = None

    @property
    def indices(self) -> tuple[int, ...]:
        """The weight, and what the scale is made of."""
        scale = () if self.in_scale is None else self.in_scale.indices
        return tuple(dict.fromkeys((self.index, *scale)))

    def stats(self, inputs: Sequence[Any]) -> SiteStats:
        """The statistics of what arrives.

        Raises:
            CalibrationError: There are none, or of another width.
        """
        return self.calibration.require(inputs[self.index], self.name, self.operand.k)

    def amax(self, inputs: Sequence[Any], tools: Tools) -> Tensor:
        """The largest magnitude of each channel, ``[k]`` float32."""
        amax = self.stats(inputs).amax.to(inputs[self.index].device)
        return amax if self.in_scale is None else amax / evaluate(self.in_scale, inputs, tools)

    def key(self, number: Mapping[int, int]) -> Hashable:
        """See `Rule.key`."""
        scale = self.in_scale
        scaled = None if scale is None else key_of(scale, number)
        return (number[self.index], self.name, self.operand, self.calibration.digest, scaled)


@dataclass(frozen=True, eq=False)
class Limit:
    """The magnitude that an activation saturates at, float32 ``[1]``.

    Static scales: the largest that was seen. Clipped ones: Outlier Suppression's token-wise
    clipping (arXiv:2209.13325, section 4.2): of the quantiles of the tokens' maxima, the one with
    the least expected error (`clipping_limit`). After a migration the tokens' maxima are taken to
    have shrunk as their largest has.

    Attributes:
        observed: A product of the activation.
        clipped: Whether scales are found at run time and only limited.
    """

    observed: Observed
    clipped: bool

    @property
    def indices(self) -> tuple[int, ...]:
        """The product's."""
        return self.observed.indices

    def compute(self, inputs: Sequence[Any], tools: Tools) -> Tensor:
        """The limit.

        Raises:
            CalibrationError: See `Observed.stats`.
        """
        peak = self.observed.amax(inputs, tools).amax()
        if not self.clipped:
            return peak.reshape(1)
        stats = self.observed.stats(inputs)
        before = stats.amax.amax().to(peak.device)
        shrunk = torch.where(before > 0, peak / before, 1.0)
        tokens = stats.token_amax.to(peak.device) * shrunk
        return clipping_limit(tokens, self.observed.operand.k).reshape(1)

    def key(self, number: Mapping[int, int]) -> Hashable:
        """See `Rule.key`."""
        return (self.observed.key(number), self.clipped)


def clipping_limit(tokens: Tensor, k: int) -> Tensor:
    """The limit c, among quantiles of the tokens' maxima a, with the least expected error.

    ``sum_a (a - min(a, c))**2 + k / 12 * (min(a, c) / 127)**2``: what is cut off a token's largest
    element, and what rounding with a step of ``min(a, c) / 127`` costs its k elements.

    Args:
        tokens: Maxima, float32, one or more.
        k: Elements of a token.
    """
    tokens = tokens.sort().values
    ranks = torch.linspace(0, len(tokens) - 1, _QUANTILES, device=tokens.device).round().long()
    limits = tokens[ranks]
    kept = torch.minimum(tokens[:, None], limits)
    error = (tokens[:, None] - kept).square() + k / 12 * (kept / _LEVELS).square()
    # Of equal errors the highest limit.
    best = error.sum(0).flip(0).argmin()
    return limits.flip(0)[best]


@dataclass(frozen=True, eq=False)
class ColumnNumbers:
    """The channels with the largest magnitudes, int32 ``[count]`` in ascending order.

    LLM.int8() with columns that are known: how many there are was settled when the first weight
    came; of another one the same number is taken, the largest ones.

    Attributes:
        observed: The products of the activation.
        count: How many.
    """

    observed: tuple[Observed, ...]
    count: int

    @property
    def indices(self) -> tuple[int, ...]:
        """The products'."""
        return tuple(dict.fromkeys(index for one in self.observed for index in one.indices))

    def compute(self, inputs: Sequence[Any], tools: Tools) -> Tensor:
        """The channels.

        Raises:
            CalibrationError: See `Observed.stats`.
        """
        found = self.amax(inputs, tools).topk(self.count).indices
        return found.sort().values.to(torch.int32)

    def amax(self, inputs: Sequence[Any], tools: Tools) -> Tensor:
        """The largest magnitude of each channel in any of the products, ``[k]`` float32."""
        return torch.stack([one.amax(inputs, tools) for one in self.observed]).amax(0)

    def key(self, number: Mapping[int, int]) -> Hashable:
        """See `Rule.key`."""
        return (tuple(one.key(number) for one in self.observed), self.count)


@dataclass(frozen=True, eq=False)
class ColumnWeights:
    """The weight of some channels in 16 bits, ``[n, count]``, or ``[e, n, count]`` with a batch.

    Attributes:
        observed: The product.
        numbers: The channels.
        dtype: Of the result.
        scaled: What scales are in the weight, of its columns and of its rows; None without any.
    """

    observed: Observed
    numbers: ColumnNumbers
    dtype: torch.dtype
    scaled: ScaledWeight | None = None

    @property
    def indices(self) -> tuple[int, ...]:
        """The product's, and what the scales are made of."""
        scales = () if self.scaled is None else self.scaled.indices
        return tuple(dict.fromkeys((*self.observed.indices, *self.numbers.indices, *scales)))

    def compute(self, inputs: Sequence[Any], tools: Tools) -> Tensor:
        """The weight, with its scales.

        Raises:
            CalibrationError: See `Observed.stats`.
        """
        observed = self.observed
        columns = evaluate(self.numbers, inputs, tools).long()
        value = inputs[observed.index]
        if self.scaled is not None:
            dense = self.scaled.dense(inputs, tools)
        else:
            dense = value.dequantize() if isinstance(value, PackedWeight) else value.detach()
        where = observed.operand
        matrix = torch.as_strided(dense.contiguous(), where.sizes, where.strides, where.offset)
        found = matrix.index_select(-1, columns)
        return (found if where.batch is not None else found[0]).to(self.dtype).contiguous()

    def key(self, number: Mapping[int, int]) -> Hashable:
        """See `Rule.key`."""
        scaled = None if self.scaled is None else key_of(self.scaled, number)
        return (self.observed.key(number), self.numbers.key(number), self.dtype, scaled)
