"""The C++ target: one C++17 file a kernel, for CPUs, without torch's headers.

`printer` puts a file together from its sections, in the order in which they stand there, and
`sections` takes it apart for people. `plan` holds the decisions, `sizes` the numbers, `isa` the
instruction sets; `support` is what all kernels are made of: functions of floats (`math`) and the
few operations on vectors (`vectors`) and on the tile unit (`unit`) that everything else is written
in. `layout` repacks the weight, `decode` and `scales` read it back; `rows` packs the activation and
`call` shares the work out; `few` and `many` are the two skeletons, the latter on `tiles` where
there is a tile unit (AMX); `finish` is the epilogue, spelled by `ops`. `cost` says which skeleton a
number of rows takes, from what `rates` measures. `quantize` prints what takes rows to int8, `pack`
the encoders.
"""

from __future__ import annotations

from fxquant.codegen.cpp import printer
from fxquant.codegen.cpp.isa import PORTABLE, Isa
from fxquant.codegen.cpp.quantize import render_quantize
from fxquant.codegen.header import Header
from fxquant.codegen.quantize import QuantizeSpec
from fxquant.codegen.spec import KernelSpec

__all__ = ["render"]


def render(spec: KernelSpec | QuantizeSpec, header: Header, isa: Isa = PORTABLE) -> str:
    """The C++ source of a spec's kernel for an instruction set.

    Raises:
        KernelError: The epilogue holds an op that C++ has no spelling for.
    """
    if isinstance(spec, QuantizeSpec):
        return render_quantize(spec, header)
    return printer.render(spec, header, isa)
