"""The C++ target: one C++17 file a kernel, for CPUs, without torch's headers.

`printer` puts a file together from its parts, in the order in which they stand there. `plan` holds
the decisions, `isa` the instruction sets, `vectors` the few operations on vectors that everything
else is written in; `layout` repacks the weight, `decode` and `scales` read it back; `rows` packs
the activation and `call` shares the work out; `few` and `many` are the two skeletons; `finish` is
the epilogue, spelled by `ops`. `cost` says which skeleton a number of rows takes, from what `rates`
measures. `pack` prints the encoders.
"""

from fxquant.codegen.cpp.printer import render

__all__ = ["render"]
