"""A C++ kernel written by hand, with the interface of printed ones: int8 and a bias."""

from __future__ import annotations

import torch
from torch import Tensor

from fxquant.codegen.spec import Epilogue, KernelSpec, WeightOperand
from fxquant.formats import Encoding, PackedWeight, pack
from fxquant.runtime import toolchain
from fxquant.runtime.cpp import CppKernel

N, K = 24, 40
INT8 = Encoding(8, block=(1, -1))
SPEC = KernelSpec(
    WeightOperand.whole(INT8, (N, K), transposed=False),
    *["float32"] * 3,
    Epilogue.bias("float32"),
    name="by_hand",
)
SOURCE = """
#include <cstdint>
#include <cstring>
namespace { constexpr int64_t N = 24, K = 40; }
extern "C" int64_t fxquant_prepared_bytes(void) { return N * K * sizeof(float); }
extern "C" void fxquant_prepare(const void* const* parts, void* prepared, int threads) {
    const auto* codes = static_cast<const int8_t*>(parts[0]);
    const auto* scales = static_cast<const float*>(parts[1]);
    auto* out = static_cast<float*>(prepared);
    #pragma omp parallel for num_threads(threads)
    for (int64_t n = 0; n < N; ++n)
        for (int64_t k = 0; k < K; ++k) out[n * K + k] = codes[n * K + k] * scales[n];
}
extern "C" int64_t fxquant_scratch_bytes(int64_t m, int, int) { return m * K * sizeof(float); }
extern "C" void fxquant_run(const void* prepared, const void* x, int64_t x_e, int64_t x_row,
                            int64_t x_col, int64_t m, void* out, const void* const* extra,
                            void* scratch, int threads, int variant) {
    const auto* w = static_cast<const float*>(prepared);
    const auto* from = static_cast<const float*>(x);
    const auto* bias = static_cast<const float*>(extra[0]);
    auto* rows = static_cast<float*>(scratch);
    auto* to = static_cast<float*>(out);
    #pragma omp parallel for num_threads(threads)
    for (int64_t i = 0; i < m; ++i) {
        for (int64_t k = 0; k < K; ++k) rows[i * K + k] = from[i * x_row + k * x_col];
        for (int64_t n = 0; n < N; ++n) {
            float sum = 0;
            for (int64_t k = 0; k < K; ++k) sum += rows[i * K + k] * w[n * K + k];
            to[i * N + n] = sum + bias[n];
        }
    }
}
"""


def kernel() -> CppKernel:
    """A kernel of its own, with nothing prepared."""
    chain = toolchain.toolchain()
    assert chain is not None
    return CppKernel(toolchain.build(chain, "by_hand", SOURCE), SPEC, openmp=chain.openmp)


def weight(seed: int = 0) -> PackedWeight:
    generator = torch.Generator().manual_seed(seed)
    return pack(torch.randn(N, K, generator=generator), INT8)


def bias() -> Tensor:
    return torch.linspace(-1, 1, N)
