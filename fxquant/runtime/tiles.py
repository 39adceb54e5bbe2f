"""Which tiles of a Triton product run for how many rows: tuned, or else by the cost model.

Results are kept a file for each kind of GPU, in the kernel cache; one of the same form that comes
with the package (``fxquant/tuned/<GPU>.json``) counts where the cache has none. They are found by
what is multiplied, whatever its name and epilogue.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import math
import re
import statistics
import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from fxquant.codegen import reference
from fxquant.codegen.indexing import WeightIndex
from fxquant.codegen.spec import KernelSpec
from fxquant.codegen.triton.gpu import Gpu
from fxquant.codegen.triton.plan import Plan, plan_for
from fxquant.codegen.triton.tiles import BUCKETS, CHUNKED, Tile
from fxquant.progress import bar
from fxquant.runtime import cache, tuning

LOG = logging.getLogger("fxquant.tuning")
SHIPPED = Path(__file__).parent.parent / "tuned"
LIMIT_S = 40.0
"""For one product, builds included: no tile is begun later."""

_CALLS = 7
_EMPTIED = 32
"""Times that the cache is emptied before a call: a millisecond on an H100."""

_LEAST_GAIN = 0.02
"""A tile that is no more than this faster than the one before it by the cost model is not it."""

_LARGEST_ERROR = 0.05
"""Of results to those of the reference, in Frobenius norms; a tile beyond computes something else.

Sums of bfloat16 products and int8 activations stay below a hundredth.
"""

Variants = dict[int, Tile]


def use(module: ModuleType, spec: KernelSpec, gpu: Gpu) -> None:
    """Sets the tiles that were tuned for this product on this GPU, if any were."""
    stored = _stored(gpu).get(_key(spec))
    if stored is None:
        return
    _set(module, _chosen(plan_for(spec, WeightIndex.of(spec.weight), gpu), stored))
    LOG.info("kernel %s has tiles as tuned", spec.name)


def _chosen(found: Plan, stored: Mapping[str, Any]) -> Variants:
    """The stored tiles, where they are candidates; rows below the first of them have that, too."""
    tiles: Variants = {}
    least = min((most for most in found.variants if str(most) in stored), default=0)
    candidates: list[Tile] = []  # those for more rows serve fewer, too
    for most, own in sorted(found.variants.items(), reverse=True):
        candidates = [*own, *candidates]
        if most >= least:
            wanted = stored.get(str(most))
            tiles[most] = next((t for t in candidates if _entry(t) == wanted), own[0])
    return dict(sorted(tiles.items()))


def remark(module: ModuleType) -> str:
    """From how many rows on the weight is decoded for another product, or ``""``."""
    fewer = 0
    for most, (_, constants, _) in module.VARIANTS.items():
        if CHUNKED in constants:
            return f"dequantize + torch.mm from {fewer + 1} rows on"
        fewer = most
    return ""


def is_tuned(spec: KernelSpec, gpu: Gpu) -> bool:
    """Whether there are results for all numbers of rows of a product."""
    stored = _stored(gpu).get(_key(spec), {})
    found = plan_for(spec, WeightIndex.of(spec.weight), gpu)
    return all(str(most) in stored for most in found.variants)


def tune(module: ModuleType, spec: KernelSpec, gpu: Gpu, device: torch.device) -> None:
    """Times the tiles that the cost model thinks best, where that was not done, and keeps what won.

    Takes some seconds for each number of rows, most of them to build kernels. Nothing else should
    run on the GPU meanwhile.

    Args:
        module: The printed kernel; runs the tiles that won from now on.
        spec: What it computes.
        gpu: The device, described.
        device: The device.
    """
    found = plan_for(spec, WeightIndex.of(spec.weight), gpu)
    stored = _stored(gpu).get(_key(spec), {})
    untimed = [most for most in found.variants if str(most) not in stored]
    if not untimed:
        return
    weight = [part.to(device) for part in tuning.random_weight(spec)]
    trial = _Trial(
        module, spec, weight, device, torch.zeros(gpu.cache_bytes // 2, dtype=torch.int32)
    )
    tiles = trial.best(found, _chosen(found, stored), untimed)
    entries = {str(most): _entry(tile) for most, tile in tiles.items()}
    _set(module, _chosen(found, {**stored, **entries}))
    _keep(spec, gpu, entries)
    LOG.info("kernel %s has tiles tuned now: %s", spec.name, tiles)


def each(
    module: ModuleType, spec: KernelSpec, gpu: Gpu, rows: int, call: Callable[[], object]
) -> None:
    """Calls something with every tile for some rows in the place of the chosen one."""
    found, before = plan_for(spec, WeightIndex.of(spec.weight), gpu), dict(module.VARIANTS)
    most = next((most for most in found.variants if rows <= most), max(found.variants))
    entries = [variant(module, tile) for tile in found.variants[most]]
    try:
        for entry in entries:
            module.VARIANTS.clear()
            module.VARIANTS[most] = entry
            with contextlib.suppress(Exception):  # what cannot be built, tuning passes over
                call()
    finally:
        module.VARIANTS.clear()
        module.VARIANTS.update(before)


class _Trial:
    """Times tiles of one product.

    Args:
        module: The printed kernel.
        spec: What it computes.
        weight: Stored tensors.
        device: Where they lie.
        buffer: As large as takes everything else out of the cache.
    """

    def __init__(
        self,
        module: ModuleType,
        spec: KernelSpec,
        weight: list[Tensor],
        device: torch.device,
        buffer: Tensor,
    ) -> None:
        self.module, self.spec, self.weight, self.device = module, spec, weight, device
        self._buffer = buffer.to(device) if device.type == "cuda" else buffer[:1]
        self._deadline = time.perf_counter() + LIMIT_S

    def best(self, found: Plan, known: Variants, untimed: Collection[int]) -> Variants:
        """The quickest tile for each number of rows; the one that is `known` where time is over.

        Few rows whose first tile is that of more rows have the one that is known by then, instead.
        """
        chosen, more = dict(known), BUCKETS[0]
        first = found.variants[more][0]
        with bar(Console(stderr=True)) as progress:
            count = sum(len(found.variants[most]) for most in untimed)
            task = progress.add_task(f"tuning {self.spec.name}", total=count)
            for most in sorted(untimed, key=lambda most: (most != more, most)):
                tiles = found.variants[most]
                if most < more and tiles[0] == first:
                    tiles = (chosen[more], *tiles[1:])
                chosen[most] = self._best_of(most, tiles, lambda: progress.advance(task))
        return {most: chosen[most] for most in untimed}

    def _best_of(self, most: int, tiles: tuple[Tile, ...], done: Callable[[], None]) -> Tile:
        if len(tiles) == 1:
            done()
            return tiles[0]
        spec = self.spec
        rows = most * (spec.weight.batch or 1) if spec.grouped else most
        batch = [] if spec.batch is None else [spec.batch]
        shape = (*batch, rows, spec.weight.k)
        x = torch.randn(shape, device=self.device) * 20
        dtype = getattr(torch, spec.x_dtype)
        x = x.round().clamp(-127, 127).to(dtype) if spec.is_quantized else (x / 20).to(dtype)
        extra = [value.to(self.device) for value in operands(spec, rows)]
        right = _first(reference.run(spec, x, self.weight, extra))
        best, least = tiles[0], math.inf
        for tile in tiles:
            if time.perf_counter() < self._deadline:
                entry = variant(self.module, tile)
                self.module.VARIANTS.clear()  # one for more rows would come first
                self.module.VARIANTS[most] = entry
                seconds = self._seconds(lambda: self.module.run(x, self.weight, extra), right, tile)
                if seconds < least * (1 - _LEAST_GAIN):
                    best, least = tile, seconds
            done()
        return best

    def _seconds(self, run: Callable[[], Any], right: Tensor, tile: Tile) -> float:
        """The median of some calls, infinite for what cannot be built or computes nonsense."""
        try:
            result = _first(run())
        except Exception as error:  # noqa: BLE001 - of any kind, from Triton and the driver
            LOG.warning("kernel %s: tile %s cannot run: %s", self.spec.name, tile, error)
            return math.inf
        wanted = right.float()
        apart = float((result.float() - wanted).norm() / wanted.norm().clamp(min=1e-30))
        if not apart <= _LARGEST_ERROR:
            LOG.warning("kernel %s: tile %s is wrong by %.3g", self.spec.name, tile, apart)
            return math.inf
        return statistics.median(self._once(run) for _ in range(_CALLS))

    def _once(self, run: Callable[[], Any]) -> float:
        if self.device.type != "cuda":
            start = time.perf_counter()
            run()
            return time.perf_counter() - start
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        # The host runs ahead meanwhile, so that the device never waits for it: launching takes
        # longer than emptying the cache once, and longer than most products. By reading: what is
        # written would go back to memory while the product runs.
        for _ in range(_EMPTIED):
            self._buffer.max()
        before.record()
        run()
        after.record()
        after.synchronize()
        return float(before.elapsed_time(after)) / 1e3


def _first(result: Tensor | list[Tensor] | tuple[Tensor, ...]) -> Tensor:
    return result if isinstance(result, Tensor) else result[0]


def operands(spec: KernelSpec, rows: int) -> list[Tensor]:
    """Operands behind the activation, ones and zeros, as a call with so many rows takes them."""
    weight = spec.weight
    sizes = {"e": spec.batch or weight.batch or 1, "m": rows, "n": weight.n}
    found = [
        torch.ones([sizes[axis] for axis in operand.dims], dtype=getattr(torch, operand.dtype))
        for operand in spec.epilogue.operands
    ]
    if spec.outliers is not None and spec.outliers.columns is not None:
        count = spec.outliers.columns
        batch = [] if weight.batch is None else [weight.batch]
        shape = [*batch, weight.n, count]
        apart = torch.zeros(shape, dtype=getattr(torch, spec.outliers.dtype))
        found += [torch.arange(count, dtype=torch.int32), apart]
    if spec.is_quantized:
        found.append(torch.ones((rows,) if spec.batch is None else (spec.batch, rows)))
    if spec.grouped:
        experts = weight.batch or 1
        ends = [rows * (number + 1) // experts for number in range(experts)]
        found.append(torch.tensor(ends, dtype=torch.int32))
    return found


def variant(module: ModuleType, tile: Tile) -> tuple[Any, Any, Any]:
    """An entry of a module's ``VARIANTS``."""
    kernel = getattr(module, f"{_printed_name(module)}_{tile.kernel}")
    return kernel, tile.constants(), tile.options()


def _printed_name(module: ModuleType) -> str:
    """Kernels may be called after the model, not after the spec."""
    kernel, *_ = next(iter(module.VARIANTS.values()))
    return str(kernel.__name__).rpartition("_")[0]


def _set(module: ModuleType, tiles: Variants) -> None:
    found = {most: variant(module, tile) for most, tile in tiles.items()}
    module.VARIANTS.clear()
    module.VARIANTS.update(found)


# --- the files ------------------------------------------------------------------------------


def _key(spec: KernelSpec) -> str:
    """A product without its name and epilogue."""
    found = json.loads(spec.to_json())
    for name in ("name", "epilogue", "out_dtype"):
        found.pop(name, None)
    return json.dumps(found, sort_keys=True)


def _entry(tile: Tile) -> dict[str, Any]:
    return {name: size for name, size in dataclasses.asdict(tile).items() if size is not None}


def path(gpu: Gpu) -> Path:
    """The file with the results of a GPU."""
    return cache.root() / "triton" / _file(gpu)


def _file(gpu: Gpu) -> str:
    return f"tuned-{re.sub(r'[^A-Za-z0-9]+', '-', gpu.name)}.json"


def write_table(gpu: Gpu, folder: Path) -> Path:
    """Writes all results for a GPU into a folder, those that come with the package among them.

    Args:
        gpu: The device, described.
        folder: Made if need be.

    Returns:
        The file.

    Raises:
        OSError: It cannot be written.
    """
    found = json.dumps(_stored(gpu), indent=1)
    folder.mkdir(parents=True, exist_ok=True)
    cache.write_atomically(folder / _file(gpu), found)
    return folder / _file(gpu)


def _stored(gpu: Gpu) -> dict[str, Any]:
    """Entries of tiles by number of rows, by product: the user's before those of the package."""
    found = _read(SHIPPED / _file(gpu))
    for product, entries in _read(path(gpu)).items():
        found[product] = {**found.get(product, {}), **entries}
    return found


def _read(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        return {product: dict(entries) for product, entries in found.items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        LOG.warning("results of tuning %s cannot be read (%s): they are not used", file, error)
        return {}


def _keep(spec: KernelSpec, gpu: Gpu, entries: Mapping[str, Any]) -> None:
    file, product = path(gpu), _key(spec)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        before = _read(file)
        before[product] = {**before.get(product, {}), **entries}
        text = json.dumps(before, indent=1)
        cache.write_atomically(file, text)
    except OSError as error:
        LOG.warning("what tuning found cannot be written to %s: %s", file, error)
