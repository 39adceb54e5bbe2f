"""The peers on a GPU: cuBLAS, Inductor, and the packages that can be imported.

What a peer does once (packing, compiling) is not timed. Graphs are compiled for any number of rows:
one for each would take most of the time there is.
"""

from __future__ import annotations

import functools
from importlib.util import find_spec

import torch
from torch import Tensor, nn

from benchmarks.contenders import THRESHOLD
from benchmarks.gpu.products import Contender, Prepared

CUBLAS = "torch bf16"
_INT_MM_ROWS = 17  # torch._int_mm takes no fewer


def peers() -> list[Contender]:
    """Those that can be had here."""
    found = [
        Contender(CUBLAS, _dense),
        Contender("inductor bf16", _inductor),
        Contender("torch._int_mm alone", _int_mm, "int8", 0.03, least_rows=_INT_MM_ROWS),
        Contender("inductor w8a8", _inductor_int8, "int8", 0.03, least_rows=_INT_MM_ROWS),
    ]
    if find_spec("bitsandbytes"):
        found += [
            Contender("bitsandbytes nf4", _bitsandbytes_nf4, tolerance=0.15),
            Contender("bitsandbytes LLM.int8()", _bitsandbytes_int8, "int8", 0.03, outliers=True),
        ]
    if find_spec("torchao"):
        found += [
            Contender("torchao int4", functools.partial(_torchao, "int4"), tolerance=0.15),
            Contender("torchao int8", functools.partial(_torchao, "int8")),
            Contender("torchao w8a8", functools.partial(_torchao, "w8a8"), "int8", 0.03),
        ]
    if find_spec("gemlite"):
        found.append(Contender("gemlite int4", _gemlite, tolerance=0.15))
    return found


def missing() -> list[str]:
    """The packages that cannot be imported, so that their figures are missing."""
    return [name for name in ("bitsandbytes", "torchao", "gemlite") if not find_spec(name)]


def _dense(weight: Tensor) -> Prepared:
    return Prepared(lambda x: nn.functional.linear(x, weight), weight.nbytes)


def _inductor(weight: Tensor) -> Prepared:
    compiled = torch.compile(nn.functional.linear, dynamic=True, fullgraph=True)
    return Prepared(lambda x: compiled(x, weight), weight.nbytes)


def _channels(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Codes ``[n, k]`` and a scale an output."""
    scales = weight.float().abs().amax(1) / 127
    return torch.round(weight.float() / scales[:, None]).to(torch.int8), scales


def _rows(x: Tensor) -> tuple[Tensor, Tensor]:
    scales = x.float().abs().amax(1, keepdim=True) / 127
    return torch.round(x.float() / scales).to(torch.int8), scales


def _int_mm(weight: Tensor) -> Prepared:
    """The product of codes alone: neither is the activation rounded nor are the sums scaled."""
    codes, scales = _channels(weight)

    class Scaled:
        """Makes a comparable result of the sums, outside of the timing."""

        def __init__(self, sums: Tensor, rows: Tensor) -> None:
            self.sums, self.rows = sums, rows

        def float(self) -> Tensor:
            return self.sums.float() * self.rows * scales

    return Prepared(lambda q, rows: Scaled(torch._int_mm(q, codes.t()), rows), codes.nbytes, _rows)


def _inductor_int8(weight: Tensor) -> Prepared:
    codes, scales = _channels(weight)

    def product(x: Tensor) -> Tensor:
        q, rows = _rows(x)
        return (torch._int_mm(q, codes.t()).float() * rows * scales).to(x.dtype)

    compiled = torch.compile(product, dynamic=True, fullgraph=True)
    return Prepared(compiled, codes.nbytes + scales.nbytes)


def _linear(weight: Tensor) -> nn.Linear:
    n, k = weight.shape
    linear = nn.Linear(k, n, bias=False, device="meta")
    linear.weight = nn.Parameter(weight.clone(), requires_grad=False)
    return linear


def _bitsandbytes_nf4(weight: Tensor) -> Prepared:
    import bitsandbytes

    packed, state = bitsandbytes.functional.quantize_4bit(
        weight, quant_type="nf4", compress_statistics=True
    )
    return Prepared(
        lambda x: bitsandbytes.matmul_4bit(x, packed.t(), quant_state=state),
        packed.nbytes + state.absmax.nbytes,
    )


def _bitsandbytes_int8(weight: Tensor) -> Prepared:
    import bitsandbytes

    n, k = weight.shape
    linear = bitsandbytes.nn.Linear8bitLt(
        k, n, bias=False, has_fp16_weights=False, threshold=THRESHOLD
    )
    linear.weight = bitsandbytes.nn.Int8Params(
        weight.half(), requires_grad=False, has_fp16_weights=False
    )
    linear = linear.to(weight.device).eval()
    return Prepared(lambda x: linear(x.half()), n * (k + 4))


def _torchao(kind: str, weight: Tensor) -> Prepared:
    from torchao import quantization

    config = {
        "int4": quantization.Int4WeightOnlyConfig,
        "int8": quantization.Int8WeightOnlyConfig,
        "w8a8": quantization.Int8DynamicActivationInt8WeightConfig,
    }[kind]()
    model = nn.Sequential(_linear(weight))
    quantization.quantize_(model, config)
    bits = 4.25 if kind == "int4" else 8
    return Prepared(torch.compile(model, dynamic=True), int(weight.numel() * bits / 8))


def _gemlite(weight: Tensor) -> Prepared:
    from gemlite.helper import A16W4_HQQ_INT

    return Prepared(
        A16W4_HQQ_INT(device=str(weight.device), dtype=torch.bfloat16).from_linear(_linear(weight)),
        int(weight.numel() * 4.5 / 8),
    )
