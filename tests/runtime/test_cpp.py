"""Calls of C++ kernels: any layout of x, weights repacked once and dropped, threads, forks."""

from __future__ import annotations

import gc
import os
import threading
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from fxquant import errors
from fxquant.runtime import cpp, memory
from tests.bounds import assert_close_within, product_bound
from tests.runtime import printed
from tests.runtime.printed import K, N


@pytest.fixture(params=printed.ENCODINGS)
def kernel(request: pytest.FixtureRequest) -> cpp.CppKernel:
    return printed.kernel(printed.ENCODINGS[request.param])


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def check(kernel: cpp.CppKernel, x: Tensor, weight: list[Tensor], dense: Tensor) -> None:
    out = kernel.run(x, weight, [printed.bias()])
    expected = x.double() @ dense.double().t() + printed.bias().double()
    bound = product_bound(x, dense, torch.float32, printed.bias(), scaled_apart=True)
    assert out.shape == (*x.shape[:-1], N)
    assert out.is_contiguous()
    assert_close_within(out, expected, bound)


class Preparing:
    """Counts how often a kernel repacks."""

    def __init__(self, kernel: cpp.CppKernel) -> None:
        self.count, self.inner = 0, kernel._prepare
        kernel._prepare = self

    def __call__(self, *args: object) -> None:
        self.count += 1
        self.inner(*args)


LAYOUTS = {
    "vector": lambda: torch.randn(K),
    "matrix": lambda: torch.randn(7, K),
    "three dimensions": lambda: torch.randn(2, 3, K),
    "every other row": lambda: torch.randn(14, K)[::2],
    "every other column": lambda: torch.randn(7, 2 * K)[:, ::2],
    "turned": lambda: torch.randn(K, 7).t(),
    "a slice of rows that collapse": lambda: torch.randn(2, 3, 2 * K)[:, :, K:],
    "rows that do not collapse": lambda: torch.randn(3, 2, K).transpose(0, 1),
    "one row for all": lambda: torch.randn(1, K).expand(5, K),
    "one row for some": lambda: torch.randn(2, 1, K).expand(2, 5, K),
    "unaligned": lambda: torch.randn(7 * K + 1)[1:].view(7, K),
    "no rows": lambda: torch.randn(0, K),
    "no rows, three dimensions": lambda: torch.randn(2, 0, K),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_of_x(layout: str, kernel: cpp.CppKernel, threads: int) -> None:
    packed = printed.weight(kernel)
    check(kernel, LAYOUTS[layout](), packed.tensors(), packed.dequantize())


def test_only_rows_that_do_not_collapse_are_copied() -> None:
    for layout, make in LAYOUTS.items():
        x = make()
        if x.numel():
            rows, _, _ = cpp.as_rows(x)
            copied = rows.data_ptr() != x.data_ptr()
            assert copied == (layout in ("rows that do not collapse", "one row for some"))


def test_operands_of_any_layout(kernel: cpp.CppKernel) -> None:
    packed, x = printed.weight(kernel), torch.randn(3, K)
    spread = torch.stack([printed.bias(), torch.zeros(N)], 1)[:, 0]
    assert not spread.is_contiguous()
    want = kernel.run(x, packed.tensors(), [printed.bias()])
    assert torch.equal(kernel.run(x, packed.tensors(), [spread]), want)


@pytest.mark.parametrize(
    ("x", "extra", "said"),
    [
        (
            torch.randn(3, K + 1),
            [torch.ones(N)],
            r"x must be float32 .*40\], got .*\[3, 41\]",
        ),
        (torch.randn(3, K).half(), [torch.ones(N)], "x must be float32 .*, got torch.float16"),
        (torch.empty(3, K, device="meta"), [torch.ones(N)], "on meta"),
        (torch.randn(3, K), [], "the number of operands must be 1, got 0"),
        (torch.randn(3, K), [torch.ones(N)] * 2, "the number of operands must be 1, got 2"),
        (torch.randn(3, K), [torch.ones(N - 1)], "operand 0 must be 24 elements of torch.float32"),
        (torch.randn(3, K), [torch.ones(N).half()], "operand 0 must be 24 .*, got torch.float16"),
    ],
)
def test_wrong_operands_are_refused_before_memory_is_read(
    x: Tensor, extra: list[Tensor], said: str, kernel: cpp.CppKernel
) -> None:
    with pytest.raises(errors.KernelError, match=f"printed: .*{said}"):
        kernel.run(x, printed.weight(kernel).tensors(), extra)


def test_a_wrong_weight_is_refused(kernel: cpp.CppKernel) -> None:
    codes, scales, *rest = printed.weight(kernel).tensors()
    for wrong in ([codes[:-1], scales], [codes, scales.double()], [codes, scales.to("meta")]):
        parts = [*wrong, *rest]
        with pytest.raises(errors.KernelError, match="printed: weight must be as its encoding"):
            kernel.run(torch.randn(3, K), parts, [printed.bias()])


def test_a_weight_is_repacked_once(kernel: cpp.CppKernel) -> None:
    packed, preparing = printed.weight(kernel), Preparing(kernel)
    for rows in (1, 5, 9):
        check(kernel, torch.randn(rows, K), packed.tensors(), packed.dequantize())
    assert preparing.count == 1
    other = printed.weight(kernel, 1)
    check(kernel, torch.randn(2, K), other.tensors(), other.dequantize())
    check(kernel, torch.randn(2, K), packed.tensors(), packed.dequantize())
    assert preparing.count == 2


@pytest.mark.parametrize("part", [0, 1])
def test_a_weight_that_was_written_to_is_repacked(part: int, kernel: cpp.CppKernel) -> None:
    packed, preparing = printed.weight(kernel), Preparing(kernel)
    tensors, x = packed.tensors(), torch.randn(3, K)
    kernel.run(x, tensors, [printed.bias()])
    tensors[part].bitwise_xor_(1) if part == 0 else tensors[part].mul_(2)
    check(kernel, x, tensors, packed.dequantize())
    tensors[part].data = tensors[part].flip(0)
    check(kernel, x, tensors, packed.dequantize())
    assert preparing.count == 3


def test_a_new_storage_at_an_old_address_is_repacked(kernel: cpp.CppKernel) -> None:
    tensors, x = printed.weight(kernel).tensors(), torch.randn(3, K)
    for seed in range(4):
        other = printed.weight(kernel, seed)
        for mine, part in zip(tensors, other.tensors(), strict=True):
            mine.data = part.clone()
        check(kernel, x, tensors, other.dequantize())


def test_weights_made_in_inference_mode(kernel: cpp.CppKernel) -> None:
    with torch.inference_mode():
        packed, preparing = printed.weight(kernel), Preparing(kernel)
        for _ in range(2):
            check(kernel, torch.randn(3, K), packed.tensors(), packed.dequantize())
    assert preparing.count == 1


def test_what_was_repacked_goes_with_the_codes(kernel: cpp.CppKernel) -> None:
    packed = printed.weight(kernel)
    kernel.run(torch.randn(3, K), packed.tensors(), [printed.bias()])
    (prepared,) = kernel._prepared.values()
    storage = weakref.ref(prepared.block._map)
    del packed, prepared
    gc.collect()
    assert not kernel._prepared
    assert not kernel._store._references
    assert storage() is None


def test_eight_threads_at_once(kernel: cpp.CppKernel) -> None:
    packed, preparing = printed.weight(kernel), Preparing(kernel)
    inputs = [torch.randn(rows, K) for rows in range(1, 9)]
    barrier = threading.Barrier(len(inputs))
    dense = packed.dequantize()

    def work(x: Tensor) -> None:
        barrier.wait()
        for _ in range(50):
            check(kernel, x, packed.tensors(), dense)

    with ThreadPoolExecutor(len(inputs)) as pool:
        list(pool.map(work, inputs))
    assert preparing.count == 1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_child_computes_the_same(kernel: cpp.CppKernel) -> None:
    packed, x = printed.weight(kernel), torch.randn(64, K)
    tensors, bias = packed.tensors(), printed.bias()
    want = kernel.run(x, tensors, [bias])
    fresh = printed.weight(kernel, 1)
    child = os.fork()
    if child == 0:
        same = torch.equal(kernel.run(x, tensors, [bias]), want)
        kernel.run(x, fresh.tensors(), [bias])
        os._exit(0 if same and cpp._Process.forked else 1)
    # A child that waits for threads that it does not have would wait forever.
    timer = threading.Timer(60, os.kill, (child, 9))
    timer.start()
    _, status = os.waitpid(child, 0)
    timer.cancel()
    assert status == 0
    assert not cpp._Process.forked
    assert torch.equal(kernel.run(x, tensors, [bias]), want)


def test_memory_is_aligned_private_and_grows() -> None:
    for size in (0, 1, 100, memory.HUGE - 1, memory.HUGE, 3 * memory.HUGE + 5):
        block = memory.Block(size)
        assert block.address % (memory.HUGE if size >= memory.HUGE else 64) == 0
    scratch = memory.Scratch()
    first = scratch.at_least(1000)
    assert scratch.at_least(10) == first
    scratch.at_least(100_000)
    assert scratch._block.size >= 100_000
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(scratch.at_least, 10).result() != scratch.at_least(10)
