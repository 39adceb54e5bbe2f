"""Small C++ kernels to call: what they compute is tested in `tests.codegen`."""

from __future__ import annotations

import torch
from torch import Tensor

from fxquant.codegen import Header, cpp
from fxquant.codegen.epilogue import Epilogue
from fxquant.codegen.spec import KernelSpec, WeightOperand
from fxquant.formats import Encoding, PackedWeight, pack
from fxquant.runtime import toolchain
from fxquant.runtime.cpp import CppKernel

N, K = 24, 40
ENCODINGS = {
    "int8": Encoding(8, block=(1, -1)),
    "nf4": Encoding(4, "nf4", (64,), scale=Encoding(8, "dynamic8", (256,), offset=True)),
}


def kernel(encoding: Encoding) -> CppKernel:
    """A product and a bias in float32: a kernel of its own, with nothing repacked."""
    chain = toolchain.toolchain()
    assert chain is not None
    operand = WeightOperand.whole(encoding, (N, K), transposed=False)
    spec = KernelSpec(operand, *["float32"] * 3, Epilogue.bias("float32"), name="printed")
    source = cpp.render(spec, Header(), chain.isa)
    return CppKernel(
        toolchain.build(chain, "printed", source), spec, openmp=chain.openmp, few_rows=2
    )


def weight(kernel: CppKernel, seed: int = 0) -> PackedWeight:
    """A random weight that a kernel takes."""
    generator = torch.Generator().manual_seed(seed)
    return pack(torch.randn(N, K, generator=generator), kernel.spec.weight.encoding)


def bias() -> Tensor:
    return torch.linspace(-1, 1, N)
