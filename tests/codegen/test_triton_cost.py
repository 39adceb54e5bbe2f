"""The roofline that ranks tiles: what it must say of cases that can be reckoned by hand."""

import dataclasses
import math

import pytest

from fxquant.codegen.epilogue import Epilogue
from fxquant.codegen.indexing import WeightIndex
from fxquant.codegen.spec import KernelSpec
from fxquant.codegen.triton import cost
from fxquant.codegen.triton.gpu import ANY, FAMILIES
from fxquant.codegen.triton.plan import form_of, plan_for
from fxquant.codegen.triton.tiles import BUCKETS, Tile
from fxquant.codegen.work import stored_bytes
from fxquant.formats import Encoding
from tests.codegen import harness

NF4 = Encoding(4, "nf4", (64,), scale=Encoding(8, "dynamic8", (256,), offset=True))
INT8 = Encoding(8, block=(1, -1))
H100 = FAMILIES["sm_90"]


def spec_of(encoding, *shape, compute="bfloat16", epilogue=None):
    weight = harness.whole(encoding, *shape)
    return KernelSpec(weight, "bfloat16", compute, "bfloat16", epilogue or Epilogue(), "priced")


def plan_of(spec, gpu=H100):
    return plan_for(spec, WeightIndex.of(spec.weight), gpu)


def seconds(spec, tile, rows, gpu=H100):
    return cost.seconds(
        spec, form_of(spec, WeightIndex.of(spec.weight), gpu.vendor), tile, gpu, rows
    )


@pytest.mark.parametrize(("encoding", "compute"), [(NF4, "bfloat16"), (INT8, "int8")])
@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_is_below_the_roofline(encoding, compute, family):
    spec, gpu = spec_of(encoding, 8192, 8192, compute=compute), FAMILIES[family]
    found = plan_of(spec, gpu)
    for most in BUCKETS:
        work = most * 8192**2 / (gpu.products[compute] * gpu.processors * gpu.clock)
        read = stored_bytes(spec.weight) / gpu.bandwidth
        for tile in found.variants[most]:
            assert seconds(spec, tile, most, gpu) > max(work, read)


def test_best_tiles_come_first_and_differ():
    spec = spec_of(NF4, 4096, 4096)
    for most, tiles in plan_of(spec).variants.items():
        times = [seconds(spec, tile, most) for tile in tiles if tile.kernel == tiles[0].kernel]
        assert times[0] <= 1.02 * min(times) < math.inf
        assert len(set(tiles)) == len(tiles)


def test_few_outputs_are_split_and_many_are_not():
    few, many = (plan_of(spec_of(NF4, n, 8192)).best for n in (512, 65536))
    assert few[16].split >= 8
    assert next(iter(many.values())).split <= 2


def test_bytes_in_flight_bound_the_bandwidth():
    """Little's law: of two stages one is in flight, so 128 steps take the time of 128 loads."""
    spec = spec_of(NF4, 8192, 8192)
    one = Tile("gemm", 16, 64, 64, 1, 4, 2)
    expected = (128 + 2) * H100.latency
    assert expected < seconds(spec, one, 1) < 1.2 * expected
    assert seconds(spec, dataclasses.replace(one, stages=4), 1) < 0.75 * expected


def test_many_rows_are_left_to_the_vendor_and_few_are_not():
    best = plan_of(spec_of(NF4, 8192, 8192)).best
    assert best[2048].kernel == "dequantize"
    assert all(tile.kernel != "dequantize" for most, tile in best.items() if most <= 256)
    # What is multiplied as integers has no such product, nor has float32.
    for compute in ("int8", "float32"):
        assert not plan_of(spec_of(INT8, 8192, 8192, compute=compute)).decodes


def test_scales_go_into_the_weight_where_there_are_more_sums_than_weights():
    found = plan_of(spec_of(NF4, 8192, 8192)).best
    kernels = {most: tile.kernel for most, tile in found.items()}
    assert kernels[16] == "gemm"
    assert kernels[128] == kernels[256] == "scaled"
    others = (FAMILIES[name] for name in FAMILIES if name != "sm_90")
    for gpu in others:
        tiles = plan_of(spec_of(NF4, 8192, 8192), gpu).tiles
        assert all(tile.kernel != "scaled" for tile in tiles)


def test_a_program_alone_on_its_processor_takes_longer():
    """As measured: two of 128 x 128 codes beside one another beat one of twice the rows."""
    spec = spec_of(INT8, 8192, 8192, compute="int8")
    two, one = (Tile("gemm", rows, 128, 128, 1, warps, 3) for rows, warps in ((128, 4), (256, 8)))
    assert seconds(spec, two, 2048) < seconds(spec, one, 2048)


def test_sums_of_an_epilogue_cost_their_way_through_memory():
    plain, gated = (
        spec_of(NF4, 8192, 8192),
        spec_of(NF4, 8192, 8192, epilogue=Epilogue.bias("float32")),
    )
    tile = Tile("dequantize", 0, 32, 128, 1, 4, 1, 8192)
    more = seconds(gated, tile, 2048) - seconds(plain, tile, 2048)
    assert more == pytest.approx(8 * 2048 * 8192 / H100.bandwidth + cost.LAUNCH)
    assert cost.is_direct(plain)
    assert not cost.is_direct(gated)


def test_amd_has_no_float32_sums_of_a_library():
    gated = spec_of(NF4, 8192, 8192, epilogue=Epilogue.bias("float32"))
    assert not plan_of(gated, FAMILIES["gfx942"]).decodes
    assert plan_of(spec_of(NF4, 8192, 8192), FAMILIES["gfx942"]).decodes


def test_scratch_is_bounded():
    tiles = plan_of(spec_of(NF4, 32768, 8192)).tiles
    chunks = {tile.chunk for tile in tiles if tile.kernel == "dequantize"}
    assert chunks
    assert all(2 * chunk * 8192 <= 256 << 20 for chunk in chunks)


def test_what_does_not_fit_costs_infinitely():
    spec = spec_of(NF4, 4096, 4096)
    assert seconds(spec, Tile("gemm", 128, 128, 64, 1, 4, 3), 128) == math.inf
    big = Tile("gemm", 128, 128, 64, 1, 8, 3)
    assert seconds(spec, big, 128) < math.inf
    assert seconds(spec, big, 128, FAMILIES["sm_100"]) == math.inf


def test_without_a_gpu_tiles_are_an_h100s():
    tiles = plan_of(spec_of(INT8, 4096, 4096, compute="int8"), ANY).variants
    assert tiles == plan_of(spec_of(INT8, 4096, 4096, compute="int8")).variants
