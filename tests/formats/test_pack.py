"""Encoding and decoding against definitions written out element by element."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from fxquant import errors
from fxquant.formats import Encoding, decode, levels, pack, quantizers
from fxquant.formats import encode as encode_module
from fxquant.formats.bits import pack_codes, packed_size
from fxquant.formats.blocks import block_grid
from fxquant.formats.decode import decode_scales
from tests.formats.test_encoding import encodings

DOUBLE = Encoding(8, "dynamic8", (256,), offset=True)
E4M3 = Encoding(8, "e4m3", (256,), offset=True)
UNIFORM = [
    Encoding(8, block=(1, -1)),
    Encoding(8, block=(-1, 1)),
    Encoding(8, block=(1, 16)),
    Encoding(4, block=(1, 16)),
    Encoding(4, block=(16, 16), zero_point=True),
    Encoding(2, block=(16,), full_range=True),
    Encoding(2, block=(16,)),
    Encoding(8, zero_point=True),
    Encoding(8, block=(-1,), full_range=True),
]


def seeded(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def blocks_of(encoding: Encoding, shape: tuple[int, ...]) -> list[torch.Tensor]:
    """The flat element numbers of every block, by the definition and no other way."""
    numbers = torch.arange(math.prod(shape))
    if encoding.is_flat:
        size = encoding.block[0]
        return list(numbers.split(size if size > 0 else len(numbers)))
    numbers = numbers.view(shape)
    block = (1,) * (len(shape) - len(encoding.block)) + encoding.block
    cuts = [
        [slice(i, i + extent) for i in range(0, size, extent)]
        for size, extent in zip(
            shape, (s if e == -1 else e for s, e in zip(shape, block, strict=True)), strict=True
        )
    ]
    return [numbers[where].reshape(-1) for where in product(*cuts)]


def unpack_codes(packed: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """The codes inside bytes, the first in the highest bits."""
    shifts = torch.arange(8 - bits, -1, -bits, dtype=torch.uint8)
    return ((packed.view(-1, 1) >> shifts) & (2**bits - 1)).view(-1)[:count]


@st.composite
def fitting(draw: st.DrawFn) -> tuple[Encoding, tuple[int, ...]]:
    encoding = draw(encodings())
    least = max(1, len(encoding.block)) if not encoding.is_flat else 1
    shape = draw(st.lists(st.integers(1, 40), min_size=least, max_size=max(least, 4)))
    while math.prod(shape) > 20000:
        shape[shape.index(max(shape))] //= 2
    return encoding, tuple(shape)


@settings(max_examples=150, deadline=None)
@given(fitting(), st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_every_element_decodes_to_level_times_scale_of_its_block(case, dtype) -> None:
    encoding, shape = case
    weight = torch.randn(shape).to(dtype)
    packed = pack(weight, encoding)
    parts = dict(zip(encoding.parts, packed.tensors(), strict=True))
    blocks = blocks_of(encoding, shape)
    assert len(parts["scales"]) == len(blocks) == block_grid(encoding, shape).count
    scales = decode_scales(parts, encoding)
    if encoding.bits == 8:
        codes = parts["codes"].long()
    else:
        codes = unpack_codes(parts["codes"], encoding.bits, weight.numel()).long()
        if encoding.is_uniform and not encoding.zero_point:
            codes = torch.where(codes >= 2 ** (encoding.bits - 1), codes - 2**encoding.bits, codes)
    book = levels(encoding)
    values = codes.float() if book is None else torch.tensor(book)[codes]
    owner = torch.empty(weight.numel(), dtype=torch.long)
    sizes = torch.tensor([len(numbers) for numbers in blocks])
    owner[torch.cat(blocks)] = torch.arange(len(blocks)).repeat_interleave(sizes)
    zeros = parts["zeros"].float()[owner] if encoding.zero_point else 0.0
    expected = (values - zeros) * scales[owner]
    assert torch.equal(packed.dequantize(torch.float32), expected.view(shape))
    assert torch.equal(packed.dequantize(), expected.view(shape).to(dtype))


@settings(max_examples=100, deadline=None)
@given(fitting())
def test_the_code_is_the_nearest_one(case) -> None:
    """No other code would have been closer, judged with the unencoded scale."""
    encoding, shape = case
    single = Encoding(**{**vars(encoding), "scale": None})
    weight = torch.randn(shape)
    packed = pack(weight, single)
    parts = dict(zip(single.parts, packed.tensors(), strict=True))
    decoded = packed.dequantize().view(-1).double()
    book = levels(single)
    if book is None:
        low, high = (
            (0, 2**single.bits - 1)
            if single.zero_point
            else (
                -(2 ** (single.bits - 1)) + (not single.full_range),
                2 ** (single.bits - 1) - 1,
            )
        )
        book = tuple(float(code) for code in range(low, high + 1))
    for i, numbers in enumerate(blocks_of(single, shape)):
        zero = float(parts["zeros"][i]) if single.zero_point else 0.0
        choices = (torch.tensor(book).double() - zero) * float(parts["scales"][i])
        x = weight.view(-1)[numbers].double()
        best = (x[:, None] - choices).abs().amin(1)
        found = (x - decoded[numbers]).abs()
        # Products round once in float32, and an 8-bit dynamic map looks up on a grid of 65536.
        slack = choices.abs().amax() * (2**-22 + (2.0**-15 if single.levels == "dynamic8" else 0))
        assert bool((found <= best + slack).all())


@pytest.mark.parametrize("encoding", UNIFORM, ids=str)
def test_uniform_error_is_half_a_step(encoding: Encoding) -> None:
    weight = seeded(48, 33)
    parts = dict(zip(encoding.parts, pack(weight, encoding).tensors(), strict=True))
    decoded = pack(weight, encoding).dequantize()
    for i, numbers in enumerate(blocks_of(encoding, (48, 33))):
        error = (weight - decoded).view(-1)[numbers].abs().amax()
        # The full range has one step more on one side only: there the largest value of the other
        # side may be a whole step away. A zero point is rounded, which costs as much again.
        steps = 1.0 if encoding.full_range or encoding.zero_point else 0.5
        assert error <= steps * parts["scales"][i].abs() * (1 + 1e-5)


def test_int8_is_rounding_to_nearest() -> None:
    weight = seeded(7, 31)
    codes, scales = pack(weight, Encoding(8, block=(1, -1))).tensors()
    assert codes.dtype == torch.int8
    assert torch.equal(scales, weight.abs().amax(1) / 127)
    assert torch.equal(codes.view(7, 31), torch.round(weight / scales[:, None]).to(torch.int8))


def test_int2_fields() -> None:
    weight = torch.tensor([1.0, 0.0, -1.0, -2.0] * 4)
    codes, scales = pack(weight, Encoding(2, block=(16,), full_range=True)).tensors()
    assert codes.tolist() == [0b01_00_11_10] * 4
    assert scales.tolist() == [1.0]


def test_full_range_meets_an_extreme_of_either_sign() -> None:
    for sign in (1.0, -1.0):
        weight = sign * torch.cat([torch.tensor([8.0]), seeded(15)])
        decoded = pack(weight, Encoding(4, block=(16,), full_range=True)).dequantize()
        assert decoded[0] == weight[0]


def test_zero_points_make_zero_exact_and_use_the_whole_range() -> None:
    weight = torch.rand(16) + 3.0
    weight[3] = 0.0
    codes, scales, zeros = pack(weight, Encoding(8, block=(16,), zero_point=True)).tensors()
    assert zeros.tolist() == [0]
    assert int(codes[3]) == 0
    assert int(codes.max()) == 255
    assert scales[0] == pytest.approx(float(weight.max()) / 255)


@pytest.mark.parametrize("encoding", [*UNIFORM, Encoding(4, "nf4"), Encoding(4, "fp4")], ids=str)
@pytest.mark.parametrize("value", [0.0, 1e-45, 1e-40, 3e38])
def test_blocks_at_the_edges(encoding: Encoding, value: float) -> None:
    weight = torch.full((33, 17), value)
    weight[::2] = -value
    decoded = pack(weight, encoding).dequantize()
    assert bool(torch.isfinite(decoded).all())
    # Two roundings of a scale may carry the largest number a little beyond itself; a rounded zero
    # point by up to half a step, of which at least 15 make up the range.
    beyond = 1 / 15 if encoding.zero_point else 1e-6
    assert float(decoded.abs().max()) <= value * (1 + beyond) * (1 + 1e-6) + 1e-38 * (value < 1)
    if value == 0.0:
        assert not decoded.any()


def test_zeros_decode_to_zeros_with_double_quantized_scales() -> None:
    weight = seeded(64, 64)
    weight[3] = 0.0
    for scale in (DOUBLE, E4M3):
        assert not pack(weight, Encoding(4, "nf4", scale=scale)).dequantize()[3].any()


@pytest.mark.parametrize("clip", [0.5, 0.9, 1.0])
@pytest.mark.parametrize("block", [(64,), (-1,), (1, -1), (-1, 1), (16, 16), (1, 16)], ids=str)
def test_clip_takes_a_quantile_of_each_block(block: tuple[int, ...], clip: float) -> None:
    weight = seeded(37, 50)
    weight[0, 0] = 1000.0
    encoding = Encoding(8, block=block, clip=clip)
    _, scales = pack(weight, encoding).tensors()
    for scale, numbers in zip(scales, blocks_of(encoding, (37, 50)), strict=True):
        magnitudes = weight.view(-1)[numbers].abs().sort().values
        limit = magnitudes[max(1, math.ceil(clip * len(magnitudes))) - 1]
        assert scale == limit / 127
    assert float(pack(weight, encoding).dequantize()[0, 0]) == pytest.approx(float(scales[0]) * 127)


def test_clip_of_mostly_zeros_keeps_what_is_there() -> None:
    weight = torch.zeros(64)
    weight[5] = 3.0
    assert pack(weight, Encoding(8, clip=0.5)).dequantize()[5] == pytest.approx(3.0)


@pytest.mark.parametrize("encoding", [Encoding(4, "nf4"), Encoding(8, block=(-1, 1), clip=0.9)])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_not_finite(encoding: Encoding, bad: float) -> None:
    weight = seeded(50, 50)
    weight[7, 3] = weight[49, 49] = bad
    with pytest.raises(errors.WeightError, match=r"layers\.0\.weight: it holds 2 NaN or Inf"):
        pack(weight, encoding, name="layers.0.weight")


def test_weights_that_cannot_be_packed() -> None:
    encoding = Encoding(4, "nf4")
    for dtype in (torch.int32, torch.complex64, torch.bool, torch.int8):
        with pytest.raises(errors.WeightError, match=f"its dtype is {dtype}"):
            pack(torch.ones(4, 4, dtype=dtype), encoding)
    for shape in ((0,), (3, 0), (0, 5, 2)):
        with pytest.raises(errors.WeightError, match="it is empty"):
            pack(torch.zeros(shape), encoding)
    with pytest.raises(errors.EncodingError, match="no longer than the tensor's 1 dimensions"):
        pack(torch.zeros(4), Encoding(8, block=(1, -1)))
    with pytest.raises(errors.EncodingError, match="offset must be False"):
        pack(torch.zeros(4), Encoding(8, "dynamic8", offset=True))


@pytest.mark.parametrize("name", ["nf4", "fp4"])
def test_comparisons_on_other_devices_give_the_same_codes(name: str, monkeypatch) -> None:
    weight = seeded(33, 65)
    expected = pack(weight, Encoding(4, name)).tensors()[0]
    monkeypatch.setattr(quantizers, "climb_with_numpy", quantizers.climb_with_torch)
    assert torch.equal(pack(weight, Encoding(4, name)).tensors()[0], expected)


def test_a_number_alone() -> None:
    for encoding in (Encoding(4, "nf4"), Encoding(8, block=(-1,)), Encoding(4, block=(1, -1))):
        weight = torch.tensor([[-3.5]])
        assert pack(weight, encoding).dequantize().item() == -3.5


@pytest.mark.parametrize("encoding", [Encoding(4, "nf4", scale=DOUBLE), *UNIFORM[:5]], ids=str)
def test_strides_do_not_matter_and_the_original_is_untouched(encoding: Encoding) -> None:
    whole = seeded(40, 66)
    for view in (whole.t(), whole[::2, 1:], whole[3:, ::3], whole[:, :1].expand(40, 20)):
        before = view.clone()
        packed = pack(view, encoding)
        for a, b in zip(packed.tensors(), pack(before, encoding).tensors(), strict=True):
            assert torch.equal(a, b)
        assert torch.equal(view, before)


@pytest.mark.parametrize(
    "encoding",
    [*UNIFORM, Encoding(4, "nf4", scale=DOUBLE), Encoding(4, "fp4", (-1,)), Encoding(8, "e4m3")],
    ids=str,
)
def test_chunks_do_not_show(encoding: Encoding, monkeypatch) -> None:
    weight = seeded(61, 53)
    whole = pack(weight, encoding).tensors()
    monkeypatch.setattr(encode_module, "CHUNK", 128)
    for a, b in zip(whole, pack(weight, encoding).tensors(), strict=True):
        assert torch.equal(a, b)


@given(st.lists(st.integers(0, 255), min_size=1, max_size=40), st.sampled_from([2, 4, 8]))
def test_bit_packing_round_trip(numbers: list[int], bits: int) -> None:
    codes = torch.tensor(numbers, dtype=torch.uint8) & (2**bits - 1)
    out = torch.empty(packed_size(len(codes), bits), dtype=torch.uint8)
    pack_codes(codes.clone(), bits, out, fill=1)
    assert torch.equal(unpack_codes(out, bits, len(codes)), codes)
    text = "".join(f"{int(code):0{bits}b}" for code in codes)
    text += f"{1:0{bits}b}" * ((-len(codes)) % (8 // bits))
    assert [f"{int(byte):08b}" for byte in out] == [text[i : i + 8] for i in range(0, len(text), 8)]


@pytest.mark.parametrize(
    "encoding", [*UNIFORM, Encoding(4, "nf4", scale=DOUBLE), Encoding(8, "e4m3")], ids=str
)
def test_decode_can_be_traced(encoding: Encoding) -> None:
    packed = pack(seeded(21, 35), encoding)

    def run(*parts: torch.Tensor) -> torch.Tensor:
        return decode(parts, encoding, (21, 35), torch.bfloat16)

    expected = run(*packed.tensors())
    assert expected.shape == (21, 35)
    assert torch.equal(make_fx(run)(*packed.tensors())(*packed.tensors()), expected)
    mode = FakeTensorMode()
    fake = make_fx(run, tracing_mode="fake")(*packed.tensors())
    assert torch.equal(fake(*packed.tensors()), expected)
    with mode:
        out = run(*(mode.from_tensor(part) for part in packed.tensors()))
    assert (out.shape, out.dtype) == ((21, 35), torch.bfloat16)


class Allocations(TorchDispatchMode):
    """The largest number of bytes that were alive at once among storages made inside."""

    def __init__(self, given: torch.Tensor) -> None:
        super().__init__()
        self.given = given.untyped_storage().data_ptr()
        self.alive: dict[int, tuple[torch.UntypedStorage, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage.data_ptr() == self.given:
                    continue
                self.alive[storage.data_ptr()] = (storage, storage.nbytes())
        self.alive = {
            key: entry
            for key, entry in self.alive.items()
            if torch._C._storage_Use_Count(entry[0]._cdata) > 1
        }
        self.peak = max(self.peak, sum(size for _, size in self.alive.values()))
        return result


@pytest.mark.parametrize(
    "encoding",
    [
        Encoding(4, "nf4", scale=DOUBLE),
        Encoding(4, "fp4"),
        Encoding(8, block=(1, -1)),
        Encoding(8, block=(-1, 1)),
        Encoding(4, "nf4", (-1,)),
        Encoding(4, block=(-1,), clip=0.99),
        Encoding(8, "e4m3"),
    ],
    ids=str,
)
@pytest.mark.parametrize("turned", [False, True])
def test_extra_memory_is_at_most_two_layers(encoding: Encoding, turned: bool) -> None:
    weight = seeded(2048, 2048).bfloat16()
    pack(weight[:64, :64], encoding)
    with Allocations(weight) as allocations:
        packed = pack(weight.t() if turned else weight, encoding)
    assert sum(part.nbytes for part in packed.tensors()) < allocations.peak <= 2 * weight.nbytes
