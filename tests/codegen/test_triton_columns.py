"""Outlier columns that are gathered for many rows, interpreted: as one by one, however many."""

import pytest
import torch

from fxquant.codegen import Header, reference
from fxquant.codegen.epilogue import Epilogue
from fxquant.codegen.spec import KernelSpec, Outliers
from fxquant.codegen.triton import render
from fxquant.formats import Encoding
from tests.bounds import assert_close_within
from tests.codegen import harness, plain_int8
from tests.codegen.test_triton_outliers import FOUND, INT8, NF4, check, load, planted, spec_of

N, K = 24, 160
ROOM = 128
COUNTS = [0, 1, 15, 16, 17, ROOM, ROOM + 1, K]
# NumPy, which the interpreter computes with, warns of what is defined here.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def some(count, seed=3):
    """So many columns, anywhere."""
    order = torch.randperm(K, generator=torch.Generator().manual_seed(seed))
    return order[:count].sort().values.tolist()


@pytest.fixture
def poisoned(monkeypatch):
    """What is allocated and not written is NaN."""
    empty = torch.empty

    def make(*args, **kwargs):
        made = empty(*args, **kwargs)
        return made.fill_(torch.nan) if made.is_floating_point() else made

    monkeypatch.setattr(torch, "empty", make)


def without_gathering(module):
    """Makes all columns be taken one by one."""
    for most, (kernel, constants, options) in list(module.VARIANTS.items()):
        module.VARIANTS[most] = kernel, {**constants, "GATHERED": 0}, options


def gathered(spec, module, x, tensors):
    _, _, columns, count = module.quantize(x, None)
    tables = module.prepare(x.device) if hasattr(module, "prepare") else []
    names = module.gather.__code__.co_varnames[: module.gather.__code__.co_argcount]
    parts = dict(zip(spec.weight.encoding.parts, tensors, strict=True))
    parts |= {"x": x, "columns": columns, "count": count}
    parts |= {name: tables[number] for number, name in enumerate(table_names(module))}
    return module.gather(*(parts[name] for name in names))


def table_names(module):
    return [name.lower() for name in vars(module) if name.endswith("LEVELS")]


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("encoding", [INT8, NF4])
def test_matrices_are_the_first_columns_and_zeros_up_to_the_next_tile(tmp_path, count, encoding):
    spec = spec_of(FOUND, encoding, (N, K))
    module, tensors = load(spec, tmp_path), harness.stored(encoding, (N, K))
    columns = some(count)
    x = planted(70, columns, k=K)
    apart, x_apart = gathered(spec, module, x, tensors)
    assert apart.shape == (N, ROOM)
    assert x_apart.shape == (70, ROOM)
    found = min(count, ROOM)
    width = -(-found // 16) * 16
    weight = torch.from_numpy(plain_int8.weight_of(spec.weight, tensors).floats[0])
    assert torch.equal(x_apart[:, :found], x[:, columns[:found]].half())
    if encoding is INT8:
        assert torch.equal(apart[:, :found], weight[:, columns[:found]].half())
    else:  # the scale of a scale is rounded elsewhere: a weight may be its neighbour
        assert_close_within(
            apart[:, :found], weight[:, columns[:found]], weight[:, columns[:found]].abs() * 2e-3
        )
    for matrix in (apart, x_apart):
        assert not matrix[:, found:width].any()
        assert matrix[:, width:].isnan().all()


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("rows", [65, 130])
@pytest.mark.parametrize("count", COUNTS)
def test_any_number_of_columns(tmp_path, count, rows):
    spec = spec_of(FOUND, INT8, (N, K))
    module = load(spec, tmp_path)
    columns = some(count)
    x = planted(rows, columns, seed=count, k=K)
    got, sums, limit = check(spec, module, x)
    assert sums.outliers[0].nonzero()[0].tolist() == columns
    without_gathering(module)
    single, _, _ = check(spec, module, x)
    assert_close_within(got, single, limit)
    if count:
        less = x.clone()
        less[:, columns[-1]] = 0
        dropped = reference.run(spec, less, harness.stored(INT8, (N, K)), [])
        assert ((dropped - got).abs() > 2 * limit).any()


@pytest.mark.parametrize("count", [17, ROOM + 1])
@pytest.mark.parametrize(
    ("encoding", "dtype", "transposed"),
    [
        (NF4, "float32", False),
        (Encoding(4, block=(1, 32), zero_point=True), "float16", True),
        (Encoding(8, block=(16,)), "float32", False),
    ],
)
def test_forms_of_weights(tmp_path, encoding, dtype, transposed, count):
    weight = harness.whole(encoding, *((K, 40) if transposed else (40, K)), transposed=transposed)
    found = Outliers(dtype, threshold=6.0)
    spec = KernelSpec(weight, "float16", "int8", "float32", Epilogue(), "apart", found)
    tensors = harness.stored(encoding, weight.shape)
    x = planted(70, some(count), k=K).half()
    limit = harness.int8_bound(spec, x, tensors, [], decoded_apart=True)
    got = load(spec, tmp_path).run(x, tensors, [])
    assert_close_within(got, reference.run(spec, x, tensors, []), 2 * limit)


@pytest.mark.parametrize("count", [40, ROOM + 20])
def test_columns_are_shared_out_in_a_split(tmp_path, count):
    spec = spec_of(FOUND, INT8, (N, 600))
    module = load(spec, tmp_path)
    x = planted(70, range(3, 3 + count), k=600)
    got, _, limit = check(spec, module, x)
    harness.split(module)
    again, _, _ = check(spec, module, x)
    assert_close_within(again, got, limit)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("rows", [64, 130])
@pytest.mark.parametrize("count", [1, 16, 17, K])
def test_given_columns_are_gathered_from_x(tmp_path, count, rows):
    spec = spec_of(Outliers("float16", columns=count), INT8, (N, K))
    module = load(spec, tmp_path)
    room = -(-count // 16) * 16
    assert {constants["GATHERED"] for _, constants, _ in module.VARIANTS.values()} == {0, room}
    x = harness.activation(spec, rows)
    got, _, limit = check(spec, module, x)
    columns = harness.operands(spec, rows)[0].long()
    x_apart = module.gather(x, columns.to(torch.int32))
    assert torch.equal(x_apart[:, :count], x[:, columns].half())
    assert not x_apart[:, count:].any()
    less = x.clone()
    less[:, columns[-1]] = 0
    dropped = reference.run(spec, less, harness.stored(INT8, (N, K)), harness.operands(spec, rows))
    assert ((dropped - got).abs() > 2 * limit).any()


def test_rows_that_do_not_lie_side_by_side(tmp_path):
    spec = spec_of(FOUND, INT8, (N, K))
    x = torch.full((70, 3 * K), 50.0)
    x[:, K : 2 * K] = planted(70, some(20), k=K)
    check(spec, load(spec, tmp_path), x[:, K : 2 * K])


def test_only_many_rows_of_one_matrix_are_worth_it(tmp_path):
    module = load(spec_of(FOUND, INT8, (N, K)), tmp_path)
    room = {most: constants["GATHERED"] for most, (_, constants, _) in module.VARIANTS.items()}
    assert set(room.values()) == {0, ROOM}
    assert all((size == ROOM) == (most > 64) for most, size in room.items())
    gather, calls = module.gather, []
    module.gather = lambda *args: calls.append(len(args)) or gather(*args)
    tensors = harness.stored(INT8, (N, K))
    module.run(planted(64, [3], k=K), tensors, [])
    assert not calls
    module.run(planted(65, [3], k=K), tensors, [])
    assert len(calls) == 1


@pytest.mark.parametrize(
    "other",
    [
        spec_of(FOUND, INT8, (2, N, K)),
        spec_of(Outliers("float16", columns=3), INT8, (2, N, K)),
        spec_of(None, INT8, (N, K)),
    ],
    ids=["batch", "given", "none"],
)
def test_other_products_gather_nothing(other):
    assert "gather" not in render(other, Header()).lower()


def test_a_sixteenth_of_long_rows_has_room(tmp_path):
    module = load(spec_of(FOUND, INT8, (16, 5000)), tmp_path)
    assert module.STEPS["gather"][1]["GATHERED"] == 304
