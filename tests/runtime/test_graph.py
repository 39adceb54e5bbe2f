"""One compiled graph, whatever sizes and parameters arrive: right, and packed once."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxquant
from fxquant.runtime import cpp
from fxquant.runtime.store import STORE
from tests.bounds import assert_close_within, product_bound
from tests.helpers import TwoLayers, compile_, decoded, frozen, packed_of

pytestmark = pytest.mark.usefixtures("few_heights", "fresh")


def test_dynamic_rows_neither_recompile_nor_repack() -> None:
    model = frozen(nn.Linear(64, 64))
    counter = 0

    def count(gm: Any, inputs: Any, **kwargs: Any) -> Any:
        nonlocal counter
        counter += 1
        from fxquant.backend import fxquant as backend

        return backend(gm, inputs, **kwargs)

    compiled = torch.compile(model, backend=count, dynamic=True)
    before = STORE.packed_count
    weight = packed_of(model.weight).dequantize()
    for rows in (2, 3, 17, 64, 5):
        x = torch.randn(rows, 64)
        expected = (x.double() @ weight.double().t()) + model.bias.double()
        assert_close_within(
            compiled(x), expected, product_bound(x, weight, torch.float32, model.bias)
        )
    assert counter == 1
    assert STORE.packed_count == before + 1


def test_automatic_dynamic_shapes_pack_once() -> None:
    model = frozen(nn.Linear(64, 64))
    compiled = compile_(model)
    before = STORE.packed_count
    for rows in (4, 7, 9, 1):
        assert compiled(torch.randn(rows, 64)).shape == (rows, 64)
    assert STORE.packed_count == before + 1


class Broken(nn.Module):
    """Two graphs with a break between, over a shared and a tied weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(64, 64)
        self.second = nn.Linear(64, 64)
        self.tied = nn.Linear(64, 64, bias=False)
        self.tied.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        torch._dynamo.graph_break()
        return self.tied(self.second(x)) + self.second(x)


def test_graph_breaks_and_tied_weights_pack_once() -> None:
    model = frozen(Broken())
    before = STORE.packed_count
    x = torch.randn(3, 64)
    out = compile_(model)(x)
    assert STORE.packed_count == before + 2
    torch.testing.assert_close(out, decoded(model)(x), rtol=1e-4, atol=1e-4)


def test_a_changed_weight_is_packed_again_at_the_next_compile() -> None:
    model = frozen(nn.Linear(64, 64))
    x = torch.randn(3, 64)
    compile_(model)(x)
    model.weight.mul_(2)
    torch._dynamo.reset()
    out = compile_(model)(x)
    torch.testing.assert_close(out, decoded(model)(x), rtol=1e-4, atol=1e-4)


def test_one_graph_serves_other_models_of_the_class() -> None:
    x = torch.randn(3, 128)
    compiles = torch._dynamo.utils.counters["stats"]
    for seed in range(3):
        torch.manual_seed(seed)
        model = frozen(TwoLayers())
        out = compile_(model)(x)
        torch.testing.assert_close(out, decoded(model)(x), rtol=1e-4, atol=1e-4)
        assert len(fxquant.report(model).quantized) == 2
        fxquant.release_weights(model)
        torch.testing.assert_close(compile_(model)(x), out, rtol=1e-4, atol=1e-4)
    assert compiles["unique_graphs"] == 2, "one for dense and one for packed parameters"


def test_blocks_compiled_one_by_one_share_a_graph() -> None:
    model = frozen(nn.Sequential(*[TwoLayers() for _ in range(4)]))
    expected = decoded(model)
    for block in model:
        block.compile(backend="fxquant")
    x = torch.randn(3, 128)
    for _ in range(2):
        torch.testing.assert_close(model(x), expected(x), rtol=1e-3, atol=1e-3)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    modules = [row.module for row in fxquant.report(model).quantized]
    assert sorted(modules) == sorted(f"{i}.{name}" for i in range(4) for name in ("up", "down"))


def test_other_options_get_another_graph() -> None:
    model = frozen(nn.Linear(128, 128))
    x = torch.randn(3, 128)
    for scheme in ("nf4", "int8", "nf4"):
        out = compile_(model, scheme=scheme)(x)
        torch.testing.assert_close(out, decoded(model, scheme)(x), rtol=1e-4, atol=1e-4)


def test_packed_weights_of_another_encoding_get_another_graph() -> None:
    x = torch.randn(3, 128)
    model = frozen(nn.Linear(128, 128))
    compiled = compile_(model)
    for scheme in ("nf4", "int8"):
        weight = packed_of(torch.randn(128, 128), scheme)
        model.weight = nn.Parameter(weight, requires_grad=False)
        expected = nn.functional.linear(x, weight.dequantize(), model.bias)
        torch.testing.assert_close(compiled(x), expected, rtol=1e-4, atol=1e-4)


def test_weights_changed_in_place_are_packed_again() -> None:
    model = frozen(TwoLayers())
    compiled = compile_(model)
    x = torch.randn(3, 128)
    compiled(x)
    model.load_state_dict(TwoLayers().state_dict())
    torch.testing.assert_close(compiled(x), decoded(model)(x), rtol=1e-4, atol=1e-4)
    model.up.weight.data = torch.randn(64, 128)
    torch.testing.assert_close(compiled(x), decoded(model)(x), rtol=1e-4, atol=1e-4)


def test_a_new_storage_at_an_old_address_is_packed_again() -> None:
    model = frozen(nn.Linear(128, 128, bias=False))
    compiled = compile_(model)
    x, buffer = torch.randn(3, 128), bytearray(128 * 128 * 4)
    for _ in range(3):
        values = torch.frombuffer(buffer, dtype=torch.float32).view(128, 128)
        model.weight.data = values.copy_(torch.randn(128, 128))
        expected = nn.functional.linear(x, packed_of(model.weight).dequantize())
        torch.testing.assert_close(compiled(x), expected, rtol=1e-4, atol=1e-4)


def test_packed_models_move_and_change_dtype() -> None:
    x = torch.randn(3, 128)
    model = frozen(TwoLayers())
    errors_db = [row.error_db for row in fxquant.quantize_(model).quantized]
    model.to(torch.bfloat16).float()
    expected = model(x)
    compiled = compile_(model)
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 0.05), (torch.float32, 1e-4)):
        model.to(dtype)
        found = compiled(x.to(dtype)).float()
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    rows = fxquant.report(model).quantized
    assert [row.error_db for row in rows] == errors_db
    assert {row.scheme for row in rows} == {"nf4"}
    assert fxquant.release_weights(model) == 0


def test_kernels_repack_each_weight_once_and_drop_it_with_the_model(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made: list[weakref.ref[Any]] = []

    class Counted(cpp.Block):
        __slots__ = ("__weakref__",)

        def __init__(self, size: int) -> None:
            super().__init__(size)
            made.append(weakref.ref(self))

    monkeypatch.setattr(cpp, "Block", Counted)
    model = frozen(TwoLayers())
    compiled = compile_(model)
    for rows in (3, 3, 5, 7):
        x = torch.randn(rows, 128)
        torch.testing.assert_close(compiled(x), decoded(model)(x), rtol=1e-4, atol=1e-4)
        compiled(x.requires_grad_()).sum().backward()
    assert len(made) == 2
    del model, compiled
    torch._dynamo.reset()
    gc.collect()
    assert [ref() for ref in made] == [None, None]
