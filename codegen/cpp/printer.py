"""A spec as one C++17 file, put together from its sections."""

from __future__ import annotations

from fxquant.codegen.cpp import (
    call,
    decode,
    few,
    finish,
    layout,
    many,
    rows,
    scales,
    sizes,
    support,
)
from fxquant.codegen.cpp.isa import PORTABLE, Isa
from fxquant.codegen.cpp.plan import Plan
from fxquant.codegen.cpp.sections import KERNEL, comment, joined, section
from fxquant.codegen.cpp.unused import without_unused
from fxquant.codegen.header import Header
from fxquant.codegen.spec import KernelSpec


def render(spec: KernelSpec, header: Header, isa: Isa = PORTABLE) -> str:
    """The C++ source of a spec's kernel for an instruction set.

    Raises:
        KernelError: The epilogue holds an op that C++ has no spelling for.
    """
    plan = Plan(spec, isa)
    text = joined(
        comment(header, spec),
        section(support.FLOATS, "functions of floats", support.floats(finish.prelude(plan))),
        section(
            isa.name,
            "vectors, threads and memory, as all kernels use them",
            support.for_isa(isa, _multiplied(plan)),
        ),
        section(
            KERNEL,
            "its sizes, what its codes stand for, and its epilogue",
            sizes.own(plan),
            sizes.places(plan),
            decode.decode(plan),
            finish.row(plan),
        ),
        section(
            "weight",
            "the repacked weight and its scales",
            sizes.derived(plan),
            layout.weight(plan),
            scales.scales(plan),
        ),
        section(
            "rows",
            "of the activation, packed, and of the result",
            rows.rows(plan),
            call.helpers(plan),
            finish.finish(plan),
        ),
        section("few", "few rows: every code is decoded in registers and used", few.few(plan)),
        section("many", "many rows: tiles of the weight are decoded once", many.many(plan)),
        section(
            "entry",
            "what is called from outside",
            call.memory(plan),
            exported=joined(layout.prepare(plan), call.entry(plan)),
        ),
    )
    return without_unused(f"{text}\n")


def _multiplied(plan: Plan) -> tuple[str, ...]:
    """Which products of vectors there are."""
    path = "f32" if plan.few_in_floats else plan.path
    # Parts of floats, and operands of the tile unit, are made of pairs.
    pairs = ("bf16",) if plan.has_thirds or plan.path == "bf16" else ()
    return tuple(dict.fromkeys((*pairs, path)))
