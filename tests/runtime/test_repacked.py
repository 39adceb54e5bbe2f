"""Repacked weights: shared by kernels of one form, made for several at once, dropped with codes."""

from __future__ import annotations

import gc
import re
import weakref
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fxquant import errors
from fxquant.codegen import Header, KernelSpec, cpp, reference
from fxquant.codegen.cpp import layout
from fxquant.codegen.cpp.isa import AVX2, AVX512, PORTABLE
from fxquant.codegen.cpp.plan import Plan
from fxquant.codegen.epilogue import Epilogue, EpilogueNode, EpilogueOperand, EpilogueResult
from fxquant.codegen.spec import Outliers, WeightOperand
from fxquant.formats import Encoding, pack
from fxquant.runtime import repacked, toolchain
from fxquant.runtime.cpp import CppKernel

pytestmark = pytest.mark.usefixtures("few_heights")

N, K = 70, 128
NF4 = Encoding(4, "nf4", (64,), scale=Encoding(8, "dynamic8", (256,), offset=True))
WHOLE = WeightOperand.whole(NF4, (N, K), transposed=False)
ALONE = KernelSpec(WHOLE, *["float32"] * 3, name="alone")
GATE = replace(
    ALONE,
    epilogue=Epilogue(
        (),
        (
            EpilogueNode("aten.silu.default", ("%acc",)),
            EpilogueNode("aten.mul.Tensor", ("%0", "%acc1")),
        ),
    ),
    weights=2,
    name="gate",
)
THREE = replace(
    ALONE,
    epilogue=Epilogue(
        (EpilogueOperand("n", "float32"),),
        (EpilogueNode("aten.add.Tensor", ("%acc", "%in0")),),
        (EpilogueResult("%acc1", "bfloat16"), EpilogueResult("%acc2", "float32")),
    ),
    weights=3,
    name="three",
)


def kernel(spec: KernelSpec) -> CppKernel:
    chain = toolchain.toolchain()
    assert chain is not None
    library = toolchain.build(chain, spec.name, cpp.render(spec, Header(), chain.isa))
    form = layout.form(Plan(spec, chain.isa))
    return CppKernel(library, spec, openmp=chain.openmp, few_rows=2, form=form)


def weight(seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return pack(torch.randn(N, K, generator=generator), NF4).tensors()


class Preparing:
    """Counts how often kernels repack."""

    def __init__(self, *kernels: CppKernel) -> None:
        self.count = 0
        for one in kernels:
            one._prepare = self._counted(one._prepare)

    def _counted(self, inner):
        def prepare(*args: object) -> None:
            self.count += 1
            inner(*args)

        return prepare


def near(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rows", [0, 1, 2, 5, 40])
def test_several_results_are_a_list(rows: int) -> None:
    three, x, bias = kernel(THREE), torch.randn(2, rows, K), torch.randn(N)
    tensors = [tensor for seed in range(3) for tensor in weight(seed)]
    got, want = three.run(x, tensors, [bias]), reference.run(THREE, x, tensors, [bias])
    assert isinstance(got, list)
    assert [one.dtype for one in got] == [torch.float32, torch.bfloat16, torch.float32]
    assert [one.shape for one in got] == [(2, rows, N)] * 3
    for ours, theirs, tolerance in zip(got, want, (1e-4, 2e-2, 1e-4), strict=True):
        assert ours.is_contiguous()
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def test_a_weight_of_a_joined_and_of_a_single_product_is_repacked_once() -> None:
    single, gate, three = kernel(ALONE), kernel(GATE), kernel(THREE)
    preparing, x = Preparing(single, gate, three), torch.randn(3, K)
    one, two = weight(0), weight(1)
    both = single.run(x, one, []), single.run(x, two, [])
    assert preparing.count == 2
    for _ in range(2):
        near(gate.run(x, [*one, *two], []), torch.nn.functional.silu(both[0]) * both[1])
        near(gate.run(x, [*two, *one], []), torch.nn.functional.silu(both[1]) * both[0])
        result, first, _ = three.run(x, [*two, *one, *one], [torch.zeros(N)])
        assert torch.equal(result, both[1])
        assert torch.equal(first, both[0].bfloat16())
    assert preparing.count == 2


def test_a_weight_that_was_written_to_is_repacked_alone() -> None:
    gate = kernel(GATE)
    preparing, x, one, two = Preparing(gate), torch.randn(3, K), weight(0), weight(1)
    before = gate.run(x, [*one, *two], [])
    two[0].bitwise_xor_(1)
    after = gate.run(x, [*one, *two], [])
    near(after, reference.run(GATE, x, [*one, *two], []))
    assert not torch.equal(before, after)
    assert preparing.count == 3


@pytest.mark.parametrize("dies", [0, 1])
def test_what_was_repacked_goes_with_any_of_the_codes(dies: int) -> None:
    gate, weights = kernel(GATE), [weight(0), weight(1)]
    gate.run(torch.randn(3, K), [*weights[0], *weights[1]], [])
    (several,) = gate._prepared.values()
    blocks = [weakref.ref(part.block._map) for part in several.parts]
    del several
    weights[dies] = []
    gc.collect()
    assert not gate._prepared
    assert [block() is None for block in blocks] == [dies == 0, dies == 1]
    gate.run(torch.randn(3, K), [*weight(3), *weight(4)], [])
    gc.collect()
    assert not gate._prepared


def test_forms_tell_apart_what_is_not_the_same() -> None:
    x32, int8 = Plan(ALONE, AVX512), Plan(replace(ALONE, compute_dtype="int8"), AVX512)
    bf16 = Plan(replace(ALONE, compute_dtype="bfloat16", x_dtype="bfloat16"), AVX512)
    f16 = Plan(replace(ALONE, compute_dtype="float16", x_dtype="float16"), AVX512)
    other = replace(WHOLE, n=N - 1)
    few = Plan(replace(ALONE, weight=other), AVX512)
    found = [
        replace(int8.spec, outliers=Outliers("float32", threshold=limit)) for limit in (5.0, 6.0)
    ]
    plans = [x32, int8, bf16, few, *(Plan(spec, AVX512) for spec in found)]
    plans += [Plan(ALONE, AVX2), Plan(ALONE, PORTABLE)]
    forms = [layout.form(plan) for plan in plans]
    assert len(set(forms)) == len(forms)
    # All that is multiplied as float32 is stored alike, whatever x comes as and becomes.
    assert layout.form(f16) == layout.form(x32) == layout.form(Plan(GATE, AVX512))


@pytest.mark.parametrize("isa", [AVX512, AVX2, PORTABLE])
def test_kernels_of_one_form_repack_with_the_same_text(isa) -> None:
    def repacking(spec: KernelSpec) -> str:
        return cpp.render(spec, Header(), isa).partition("// Repacks")[2].partition("\n}\n")[0]

    def stored(spec: KernelSpec) -> list[str]:
        text = cpp.render(spec, Header(), isa)
        sizes = re.findall(r"constexpr int64_t (?:E|N|K|BLOCK|NESTED|GROUPS) = .*", text)
        return [*sizes, text.partition("// Where the arrays")[2].partition("struct Weight {")[0]]

    half = replace(GATE, x_dtype="float16", compute_dtype="float16", out_dtype="bfloat16")
    for spec in (GATE, THREE, half):
        assert layout.form(Plan(spec, isa)) == layout.form(Plan(ALONE, isa))
        assert repacking(spec) == repacking(ALONE) != ""
        assert stored(spec) == stored(ALONE)
        assert len(stored(spec)) == 7
        assert "PREPARED_BYTES" in stored(spec)[-1]


def test_a_form_of_ones_own_is_not_shared_and_stores_go_with_their_kernels() -> None:
    assert repacked.store(None) is not repacked.store(None)
    first = repacked.store("a form")
    assert repacked.store("a form") is first
    gone = weakref.ref(first)
    del first
    gc.collect()
    assert gone() is None


def test_too_few_weights_are_refused() -> None:
    gate = kernel(GATE)
    with pytest.raises(errors.KernelError, match="gate: weights must be 2 of 4 tensors, got 4"):
        gate.run(torch.randn(3, K), weight(0), [])
