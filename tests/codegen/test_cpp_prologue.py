"""Printed C++ kernels that make rows and round them: inside the enclosures, codes exact."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from fxquant import errors
from fxquant.codegen import Header, cpp
from fxquant.codegen.cpp.isa import ISAS
from fxquant.codegen.cpp.prologue import Loops
from fxquant.codegen.quantize import QuantizeSpec
from fxquant.runtime import counters, toolchain
from fxquant.runtime.cpp_rows import CppRows
from tests.codegen import prologues
from tests.codegen.cpp_harness import vector_isas

pytestmark = pytest.mark.skipif(
    toolchain.compiler() is None and not os.environ.get("CI"), reason=toolchain.NOT_FOUND
)
RANDOM = [
    QuantizeSpec(k, dtype, *way, f"random_{seed}", prologues.random_prologue(seed))
    for seed, (k, dtype, way) in enumerate(
        [
            (1, "float32", ("token", False)),
            (7, "bfloat16", ("token", True)),
            (33, "float16", ("static", False)),
            (64, "float32", ("token", False)),
            (100, "bfloat16", ("token", False)),
            (77, "float32", ("token", True)),
            (16, "float16", ("token", False)),
            (129, "bfloat16", ("static", False)),
        ]
    )
]
FIXED = [*prologues.fixed(77, "bfloat16")[:4], *prologues.fixed(96, "float32")[2:]]
SPECS = [*FIXED, *RANDOM]
GUARD = 64


def _build(key: tuple[QuantizeSpec, str]) -> CppRows:
    spec, isa = key
    compiler = toolchain.compiler()
    assert compiler is not None
    chain = toolchain.Toolchain(compiler, ISAS[isa], openmp=True)
    library = toolchain.build(chain, spec.name, cpp.render(spec, Header(), ISAS[isa]))
    return CppRows(library, spec, openmp=True)


def _isas_of(spec: QuantizeSpec) -> int:
    return 3 if spec in FIXED[1:3] else 1


@functools.cache
def kernels() -> dict[tuple[QuantizeSpec, str], CppRows]:
    """All kernels, built side by side: most for the best instruction set only."""
    keys = [(spec, isa) for spec in SPECS for isa in vector_isas()[: _isas_of(spec)]]
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(keys, pool.map(_build, keys), strict=True))


def kernel(spec: QuantizeSpec, isa: str = "") -> CppRows:
    return kernels()[spec, isa or vector_isas()[0]]


def turned(x: Tensor) -> Tensor:
    return x.transpose(0, -1).contiguous().transpose(0, -1)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "rows": lambda x: x,
    "unaligned": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape),
    "apart": lambda x: torch.stack([x, x], -1)[..., 0],
    "turned": turned,
    "wider": lambda x: torch.cat([x, x], -1)[..., : x.shape[-1]] if x.dim() else x,
}


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_results_lie_where_they_have_to(spec: QuantizeSpec) -> None:
    for isa in vector_isas()[: _isas_of(spec)]:
        run = kernel(spec, isa).run
        for rows in (0, 1, 3):
            prologues.check(spec, run, prologues.operands(spec, 2, rows, seed=rows))
        prologues.check(spec, run, prologues.operands(spec))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        for seed, layout in enumerate(LAYOUTS.values()):
            given = [layout(x) for x in prologues.operands(spec, 300, seed=seed)]
            prologues.check(spec, kernel(spec).run, given, limit=0.5)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_what_is_not_finite_spoils_its_row_only(spec: QuantizeSpec) -> None:
    assert spec.prologue is not None
    for bad in (torch.nan, torch.inf, -torch.inf):
        for number, operand in enumerate(spec.prologue.operands):
            if operand.dims == "mk" and operand.dtype != "bool":
                given = prologues.operands(spec, 5)
                given[number][3, spec.k // 2] = bad
                _, amax, *_ = prologues.check(spec, kernel(spec).run, given)
                assert not amax[torch.tensor([0, 1, 2, 4])].isnan().any()


@pytest.mark.parametrize("size", [0.0, 1e-30, 1e4])
def test_small_large_and_constant_rows(size: float) -> None:
    for spec in FIXED:
        given = prologues.operands(spec, 4)
        for value in given:
            if value.dtype != torch.bool:
                value.copy_(value.float() * size)
        given[0][0] = size
        prologues.check(spec, kernel(spec).run, given)


def test_variance_far_from_zero_is_that_of_two_passes() -> None:
    """With ``mean(x^2) - mean(x)^2`` in float32 nothing would be left of it."""
    spec = next(s for s in FIXED if s.name == "layer_norm" and s.x_dtype == "bfloat16")
    assert "sub" in cpp.render(spec, Header())
    spec = QuantizeSpec(96, "float32", name="far", prologue=prologues.layer_norm("float32"))
    built = _build((spec, vector_isas()[0]))
    x = torch.randn(6, 96, generator=torch.Generator().manual_seed(0)) + 3000
    given = [x, torch.zeros(6, 96), torch.ones(96), torch.zeros(96)]
    normed = prologues.check(spec, built.run, given)[2]
    want = torch.nn.functional.layer_norm(x.double(), (96,), eps=1e-5)
    assert (normed - want).abs().max() < 1e-3
    rough = x.square().mean(-1) - x.mean(-1).square()
    assert (rough / x.double().var(-1, correction=0) - 1).abs().max() > 0.1


def test_loops_end_at_reductions_and_share_buffers() -> None:
    for dtype in ("bfloat16", "float32"):
        found = Loops.of(prologues.layer_norm(dtype))
        assert (found.count, found.n_buffers) == (3, 1)
        found = Loops.of(prologues.rms_norm(dtype))
        assert (found.count, found.n_buffers) == (2, 1)
        found = Loops.of(prologues.gate(dtype))
        assert (found.count, found.n_buffers) == (1, 1)
    assert Loops.of(prologues.soft("float32")).count == 3


def test_nothing_is_written_behind_results() -> None:
    spec = next(s for s in FIXED if s.name == "add_layer_norm" and s.x_dtype == "bfloat16")
    given, k = prologues.operands(spec, 3), spec.k
    codes = torch.full((3 * k + GUARD,), 99, dtype=torch.int8)
    amax = torch.full((3 + GUARD,), 9.0)
    more = torch.full((3 * k + GUARD,), 5.0, dtype=torch.bfloat16)
    pointers, steps = [value.data_ptr() for value in given], (k, k, 0, 0)
    limit, entry = torch.tensor([2.0]), kernel(spec)._entry
    words = (3, limit.data_ptr(), codes.data_ptr(), amax.data_ptr(), 2)
    entry.call(entry.pack(entry.address, *words, 4, *pointers, *steps, more.data_ptr()))
    assert (codes[3 * k :] == 99).all()
    assert (amax[3:] == 9).all()
    assert (more[3 * k :] == 5).all()
    assert (codes[: 3 * k] != 99).any()


def test_what_lies_beyond_a_limit_is_counted() -> None:
    spec = next(s for s in FIXED if s.name == "rms_norm" and s.scope == "static")
    given, limit = prologues.operands(spec, 40), torch.tensor([0.75])
    found = kernel(spec).run(given, [limit])
    assert counters.read(limit) is not None
    assert 0 < counters.read(limit)[0] < found[0].numel()
    with torch.inference_mode():
        kernel(spec).run(given, [limit])
    assert counters.read(limit)[0] % 2 == 0


def test_operands_that_do_not_fit() -> None:
    spec = next(s for s in FIXED if s.name == "add_rms_norm" and s.x_dtype == "bfloat16")
    run, given = kernel(spec).run, prologues.operands(spec, 5)
    limit = [torch.tensor([1.0])] if spec.has_limit else []
    for number, wrong in (
        (0, given[0].float()),
        (1, given[1][:4]),
        (1, given[1].reshape(spec.k, 5)),
        (2, given[2][:3]),
    ):
        changed = [*given[:number], wrong, *given[number + 1 :]]
        with pytest.raises(errors.KernelError, match=f"operand {number} must be"):
            run(changed, limit)
    with pytest.raises(errors.KernelError, match="number of operands"):
        run(given[:2], limit)
    with pytest.raises(errors.KernelError, match="number of operands"):
        run(given, [*limit, torch.tensor([1.0])])
