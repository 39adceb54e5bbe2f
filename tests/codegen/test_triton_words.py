"""Codes decoded a word at a time: all ways to do it, and the products around them."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from fxquant.codegen import Header
from fxquant.codegen.epilogue import Epilogue
from fxquant.codegen.indexing import WeightIndex
from fxquant.codegen.spec import KernelSpec, WeightOperand
from fxquant.codegen.triton import cost, render, word_bytes, words
from fxquant.codegen.triton.gpu import ANY, FAMILIES
from fxquant.codegen.triton.plan import plan_for
from fxquant.formats import Encoding
from tests.codegen import harness, ptx
from tests.codegen.test_triton_interpreted import check
from tests.codegen.test_triton_joined import GATED
from tests.codegen.test_triton_joined import check as check_joined

NF4 = Encoding(4, "nf4", (64,), scale=Encoding(8, "dynamic8", (256,), offset=True))
INT4 = Encoding(4, block=(1, 128))
CHANNELS = Encoding(4, block=(1, -1))


def words_of(spec, gpu=ANY):
    return plan_for(spec, WeightIndex.of(spec.weight), gpu).form.words


def spec_of(weight, dtype="float16", epilogue=None, **more):
    return KernelSpec(weight, dtype, dtype, dtype, epilogue or Epilogue(), "words", **more)


WAYS = {"choice": ANY, "prmt": FAMILIES["sm_90"], "table": FAMILIES["gfx942"]}


@pytest.fixture(params=WAYS.values(), ids=WAYS)
def gpu(request, monkeypatch):
    """All variants; assembly runs in an interpreter of ours."""
    ptx.interpret_assembly(monkeypatch)
    return request.param


# Where scales are multiplied into the weight tile: with Hopper's sizes.
HOPPER = pytest.mark.parametrize(
    "gpu", [ANY, FAMILIES["sm_90"]], ids=lambda gpu: gpu.name, indirect=True
)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("encoding", [NF4, Encoding(4, "fp4"), INT4])
def test_assembly_gives_the_levels_bit_for_bit(encoding, dtype):
    book = words.book_of(encoding)
    drawn = np.random.default_rng(0).integers(0, 2**32, 4096, dtype=np.uint32)
    drawn[:2] = 0, 2**32 - 1
    table = np.array(word_bytes.level_words(book, dtype)[::2], np.int32).view(np.uint32)
    text = "\n".join(word_bytes.assembly(book, dtype))
    found = ptx.run(text, 8, [drawn, *(np.full_like(drawn, word) for word in table)])
    rounded = torch.tensor(book, dtype=getattr(torch, dtype)).view(torch.int16).numpy()
    codes = drawn.view(np.uint8).reshape(-1, 4)
    nibbles = np.stack([codes >> 4, codes & 15], -1).reshape(-1, 8)
    want = rounded.view(np.uint16)[nibbles]
    for number, values in enumerate(found):
        assert np.array_equal(values, want[:, number])
    assert not np.array_equal(found[0], want[:, 1])


@pytest.mark.parametrize(
    ("weight", "scaling"),
    [
        (harness.whole(NF4, 64, 512), "tile"),
        (harness.whole(Encoding(4, "fp4"), 40, 128), "tile"),
        (harness.whole(INT4, 48, 384), "tile"),
        (harness.whole(CHANNELS, 32, 256), "output"),
        (harness.whole(NF4, 3, 24, 128), "tile"),
        (WeightOperand(NF4, (96, 128), None, 32, 64, (0, 128, 1), 64 * 128 + 64), "output"),
    ],
)
def test_products(tmp_path, gpu, weight, scaling):
    spec = spec_of(weight, epilogue=Epilogue.bias("float16", "en" if weight.batch else "n"))
    found = plan_for(spec, WeightIndex.of(weight), gpu)
    assert WAYS[found.form.words] is gpu
    assert found.form.scaling == scaling
    module = harness.load(spec, tmp_path, interpreted=True, gpu=gpu)
    for rows in (1, 3, 20):
        check(spec, module, rows)


def test_many_rows_with_splits_and_another_x(tmp_path, gpu):
    spec = dataclasses.replace(spec_of(harness.whole(NF4, 64, 1024)), x_dtype="float32")
    module = harness.load(spec, tmp_path, interpreted=True, gpu=gpu)
    harness.split(module)
    for rows in (2, 140):
        check(spec, module, rows)


def test_several_weights(tmp_path, gpu):
    spec = spec_of(harness.whole(NF4, 32, 192), epilogue=GATED, weights=2)
    check_joined(spec, harness.load(spec, tmp_path, interpreted=True, gpu=gpu), 5)


@pytest.mark.parametrize("encoding", [NF4, Encoding(4, "fp4"), INT4])
def test_all_ways_give_the_same_numbers(tmp_path, monkeypatch, encoding):
    ptx.interpret_assembly(monkeypatch)
    spec = spec_of(harness.whole(encoding, 64, 256))
    tensors, x = harness.stored(encoding, (64, 256)), harness.activation(spec, 7)
    found = [
        harness.load(spec, tmp_path, interpreted=True, gpu=gpu).run(x, tensors, [])
        for gpu in WAYS.values()
    ]
    assert all(torch.equal(found[0], other) for other in found[1:])
    assert found[0].any()


@pytest.mark.parametrize(
    "spec",
    [
        spec_of(harness.whole(NF4, 64, 100)),
        spec_of(harness.whole(Encoding(4, "nf4", (32,)), 64, 128)),
        spec_of(harness.whole(Encoding(4, block=(1, 64), zero_point=True), 64, 128)),
        spec_of(harness.whole(Encoding(8, block=(1, -1)), 64, 128)),
        spec_of(harness.whole(Encoding(2, block=(64,)), 64, 128)),
        spec_of(harness.whole(NF4, 128, 64, transposed=True)),
        spec_of(harness.whole(NF4, 64, 128), "float32"),
        spec_of(WeightOperand(NF4, (96, 128), None, 32, 64, (0, 128, 1), 4)),
    ],
    ids=str,
)
def test_what_is_decoded_otherwise(spec):
    assert not words_of(spec)
    assert not words_of(spec, FAMILIES["sm_90"])


def test_levels_that_float16_has_no_normal_numbers_for():
    tiny = Encoding(4, tuple(2.0**-i for i in range(16)), (64,))
    weight = harness.whole(tiny, 32, 64)
    assert not words_of(spec_of(weight))
    assert words_of(spec_of(weight, "bfloat16"))


def test_assembly_is_for_one_vendor():
    spec = spec_of(harness.whole(NF4, 64, 128))
    assert "inline_asm" in render(spec, Header(), FAMILIES["sm_80"])
    for gpu in (ANY, FAMILIES["gfx942"]):
        assert "inline_asm" not in render(spec, Header(), gpu)


@pytest.fixture
def scaled_first(monkeypatch):
    """Scales in the weight tile, whatever the cost model says."""
    seconds = cost.seconds

    def priced(spec, form, tile, gpu, rows):
        return seconds(spec, form, tile, gpu, rows) / (1e6 if tile.kernel == "scaled" else 1)

    monkeypatch.setattr(cost, "seconds", priced)


@HOPPER
@pytest.mark.usefixtures("scaled_first")
@pytest.mark.parametrize(
    "weight",
    [
        harness.whole(NF4, 256, 1024),
        harness.whole(INT4, 128, 512),
        harness.whole(CHANNELS, 128, 256),
        harness.whole(NF4, 2, 64, 128),
        WeightOperand(NF4, (192, 128), None, 128, 64, (0, 128, 1), 64 * 128 + 64),
    ],
)
def test_many_rows(tmp_path, gpu, weight):
    spec = spec_of(weight, epilogue=Epilogue.bias("float16", "en" if weight.batch else "n"))
    module = harness.load(spec, tmp_path, interpreted=True, gpu=gpu)
    for rows in (40, 70, 300):
        assert "_scaled_" in harness.build_for(module, rows).name
        check(spec, module, rows)


@HOPPER
@pytest.mark.usefixtures("scaled_first")
def test_many_rows_of_several_weights(tmp_path, gpu):
    spec = spec_of(harness.whole(NF4, 64, 192), epilogue=GATED, weights=2)
    module = harness.load(spec, tmp_path, interpreted=True, gpu=gpu)
    assert "scaled" in harness.build_for(module, 67).name
    check_joined(spec, module, 67)


@HOPPER
@pytest.mark.usefixtures("scaled_first")
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_a_scale_that_is_no_number_spoils_its_own_outputs(tmp_path, gpu):
    spec = spec_of(harness.whole(INT4, 64, 256))
    tensors, x = harness.stored(INT4, (64, 256)), harness.activation(spec, 64)
    clean = harness.load(spec, tmp_path, interpreted=True, gpu=gpu).run(x, tensors, [])
    tensors[1].view(-1)[0], tensors[1].view(-1)[2] = math.nan, math.inf
    found = harness.load(spec, tmp_path, interpreted=True, gpu=gpu).run(x, tensors, [])
    assert not found[:, :2].isfinite().any()
    assert torch.equal(found[:, 2:], clean[:, 2:])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_assembly_multiplies_bytes_with_scales_and_rounds_once(dtype):
    """The scale's second part makes up for the first one's rounding: within 2**-7 of a unit."""
    book, kind = words.book_of(NF4), getattr(torch, dtype)
    generator = torch.Generator().manual_seed(0)
    code = torch.randint(0, 256, (512, 4), generator=generator, dtype=torch.uint8)
    scale = (torch.rand(512, 4, generator=generator) + 0.5) / 7
    whole = scale.to(kind)
    registers = ptx.registers(code.numpy(), 4)
    for part in (whole, (scale - whole.float()).to(kind)):
        registers += ptx.registers(part.view(torch.int16).numpy(), 4)
    text = "\n".join(word_bytes.byte_assembly(book, dtype, scaled=True))
    found = np.stack(ptx.run(text, 4, registers), -1).astype(np.uint32).view(np.int16)
    found = torch.from_numpy(found.copy()).view(kind).reshape(512, 2, 4).double()
    levels = torch.tensor(book, dtype=kind).double()
    nibbles = torch.stack((code >> 4, code & 15), 1).long()
    exact = levels[nibbles] * scale[:, None].double()
    unit = torch.finfo(kind).eps * exact.abs()
    assert ((found - exact).abs() <= (0.5 + 2.0**-6) * unit + 2.0**-25).all()
    alone = (levels.to(kind)[nibbles] * whole[:, None]).double()
    assert ((alone - exact).abs() > (0.5 + 2.0**-6) * unit).any()
