"""``options={"verify": True}``: kernels are checked on their first real inputs.

A launch whose target ends in `VERIFIED` goes through a `Checked` runner. The first call of each
size (numbers of rows up to a power of two: that is how far variants of a kernel go) is
compared with the enclosure of the right results (`fxquant.codegen.bounds`), codes of rows bit for
bit. A kernel that fails is set aside: torch computes this call and all later ones, one log line
says so, and a file that reproduces the failure is written.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
import textwrap
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from fxquant import errors, tensorfile
from fxquant._version import __version__
from fxquant.codegen import Spec, bounds, quantize, row_bounds
from fxquant.codegen.intervals import Interval
from fxquant.codegen.quantize import QuantizeSpec
from fxquant.runtime import cache

LOG = logging.getLogger("fxquant.verify")
VERIFIED = ":verify"
"""What a target of a launch ends in, where its kernel is to be checked."""
_MOST_PRODUCTS = 1 << 33
_LEAST_ROWS, _MOST_ROWS = 16, 512
"""How many rows of an input are looked at: as many as keep a check at about a second."""


@dataclass(frozen=True)
class Failure:
    """What a check found.

    Attributes:
        error: The largest distance from the right result, infinite where one of two is NaN.
        allowed: How far off that one may have been.
    """

    error: float
    allowed: float


class Printed(Protocol):
    """A kernel's text and whom it serves."""

    @property
    def target(self) -> str:
        """What it is printed for."""

    @property
    def source(self) -> str:
        """The text."""

    @property
    def spec(self) -> Spec:
        """What it computes."""

    @property
    def modules(self) -> tuple[str, ...]:
        """Paths of the modules whose work it does."""


def named(target: str, *, wanted: bool) -> str:
    """What a launch calls a target, according to whether its kernels are to be checked."""
    return target + VERIFIED if wanted and target != "torch" else target


_set_aside: dict[tuple[str, str], str] = {}
"""Kernels that were found to be wrong, by spec and target, each with the error in a clause."""


def set_aside_because(spec: str, target: str) -> str:
    """Why a kernel was set aside, in a clause, or ``""``."""
    return _set_aside.get((spec, target), "")


def checked(
    key: tuple[str, str],
    kernel: Callable[..., Any],
    instead: Callable[..., Any],
    printed: Callable[[], Printed],
) -> Callable[..., Any]:
    """A kernel's runner that checks it.

    Args:
        key: The spec as JSON, and the target.
        kernel: Runs the kernel.
        instead: Computes the same with torch.
        printed: Prints the kernel once more.
    """
    if key in _set_aside or key[1] == "torch":
        return instead
    return Checked(key, kernel, instead, printed)


class Checked:
    """Checks the first call of each size; see `checked`."""

    def __init__(
        self,
        key: tuple[str, str],
        kernel: Callable[..., Any],
        instead: Callable[..., Any],
        printed: Callable[[], Printed],
    ) -> None:
        self._key, self._runner, self._instead, self._printed = key, kernel, instead, printed
        self.__self__ = getattr(kernel, "__self__", None)  # as of the method that it stands for
        self._spec = printed().spec
        self._sizes: set[int] = set()
        self._lock = threading.Lock()

    def __call__(self, *operands: Any) -> Any:
        """Computes the spec."""
        size = max(0, rows_of(self._spec, operands) - 1).bit_length()
        if size in self._sizes:
            return self._runner(*operands)
        if not _may_check(operands):
            _tell_unverified(self._spec.name)
            return self._runner(*operands)
        result = self._runner(*operands)
        with self._lock, torch.no_grad():
            if size in self._sizes:  # another thread was faster
                return self._runner(*operands)
            failure = check(self._spec, operands, result)
            if failure is None:
                self._sizes.add(size)
                return result
            self._give_up(failure, operands)
        return self._runner(*operands)

    def _give_up(self, failure: Failure, operands: Sequence[Any]) -> None:
        printed = self._printed()
        try:
            where: object = write(printed, operands)
        except errors.FxquantError as error:
            where = f"not written ({error})"
        said = errors.wrong_kernel(
            (printed.target, self._spec.name, printed.modules),
            (failure.error, failure.allowed),
            where,
        )
        LOG.error("%s", said)
        _set_aside[self._key] = said.reason
        self._runner = self._instead
        self._sizes.update(range(64))


def check(spec: Spec, operands: Sequence[Any], result: Any) -> Failure | None:
    """Compares what a kernel gave with what is right; None if it is."""
    if isinstance(spec, QuantizeSpec):
        return _check_codes(spec, operands, result)
    x, weight, extra = operands
    results = list(result) if isinstance(result, (list, tuple)) else [result]
    batch, n, k = spec.weight.sizes
    per_row = batch * n * k * spec.weights
    most = min(_MOST_ROWS, max(_LEAST_ROWS, _MOST_PRODUCTS // per_row))
    chosen = torch.tensor(bounds.spread(rows_of(spec, operands), most), device=x.device)
    found: Failure | None = None
    for got, enclosure in zip(
        results, bounds.enclosures(spec, x, weight, extra, chosen), strict=True
    ):
        shape = (-1, n) if spec.batch is None else (batch, -1, n)
        failure = _outside(enclosure, got.reshape(shape).index_select(-2, chosen))
        if failure is not None and (found is None or failure.error > found.error):
            found = failure
    return found


def _check_codes(spec: QuantizeSpec, operands: Sequence[Any], result: Any) -> Failure | None:
    if spec.prologue is not None:
        return _check_rows(spec, operands, result)
    codes, amax = quantize.run(spec, *operands)
    apart = (codes.int() - result[0].int()).abs().flatten()
    other = result[1].reshape(amax.shape)
    unequal = (amax != other) & ~(amax.isnan() & other.isnan())
    if not apart.any() and not unequal.any():
        return None
    worst = float(apart.max()) if apart.any() else float((amax - other).abs()[unequal].max())
    return Failure(worst, 0.0)


def _check_rows(spec: QuantizeSpec, operands: Sequence[Any], result: Any) -> Failure | None:
    given, limit = operands
    found = row_bounds.enclosures(spec, given, limit, result[1])
    pairs = zip(result, found, strict=True)
    failures = [_outside(e, got.reshape(e.low.shape)) for got, e in pairs]
    return next((failure for failure in failures if failure is not None), None)


def _outside(enclosure: Interval, got: Tensor) -> Failure | None:
    excess = enclosure.excess(got)
    if not excess.numel() or float(excess.max()) == 0:
        return None
    place = int(excess.argmax())
    half = float(((enclosure.high - enclosure.low) / 2).flatten()[place])
    return Failure(float(excess.flatten()[place]) + half, half)


def rows_of(spec: Spec, operands: Sequence[Any]) -> int:
    """The number of rows of a call; of a batch, of each of its matrices."""
    if not isinstance(spec, QuantizeSpec):
        return int(operands[0].numel()) // (spec.weight.k * (spec.batch or 1))
    if spec.prologue is None:
        return int(operands[0].numel()) // spec.k
    dims = [operand.dims for operand in spec.prologue.operands]
    return int(operands[0][dims.index("mk")].numel()) // spec.k


@functools.lru_cache(maxsize=1024)
def _tell_unverified(name: str) -> None:
    LOG.warning("%s is not verified: a CUDA graph is being captured", name)


def _may_check(operands: Sequence[Any]) -> bool:
    """Whether work may be done beside the launch, and be waited for."""
    return _device_of(operands).type != "cuda" or not torch.cuda.is_current_stream_capturing()


# --- files that reproduce a failure -----------------------------------------------------------


_folders: dict[str, Path] = {}


def write_to(folder: Path, specs: Iterable[str]) -> None:
    """Sets where files about the kernels of some specs go; by default below the kernel cache."""
    _folders.update(dict.fromkeys(specs, folder))


def write(asked: Printed, operands: Sequence[Any]) -> Path:
    """Writes a script, the operands and the kernel's text side by side.

    Returns:
        The script. Running it checks the kernel that is printed by then: it prints the largest
        error and exits with 1 while it is wrong.

    Raises:
        FolderError: The folder cannot be written.
    """
    text = asked.spec.to_json()
    folder = _folders.get(text, cache.root() / "repro")
    key = hashlib.sha256(f"{asked.target} {text}".encode()).hexdigest()[:8]
    name = f"repro_{asked.target}_{asked.spec.name}_{key}"
    tensors: dict[str, Tensor] = {}
    shapes = [_stored(tensors, f"{place}", value) for place, value in enumerate(operands)]
    suffix = ".cpp" if asked.target == "cpp" else ".kernel.py"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        cache.write_atomically(folder / f"{name}{suffix}", asked.source)
        tensorfile.write(folder / f"{name}.safetensors", tensors, {"fxquant": __version__})
        script = _script(asked, f"{name}.safetensors", shapes, str(_device_of(operands)))
        cache.write_atomically(folder / f"{name}.py", script)
    except OSError as error:
        raise errors.unwritable_folder("repro", folder, cache.ENVIRONMENT, error) from error
    return folder / f"{name}.py"


def _stored(tensors: dict[str, Tensor], name: str, value: Any) -> Any:
    """Takes in an operand's elements in the order of its memory; gives what finds them again."""
    if not isinstance(value, Tensor):
        return [_stored(tensors, f"{name}.{i}", inner) for i, inner in enumerate(value)]
    pairs = zip(value.shape, value.stride(), strict=True)
    extent = 1 + sum((size - 1) * step for size, step in pairs) if value.numel() else 0
    flat = torch.as_strided(value.detach(), (extent,), (1,))
    tensors[name] = flat.cpu().clone()
    return (name, tuple(value.shape), tuple(value.stride()))


def _device_of(operands: Sequence[Any]) -> torch.device:
    first = operands[0]
    return torch.device((first if isinstance(first, Tensor) else first[0]).device.type)


def _script(asked: Printed, file: str, shapes: list[Any], device: str) -> str:
    spec = json.dumps(json.loads(asked.spec.to_json()), indent=1)
    interpreted = os.environ.get("TRITON_INTERPRET") == "1" and asked.target == "triton"
    modules = ", ".join(asked.modules) or "not known"
    return "\n".join(
        [
            f'"""The kernel {asked.spec.name} for target {asked.target!r} gave a wrong result.',
            "",
            *textwrap.wrap(f"Modules: {modules}", 98, subsequent_indent="  "),
            "Run this file: it prints the largest error, and exits with 1 while the kernel is",
            "wrong. Its text at the time lies beside it.",
            '"""',
            "",
            "import os",
            "import sys",
            "from pathlib import Path",
            "",
            *(['os.environ["TRITON_INTERPRET"] = "1"', ""] if interpreted else []),
            "from fxquant.runtime import replay",
            "",
            f'SPEC = """\n{spec}\n"""',
            f"OPERANDS = {shapes!r}",
            f'TENSORS = Path(__file__).with_name("{file}")',
            "",
            'if __name__ == "__main__":',
            f'    sys.exit(replay.main(SPEC, "{asked.target}", TENSORS, OPERANDS, "{device}"))',
            "",
        ]
    )
