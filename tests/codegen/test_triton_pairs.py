"""Few rows of x, and codes looked up in pairs in a table that assembly makes in shared memory."""

import itertools
import math
import re

import numpy as np
import pytest
import torch

from fxquant.codegen.epilogue import Epilogue
from fxquant.codegen.indexing import WeightIndex
from fxquant.codegen.spec import KernelSpec, WeightOperand
from fxquant.codegen.triton import words
from fxquant.codegen.triton.gpu import ANY, FAMILIES
from fxquant.codegen.triton.plan import plan_for
from fxquant.codegen.triton.tiles import GEMV_ROWS
from fxquant.formats import Encoding
from fxquant.runtime import cubin, tiles
from tests.codegen import harness, ptx
from tests.codegen.test_cubin import WIDE
from tests.codegen.test_triton_interpreted import check
from tests.codegen.test_triton_joined import GATED
from tests.codegen.test_triton_joined import check as check_joined
from tests.codegen.test_triton_words import CHANNELS, INT4, NF4, spec_of

NVIDIA = ("sm_80", "sm_90", "sm_100")
H100 = FAMILIES["sm_90"]
FP4 = Encoding(4, "fp4")


def candidates(spec, rows=1, gpu=H100):
    """The tiles that tuning tries for few rows, behind that of more."""
    return plan_for(spec, WeightIndex.of(spec.weight), gpu).variants.get(rows, ())[1:]


def use(module, tile):
    """Runs a tile for any number of rows."""
    entry = tiles.variant(module, tile)
    module.VARIANTS.clear()
    module.VARIANTS[tile.rows] = entry


@pytest.fixture
def load(tmp_path, monkeypatch):
    """Loads a module for the interpreter, with one of its tiles for few rows."""
    ptx.interpret_assembly(monkeypatch)

    def loaded(spec, wanted=lambda tile: tile.split == 1, rows=1):
        module = harness.load(spec, tmp_path, interpreted=True, gpu=H100)
        use(module, next(filter(wanted, candidates(spec, rows))))
        return module

    return loaded


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("encoding", [NF4, FP4, INT4])
def test_every_pair_is_looked_up_in_every_copy(tmp_path, encoding, dtype):
    """The table as the printed kernel fills it, read by its own assembly."""
    book, dtype = words.book_of(encoding), getattr(torch, dtype)
    spec = spec_of(harness.whole(encoding, 16, 2048), str(dtype).removeprefix("torch."))
    source = harness.load(spec, tmp_path, interpreted=False, gpu=H100)
    shared = ptx.Shared()
    aside, fill, _, look_up = assemblies(source)
    (base,) = ptx.run(aside, 1, [], shared)
    levels = torch.tensor(book).to(dtype).float()
    assert [
        x for first in levels.tolist() for second in levels.tolist() for x in (first, second)
    ] == source.LEVEL_PAIRS
    pairs = np.array(source.LEVEL_PAIRS, np.float32).view(np.uint64)
    byte, two = np.arange(256)[:, None], np.arange(8)[None, :]
    where = (base + byte * 128 + two * 16).astype(np.uint32)
    ptx.run(fill, 1, [where, np.broadcast_to(pairs[:, None], where.shape)], shared)
    drawn = np.random.default_rng(0).integers(0, 2**32, (512, 16), dtype=np.uint32)
    copy = np.broadcast_to(np.arange(16, dtype=np.uint32) * 8, drawn.shape)
    found = ptx.run(look_up, 8, [drawn, copy, base], shared)
    codes = torch.from_numpy(drawn.view(np.uint8).reshape(*drawn.shape, 4).copy())
    nibbles = torch.stack((codes >> 4, codes & 15), -1).reshape(*drawn.shape, 8).long()
    for number, values in enumerate(found):
        want = levels[nibbles[..., number]].numpy()
        assert np.array_equal(values.view(np.float32), want)
    assert not np.array_equal(found[0], found[1])


def assemblies(module):
    """The texts of inline assembly around the table, in their order."""
    text = module.__loader__.get_source(module.__name__)
    start = text.index("def pair_table")
    found = re.findall(r'inline_asm_elementwise\(\s*("""|")(.*?)\1', text[start:], re.DOTALL)
    return [assembly for _, assembly in found[:4]]


@pytest.mark.parametrize(
    "weight",
    [
        harness.whole(NF4, 32, 2048),
        harness.whole(NF4, 16, 2560),
        harness.whole(NF4, 20, 1216),
        harness.whole(FP4, 48, 1088),
        harness.whole(INT4, 16, 3200),
        harness.whole(CHANNELS, 32, 1280),
        WeightOperand(NF4, (96, 4096), None, 32, 2048, (0, 4096, 1), 64 * 4096 + 2048),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_products(load, weight, dtype):
    """Without a matrix unit bfloat16 can be interpreted, too."""
    spec = spec_of(weight, dtype, Epilogue.bias(dtype))
    module = load(spec)
    assert "gemv" in harness.build_for(module, 1).name
    check(spec, module, 1)


@pytest.mark.parametrize("rows", GEMV_ROWS)
def test_more_rows_than_a_tile_has_and_fewer(load, rows):
    spec = spec_of(harness.whole(NF4, 16, 1216), epilogue=Epilogue.bias("float16"))
    module = load(spec, rows=rows)
    for count in (1, 3, rows):
        check(spec, module, count)


@pytest.mark.parametrize("rows", GEMV_ROWS)
def test_every_tile(load, rows):
    spec = spec_of(harness.whole(NF4, 16, 5120))
    found = candidates(spec, rows)
    assert len({(tile.n, tile.k, tile.split) for tile in found}) == len(found) >= 2
    for tile in found:
        check(spec, load(spec, lambda other, tile=tile: other == tile, rows), rows)


def test_splits(load):
    spec = spec_of(harness.whole(NF4, 16, 32768), epilogue=Epilogue.bias("float16"))
    module = load(spec, lambda tile: tile.split > 1)
    check(spec, module, 1)


def test_several_weights_and_another_x(load):
    spec = KernelSpec(
        harness.whole(NF4, 32, 1152), "float32", *["float16"] * 2, GATED, "words", weights=2
    )
    for rows in (1, 2):
        check_joined(spec, load(spec, rows=rows), rows)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("scale", [math.nan, math.inf])
def test_a_scale_that_is_no_number_spoils_its_own_outputs(load, scale):
    """Also one at the end, which threads beyond it read: 1088 inputs are no whole tile."""
    spec = spec_of(harness.whole(FP4, 32, 1088))
    tensors, x = harness.stored(FP4, (32, 1088)), harness.activation(spec, 1)
    clean = load(spec).run(x, tensors, [])
    tensors[1].view(-1)[[0, 2 * 17 - 1]] = scale
    found = load(spec).run(x, tensors, [])
    assert not found[:, :2].isfinite().any()
    assert found[:, 1].isnan().any() == math.isnan(scale)
    assert torch.equal(found[:, 2:], clean[:, 2:])


@pytest.mark.parametrize(
    "spec",
    [
        spec_of(harness.whole(NF4, 8, 64, 4096), epilogue=Epilogue.bias("float16", "en")),
        spec_of(harness.whole(NF4, 30, 4096)),
    ],
    ids=["a matrix for each of a batch", "outputs that no tile divides"],
)
def test_what_has_no_such_tile(spec):
    assert candidates(spec) == ()
    assert "level_pairs" not in words.tables(plan_for(spec, WeightIndex.of(spec.weight), H100))


def test_tuning_alone_chooses_them():
    """What no GPU has run does not come before what one has."""
    spec = spec_of(harness.whole(NF4, 4096, 4096), "bfloat16")
    for family in NVIDIA:
        plan = plan_for(spec, WeightIndex.of(spec.weight), FAMILIES[family])
        assert plan.has("gemv")
        assert min(plan.best) >= 16
        assert {plan.variants[rows][0] for rows in GEMV_ROWS} == {plan.variants[16][0]}
    for gpu in (ANY, FAMILIES["gfx942"]):
        assert not plan_for(spec, WeightIndex.of(spec.weight), gpu).has("gemv")


def test_other_kernels_need_no_mask_for_their_sake():
    spec = spec_of(harness.whole(NF4, 4096, 11008), "bfloat16")
    plan = plan_for(spec, WeightIndex.of(spec.weight), H100)
    assert any(11008 % tile.k for tile in candidates(spec))
    assert plan.whole_k
    assert plan.decodes


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The machine code of the first tiles for few rows, by the device."""
    folder = tmp_path_factory.mktemp("printed")
    spec = spec_of(harness.whole(NF4, 4096, 8192), "bfloat16")
    found = {}
    for family in NVIDIA:
        module = harness.load(spec, folder, interpreted=False, gpu=FAMILIES[family])
        found[family] = []
        for rows in GEMV_ROWS:
            for tile in candidates(spec, rows, FAMILIES[family])[: 3 if family == "sm_90" else 1]:
                build = cubin.Build("gemv", *tiles.variant(module, tile))
                found[family].append((tile, cubin.compile_for(family, module, build)))
    return found


@pytest.mark.parametrize("family", NVIDIA)
def test_machine_code(built, family):
    """A shift, an insertion and a look-up a pair, a multiply-add a weight and row, little else."""
    processor = FAMILIES[family].processor
    for tile, binary in built[family]:
        assert binary.spills == 0
        assert 32 << 10 <= binary.shared_bytes <= 40 << 10
        assert binary.occupancy * processor.warps >= 8
        assert binary.count("[A-Z]*MMA") == 0
        weights, steps = tile.n * tile.k / (32 * tile.warps), 8192 / tile.k / tile.split
        # Beside look-ups warps read one another's sums.
        looked_up = binary.count(r"LDS\.64")
        assert weights / 2 <= looked_up
        assert binary.count("LDS") <= weights / 2 + 2 * tile.n * tile.rows
        assert binary.count("LOP3") <= weights / 2 + 80
        multiplied = binary.count("FFMA") + 2 * binary.count("FFMA2")
        assert weights * tile.rows <= multiplied <= 1.1 * weights * tile.rows + 8
        # Codes of the first step, and in the loop those of the next.
        assert binary.count(WIDE) >= tile.n * (2 if steps > 1 else 1)
    assert {tile.rows for tile, _ in built[family]} == {*GEMV_ROWS}


@pytest.mark.parametrize("family", NVIDIA)
def test_the_table_is_there_before_anyone_reads_it(built, family):
    for tile, binary in built[family]:
        order = [name for name in binary.listing if re.match(r"STS\.128|BAR|LDS\.64", name)]
        runs = [name for name, _ in itertools.groupby(n.partition(".")[0] for n in order)]
        assert runs[:3] == ["STS", "BAR", "LDS"], tile
