"""Products of many rows: the weight is decoded to memory, and torch multiplies."""

import dataclasses

import pytest
import torch

from fxquant.codegen import reference
from fxquant.codegen.epilogue import Epilogue, EpilogueResult
from fxquant.codegen.spec import KernelSpec
from fxquant.codegen.triton import plan
from fxquant.codegen.triton import tiles as candidates
from fxquant.codegen.triton.gpu import ANY, FAMILIES
from fxquant.codegen.triton.tiles import Tile
from fxquant.formats import Encoding
from fxquant.runtime import cubin, tiles
from tests.codegen import harness
from tests.codegen.test_cubin import ANY_MATRIX, WIDE
from tests.codegen.test_triton_interpreted import check
from tests.codegen.test_triton_joined import GATED
from tests.codegen.test_triton_joined import check as check_joined

NF4 = Encoding(4, "nf4", (64,), scale=Encoding(8, "dynamic8", (256,), offset=True))


def spec_of(weight, epilogue=None, **more):
    return KernelSpec(weight, *["float16"] * 3, epilogue or Epilogue(), "decoded", **more)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Small products are decoded too, in tests where they would not be."""
    monkeypatch.setattr(candidates, "_LEAST_DECODED", 0)
    monkeypatch.setattr(plan, "_price", lambda spec, tile: 0.0)


def decoding(spec, folder, chunk, **more):
    """A module whose only variant decodes so many outputs at a time."""
    module = harness.load(spec, folder, interpreted=True, **more)
    wide, deep = (
        candidates.dividing(spec.weight.n, 32, 16),
        candidates.dividing(spec.weight.k, 128, 16),
    )
    tile = Tile("dequantize", 0, wide, deep, 1, 4, 1, chunk)
    only = {16: tiles.variant(module, tile)}
    module.VARIANTS.clear()
    module.VARIANTS.update(only)
    return module


@pytest.mark.parametrize("chunk", [96, 32])
@pytest.mark.parametrize(
    ("weight", "epilogue"),
    [
        (harness.whole(NF4, 96, 256), Epilogue()),
        (harness.whole(NF4, 96, 256), Epilogue.bias("float16")),
        (harness.whole(Encoding(4, block=(1, 64), zero_point=True), 96, 128), Epilogue()),
        (harness.whole(Encoding(8, block=(1, -1)), 96, 128), Epilogue.bias("float32")),
        (harness.whole(Encoding(2, block=(32,)), 96, 96), Epilogue()),
        (harness.whole(NF4, 256, 96, transposed=True), Epilogue()),
    ],
)
def test_products(tmp_path, weight, epilogue, chunk):
    spec = spec_of(weight, epilogue)
    module = decoding(spec, tmp_path, chunk)
    for rows in (1, 20):
        check(spec, module, rows)


def test_the_report_says_from_when_on(tmp_path):
    module = harness.load(spec_of(harness.whole(NF4, 64, 128)), tmp_path, interpreted=True)
    assert tiles.remark(module) == "dequantize + torch.mm from 257 rows on"
    module = harness.load(spec_of(harness.whole(NF4, 3, 64, 128)), tmp_path, interpreted=True)
    assert tiles.remark(module) == ""


def test_sizes_that_no_tile_divides(tmp_path):
    spec = spec_of(harness.whole(Encoding(4, "fp4"), 41, 75))
    check(spec, decoding(spec, tmp_path, 41), 7)


def test_another_x(tmp_path):
    spec = dataclasses.replace(spec_of(harness.whole(NF4, 64, 128)), x_dtype="float32")
    check(spec, decoding(spec, tmp_path, 64), 5)


def test_several_weights(tmp_path):
    spec = spec_of(harness.whole(NF4, 32, 192), GATED, weights=2)
    check_joined(spec, decoding(spec, tmp_path, 32), 5)
    three = Epilogue((), (), (EpilogueResult("%acc1", "float16"),))
    spec = spec_of(harness.whole(NF4, 32, 192), three, weights=2)
    check_joined(spec, decoding(spec, tmp_path, 32), 5)


def test_given_results_and_strides(tmp_path):
    spec = spec_of(harness.whole(NF4, 64, 128))
    module, tensors = decoding(spec, tmp_path, 64), harness.stored(NF4, (64, 128))
    x = torch.randn(2, 6, 128, dtype=torch.float16)[:, ::2]
    want = module.run(x.contiguous(), tensors, [])
    out = torch.empty(2, 64, 3, dtype=torch.float16).transpose(1, 2)
    assert module.run(x, tensors, [], out=out) is out
    assert torch.equal(out, want)


def test_weights_are_the_references_bit_for_bit(tmp_path):
    """As the identity's product shows: they are scaled, and rounded once."""
    weight = harness.whole(NF4, 64, 128)
    spec, tensors = spec_of(weight), harness.stored(NF4, (64, 128))
    module = decoding(spec, tmp_path, 32, gpu=FAMILIES["sm_90"])
    found = module.run(torch.eye(128, dtype=torch.float16), tensors, []).t()
    assert torch.equal(found, reference.operand(weight, tensors, torch.float16))


@pytest.mark.parametrize("target", cubin.TARGETS)
def test_decoding_is_built_for_every_gpu(tmp_path, target):
    bf16 = ["bfloat16"] * 3
    spec = KernelSpec(harness.whole(NF4, 8192, 8192), *bf16, Epilogue(), "decoded")
    module = harness.load(spec, tmp_path, interpreted=False, gpu=FAMILIES[target])
    build = harness.build_for(module, 2048)
    assert "dequantize" in build.name
    binary = cubin.compile_for(target, module, build)
    assert binary.spills == 0
    assert binary.count(ANY_MATRIX[target]) == 0
    assert (binary.count(WIDE) > 0) == target.startswith("sm")
    assert binary.occupancy >= 0.5


def test_what_is_never_decoded(tmp_path):
    for spec in (
        spec_of(harness.whole(NF4, 3, 32, 64)),
        dataclasses.replace(spec_of(harness.whole(NF4, 32, 64)), compute_dtype="int8"),
        KernelSpec(harness.whole(NF4, 32, 64), *["float32"] * 3),
    ):
        assert "dequantize" not in (tmp_path / _path_of(spec, tmp_path)).read_text()


def _path_of(spec, folder):
    return harness.load(spec, folder, interpreted=True, gpu=ANY).__file__
