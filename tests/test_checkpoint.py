"""Saved files: what goes in comes out, and what is broken is refused with nothing half-loaded."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from fxquant import checkpoint, errors
from fxquant.formats import Encoding, PackedWeight, pack

pytestmark = pytest.mark.usefixtures("few_heights")

DYNAMIC = Encoding(8, "dynamic8", (256,), offset=True)
ENCODINGS = {
    "nf4": Encoding(4, "nf4", (64,), scale=DYNAMIC),
    "fp4": Encoding(4, "fp4", (64,)),
    "int8": Encoding(8, block=(1, -1)),
    "int4": Encoding(4, block=(1, 16), zero_point=True),
    "given": Encoding(2, (-1.0, -0.25, 0.25, 1.0), (16,), scale=Encoding(8, "e4m3", (-1,))),
}


class Model(nn.Module):
    """A tied embedding, a norm with buffers, a plain and a packed product."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embedding = nn.Embedding(21, 33)
        self.norm = nn.BatchNorm1d(33)
        self.hidden = nn.Linear(33, 33)
        self.head = nn.Linear(33, 21, bias=False)
        self.head.weight = self.embedding.weight
        nn.init.normal_(self.norm.running_mean)


def quantized(encoding: Encoding, seed: int = 0) -> Model:
    model = Model(seed)
    model.hidden.weight = packed_parameter(model.hidden.weight, encoding)
    model.embedding.weight = model.head.weight = packed_parameter(model.head.weight, encoding)
    return model


def packed_parameter(weight: torch.Tensor, encoding: Encoding) -> nn.Parameter:
    return nn.Parameter(pack(weight, encoding), requires_grad=False)


def snapshot(model: nn.Module) -> dict[str, torch.Tensor]:
    return {
        name: value.dequantize() if isinstance(value, PackedWeight) else value.detach().clone()
        for name, value in model.state_dict(keep_vars=True).items()
    }


def assert_same(a: nn.Module, b: nn.Module) -> None:
    left, right = snapshot(a), snapshot(b)
    assert left.keys() == right.keys()
    for name, value in left.items():
        assert torch.equal(value, right[name]), name


@pytest.mark.parametrize("encoding", ENCODINGS.values(), ids=ENCODINGS)
def test_round_trip(encoding: Encoding, tmp_path: Path) -> None:
    original, loaded = quantized(encoding), Model(seed=1)
    checkpoint.save(original, tmp_path / "model.safetensors")
    checkpoint.load(loaded, tmp_path / "model.safetensors")
    assert_same(original, loaded)
    assert isinstance(loaded.hidden.weight, PackedWeight)
    assert isinstance(loaded.hidden.weight, nn.Parameter)
    assert loaded.hidden.weight.encoding == encoding
    assert not loaded.hidden.weight.requires_grad
    assert loaded.hidden.bias.requires_grad
    assert loaded.head.weight is loaded.embedding.weight
    for mine, theirs in zip(
        original.hidden.weight.tensors(), loaded.hidden.weight.tensors(), strict=True
    ):
        assert torch.equal(mine, theirs)
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.safetensors"]


@settings(
    max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    shape=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    encoding=st.builds(
        Encoding,
        st.just(4),
        st.sampled_from(["nf4", "fp4"]),
        st.sampled_from([(16,), (64,), (4096,)]),
        st.sampled_from([None, DYNAMIC]),
    ),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
    layout=st.sampled_from(checkpoint.LAYOUTS),
)
def test_any_shape_in_either_layout(shape, encoding, dtype, layout, tmp_path) -> None:
    module, other = nn.Module(), nn.Module()
    module.weight = packed_parameter(torch.randn(shape).to(dtype), encoding)
    other.weight = nn.Parameter(torch.zeros(shape, dtype=dtype))
    checkpoint.save(module, tmp_path / "file", layout=layout)
    checkpoint.load(other, tmp_path / "file")
    assert other.weight.encoding == encoding
    assert_same(module, other)


def test_tied_weights_are_stored_once(tmp_path: Path) -> None:
    checkpoint.save(quantized(ENCODINGS["nf4"]), tmp_path / "file")
    names = safetensors.torch.load_file(tmp_path / "file")
    assert sum(name.endswith(".codes") for name in names) == 2
    checkpoint.save(Model(), tmp_path / "dense")
    assert "head.weight" not in safetensors.torch.load_file(tmp_path / "dense")
    loaded = Model(seed=1)
    checkpoint.load(loaded, tmp_path / "dense")
    assert_same(Model(), loaded)


def test_a_file_without_the_second_of_two_tied_names(tmp_path: Path) -> None:
    state = {k: v for k, v in Model().state_dict().items() if k != "head.weight"}
    safetensors.torch.save_file(state, tmp_path / "file")
    loaded = Model(seed=1)
    checkpoint.load(loaded, tmp_path / "file")
    assert_same(Model(), loaded)


def test_views_of_one_tensor_are_stored_apart(tmp_path: Path) -> None:
    model, other = nn.Module(), nn.Module()
    both = torch.randn(2, 5)
    for i in range(2):
        model.register_buffer(f"row{i}", both[i])
        other.register_buffer(f"row{i}", torch.zeros(5))
    model.register_buffer("turned", both.t())
    other.register_buffer("turned", torch.zeros(5, 2))
    checkpoint.save(model, tmp_path / "file")
    checkpoint.load(other, tmp_path / "file")
    assert_same(model, other)


def test_takes_the_models_dtype_and_keeps_the_files_on_meta(tmp_path: Path) -> None:
    checkpoint.save(quantized(ENCODINGS["nf4"]), tmp_path / "file")
    half = Model(seed=1).half()
    checkpoint.load(half, tmp_path / "file")
    assert half.hidden.weight.dtype == half.hidden.bias.dtype == torch.float16
    with torch.device("meta"):
        empty = Model()
    checkpoint.load(empty, tmp_path / "file")
    assert_same(empty, quantized(ENCODINGS["nf4"]))


def test_replaces_packed_by_dense(tmp_path: Path) -> None:
    checkpoint.save(Model(), tmp_path / "file")
    loaded = quantized(ENCODINGS["int8"], seed=1)
    checkpoint.load(loaded, tmp_path / "file")
    assert type(loaded.hidden.weight) is nn.Parameter
    assert_same(loaded, Model())


def test_compiled_models_have_plain_names(tmp_path: Path) -> None:
    model = quantized(ENCODINGS["nf4"])
    checkpoint.save(torch.compile(model, backend="eager"), tmp_path / "file")
    loaded = Model(seed=1)
    checkpoint.load(torch.compile(loaded, backend="eager"), tmp_path / "file")
    assert_same(loaded, model)


def refused(path: Path, match: str, model: nn.Module | None = None) -> None:
    """Loading fails with one sentence, and leaves no trace in the model."""
    model = model or quantized(ENCODINGS["fp4"], seed=1)
    before = snapshot(model)
    identities = [id(value) for value in model.state_dict(keep_vars=True).values()]
    with pytest.raises(errors.CheckpointError, match=match) as caught:
        checkpoint.load(model, path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)
    assert identities == [id(value) for value in model.state_dict(keep_vars=True).values()]
    after = snapshot(model)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_cut_short_anywhere(tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    checkpoint.save(quantized(ENCODINGS["nf4"]), whole)
    content = whole.read_bytes()
    header = struct.unpack("<Q", content[:8])[0]
    places = {0, 1, 7, 8, 9, 8 + header // 2, 8 + header - 1, 8 + header, 8 + header + 1}
    places |= set(range(8 + header, len(content), 997)) | {len(content) - 1}
    for place in sorted(places):
        cut = tmp_path / "cut"
        cut.write_bytes(content[:place])
        refused(cut, "cut short")


def test_not_there_or_not_safetensors(tmp_path: Path) -> None:
    refused(tmp_path / "nothing", "missing")
    refused(tmp_path, "cannot load")
    (tmp_path / "text").write_text("This is no checkpoint at all, however long it may be. " * 9)
    refused(tmp_path / "text", "not a safetensors file")
    torch.save(Model().state_dict(), tmp_path / "pickle")
    refused(tmp_path / "pickle", "not a safetensors file")


def test_missing_and_unexpected_names(tmp_path: Path) -> None:
    state = dict(Model().state_dict())
    del state["hidden.bias"], state["head.weight"]
    safetensors.torch.save_file(state, tmp_path / "file")
    refused(tmp_path / "file", r"lacks 'hidden\.bias'; ")
    state["hidden.bias"] = torch.zeros(33)
    state |= {f"extra{i}": torch.zeros(1) for i in range(5)}
    safetensors.torch.save_file(state, tmp_path / "file")
    refused(tmp_path / "file", "and 2 more, which the model does not")


def test_wrong_shapes(tmp_path: Path) -> None:
    other = quantized(ENCODINGS["nf4"])
    other.hidden = nn.Linear(33, 34)
    checkpoint.save(other, tmp_path / "dense")
    refused(tmp_path / "dense", r"'hidden\.weight' has shape \(34, 33\)")
    other.hidden.weight = packed_parameter(other.hidden.weight, ENCODINGS["nf4"])
    checkpoint.save(other, tmp_path / "packed")
    refused(tmp_path / "packed", r"'hidden\.weight' has shape \(34, 33\)")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda t, m: t.pop("hidden.weight.scales"), "'hidden.weight.scales' is missing"),
        (lambda t, m: t.update({"hidden.weight.codes": torch.zeros(3)}), "its codes are"),
        (lambda t, m: t.update({"hidden.weight.nested": torch.zeros(9)}), "its nested are"),
        (lambda t, m: m["hidden.weight"].pop("shape"), "'shape' is missing"),
        (lambda t, m: m["hidden.weight"].update(shape=[33, 66]), "its codes are"),
        (lambda t, m: m["hidden.weight"].update(shape=[0, 33]), "it is empty"),
        (lambda t, m: m["hidden.weight"].update(shape=["a"]), "is damaged"),
        (lambda t, m: m["hidden.weight"].update(dtype="load"), "is damaged"),
        (lambda t, m: m["hidden.weight"]["encoding"].update(bits=3), "bits must be"),
        (lambda t, m: m["hidden.weight"]["encoding"].update(block=[0]), "block size"),
        (lambda t, m: m["hidden.weight"]["encoding"].update(unknown=1), "unknown"),
        (lambda t, m: m.update({"hidden.weight": 7}), "is damaged"),
    ],
)
def test_parts_that_do_not_fit(change, match: str, tmp_path: Path) -> None:
    checkpoint.save(quantized(ENCODINGS["nf4"]), tmp_path / "file")
    with safetensors.safe_open(tmp_path / "file", "pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    packed = json.loads(metadata[checkpoint.PACKED])
    change(tensors, packed)
    metadata[checkpoint.PACKED] = json.dumps(packed)
    safetensors.torch.save_file(tensors, tmp_path / "file", metadata)
    refused(tmp_path / "file", match)


@pytest.mark.parametrize("text", ["[1]", "{", "7", '"a"'])
def test_metadata_that_is_not_what_it_should_be(text: str, tmp_path: Path) -> None:
    state = {k: v for k, v in Model().state_dict().items() if k != "head.weight"}
    safetensors.torch.save_file(state, tmp_path / "file", {checkpoint.PACKED: text})
    refused(tmp_path / "file", "cannot load")


def test_saving_what_cannot_be_saved(tmp_path: Path, monkeypatch) -> None:
    model = quantized(ENCODINGS["int8"])
    with pytest.raises(errors.CheckpointError, match=r"cannot save 'embedding.* for bitsandbytes"):
        checkpoint.save(model, tmp_path / "file", layout="bitsandbytes")
    with pytest.raises(errors.OptionError, match="layout"):
        checkpoint.save(model, tmp_path / "file", layout="gguf")
    monkeypatch.setattr(nn.Linear, "get_extra_state", lambda self: {"a": 1})
    with pytest.raises(errors.CheckpointError, match=r"'hidden\._extra_state': it is a dict"):
        checkpoint.save(model, tmp_path / "file")
    monkeypatch.undo()
    with pytest.raises(errors.FolderError, match="nowhere"):
        checkpoint.save(Model(), tmp_path / "nowhere" / "file")
    assert list(tmp_path.iterdir()) == []


def test_a_failed_save_keeps_the_old_file(tmp_path: Path, monkeypatch) -> None:
    checkpoint.save(Model(), tmp_path / "file")
    before = (tmp_path / "file").read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(errors.FolderError, match="No space left"):
        checkpoint.save(Model(seed=1), tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1
