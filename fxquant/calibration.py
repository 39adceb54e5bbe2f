"""`Calibration`: statistics of the activations that go into each product.

They are kept by the product's weight: as long as the process lives that calibrated, by the
parameter itself, whatever path it is seen at; from a file, by its name in the model.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from fxquant import errors, tensorfile
from fxquant.formats import anchor_of

SAMPLE = 4096
"""Tokens whose maxima are kept, at most."""
_SITES = "fxquant.calibration"


@dataclass(frozen=True, eq=False)
class SiteStats:
    """What went into one product: an activation of `tokens` rows of k channels.

    The rows of all batches count, and of batched weights those of every matrix.

    Attributes:
        amax: ``[k]`` float32: ``max |x_j|`` of each channel.
        low: The smallest element.
        high: The largest element.
        token_amax: Sorted float32: the rows' maxima ``max_j |x_j|``, all of them up to `SAMPLE`
            rows, else those of a random sample of rows, the same in every run.
        tokens: Number of rows.
        moments: ``[k, k]`` float32, the sum of ``x xT`` over the rows, or None.
    """

    amax: Tensor
    low: float
    high: float
    token_amax: Tensor
    tokens: int
    moments: Tensor | None = None

    def merged(self, other: SiteStats) -> SiteStats:
        """The statistics over the rows of both.

        All but `token_amax` are what one run over all rows gives (`moments` up to the rounding of
        a sum). Of more than `SAMPLE` rows the two samples give parts in proportion to their rows,
        spread evenly over their ranks.
        """
        moments = None
        if self.moments is not None and other.moments is not None:
            moments = self.moments + other.moments
        return SiteStats(
            amax=torch.maximum(self.amax, other.amax),
            low=min(self.low, other.low),
            high=max(self.high, other.high),
            token_amax=_merged_samples(self, other),
            tokens=self.tokens + other.tokens,
            moments=moments,
        )


def _merged_samples(a: SiteStats, b: SiteStats) -> Tensor:
    total = a.tokens + b.tokens
    if total <= SAMPLE:
        return torch.cat([a.token_amax, b.token_amax]).sort().values
    from_a = round(SAMPLE * a.tokens / total)
    parts = [_thinned(a.token_amax, from_a), _thinned(b.token_amax, SAMPLE - from_a)]
    return torch.cat(parts).sort().values


def _thinned(sample: Tensor, count: int) -> Tensor:
    """As many of a sorted sample, in the middle of equal shares of its ranks."""
    places = ((torch.arange(count, dtype=torch.float64) + 0.5) * len(sample) / max(count, 1)).long()
    return sample[places]


class Calibration:
    """Statistics of a model's products; equal and hashed by content.

    Args:
        stats: By the weight's name in the model. Tied weights have several.
        parameters: The weights themselves, which are held weakly.
    """

    def __init__(
        self,
        stats: Mapping[str, SiteStats],
        parameters: Iterable[tuple[Tensor, SiteStats]] = (),
    ) -> None:
        self.stats = dict(stats)
        self._by_parameter: WeakIdKeyDictionary = WeakIdKeyDictionary()
        for parameter, found in parameters:
            self._by_parameter[anchor_of(parameter)] = found
        self._digest = ""

    def of(self, parameter: Tensor, name: str) -> SiteStats | None:
        """The statistics of the product with a weight, or None.

        Args:
            parameter: The weight: looked for first.
            name: Its path. A model that is compiled block by block knows only the last part of
                it; that is enough where one name alone ends so.
        """
        found: SiteStats | None = self._by_parameter.get(anchor_of(parameter))
        name = plain_name(name)
        if found is not None or name in self.stats:
            return found or self.stats[name]
        ends = [full for full in list(self.stats) if full.endswith(f".{name}")]
        return self.stats[ends[0]] if len(ends) == 1 else None

    def require(self, parameter: Tensor, name: str, k: int) -> SiteStats:
        """The statistics of the product with a weight.

        Args:
            parameter: The weight.
            name: Its path.
            k: Channels of its activation.

        Raises:
            CalibrationError: There are none, or of another number of channels.
        """
        found = self.of(parameter, name)
        if found is None:
            raise errors.no_statistics(name, len(self.stats))
        if len(found.amax) != k:
            raise errors.wrong_channels(name, len(found.amax), k)
        return found

    def merge(self, other: Calibration) -> Calibration:
        """The calibration over the batches of both, as in ``first | second``.

        `SiteStats.merged` says how. Weights that one of them alone knows are kept.

        Raises:
            CalibrationError: A weight has another number of channels in the other.
        """
        both: dict[tuple[int, int], SiteStats] = {}

        def merged(name: str, a: SiteStats | None, b: SiteStats | None) -> SiteStats:
            if a is None or b is None:
                return a or b  # type: ignore[return-value]
            if len(a.amax) != len(b.amax):
                raise errors.wrong_channels(name, len(b.amax), len(a.amax))
            # Tied names go on to share one set of statistics.
            key = (id(a), id(b))
            if key not in both:
                both[key] = a.merged(b)
            return both[key]

        names = [*self.stats, *(name for name in other.stats if name not in self.stats)]
        out = Calibration({n: merged(n, self.stats.get(n), other.stats.get(n)) for n in names})
        mine, others = self._by_parameter, other._by_parameter
        for anchor in [*mine.keys(), *(a for a in others.keys() if a not in mine)]:  # noqa: SIM118
            out._by_parameter[anchor] = merged("a weight", mine.get(anchor), others.get(anchor))
        return out

    def __or__(self, other: Calibration) -> Calibration:
        return self.merge(other)

    def update(self, other: Calibration) -> None:
        """Takes over another's statistics, in place of its own for the same weights.

        For a calibration that grows as graphs run: its hash changes with it.
        """
        self.stats.update(other.stats)
        for anchor, found in list(other._by_parameter.items()):
            self._by_parameter[anchor] = found
        self._digest = ""

    @property
    def digest(self) -> str:
        """A hash of names and statistics, as hexadecimal text."""
        if not self._digest:
            state = hashlib.sha256()
            for name in sorted(self.stats):
                found = self.stats[name]
                state.update(f"{name}\0{found.tokens}\0{found.low!r}\0{found.high!r}\0".encode())
                for tensor in _tensors(found).values():
                    state.update(str(tuple(tensor.shape)).encode() + tensor.numpy().tobytes())
            self._digest = state.hexdigest()
        return self._digest

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Calibration) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def __repr__(self) -> str:
        return f"<Calibration of {len(self.stats)} weights>"

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a safetensors file, whole or not at all.

        Raises:
            FolderError: The file cannot be written.
        """
        tensors: dict[str, Tensor] = {}
        sites: dict[str, Any] = {}
        first: dict[int, str] = {}
        for name, found in self.stats.items():
            original = first.setdefault(id(found), name)
            if original != name:
                sites[name] = {"tied": original}
                continue
            sites[name] = {"tokens": found.tokens, "low": found.low, "high": found.high}
            tensors.update({f"{name}.{kind}": t for kind, t in _tensors(found).items()})
        tensorfile.write(Path(path), tensors, {"format": "pt", _SITES: json.dumps(sites)})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Calibration:
        """Reads what `save` wrote.

        Raises:
            CheckpointError: The file is missing, cut short, damaged, or holds something else.
        """
        tensors, metadata = tensorfile.read(Path(path))
        if _SITES not in metadata:
            raise errors.no_calibration_file(path)
        try:
            sites = dict(json.loads(metadata[_SITES]))
        except (ValueError, TypeError) as cause:
            raise errors.damaged_entry(path, _SITES, cause) from cause
        stats: dict[str, SiteStats] = {}
        name = ""
        try:
            for name, site in sites.items():
                tied = site.get("tied")
                stats[name] = stats[tied] if tied else _from_tensors(tensors, name, site)
        except (KeyError, AttributeError, TypeError, ValueError) as cause:
            raise errors.damaged_entry(path, name, cause) from cause
        return cls(stats)


def plain_name(name: str) -> str:
    """A parameter's path without the wrappers that `torch.compile` puts around modules."""
    return name.replace("_orig_mod.", "")


def _tensors(found: SiteStats) -> dict[str, Tensor]:
    tensors = {"amax": found.amax, "token_amax": found.token_amax}
    return tensors if found.moments is None else {**tensors, "moments": found.moments}


def _from_tensors(tensors: Mapping[str, Tensor], name: str, site: Mapping[str, Any]) -> SiteStats:
    """One site of a file.

    Raises:
        KeyError: A part is missing.
        ValueError: The parts do not fit together.
    """
    found = SiteStats(
        amax=tensors[f"{name}.amax"],
        low=float(site["low"]),
        high=float(site["high"]),
        token_amax=tensors[f"{name}.token_amax"],
        tokens=int(site["tokens"]),
        moments=tensors.get(f"{name}.moments"),
    )
    k = len(found.amax)
    shapes = {"amax": (k,), "token_amax": (min(found.tokens, SAMPLE),), "moments": (k, k)}
    for kind, tensor in _tensors(found).items():
        if tensor.shape != shapes[kind] or tensor.dtype != torch.float32:
            msg = f"{kind} is {tensor.dtype} of shape {tuple(tensor.shape)}"
            raise ValueError(msg)
    if not (math.isfinite(found.low + found.high) and found.amax.isfinite().all()):
        msg = "its statistics hold NaN or Inf"
        raise ValueError(msg)
    return found
