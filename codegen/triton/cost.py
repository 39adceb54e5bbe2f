"""What a tile costs: a roofline of memory, L2 cache, matrix unit and vector instructions.

One sympy expression for all tiles, specs and GPUs. It ranks tiles: what all of them do alike (the
epilogue, activations to int8) is left out. Within a program products wait for decoded weights, so
the two overlap only between programs of one processor. Memory is asked for as far ahead as the
pipeline is deep: a step takes at least the time of one load over the loads that are under way. That
is Little's law: enough programs, steps and stages have a bandwidth's bytes in flight.

The constants are those with which 361 tiles of 8192 x 8192 products, timed on an H100, come out
best: of these a time is off by a quarter on average, and the first tile takes 7 % longer than the
quickest. Products of floats did not wait for each step then, outliers were not gathered, and tiles
with scales in the weight were written by hand.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import sympy

from fxquant.codegen.spec import KernelSpec
from fxquant.codegen.triton.gpu import Gpu
from fxquant.codegen.triton.tiles import Form, Tile, is_stored, looks_up_pairs
from fxquant.codegen.work import stored_bytes
from fxquant.formats import levels

LAUNCH = 4e-6
"""Seconds that a further kernel takes, whatever it does: its start, first loads and end."""

_SCALE = 3.0
"""Vector instructions to scale a sum of one step: it is waited for, scaled and added."""

_PAIR = 2.0
"""The least that a weight takes which is looked up with its neighbour, in cycles of `_LANES`: both
are 8 bytes of shared memory, which gives 128 in one."""

_PAIR_ISSUED, _PAIR_ROW = 1.05, 0.67
"""The same for its instructions, and for those of each row: half of what machine code has."""

_PAIR_TABLE = 32 << 10
"""Bytes of shared memory that pairs of levels lie in."""

_SHARE = 0.75
"""Of the matrix unit's throughput, what the best products reach."""

_ALONE = 0.3
"""How much longer products take where nothing else runs around a program's barriers."""

_LANES = 64
"""Lanes of vector instructions that a processor works off in a cycle: bytes, shifts, logic.

CUDA's programming guide, "throughput of native arithmetic instructions"; four SIMDs of 16 on AMD.
"""

_LEAST_WARPS = 8  # two on every part of a processor that issues instructions
_MANY_SUMS = 128 * 128

_HIDING = 9
"""Warps of a processor from which on vector instructions do not wait for one another."""

_APART = 0.25
"""Of what could go on at the same time as what takes longest, the share that does not."""

_STEP = 85
"""Instructions of a warp around a step: addresses, barriers, the asynchronous copies."""

M, N, K, WEIGHTS, EXPERTS = sympy.symbols("m n k weights experts", integer=True, positive=True)
ROWS, BN, BK, SPLIT, WARPS, STAGES, RESIDENT = sympy.symbols(
    "rows bn bk split warps stages resident", integer=True, positive=True
)
BYTES, X_BYTES, DECODE, SCALE = sympy.symbols("bytes x_bytes decode scale", positive=True)
PROCESSORS, CLOCK, BANDWIDTH, CACHE, PRODUCTS, LATENCY, WARP = sympy.symbols(
    "processors clock bandwidth cache products latency warp", positive=True
)
_SYMBOLS = (
    M, N, K, WEIGHTS, EXPERTS, ROWS, BN, BK, SPLIT, WARPS, STAGES, RESIDENT, BYTES, X_BYTES,
    DECODE, SCALE, PROCESSORS, CLOCK, BANDWIDTH, CACHE, PRODUCTS, LATENCY, WARP,
)  # fmt: skip


def time() -> sympy.Expr:
    """Seconds of a tile's kernel, and of the one that adds its shares.

    `BYTES` is what a weight has in memory, `DECODE` what one takes of vector instructions, `SCALE`
    the same for the sum of one step.
    """
    tiles = sympy.ceiling(M / ROWS) * sympy.ceiling(N / BN) * EXPERTS
    busiest = sympy.ceiling(tiles * SPLIT / PROCESSORS)
    together = _least(RESIDENT, busiest)
    steps = sympy.ceiling(K / (BK * SPLIT))
    products = ROWS * BN * BK * steps * WEIGHTS / (PRODUCTS * _SHARE)
    products *= 1 + _ALONE * _most(0, 2 - together)
    vectors = BN * BK * DECODE * WEIGHTS + ROWS * BN * SCALE * WEIGHTS + _STEP * WARPS * WARP / 2
    hidden = _least(1, together * WARPS / _HIDING)
    vectors = vectors * steps / (_LANES * hidden)
    turns = sympy.ceiling(busiest / RESIDENT)
    compute = _most(busiest * products, busiest * vectors, turns * (products + vectors)) / CLOCK
    weight, x = N * K * WEIGHTS * EXPERTS * BYTES, M * K * EXPERTS * X_BYTES
    waiting = turns * steps * LATENCY / (STAGES - 1)
    memory = (weight + x) / BANDWIDTH
    again = weight * sympy.ceiling(M / ROWS) + x * sympy.ceiling(N / BN)
    shared = 4 * SPLIT * M * N * WEIGHTS * EXPERTS * _least(1, SPLIT - 1)
    added = _least(1, SPLIT - 1) * LAUNCH + 2 * shared / CACHE
    bounds = (compute, memory, again / CACHE, waiting)
    largest = _most(*bounds)
    return largest + _APART * (sum(bounds) - largest) + (1 + turns) * LATENCY + added


def decoded_time() -> sympy.Expr:
    """Seconds of decoding to memory `BN` outputs at a time, and of the vendor's products.

    They are taken to compute 128 x 128 tiles. `SCALE` is 1 where sums go through memory to an
    epilogue, `RESIDENT` 1 where a chunk stays in the cache.
    """
    chunks = sympy.ceiling(N / BN)
    moved = RESIDENT * 2 * BN * K / CACHE + (1 - RESIDENT) * 2 * BN * K / BANDWIDTH
    vectors = BN * K * DECODE / (_LANES * PROCESSORS * CLOCK)
    decoding = _most(BN * K * BYTES / BANDWIDTH + moved, vectors) + LAUNCH
    waves = sympy.ceiling(sympy.ceiling(M / 128) * sympy.ceiling(BN / 128) / PROCESSORS)
    product = waves * 128 * 128 * K / (PRODUCTS * CLOCK * _SHARE)
    reading = (M * K * X_BYTES + 2 * BN * K) / CACHE
    finish = SCALE * (8 * M * N / BANDWIDTH + LAUNCH)
    return WEIGHTS * chunks * (decoding + _most(product, reading) + LAUNCH) + WEIGHTS * finish


def _most(*values: sympy.Expr | int) -> sympy.Expr:
    # Unevaluated: sympy would take long to find out which is larger.
    return sympy.Max(*values, evaluate=False)


def _least(*values: sympy.Expr | int) -> sympy.Expr:
    return sympy.Min(*values, evaluate=False)


@functools.cache
def _compiled(kind: str) -> Callable[..., Any]:
    expression = decoded_time() if kind == "dequantize" else time()
    return sympy.lambdify(_SYMBOLS, expression, modules="math")


def seconds(spec: KernelSpec, form: Form, tile: Tile, gpu: Gpu, rows: int) -> float:
    """What a tile is reckoned to take, infinite for one that does not fit.

    Args:
        spec: The product.
        form: How it is computed.
        tile: How it is cut up.
        gpu: What it runs on.
        rows: Of the activation; of a batch or a group each matrix has so many.
    """
    weight, experts = spec.weight, spec.batch or spec.weight.batch or 1
    values = {
        M: rows, N: weight.n, K: weight.k, WEIGHTS: spec.weights, EXPERTS: experts,
        ROWS: tile.rows or 1, BN: tile.chunk or tile.n, BK: tile.k,
        SPLIT: tile.split, WARPS: tile.warps, STAGES: tile.stages,
        BYTES: stored_bytes(weight) / math.prod(weight.sizes),
        X_BYTES: 1 if spec.compute_dtype == "int8" else 4 if spec.x_dtype == "float32" else 2,
        PROCESSORS: gpu.processors, CLOCK: gpu.clock, BANDWIDTH: gpu.bandwidth, CACHE: gpu.cache,
        PRODUCTS: gpu.products[_multiplied(spec, form)], LATENCY: gpu.latency,
        WARP: gpu.processor.lanes,
    }  # fmt: skip
    if tile.kernel == "dequantize":
        values[DECODE], values[SCALE] = _decoding(spec, form, tile), float(not is_direct(spec))
        dense = 2 * tile.chunk * weight.k
        values[RESIDENT] = float(tile.chunk < weight.n and 2 * dense <= gpu.cache_bytes)
    else:
        registers, shared = needs(spec, form, tile)
        if not fits(spec, form, tile, gpu):
            return math.inf
        values[RESIDENT] = gpu.processor.resident(registers, shared, tile.warps)
        values[DECODE] = _decoding(spec, form, tile)
        values[SCALE] = _SCALE if _scales_sums(form, tile) else 0.0
    return float(_compiled(tile.kernel)(*(values[symbol] for symbol in _SYMBOLS)))


def is_direct(spec: KernelSpec) -> bool:
    """Whether the vendor's product is the result: nothing is to be done with its sums."""
    epilogue = spec.epilogue
    plain = not epilogue.nodes and epilogue.result == "%acc" and not epilogue.more
    return plain and spec.weights == 1 and spec.out_dtype == spec.compute_dtype


def fits(spec: KernelSpec, form: Form, tile: Tile, gpu: Gpu) -> bool:
    """Whether a tile can be built: registers without a spill, and shared memory.

    Only Hopper's products take operands from shared memory: elsewhere they need registers beside
    the sums, and so does a decoded weight beside more than 128 x 128 of them. Of 128 x 128 sums of
    decoded words Triton 3.7 makes Blackwell an empty kernel. Ampere's assembler spills rather than
    take more than 128 registers where outliers are found beside decoded weights.
    """
    registers, shared = needs(spec, form, tile)
    processor, sums = gpu.processor, tile.rows * tile.n
    if gpu.family != "sm_90" and sums * spec.weights > 96 * processor.lanes * tile.warps:
        return False
    if sums > _MANY_SUMS and not (gpu.family == "sm_90" and is_stored(spec)):
        return False
    if sums == _MANY_SUMS and form.words and gpu.family == "sm_100":
        return False
    crowded = gpu.family == "sm_80" and spec.outliers is not None and not is_stored(spec)
    most = 120 if crowded else 0.94 * processor.most_registers
    if registers > most or shared > processor.program_bytes:
        return False
    return processor.resident(registers, shared, tile.warps) * tile.warps >= _LEAST_WARPS


def needs(spec: KernelSpec, form: Form, tile: Tile) -> tuple[int, int]:
    """Registers of a lane and bytes of shared memory, as they are found in machine code.

    Sums, those of a step where they are scaled by themselves, decoded weights, the addresses of
    asynchronous copies (of two inputs for words, of 16 bytes else), and what else there is.
    """
    if looks_up_pairs(form, tile):
        return 66 + (8 + 3 * tile.rows) * tile.n * spec.weights, _PAIR_TABLE
    lanes, in_words = 32 * tile.warps, bool(form.words) and tile.kernel != "scaled"
    sums = tile.rows * tile.n * spec.weights * (2 if _scales_sums(form, tile) else 1)
    decoded = tile.n * tile.k * spec.weights // (2 if form.words else 1)
    copied = tile.rows * tile.k // (2 if in_words else 8)
    if not in_words:
        copied += (tile.rows if form.words else tile.n) * tile.k // 8
        sums += sums // 4  # turned into floats, or what the epilogue makes of them
    beside = 30 if spec.outliers is None else 46
    registers = beside + (sums + copied + (0 if is_stored(spec) else decoded)) // lanes
    codes = tile.n * tile.k * spec.weight.encoding.bits // 8 * spec.weights
    x_bytes = 1 if spec.compute_dtype == "int8" else 4 if spec.compute_dtype == "float32" else 2
    turned = 2 * tile.n * tile.k if tile.kernel == "scaled" else 0
    return registers, tile.stages * (codes + tile.rows * tile.k * x_bytes) + turned


def _scales_sums(form: Form, tile: Tile) -> bool:
    """Whether the sums of a step are scaled by themselves."""
    return form.scaling == "tile" and tile.kernel != "scaled"


def _multiplied(spec: KernelSpec, form: Form) -> str:
    """The dtype of the products, of integers with scales inside of a tile float32."""
    is_int8 = spec.compute_dtype == "int8"
    return "float32" if is_int8 and form.scaling == "elements" else spec.compute_dtype


def _decoding(spec: KernelSpec, form: Form, tile: Tile) -> float:
    """Vector instructions to decode one weight.

    With permutations and of plain int8: what makes an H100's times come out; else counted. Look-ups
    in a table wait for one another: 64 threads take some 7 cycles for their two codes each.
    """
    if looks_up_pairs(form, tile):
        return max(_PAIR, _PAIR_ISSUED + _PAIR_ROW * tile.rows)
    if form.words and tile.kernel != "dequantize":
        return {"prmt": 5.5, "table": 4.0, "choice": 20.0}[form.words]
    encoding = spec.weight.encoding
    if spec.compute_dtype == "int8":
        return 0.1 if is_stored(spec) else 5.0
    return 4.5 if levels(encoding) is None and encoding.bits == 8 else 13.0
