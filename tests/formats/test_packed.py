"""`PackedWeight` behaves as the tensor that it stands for."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fxquant import errors
from fxquant.formats import Encoding, PackedWeight, pack

NF4 = Encoding(4, "nf4", (64,), scale=Encoding(8, "dynamic8", (256,), offset=True))
INT8 = Encoding(8, block=(1, -1))


def weight(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def packed_linear(encoding: Encoding = NF4) -> nn.Linear:
    linear = nn.Linear(50, 30)
    linear.weight = nn.Parameter(pack(weight(30, 50), encoding), requires_grad=False)
    return linear


def same_parts(a: PackedWeight, b: PackedWeight) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.tensors(), b.tensors(), strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_looks_like_the_original(dtype: torch.dtype) -> None:
    original = weight(3, 5, 40, dtype=dtype)
    packed = pack(original, NF4)
    assert (packed.shape, packed.dtype, packed.device) == (
        original.shape,
        dtype,
        original.device,
    )
    assert packed.is_contiguous()
    assert not packed.requires_grad
    assert packed.dequantize().dtype == dtype
    assert packed.dequantize(torch.float32).dtype == torch.float32


def test_reading_operations_see_the_decoded_tensor() -> None:
    packed = pack(weight(30, 50), NF4)
    dense = packed.dequantize()
    assert type(dense) is torch.Tensor
    for operation in (
        lambda w: w + 1,
        lambda w: w.t(),
        lambda w: w[3:7, ::2],
        lambda w: w.sum(0),
        lambda w: torch.cat([w, w]),
        lambda w: w.view(10, 150),
        lambda w: w @ torch.ones(50),
        lambda w: w.to(torch.int32),
        lambda w: torch.where(w > 0, w, 0.0),
        lambda w: F.embedding(torch.tensor([1, 2]), w),
        lambda w: torch.empty_like(w).copy_(w),
    ):
        result = operation(packed)
        assert type(result) is torch.Tensor
        assert torch.equal(result, operation(dense))
    assert packed.tolist() == dense.tolist()
    assert (packed.numpy() == dense.numpy()).all()
    assert packed[1, 2].item() == dense[1, 2].item()


def test_writing_operations_are_encoded_again() -> None:
    packed = pack(weight(30, 50), INT8)
    codes = packed.tensors()[0]
    dense = packed.dequantize()
    assert packed.mul_(2.0) is packed
    assert torch.equal(packed.dequantize(), dense * 2.0)
    packed.zero_()
    assert not packed.dequantize().any()
    assert packed.tensors()[0] is codes
    torch.add(torch.zeros(30, 50), dense, out=packed)
    assert torch.equal(packed.dequantize(), dense)
    nn.init.ones_(packed)
    assert torch.equal(packed.dequantize(), torch.ones(30, 50))


def test_refuses_to_write_what_it_cannot_hold() -> None:
    packed = pack(weight(30, 50), NF4)
    before = packed.clone()
    with pytest.raises(errors.WeightError, match="NaN or Inf"):
        packed.fill_(float("nan"))
    assert same_parts(packed, before)


def test_views_are_copies() -> None:
    packed = pack(weight(30, 50), NF4)
    before = packed.clone()
    packed[0].zero_()
    assert same_parts(packed, before)


def test_clone_and_detach() -> None:
    packed = pack(weight(30, 50), NF4)
    cloned, detached = packed.clone(), packed.detach()
    assert type(cloned) is type(detached) is PackedWeight
    assert same_parts(cloned, packed)
    assert cloned.tensors()[0].data_ptr() != packed.tensors()[0].data_ptr()
    assert detached.tensors()[0].data_ptr() == packed.tensors()[0].data_ptr()


def test_casts_change_the_nominal_dtype_only() -> None:
    packed = pack(weight(30, 50), NF4)
    half = packed.half()
    assert isinstance(half, PackedWeight)
    assert half.dtype == torch.float16
    assert same_parts(half, packed)
    assert torch.equal(half.dequantize(), packed.dequantize().half())
    assert type(packed.long()) is torch.Tensor


def test_moves_its_parts() -> None:
    moved = pack(weight(30, 50), NF4).to("meta")
    assert isinstance(moved, PackedWeight)
    assert moved.device.type == "meta"
    assert {part.device.type for part in moved.tensors()} == {"meta"}


def test_copy_from_packed_and_dense() -> None:
    target = pack(torch.zeros(30, 50), NF4)
    source = pack(weight(30, 50), NF4)
    target.copy_(source)
    assert same_parts(target, source)
    target.copy_(weight(30, 50) * 2)
    assert same_parts(target, pack(weight(30, 50) * 2, NF4))
    target.copy_(pack(weight(30, 50), INT8))
    assert same_parts(target, pack(pack(weight(30, 50), INT8).dequantize(), NF4))
    dense = torch.empty(30, 50)
    assert dense.copy_(source) is dense
    assert torch.equal(dense, source.dequantize())
    with pytest.raises(RuntimeError):
        target.copy_(torch.zeros(7, 50))


def test_module_casts_and_state_dict() -> None:
    linear = packed_linear()
    expected = linear.weight.dequantize()
    linear.half()
    assert isinstance(linear.weight, PackedWeight)
    assert isinstance(linear.weight, nn.Parameter)
    assert linear.weight.dtype == linear.bias.dtype == torch.float16
    linear.float()
    assert torch.equal(linear.weight.dequantize(), expected)
    linear.to(torch.bfloat16).to("cpu").to(memory_format=torch.channels_last)
    other = packed_linear()
    other.weight.zero_()
    assert other.load_state_dict(linear.state_dict()).missing_keys == []
    assert same_parts(other.weight, linear.weight)
    dense = nn.Linear(50, 30)
    dense.load_state_dict(linear.state_dict())
    assert type(dense.weight.data) is torch.Tensor
    dense.load_state_dict(linear.state_dict(), assign=True)
    assert isinstance(dense.weight, PackedWeight)
    with pytest.raises(RuntimeError, match="size mismatch"):
        nn.Linear(51, 30).load_state_dict(linear.state_dict())


@pytest.mark.parametrize("weights_only", [True, False])
@pytest.mark.parametrize("encoding", [NF4, INT8, Encoding(4, tuple(range(16)), (16,))])
def test_save_and_load(encoding: Encoding, weights_only: bool) -> None:
    linear = packed_linear(encoding)
    buffer = io.BytesIO()
    torch.save(linear.state_dict(), buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=weights_only)["weight"]
    assert isinstance(loaded, PackedWeight)
    assert loaded.encoding == encoding
    assert same_parts(loaded, linear.weight)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_deepcopy_and_pickle(duplicate) -> None:
    model = nn.Sequential(packed_linear(), packed_linear())
    model[1].weight = model[0].weight
    model[0].weight.tag = "kept by copy"
    other = duplicate(model)
    assert isinstance(other[0].weight, PackedWeight)
    assert isinstance(other[0].weight, nn.Parameter)
    assert other[0].weight is other[1].weight
    assert same_parts(other[0].weight, model[0].weight)
    assert other[0].weight.tensors()[0].data_ptr() != model[0].weight.tensors()[0].data_ptr()
    assert not other[0].weight.requires_grad


def test_repr_names_encoding_and_shape() -> None:
    text = repr(packed_linear().weight)
    assert text.startswith("PackedWeight parameter(shape=(30, 50), dtype=torch.float32")
    assert str(NF4) in text
    assert repr(pack(weight(30, 50), NF4)).startswith("PackedWeight(shape")


def test_gradient_reaches_the_activation() -> None:
    linear = packed_linear()
    x = torch.randn(7, 50, requires_grad=True)
    linear(x).sum().backward()
    assert torch.allclose(x.grad, linear.weight.dequantize().sum(0).expand(7, 50))
    assert linear.weight.grad is None


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # torch's own
@pytest.mark.parametrize("encoding", [NF4, INT8], ids=str)
def test_a_backward_that_is_compiled_decodes_too(encoding: Encoding) -> None:
    """Its tracer shows the weight fake parts, under no mode that would make tables fake."""
    linear, x = packed_linear(encoding), torch.randn(3, 50, requires_grad=True)
    (eager,) = torch.autograd.grad(linear(x).sin().sum(), x)
    torch._dynamo.reset()
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager")):
        linear(x).sin().sum().backward()
    torch.testing.assert_close(x.grad, eager)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_as_a_parameter(dynamic: bool) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(20, 50)
            self.linear = packed_linear()
            self.embedding.weight = nn.Parameter(pack(weight(20, 50), NF4), requires_grad=False)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.linear(self.embedding(ids))

    model = Model()
    compiled = torch.compile(model, backend="aot_eager", dynamic=dynamic, fullgraph=True)
    for count in (5, 9):
        ids = torch.arange(count)
        torch.testing.assert_close(compiled(ids), model(ids))


def test_stable_hash() -> None:
    a, b = pack(weight(30, 50), NF4), pack(weight(30, 50) * 2, NF4)
    assert a._stable_hash_for_caching() == b._stable_hash_for_caching()
    assert a._stable_hash_for_caching() != a.half()._stable_hash_for_caching()
    assert a._stable_hash_for_caching() != pack(weight(30, 50), INT8)._stable_hash_for_caching()


def test_bits_per_weight() -> None:
    assert pack(weight(64, 256), INT8).bits_per_weight == 8 + 32 / 256
    assert pack(weight(1024, 1024), NF4).bits_per_weight == pytest.approx(4.127, abs=5e-4)


def test_what_guards_compare_at_each_call_is_the_same_object() -> None:
    """Dynamo compares metadata with a deep copy; other metadata must be told apart all the same."""
    first, second = pack(torch.randn(8, 64), NF4), pack(torch.randn(8, 64), INT8)
    names, metadata = first.__tensor_flatten__()
    kept = copy.deepcopy(metadata)
    assert kept[0] is metadata[0]
    assert first.__tensor_flatten__()[1] == kept
    assert second.__tensor_flatten__()[1] != kept
    assert first.to(torch.bfloat16).__tensor_flatten__()[1] != kept
    names.append("changed by whoever asked")
    assert first.__tensor_flatten__()[0] == names[:-1]
    parts = zip(names[:-1], first.tensors(), strict=True)
    assert all(getattr(first, name) is part for name, part in parts)
