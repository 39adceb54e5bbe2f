"""Each parameter is packed once, and again when it changed."""

from __future__ import annotations

import gc
import threading
import weakref

import pytest
import torch
from torch import nn

from fxquant import errors
from fxquant.formats import Encoding, PackedWeight
from fxquant.runtime.store import STORE, WeightStore
from fxquant.schemes import get_scheme
from tests.helpers import frozen

NF4, INT8 = Encoding(4, "nf4", (64,)), Encoding(8, block=(1, -1))


def parameter() -> nn.Parameter:
    return nn.Parameter(torch.randn(16, 64), requires_grad=False)


def test_packs_once_for_an_encoding() -> None:
    store, weight = WeightStore(), parameter()
    first = store.pack(weight, NF4, "w")
    assert store.pack(weight, NF4, "w") is first
    assert store.pack(weight, INT8, "w") is not first
    assert store.packed_count == 2
    assert store.packed_from(weight) is store.pack(weight, INT8, "w")
    assert store.pack(first, INT8, "w") is first, "what is packed stays as it is"


def test_same_storage_is_the_same_weight() -> None:
    store, weight = WeightStore(), parameter()
    twin = nn.Parameter(weight.data, requires_grad=False)
    assert store.pack(twin, NF4, "a") is store.pack(weight, NF4, "b")
    half = nn.Parameter(weight.data[:8], requires_grad=False)
    assert store.pack(half, NF4, "c") is not store.pack(weight, NF4, "b")


def test_changes_are_noticed() -> None:
    store, weight = WeightStore(), parameter()
    first = store.pack(weight, NF4, "w")
    with torch.no_grad():
        weight.mul_(2)
    assert store.packed_from(weight) is None
    second = store.pack(weight, NF4, "w")
    assert second is not first
    weight.data = torch.randn(16, 64)
    assert store.pack(weight, NF4, "w") is not second


def test_another_storage_at_the_same_address_is_noticed() -> None:
    store, weight, buffer = WeightStore(), parameter(), bytearray(16 * 64 * 4)

    def at_buffer(fill: float) -> torch.Tensor:
        return torch.frombuffer(buffer, dtype=torch.float32).view(16, 64).fill_(fill)

    weight.data = at_buffer(1.0)
    first = store.pack(weight, NF4, "w")
    assert store.get(weight, NF4) is first
    weight.data = at_buffer(2.0)
    assert store.get(weight, NF4) is None
    other = nn.Parameter(at_buffer(3.0), requires_grad=False)
    assert store.get(other, NF4) is None


def test_nothing_is_kept_alive() -> None:
    store, weight = WeightStore(), parameter()
    packed = weakref.ref(store.pack(weight, NF4, "w"))
    assert packed() is not None
    del weight
    gc.collect()
    assert packed() is None
    assert store.pack(parameter(), NF4, "w").shape == (16, 64)


def test_inference_tensors_are_packed() -> None:
    with torch.inference_mode():
        weight = torch.randn(16, 64)
        assert WeightStore().pack(weight, NF4, "w").shape == (16, 64)


def test_weights_without_values_are_refused() -> None:
    with pytest.raises(errors.WeightError, match=r"cannot quantize a\.w: it is on the meta device"):
        WeightStore().pack(torch.empty(16, 64, device="meta"), NF4, "a.w")


def test_threads_share_one_packing() -> None:
    model = frozen(nn.Linear(64, 64))
    before = STORE.packed_count
    packed: list[PackedWeight] = []
    encoding = get_scheme("nf4").recipe.weight
    threads = [
        threading.Thread(target=lambda: packed.append(STORE.pack(model.weight, encoding, "w")))
        for _ in range(50)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert STORE.packed_count == before + 1
    assert len({id(p) for p in packed}) == 1
