"""Calibration leaves no traces: in the model, in Dynamo, in what the user compiles."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import gelu

from fxquant.calibration import Calibration
from tests.calibrating import BATCHES, Counter, calibrate, check, state_of
from tests.helpers import TwoLayers

pytestmark = pytest.mark.usefixtures("fresh")


class Fails(TwoLayers):
    def forward(self, x: Tensor) -> Tensor:
        y = self.up(x)
        if x.shape[0] == 3:
            torch._dynamo.graph_break()
            raise OverflowError("as the user wrote it")
        return self.down(gelu(y))


def test_the_model_is_untouched_also_after_an_exception() -> None:
    model = Fails()
    before = state_of(model)
    config = torch._dynamo.config.recompile_limit
    calibrate(model, BATCHES)
    assert state_of(model) == before
    with pytest.raises(OverflowError, match="as the user wrote it"):
        calibrate(model, [BATCHES[0], torch.randn(3, 128)])
    assert state_of(model) == before
    assert torch._dynamo.config.recompile_limit == config
    assert torch.is_grad_enabled()
    # Nobody is observed any more: a compile of the user's is the user's.
    counted = Counter()
    torch.compile(model, backend=counted)(BATCHES[0])
    assert counted.graphs == 1


class Breaks(TwoLayers):
    def forward(self, x: Tensor) -> Tensor:
        y = gelu(self.up(x))
        torch._dynamo.graph_break()
        return self.down(y)


@pytest.mark.parametrize("kind", [TwoLayers, Breaks])
@pytest.mark.parametrize("in_place", [False, True])
def test_a_compiled_model_stays_compiled(kind: type[TwoLayers], in_place: bool) -> None:
    model, counter = kind().eval(), Counter()
    compiled: Any = model
    if in_place:
        model.compile(backend=counter)
    else:
        compiled = torch.compile(model, backend=counter)
    with torch.no_grad():
        wanted = compiled(BATCHES[0])
        graphs = counter.graphs
        found = calibrate(compiled, [*BATCHES, lambda m: m(BATCHES[0])])
        assert torch.equal(compiled(BATCHES[0]), wanted)
    assert counter.graphs == graphs
    assert set(found.stats) == {"up.weight", "down.weight"}
    check(found.stats["up.weight"], torch.cat([*BATCHES, BATCHES[0]]))


@pytest.mark.parametrize("kind", [TwoLayers, Breaks])
def test_later_compiles_start_from_nothing(kind: type[TwoLayers]) -> None:
    model, counter = kind().eval(), Counter()
    calibrate(model, [torch.randn(n, 128) for n in range(2, 14)])
    with torch.no_grad():
        torch.compile(model, backend=counter)(torch.randn(20, 128))
    assert counter.graphs == (1 if kind is TwoLayers else 2)
    # The shapes of the batches would have made this compile dynamic.
    assert not counter.dynamic
    code = kind.forward.__code__
    assert len(torch._dynamo.eval_frame._debug_get_cache_entry_list(code)) == 1


def test_one_calibration_at_a_time() -> None:
    models = [TwoLayers().eval() for _ in range(4)]
    found: dict[int, Calibration] = {}

    def run(number: int) -> None:
        found[number] = calibrate(models[number], BATCHES[number % 3 :])

    threads = [threading.Thread(target=run, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number in range(4):
        check(found[number].stats["up.weight"], torch.cat(BATCHES[number % 3 :]))
    # Nothing is left in force: the next compile is the user's.
    counter = Counter()
    torch.compile(models[0], backend=counter)(BATCHES[0])
    assert counter.graphs == 1
