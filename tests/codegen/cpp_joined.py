"""Specs of several weights and several results that C++ kernels are tested on."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from fxquant.codegen import KernelSpec
from fxquant.codegen.epilogue import Epilogue, EpilogueNode, EpilogueOperand, EpilogueResult
from fxquant.codegen.spec import Outliers, WeightOperand
from fxquant.formats import Encoding
from tests.codegen import harness
from tests.codegen.cpp_specs import CHANNELS, EVERY, NF4

GATE = Epilogue(
    (),
    (
        EpilogueNode("aten.silu.default", ("%acc",)),
        EpilogueNode("aten._to_copy.default", ("%0",), (("dtype", "bfloat16"),)),
        EpilogueNode("aten.mul.Tensor", ("%1", "%acc1")),
    ),
)


def biases(dtype: str, dims: str = "n") -> Epilogue:
    """Three products, each with a bias: the last is the main result."""
    sums = ("%acc1", "%acc2", "%acc")
    nodes = [EpilogueNode("aten.add.Tensor", (name, f"%in{i}")) for i, name in enumerate(sums)]
    more = (EpilogueResult("%0", dtype), EpilogueResult("%1", "float32"))
    return Epilogue((EpilogueOperand(dims, dtype),) * 3, tuple(nodes), more)


def _operands_of_all_axes() -> Epilogue:
    dtypes = ("float32", "float16", "bfloat16", "bool")
    operands = tuple(EpilogueOperand(dims, dtypes[i % 4]) for i, dims in enumerate(EVERY))
    before = ("%acc", "%acc1", *(f"%{i}" for i in range(len(EVERY) - 2)))
    nodes = [EpilogueNode("aten.add.Tensor", (name, f"%in{i}")) for i, name in enumerate(before)]
    nodes.append(EpilogueNode("aten.add.Tensor", (f"%{len(nodes) - 1}", f"%{len(nodes) - 2}")))
    more = (EpilogueResult("%acc1", "float16"), EpilogueResult("%3", "bfloat16"))
    return Epilogue(operands, tuple(nodes), more)


def joined(
    name: str,
    encoding: Encoding,
    shape: tuple[int, ...],
    dtypes: tuple[str, str, str],
    epilogue: Epilogue,
    *,
    weights: int = 1,
    outliers: Outliers | None = None,
) -> KernelSpec:
    """A spec of whole parameters; `dtypes` are those of x, of the product and of the result."""
    weight = WeightOperand.whole(encoding, shape, transposed=False)
    return KernelSpec(weight, *dtypes, epilogue, name, outliers, weights)


SPECS = {
    one.name: one
    for one in (
        joined("gate_nf4_bf16", NF4, (100, 704), ("bfloat16",) * 3, GATE, weights=2),
        joined("gate_nf4_f32", NF4, (100, 704), ("float32",) * 3, GATE, weights=2),
        joined(
            *("qkv_codes", CHANNELS, (77, 320), ("int8", "int8", "float16")),
            biases("float16"),
            weights=3,
        ),
        joined(
            *("qkv_int8_in_call", CHANNELS, (70, 331), ("float32", "int8", "float32")),
            biases("float32"),
            weights=3,
        ),
        joined(
            *("gate_nf4_int8_batched", NF4, (2, 70, 192), ("bfloat16", "int8", "bfloat16")),
            replace(GATE, more=(EpilogueResult("%acc1", "float32"),)),
            weights=2,
        ),
        joined(
            *("operands", Encoding(2, "nf2", (16,)), (2, 65, 48), ("float32",) * 3),
            _operands_of_all_axes(),
            weights=2,
        ),
        joined(
            *("gate_zero4_odd", Encoding(4, block=(16,), zero_point=True), (33, 77)),
            ("float16",) * 3,
            GATE,
            weights=2,
        ),
        joined(
            *("qkv_found", CHANNELS, (70, 331), ("bfloat16", "int8", "bfloat16")),
            biases("bfloat16"),
            weights=3,
            outliers=Outliers("bfloat16", threshold=2.5),
        ),
        joined(
            *("qkv_given", CHANNELS, (77, 320), ("float32", "int8", "float32")),
            biases("float32"),
            weights=3,
            outliers=Outliers("float16", columns=5),
        ),
        joined(
            *("gate_found_batched", NF4, (2, 70, 192), ("float32", "int8", "float32")),
            replace(GATE, more=(EpilogueResult("%acc1", "float32"),)),
            weights=2,
            outliers=Outliers("float16", threshold=3.0),
        ),
        joined("two_of_one", CHANNELS, (1, 1), ("float32",) * 3, biases("float16"), weights=3),
    )
}
EVERYWHERE = ("gate_nf4_bf16", "qkv_codes", "qkv_int8_in_call", "qkv_found", "qkv_given")
"""Built for every instruction set; the others for the best one."""


def alone(spec: KernelSpec, epilogue: Epilogue | None = None, out: str = "float32") -> KernelSpec:
    """One weight's product of a spec."""
    return replace(spec, weights=1, epilogue=epilogue or Epilogue(), out_dtype=out, name="alone")


def stored(spec: KernelSpec, seed: int = 0) -> list[list[Tensor]]:
    """A packed random weight for each that the spec has."""
    weight = spec.weight
    return [
        harness.stored(weight.encoding, weight.shape, seed + 10 * number)
        for number in range(spec.weights)
    ]
