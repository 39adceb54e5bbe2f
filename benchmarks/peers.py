"""The peers of `benchmarks.linear`, each the fastest way that its package offers on a CPU.

What a peer does once (packing, repacking, compiling) is not timed, and where a module's `forward`
only leads to a function, the function is called.
"""

from __future__ import annotations

import functools
import logging
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.contenders import THRESHOLD, Contender, Prepared

FP32, BF16 = torch.float32, torch.bfloat16
INT4_GROUP = 64


def peers() -> list[Contender]:
    """All of them.

    Raises:
        SystemExit: A package is not installed.
    """
    missing = [name for name in ("bitsandbytes", "torchao") if find_spec(name) is None]
    if missing:
        raise SystemExit(f"Not installed: {', '.join(missing)}. Run: pip install 'fxquant[bench]'.")
    quiet()
    plain = [
        Contender(f"torch {short}", functools.partial(_dense, dtype), dtype, unit, 0.01)
        for short, dtype, unit in (("fp32", FP32, "float32"), ("bf16", BF16, "bfloat16"))
    ]
    inductor = [
        Contender(
            f"inductor {short}{', frozen' if frozen else ''}",
            functools.partial(_inductor, dtype, frozen),
            dtype,
            unit,
            0.01,
        )
        for short, dtype, unit in (("fp32", FP32, "float32"), ("bf16", BF16, "bfloat16"))
        for frozen in (False, True)
    ]
    llm_int8 = functools.partial(_bitsandbytes_int8, THRESHOLD)
    return [
        *plain,
        *inductor,
        Contender("fbgemm dynamic int8", _fbgemm, FP32, "int8", 0.03),
        Contender("bitsandbytes nf4", _bitsandbytes_nf4, BF16, "bfloat16", 0.15),
        Contender("bitsandbytes LLM.int8()", llm_int8, BF16, "int8", 0.03),
        Contender("bitsandbytes LLM.int8(), 1% outliers", llm_int8, BF16, "int8", 0.03, True),
        Contender("torchao int8 dynamic", _torchao_int8, BF16, "int8", 0.03),
        Contender("torchao int4 weight-only", _torchao_int4, BF16, "bfloat16", 0.15),
    ]


def quiet() -> None:
    """Keeps the peers from warning of their own casts (in every call) and of GPU libraries."""
    for name in ("bitsandbytes", "torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _linear(weight: Tensor, dtype: torch.dtype) -> nn.Module:
    n, k = weight.shape
    linear = nn.Linear(k, n, bias=False, dtype=dtype)
    linear.weight = nn.Parameter(weight.to(dtype, copy=True), requires_grad=False)
    return linear.eval()


def _dense(dtype: torch.dtype, weight: Tensor) -> Prepared:
    own = weight.to(dtype, copy=True)
    return Prepared(lambda x: nn.functional.linear(x, own), own.nbytes)


def _compiled(module: nn.Module, *, frozen: bool) -> Callable[[Tensor], Tensor]:
    # Shapes are static: a graph for each number of rows is the best case for a peer. A full graph
    # makes an error of what would otherwise run uncompiled.
    return torch.compile(module, dynamic=False, fullgraph=True, options={"freezing": frozen})


def _inductor(dtype: torch.dtype, frozen: bool, weight: Tensor) -> Prepared:
    module = _linear(weight, dtype)
    return Prepared(_compiled(module, frozen=frozen), weight.numel() * dtype.itemsize)


def _fbgemm(weight: Tensor) -> Prepared:
    n, k = weight.shape
    scales, zeros = weight.abs().amax(1) / 127, torch.zeros(n, dtype=torch.long)
    with warnings.catch_warnings():
        # PyTorch says that these tensors will go; they are what there is.
        warnings.simplefilter("ignore")
        quantized = torch.quantize_per_channel(weight, scales, zeros, 0, torch.qint8)
    before = torch.backends.quantized.engine
    torch.backends.quantized.engine = "fbgemm"
    packed = torch.ops.quantized.linear_prepack(quantized, None)
    torch.backends.quantized.engine = before
    # A scale and the sum of the codes, float32 and int32, an output.
    return Prepared(lambda x: torch.ops.quantized.linear_dynamic(x, packed), n * (k + 8))


def _bitsandbytes_nf4(weight: Tensor) -> Prepared:
    import bitsandbytes

    n, k = weight.shape
    linear = bitsandbytes.nn.Linear4bit(
        k, n, bias=False, compute_dtype=BF16, quant_type="nf4", compress_statistics=True
    )
    linear.weight = bitsandbytes.nn.Params4bit(
        weight.to(BF16), requires_grad=False, quant_type="nf4", compress_statistics=True
    )
    linear = linear.to("cpu").eval()
    # The first call repacks the weight for the AVX512 kernel and decodes the scales.
    linear(torch.zeros(1, k, dtype=BF16))
    packed, state = linear.weight, linear.weight.quant_state
    return Prepared(
        lambda x: bitsandbytes.matmul_4bit(x, packed, quant_state=state),
        packed.nbytes + state.absmax.nbytes,
    )


def _bitsandbytes_int8(threshold: float, weight: Tensor) -> Prepared:
    import bitsandbytes

    n, k = weight.shape
    linear = bitsandbytes.nn.Linear8bitLt(
        k, n, bias=False, has_fp16_weights=False, threshold=threshold
    )
    linear.weight = bitsandbytes.nn.Int8Params(
        weight.clone(), requires_grad=False, has_fp16_weights=False
    )
    linear = linear.to("cpu").eval()
    linear(torch.ones(1, k, dtype=BF16))
    packed, state = linear.weight, linear.state
    return Prepared(
        lambda x: bitsandbytes.matmul(x, packed, state=state),
        state.CB.nbytes + state.SCB.nbytes,
    )


def _torchao(weight: Tensor, config: Any) -> Prepared:
    from torchao.quantization import quantize_

    model = nn.Sequential(_linear(weight, BF16))
    quantize_(model, config)
    packed: Any = model[0].weight
    parts = [getattr(packed, name) for name in packed.__tensor_flatten__()[0]]
    return Prepared(_compiled(model, frozen=True), sum(part.nbytes for part in parts))


def _torchao_int8(weight: Tensor) -> Prepared:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig

    return _torchao(weight, Int8DynamicActivationInt8WeightConfig())


def _torchao_int4(weight: Tensor) -> Prepared:
    # The format of torchao.quantization.Int4WeightOnlyConfig has no CPU kernel; this one has.
    from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig

    return _torchao(weight, PrototypeInt4WeightOnlyConfig(group_size=INT4_GROUP))
