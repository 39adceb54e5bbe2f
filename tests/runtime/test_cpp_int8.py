"""Calls of C++ kernels on integers: codes made before, and outliers that are counted."""

from __future__ import annotations

import dataclasses
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from fxquant import errors
from fxquant.codegen import Header, cpp, reference
from fxquant.codegen.epilogue import Epilogue
from fxquant.codegen.quantize import QuantizeSpec
from fxquant.codegen.spec import KernelSpec, Outliers, WeightOperand
from fxquant.formats import Encoding, pack
from fxquant.runtime import toolchain
from fxquant.runtime.cpp import CppKernel
from fxquant.runtime.cpp_quantize import CppQuantizer

N, K = 70, 128
WEIGHT = WeightOperand.whole(Encoding(8, block=(1, -1)), (N, K), transposed=False)
BIAS = Epilogue.bias("float32")
FUSED = KernelSpec(WEIGHT, "float32", "int8", "float32", BIAS)
APART = KernelSpec(WEIGHT, "int8", "int8", "float32", BIAS)
FOUND = KernelSpec(
    WEIGHT, "float32", "int8", "float32", BIAS, outliers=Outliers("float32", threshold=6.0)
)


def kernel(spec: KernelSpec) -> CppKernel:
    chain = toolchain.toolchain()
    assert chain is not None
    library = toolchain.build(chain, spec.name, cpp.render(spec, Header(), chain.isa))
    return CppKernel(library, spec, openmp=chain.openmp, few_rows=4)


def quantizer(spec: QuantizeSpec) -> CppQuantizer:
    chain = toolchain.toolchain()
    assert chain is not None
    library = toolchain.build(chain, spec.name, cpp.render(spec, Header(), chain.isa))
    return CppQuantizer(library, spec, openmp=chain.openmp)


def weight(seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return pack(torch.randn(N, K, generator=generator), WEIGHT.encoding).tensors()


@pytest.mark.parametrize("rows", [1, 3, 40])
@pytest.mark.parametrize("layout", ["rows", "unaligned", "apart", "turned"])
def test_quantized_before_or_inside_is_the_same(rows: int, layout: str) -> None:
    x, tensors, bias = torch.randn(rows, K), weight(), torch.randn(N)
    codes, amax = quantizer(QuantizeSpec(K, "float32")).run(x, [])
    if layout == "unaligned":
        codes = torch.cat([codes.new_zeros(1), codes.flatten()])[1:].view(rows, K)
    elif layout == "apart":
        codes = torch.stack([codes, codes.flip(0)], -1)[..., 0]
    elif layout == "turned":
        codes = codes.t().contiguous().t()
    got = kernel(APART).run(codes, tensors, [bias, amax])
    assert torch.equal(got, kernel(FUSED).run(x, tensors, [bias]))
    assert not torch.equal(got, kernel(APART).run(codes, tensors, [bias, 2 * amax]))


def test_codes_keep_their_leading_dimensions() -> None:
    codes, amax = quantizer(QuantizeSpec(K, "float32")).run(torch.randn(2, 3, K), [])
    tensors, bias = weight(), torch.zeros(N)
    got = kernel(APART).run(codes, tensors, [bias, amax])
    assert got.shape == (2, 3, N)
    assert torch.equal(got[1], kernel(APART).run(codes[1], tensors, [bias, amax[1]]))
    amax[1, 2] = torch.nan
    lost = kernel(APART).run(codes, tensors, [bias, amax]).isnan()
    assert lost[1, 2].all()
    assert int(lost.sum()) == N


@pytest.mark.parametrize(
    ("x", "extra", "said"),
    [
        (torch.ones(2, K), [torch.ones(N), torch.ones(2)], "x"),
        (torch.ones(2, K, dtype=torch.int8), [torch.ones(N)], "the number of operands"),
        (torch.ones(2, K, dtype=torch.int8), [torch.ones(N), torch.ones(3)], "operand 1"),
        (torch.ones(2, K, dtype=torch.int8), [torch.ones(N), torch.ones(2).half()], "operand 1"),
    ],
)
def test_operands_that_do_not_fit(x: Tensor, extra: list[Tensor], said: str) -> None:
    with pytest.raises(errors.KernelError, match=said):
        kernel(APART).run(x, weight(), extra)


def test_outliers_are_counted_for_their_weight() -> None:
    made, first, second, bias = kernel(FOUND), weight(), weight(1), torch.zeros(N)
    assert made.outlier_counts(first[0]) == (0, 0)
    x = torch.zeros(1000, K)
    made.run(x, first, [bias])
    assert made.outlier_counts(first[0]) == (1, 0)
    x[999, 5] = x[0, 7] = x[3, 7] = -6.0
    got = made.run(x, first, [bias])
    assert torch.equal(got.isnan(), torch.zeros_like(got, dtype=torch.bool))
    torch.testing.assert_close(got, reference.run(FOUND, x, first, [bias]))
    assert made.outlier_counts(first[0]) == (2, 2)
    made.run(x[:4], first, [bias])
    made.run(x[:0], first, [bias])
    assert made.outlier_counts(first[0]) == (3, 3)
    assert made.outlier_counts(second[0]) == (0, 0)
    made.run(x, second, [bias])
    assert made.outlier_counts(second[0]) == (1, 2)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: made.run(x, second, [bias]), range(200)))
    assert made.outlier_counts(second[0]) == (201, 402)


@pytest.mark.parametrize("threshold", [6.0, 0.1, 3.3, 70000.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_what_is_as_large_as_the_threshold_is_an_outlier(
    dtype: torch.dtype, threshold: float
) -> None:
    """Told by its bits: the numbers around a threshold, which need not be one of the dtype."""
    name = str(dtype).removeprefix("torch.")
    spec = dataclasses.replace(FOUND, x_dtype=name, outliers=Outliers(name, threshold))
    near = torch.tensor([threshold, 0.0, torch.inf, torch.nan, -torch.inf]).to(dtype)
    above, below = near.nextafter(near[2]), near.nextafter(near[4])
    numbers = torch.cat([near, -near, above, below, -above, -below])
    x = torch.zeros(40, K, dtype=dtype)
    x[torch.arange(len(numbers)) % 40, torch.arange(len(numbers))] = numbers
    expected = int((x.float().abs() >= threshold).any(0).sum())
    assert 0 < expected < len(numbers)
    made, tensors = kernel(spec), weight()
    for layout in (x, x.t().contiguous().t()):
        made.run(layout, tensors, [torch.zeros(N)])
    assert made.outlier_counts(tensors[0]) == (2, 2 * expected)
