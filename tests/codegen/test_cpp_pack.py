"""Printed packing kernels against torch code: the same bits, on every instruction set here."""

from __future__ import annotations

import ctypes
import functools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fxquant.codegen.cpp.isa import ISAS
from fxquant.codegen.cpp.pack import can_pack, render_pack
from fxquant.formats import Encoding, native
from fxquant.formats.bits import packed_size
from fxquant.formats.blocks import block_grid, run_length
from fxquant.formats.codebooks import get_codebook, thresholds
from fxquant.formats.encode import FLOATS, _Work
from fxquant.formats.encoding import MAX_BLOCK, MIN_BLOCK
from fxquant.runtime import toolchain
from tests.codegen.cpp_harness import vector_isas

BFLOAT16, FLOAT16, FLOAT32 = torch.bfloat16, torch.float16, torch.float32
RUNNABLE = vector_isas()
UNEVEN = tuple(((i * 37) % 16 - 7.3) ** 3 / 700 for i in range(16))
# Every form of a kernel, and every dtype with forms that read it differently.
KERNELS = [
    (Encoding(4, "nf4"), BFLOAT16),
    (Encoding(4, "fp4"), FLOAT32),
    (Encoding(4, UNEVEN, (1, -1)), FLOAT32),
    (Encoding(2, "nf2"), FLOAT16),
    (Encoding(8, "e4m3"), FLOAT32),
    (Encoding(8, "dynamic8"), FLOAT32),
    (Encoding(8), BFLOAT16),
    (Encoding(2, full_range=True), FLOAT16),
    (Encoding(4, zero_point=True), FLOAT32),
]
kernels = pytest.mark.parametrize(("encoding", "dtype"), KERNELS, ids=str)
isas = pytest.mark.parametrize("isa", RUNNABLE)


@functools.cache
def built(encoding: Encoding, dtype: torch.dtype, isa: str):
    chain = toolchain.Toolchain(toolchain.compiler(), ISAS[isa], openmp=True)
    source = render_pack(encoding, dtype, ISAS[isa])
    function = ctypes.CDLL(str(toolchain.build(chain, "pack", source))).fxquant_pack
    int64, pointer = ctypes.c_int64, ctypes.c_void_p
    function.argtypes = [pointer, int64, int64, int64, pointer, pointer, ctypes.c_int]
    function.restype = None
    return function


def with_block(encoding: Encoding, block: tuple[int, ...]) -> Encoding:
    return Encoding(**{**vars(encoding), "block": block})


def check(kernel, x: torch.Tensor, encoding: Encoding, *, threads: int = 1) -> None:
    """Runs torch code and the kernel, and wants the same bytes."""
    expected = _Work(x, encoding)
    width = run_length(expected.grid)
    assert width is not None
    runs = expected._runs(width)
    registered = native.set_encoder(None)
    try:
        expected.run()
    finally:
        native.set_encoder(registered)
    # Whatever the kernel does not write shows, and so does what it writes beyond.
    codes = torch.full((len(expected.packed) + 64,), 0xA5, dtype=torch.uint8)
    peaks = torch.full((expected.peaks.numel() + 16,), -7.0)
    kernel(
        runs.x.data_ptr(),
        *(runs.blocks, runs.width, runs.rest),
        *(codes.data_ptr(), peaks.data_ptr()),
        threads,
    )
    found = peaks[:-16].view(expected.peaks.shape)
    assert found.numpy().tobytes() == expected.peaks.numpy().tobytes()
    assert torch.equal(codes[:-64], expected.packed)
    assert bool((codes[-64:] == 0xA5).all())
    assert bool((peaks[-16:] == -7.0).all())


def values(kind: str, count: int, seed: int, encoding: Encoding, dtype: torch.dtype):
    """Numbers of a kind that decides something."""
    draw = torch.Generator().manual_seed(seed)
    normal = torch.randn(count, generator=draw)
    limit = torch.finfo(dtype).max
    if kind in {"midpoints", "scaled midpoints"}:
        # Midpoints and their neighbours in blocks whose peak is a power of two, so that they are
        # met exactly, or is any number: then products with its reciprocal differ from quotients.
        largest = 2 ** (encoding.bits - 1) - 1
        points = torch.arange(-largest + 0.5, largest) / largest
        if not encoding.is_uniform:
            points = torch.tensor(thresholds(get_codebook(encoding.levels)).midpoints)
        towards = torch.tensor([-2.0, 0.0, 2.0])
        around = torch.cat([points, torch.nextafter(points[:, None], towards).view(-1)])
        numbers = around[torch.randint(len(around), (count,), generator=draw)]
        numbers[::15] = 1.0
        power = 2.0 ** int(torch.randint(-6, 6, (), generator=draw))
        numbers *= power if kind == "midpoints" else torch.rand((), generator=draw) + 0.1
    elif kind == "tiny":
        numbers = normal * 10.0 ** (-46 + 9 * torch.rand((), generator=draw))
        numbers = numbers if dtype != FLOAT16 else normal * 2.0**-20
    elif kind == "huge":
        numbers = (normal * limit).clamp(-limit, limit)
    elif kind == "zeros":
        numbers = torch.where(normal.abs() < 1.5, 0.0 * normal, normal)
    elif kind == "one-sided":
        numbers = normal.abs() + 0.1
    else:
        numbers = normal * 0.05
    return numbers.clamp(-limit, limit).to(dtype)


KINDS = ["normal", "midpoints", "scaled midpoints", "tiny", "huge", "zeros", "one-sided"]


@isas
@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_the_same_bits_as_torch_code(isa, data) -> None:
    encoding, dtype = data.draw(st.sampled_from(KERNELS))
    kernel = built(encoding, dtype, isa)
    shape = (data.draw(st.integers(1, 40)), data.draw(st.integers(1, 300)))
    block = (1, -1)
    if encoding.is_flat:
        powers = st.integers(int(math.log2(MIN_BLOCK)), int(math.log2(MAX_BLOCK)))
        block = data.draw(st.one_of(st.just((-1,)), powers.map(lambda power: (2**power,))))
    kind, seed = data.draw(st.sampled_from(KINDS)), data.draw(st.integers(0, 2**31))
    x = values(kind, math.prod(shape), seed, encoding, dtype).view(shape)
    check(kernel, x, with_block(encoding, block), threads=data.draw(st.sampled_from([1, 2])))


@isas
@pytest.mark.parametrize(
    ("encoding", "dtype"), [case for case in KERNELS if case[1] != FLOAT32], ids=str
)
def test_every_16_bit_number_against_a_peak_of_one(encoding, dtype, isa) -> None:
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    small = every[every.float().abs() <= 1.0]
    small = small[: len(small) // 63 * 63].view(-1, 63)
    x = torch.cat([torch.ones(len(small), 1, dtype=dtype), small], dim=1)
    check(built(encoding, dtype, isa), x, encoding)
    assert int(x.float().abs().amax(1).unique()) == 1
    finite = every[every.float().isfinite()]
    assert len(finite) in {2**16 - 2**8, 2**16 - 2**11}
    check(built(encoding, dtype, isa), finite, encoding)


@isas
@kernels
def test_every_short_length(encoding, dtype, isa) -> None:
    kernel = built(encoding, dtype, isa)
    for count in [*range(1, 70), 127, 128, 129, 4095]:
        x = values("normal", count, count, encoding, dtype)
        if encoding.is_flat:
            for short in ((16,), (32,)):
                check(kernel, x, with_block(encoding, short))
            check(kernel, x, encoding)
        else:
            check(kernel, x.view(1, -1), encoding)


@isas
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_channels_that_share_bytes_and_blocks_longer_than_a_piece(isa, threads) -> None:
    channels = Encoding(4, UNEVEN, (1, -1))
    kernel = built(channels, FLOAT32, isa)
    for shape in ((3, 300001), (70000, 3), (1001, 77), (5, 2, 13), (300, 1), (999, 8), (77, 32)):
        x = values("normal", math.prod(shape), 0, channels, FLOAT32).view(shape)
        check(kernel, x, channels, threads=threads)
    whole = Encoding(4, "nf4", (-1,))
    kernel = built(Encoding(4, "nf4"), BFLOAT16, isa)
    for count in (262144, 262145, 700001):
        check(kernel, values("normal", count, 0, whole, BFLOAT16), whole, threads=threads)


@isas
@kernels
@pytest.mark.parametrize("bad", [math.nan, -math.nan, math.inf, -math.inf])
def test_what_is_not_finite_shows_in_the_peaks_of_its_block(encoding, dtype, isa, bad) -> None:
    kernel = built(encoding, dtype, isa)
    flat = encoding.is_flat
    for at in (0, 1, 63, 64, 100, 191, 192, 199):
        x = values("normal", 200, 0, encoding, dtype)
        x[at] = bad
        grid = block_grid(Encoding(8, block=(64,) if flat else (1, -1)), (4, 50))
        blocks, width = divmod(200, run_length(grid))[0], run_length(grid)
        count, rows = grid.count, 2 if encoding.full_range or encoding.zero_point else 1
        peaks = torch.zeros(rows, count)
        codes = torch.zeros(packed_size(200, encoding.bits), dtype=torch.uint8)
        rest = 200 - blocks * width
        kernel(x.data_ptr(), blocks, width, rest, codes.data_ptr(), peaks.data_ptr(), 2)
        finite = torch.isfinite(peaks).all(0)
        assert finite.tolist() == [at // width != block for block in range(count)]


def test_what_cannot_be_printed() -> None:
    assert not can_pack(Encoding(8, clip=0.99), BFLOAT16)
    assert not can_pack(Encoding(8), torch.float64)
    assert not can_pack(Encoding(2, (-3e38, 0.0, 3e38, 3.4e38)), FLOAT32)
    assert can_pack(Encoding(2, (-3e38, 0.0, 1e38, 2e38)), FLOAT32)
    for dtype in FLOATS:
        assert can_pack(Encoding(8, clip=1.0), dtype) == (dtype != torch.float64)


def test_intrinsics_are_those_of_the_instruction_set() -> None:
    sources = {isa: render_pack(Encoding(4, "nf4"), BFLOAT16, ISAS[isa]) for isa in ISAS}
    assert "_mm512_permutexvar_ps" in sources["avx512"]
    assert "_mm256_permutevar8x32_ps" in sources["avx2"]
    assert "_mm512" not in sources["avx2"]
    assert "immintrin" not in sources["portable"]
    assert "_mm" not in sources["portable"]
