"""The tile unit: results are those of vectors, memory is kept to, and threads are left as found."""

from __future__ import annotations

import ctypes
import faulthandler
import functools
import mmap
import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fxquant.codegen import Header, KernelSpec, bounds, cpp, reference
from fxquant.codegen.cpp.isa import AMX, AVX512
from fxquant.codegen.cpp.plan import SUPER_ROWS, Plan
from fxquant.codegen.spec import Outliers
from fxquant.formats import Encoding
from fxquant.runtime import toolchain
from tests.bounds import assert_close_within
from tests.codegen import harness
from tests.codegen.cpp_harness import FEW, MANY, Kernel
from tests.codegen.cpp_specs import CHANNELS, NF4, spec

SPECS = {
    one.name: one
    for one in (
        spec("levels", NF4, (80, 448), compute="bfloat16"),
        # More inputs than a second-level cache holds of many rows.
        spec("channels_bf16", CHANNELS, (33, 10304), compute="bfloat16"),
        spec("short_blocks", Encoding(4, block=(1, 32)), (70, 192), compute="bfloat16"),
        spec("shorter_blocks", Encoding(4, block=(1, 16)), (70, 192), compute="bfloat16"),
        spec("zeros", Encoding(4, block=(1, 64), zero_point=True), (64, 320), compute="bfloat16"),
        spec("nf4_int8", NF4, (80, 704), compute="int8", x="float32"),
        spec("groups", Encoding(8, block=(1, 128)), (80, 448), compute="int8", x="bfloat16"),
        spec(
            "zeros_int8",
            Encoding(4, block=(1, 64), zero_point=True),
            (64, 320),
            compute="int8",
            x="float32",
        ),
        # Longer than what is decoded at a time.
        spec("channels", CHANNELS, (70, 1344), compute="int8", x="float32"),
        spec("int4_channels", Encoding(4, block=(1, -1)), (64, 1344), compute="int8", x="float32"),
        spec("long_groups", Encoding(8, block=(1, 1024)), (64, 2112), compute="int8", x="float32"),
        spec(
            "outliers",
            CHANNELS,
            (2, 66, 128),
            compute="int8",
            x="float16",
            outliers=Outliers("float16", threshold=2.5),
        ),
    )
}
ROWS = (0, 1, 2, 15, 16, 17, 31, 32, 33, 49, 64, 69, 97)  # on both sides of `Plan.span_rows`
SPANS = {"levels", "channels_bf16", "short_blocks", "zeros", "nf4_int8", "zeros_int8"}
NARROW = {"nf4_int8", "zeros_int8", "groups", "outliers"}
ALSO_WITHOUT = ("nf4_int8", "groups", "channels")

needs_tiles = pytest.mark.skipif(
    not toolchain.runs(AMX) or toolchain.compiler() is None, reason="there is no tile unit here"
)


@functools.cache
def kernels() -> dict[tuple[str, str], Kernel]:
    """All kernels, with and without the unit, built side by side."""
    isas = [replace(isa, few_heights=(2, 1), many_heights=(2,)) for isa in (AMX, AVX512)]
    keys = [(name, isas[0]) for name in SPECS] + [(name, isas[1]) for name in ALSO_WITHOUT]
    with ThreadPoolExecutor(2) as pool:
        built = pool.map(lambda key: Kernel(SPECS[key[0]], key[1]), keys)
        return {(name, isa.name): kernel for (name, isa), kernel in zip(keys, built, strict=True)}


def operands(one: KernelSpec, rows: int) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    tensors = harness.stored(one.weight.encoding, one.weight.shape)
    return harness.activation(one, rows), tensors, harness.operands(one, rows)


@pytest.mark.parametrize("name", SPECS)
def test_the_text_goes_the_way_that_is_meant(name: str) -> None:
    plan = Plan(SPECS[name], AMX)
    text = cpp.render(SPECS[name], Header(), AMX)
    assert plan.uses_tiles
    assert ("tdpbf16ps" in text) == (plan.path == "bf16") != ("tdpbs" in text)
    assert ("tdpbsud" in text) == (plan.path == "int8" and plan.encoding.bits == 8)
    assert ("span_tile(" in text) == plan.has_spans == (name in SPANS)
    assert ("narrow_tile(" in text) == (name in NARROW)
    assert ("wide_tile(" in text) == (name not in NARROW)
    assert "tile_load" not in cpp.render(SPECS[name], Header(), AVX512)


def test_rows_that_are_worked_off_at_a_time_stay_near() -> None:
    assert Plan(SPECS["channels_bf16"], AMX).super_rows == 64 < ROWS[-1]
    assert Plan(SPECS["levels"], AMX).super_rows == SUPER_ROWS
    assert Plan(SPECS["channels_bf16"], AVX512).super_rows == SUPER_ROWS
    # 5/4 MiB of rows of 8 KiB.
    assert Plan(spec("wide", NF4, (64, 4096), compute="bfloat16"), AMX).super_rows == 160


def test_what_the_unit_does_not_multiply_is_the_text_of_vectors() -> None:
    for one in (
        spec("short_f32", Encoding(4, "nf4", (32,)), (70, 192)),
        spec("short_int8", Encoding(8, block=(1, 32)), (70, 192), compute="int8", x="float32"),
    ):
        assert not Plan(one, AMX).uses_tiles
        assert not Plan(one, AMX).has_thirds
        vectors = replace(AVX512, looks_ahead=AMX.looks_ahead)
        text = cpp.render(one, Header(), AMX).replace("// --- amx: ", "// --- avx512: ")
        assert text == cpp.render(one, Header(), vectors)


@needs_tiles
@pytest.mark.parametrize("name", SPECS)
def test_every_number_of_rows(name: str) -> None:
    """Within the bounds; of integers bit for bit what vectors give."""
    one, kernel = SPECS[name], kernels()[name, "amx"]
    plan = Plan(one, AMX)
    plain = kernels().get((name, "avx512"))
    for rows in ROWS:
        x, tensors, extra = operands(one, rows)
        prepared = kernel.prepare(tensors)
        got = [kernel.run(prepared, x, extra, MANY, threads) for threads in (1, 2)]
        assert torch.equal(*got), "the number of threads is seen in the result"
        want, bound = reference.run(one, x, tensors, extra), bounds.allowed(one, x, tensors, extra)
        assert_close_within(got[0], want, bound)
        if plain is not None:
            vectors = plain.run(plain.prepare(tensors), x, extra, MANY)
            assert torch.equal(got[0], vectors)
        if plan.is_regular:
            assert_close_within(kernel.run(prepared, x, extra, FEW), want, bound)


class Guarded:
    """A copy of memory behind which there is none.

    Args:
        address: Of what is copied.
        size: Its bytes.
    """

    def __init__(self, address: int, size: int) -> None:
        libc, page = ctypes.CDLL(None, use_errno=True), mmap.PAGESIZE
        pages = -(-size // page) * page
        self._memory = mmap.mmap(-1, pages + page)
        start = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        self.address = start + pages - size
        ctypes.memmove(self.address, address, size)
        behind = libc.mprotect(ctypes.c_void_p(start + pages), ctypes.c_size_t(page), 0)
        assert behind == 0, os.strerror(ctypes.get_errno())


@needs_tiles
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("short", [0, 64])
@pytest.mark.parametrize("name", ["levels", "groups", "channels"])
def test_nothing_behind_the_operands_is_touched(name: str, short: int) -> None:
    check_memory(kernels()[name, "amx"], short)


def check_memory(kernel: Kernel, short: int) -> None:
    """In a process of its own, which ends where memory that is a line too short is missed."""
    one, library = kernel.spec, kernel._library
    inputs = [operands(one, rows) for rows in (1, 16, 19, 70)]
    child = os.fork()
    if child == 0:
        faulthandler.disable()
        try:
            for x, tensors, _ in inputs:
                block = kernel.prepare(tensors, restores=False)[0]
                size = library.fxquant_scratch_bytes(len(x), 1)
                room = Guarded(ctypes.addressof((ctypes.c_char * size)()), size)
                weight = Guarded(block.address, library.fxquant_prepared_bytes() - short)
                out = torch.empty(len(x), one.weight.n, dtype=getattr(torch, one.out_dtype))
                result = Guarded(out.data_ptr(), out.nbytes)
                given = Guarded(x.data_ptr(), x.nbytes - short)
                library.fxquant_run(
                    *(weight.address, given.address, 0, one.weight.k, 1, len(x), result.address),
                    *(None, room.address, 1, MANY),
                )
            os._exit(0)
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    if short:
        assert os.WIFSIGNALED(status)
        assert os.WTERMSIG(status) == signal.SIGSEGV
    else:
        assert status == 0


@needs_tiles
def test_others_find_the_unit_as_they_left_it() -> None:
    """oneDNN multiplies with it in the same threads, before and after, in several at once."""
    one, kernel = SPECS["levels"], kernels()["levels", "amx"]
    dense = torch.randn(256, 256, generator=torch.Generator().manual_seed(0)).bfloat16()
    product = dense @ dense
    inputs = [operands(one, rows) for rows in (5, 19, 70, 97)]
    prepared = [kernel.prepare(tensors) for _, tensors, _ in inputs]
    ready = [kernel.run(p, x, e, MANY) for p, (x, _, e) in zip(prepared, inputs, strict=True)]
    barrier = threading.Barrier(len(inputs))

    def work(number: int) -> None:
        x, _, extra = inputs[number]
        barrier.wait()
        for turn in range(30):
            got = kernel.run(prepared[number], x, extra, MANY, 1 + turn % 2)
            assert torch.equal(got, ready[number])
            assert torch.equal(dense @ dense, product)

    with ThreadPoolExecutor(len(inputs)) as pool:
        list(pool.map(work, range(len(inputs))))


@needs_tiles
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_child_may_use_the_unit() -> None:
    one, kernel = SPECS["nf4_int8"], kernels()["nf4_int8", "amx"]
    x, tensors, extra = operands(one, 40)
    prepared = kernel.prepare(tensors)
    want = kernel.run(prepared, x, extra, MANY, 2)
    child = os.fork()
    if child == 0:
        try:
            os._exit(0 if torch.equal(kernel.run(prepared, x, extra, MANY, 1), want) else 1)
        finally:
            os._exit(2)
    assert os.waitpid(child, 0)[1] == 0
