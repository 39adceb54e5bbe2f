"""Calibration while the first calls run."""

from __future__ import annotations

import copy
import gc
import threading
import weakref
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from fxquant import backend, errors, online
from fxquant.calibrate import calibrate
from fxquant.calibration import Calibration
from fxquant.quantize import release_weights
from fxquant.report import report
from fxquant.runtime.store import STORE
from tests.helpers import TwoLayers, compile_, frozen, packed_of

pytestmark = pytest.mark.usefixtures("few_heights", "fresh")


class Seen:
    """The calibrations that graphs were lowered with."""

    def __init__(self) -> None:
        self.calibrations: list[Calibration] = []


@pytest.fixture
def seen() -> Iterator[Seen]:
    out, usual = Seen(), backend._compile

    def compile_too(gm: Any, inputs: Any, config: Any, mode: Any) -> Any:
        out.calibrations.append(config.calibration)
        assert config.calibration_steps == 0
        return usual(gm, inputs, config, mode)

    with mock.patch.object(backend, "_compile", compile_too):
        yield out


def batches(count: int, rows: int = 4) -> list[Tensor]:
    return list(torch.randn(count, rows, 128))


def test_the_first_calls_are_exact_and_the_others_quantized(seen: Seen) -> None:
    model = frozen(TwoLayers())
    compiled = compile_(model, calibration_steps=3)
    exact = torch.compile(model, backend="eager")
    inputs = batches(5)
    for x in inputs[:3]:
        assert torch.equal(compiled(x), exact(x))
        assert seen.calibrations == []
    for x in inputs[3:]:
        error = (compiled(x) - exact(x)).norm() / exact(x).norm()
        assert 0.01 < error < 0.3
    (found,) = seen.calibrations
    wanted = calibrate(model, inputs[:3], progress=False)
    assert found == wanted
    assert len(report(model).quantized) == 2


def test_dynamo_compiles_once_and_weights_are_packed_once() -> None:
    model = frozen(TwoLayers())
    compiled = compile_(model, calibration_steps=2)
    before = STORE.packed_count
    for x in batches(5):
        compiled(x)
    assert STORE.packed_count == before + 2
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


class Normed(TwoLayers):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(128)
        self.norm.weight.data[5] = 40

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(self.norm(x))


@pytest.mark.parametrize("scheme", ["smoothquant_o3", "llm_int8_static"])
def test_the_lowered_graph_is_what_a_compile_with_the_calibration_gives(scheme: str) -> None:
    torch.manual_seed(1)
    first, second = frozen(Normed()), frozen(Normed())
    second.load_state_dict(first.state_dict())
    inputs = batches(3)
    compiled = compile_(first, scheme=scheme, calibration_steps=2)
    online_out = [compiled(x) for x in inputs][-1]
    stats = calibrate(second, inputs[:2], progress=False)
    torch._dynamo.reset()
    assert torch.equal(compile_(second, scheme=scheme, calibration=stats)(inputs[2]), online_out)
    assert not torch.equal(online_out, first(inputs[2]))


def test_blocks_that_share_a_graph_get_scales_of_their_own() -> None:
    torch.manual_seed(1)
    options = {"scheme": "smoothquant", "calibration_steps": 1}
    blocks = [frozen(Normed()) for _ in range(2)]
    blocks[1].norm.weight.data[5] = 1
    blocks[1].norm.weight.data[7] = 90
    compiled = [compile_(block, **options) for block in blocks]
    x = torch.randn(4, 128)
    for block, run in zip(blocks, compiled, strict=True):
        assert torch.equal(run(x), torch.compile(block, backend="eager")(x))
    for block, run in zip(blocks, compiled, strict=True):
        twin = copy.deepcopy(block)
        stats = calibrate(twin, [x], progress=False)
        assert torch.equal(run(x), compile_(twin, scheme="smoothquant", calibration=stats)(x))
        assert not torch.equal(run(x), block(x))


def test_a_graph_without_products_is_lowered_at_once() -> None:
    x = torch.randn(3)
    with mock.patch.object(online, "OnlineGraph", side_effect=AssertionError):
        # Of ops that Inductor has code of its own for, few give the same bits as torch everywhere.
        assert torch.equal(compile_(torch.neg, calibration_steps=4)(x), -x)


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            [compile_(frozen(TwoLayers()), calibration_steps=2) for _ in range(3)]
        )

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def test_each_block_that_shares_a_graph_is_observed(seen: Seen) -> None:
    model = Blocks()
    inputs = batches(4)
    plain = nn.Sequential(*(block._orig_mod for block in model.blocks))
    wanted = [plain(x) for x in inputs]
    for x, exact in zip(inputs[:2], wanted[:2], strict=True):
        assert torch.equal(model(x), exact)
    for x, exact in zip(inputs[2:], wanted[2:], strict=True):
        assert not torch.equal(model(x), exact)
    # One graph served all, and has statistics of each.
    (found,) = seen.calibrations
    stats = [found.of(block.up.weight, "up.weight") for block in plain]
    hidden = torch.cat(inputs[:2])
    for block, site in zip(plain, stats, strict=True):
        assert site is not None
        assert site.tokens == 8
        assert torch.equal(site.amax, hidden.abs().amax(0))
        hidden = torch.cat([block(part) for part in hidden.split(4)])


def test_a_second_model_on_the_same_graph_is_observed_first(seen: Seen) -> None:
    first, second = frozen(TwoLayers()), frozen(TwoLayers())
    x = torch.randn(4, 128)
    compiled = compile_(first, calibration_steps=1)
    exact = compiled(x)
    assert not torch.equal(compiled(x), exact)
    other = compile_(second, calibration_steps=1)
    assert torch.equal(other(x), torch.compile(second, backend="eager")(x))
    assert not torch.equal(other(x), torch.compile(second, backend="eager")(x))


def test_dynamic_shapes(seen: Seen) -> None:
    model = frozen(TwoLayers())
    compiled = compile_(model, calibration_steps=1)
    # Static first; then dynamic, which is another graph and observes again; then quantized.
    for rows in (4, 6):
        assert torch.equal(compiled(torch.ones(rows, 128)), model(torch.ones(rows, 128)))
    for rows in (9, 2, 30, 6):
        x = torch.randn(rows, 128)
        out = compiled(x)
        assert out.shape == (rows, 128)
        assert not torch.equal(out, model(x))
        # A graph that had taken on one size would be wrong, not merely rounded, for another.
        assert (out - model(x)).norm() < 0.3 * model(x).norm()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2


class Specializes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x)


def test_sizes_that_lowering_fixes_run_in_full_precision_else(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = frozen(Specializes())
    usual = backend._compile

    def fixes_size(gm: Any, inputs: Any, config: Any, mode: Any) -> Any:
        size = next(given for given in inputs if isinstance(given, torch.SymInt))
        assert bool(size < 10)
        return usual(gm, inputs, config, mode)

    with mock.patch.object(backend, "_compile", fixes_size):
        compiled = torch.compile(
            model, backend="fxquant", options={"calibration_steps": 1}, dynamic=True
        )
        compiled(torch.randn(4, 16))
        x = torch.randn(5, 16)
        assert not torch.equal(compiled(x), model(x))
        assert "fewer sizes" in caplog.text
        x = torch.randn(12, 16)
        assert torch.equal(compiled(x), model(x))
        x = torch.randn(6, 16)
        assert not torch.equal(compiled(x), model(x))


def test_training_goes_through_both_phases() -> None:
    model = frozen(TwoLayers())
    compiled = compile_(model, calibration_steps=1)
    gradients = []
    for _ in range(2):
        x = torch.ones(4, 128, requires_grad=True)
        compiled(x).square().sum().backward()
        gradients.append(x.grad)
    exact = torch.ones(4, 128, requires_grad=True)
    model(exact).square().sum().backward()
    assert exact.grad is not None
    assert torch.allclose(gradients[0], exact.grad, rtol=1e-4, atol=1e-5)
    assert not torch.equal(gradients[1], exact.grad)
    assert (gradients[1] - exact.grad).norm() < 0.5 * exact.grad.norm()


def test_packed_weights_and_released_ones() -> None:
    model = frozen(TwoLayers())
    model.up.weight = nn.Parameter(packed_of(model.up.weight), requires_grad=False)
    compiled = compile_(model, calibration_steps=1)
    x = torch.randn(4, 128)
    compiled(x)
    wanted = compiled(x)
    assert release_weights(compiled) > 0
    # The weights are others now: a recompile, observed again, and then the same numbers.
    compiled(x)
    assert torch.equal(compiled(x), wanted)


def test_other_threads_call_compiled_models_while_a_graph_is_lowered() -> None:
    x, usual = torch.randn(4, 128), backend._compile
    model = frozen(TwoLayers())
    other = torch.compile(model, backend="eager")
    found = [other(x)]

    def compile_too(gm: Any, inputs: Any, config: Any, mode: Any) -> Any:
        thread = threading.Thread(target=lambda: found.append(other(x)))
        # As a tracer has it, for all threads; from torch 2.14 on each thread has its own.
        flag = "_is_fx_tracing_flag"
        with mock.patch.object(torch.fx._symbolic_trace, flag, True, create=True):
            thread.start()
            thread.join()
        return usual(gm, inputs, config, mode)

    compiled = compile_(model, calibration_steps=1)
    with mock.patch.object(backend, "_compile", compile_too):
        compiled(x)
        compiled(x)
    assert len(found) == 2
    assert torch.equal(*found)
    assert not torch.compiler.is_compiling()


def test_many_threads(seen: Seen) -> None:
    model = frozen(TwoLayers())
    compiled = compile_(model, calibration_steps=8)
    x = torch.randn(4, 128)
    compiled(x)
    results: list[Tensor] = []

    def run() -> None:
        results.extend(compiled(x) for _ in range(6))

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(seen.calibrations) == 1
    exact = model(x)
    same = sum(torch.allclose(out, exact, atol=1e-5) for out in results)
    # Seven more calls are to be observed; what started before the last of them ended is too.
    assert 7 <= same <= 7 + 4
    assert len(results) == 24


def test_not_finite_activations_are_named_and_can_be_made_good(seen: Seen) -> None:
    model = frozen(TwoLayers())
    compiled = compile_(model, calibration_steps=2)
    x = torch.randn(4, 128)
    compiled(x)
    with pytest.raises(errors.CalibrationError, match=r"'up\.weight' hold NaN or Inf in batch 1"):
        compiled(torch.full((4, 128), torch.nan))
    # The counting starts again, without what was no number.
    for _ in range(2):
        assert torch.equal(compiled(x), model(x))
    assert not torch.equal(compiled(x), model(x))
    assert seen.calibrations[0].stats["up.weight"].tokens == 8


def test_errors_of_the_compile_come_with_the_call_after() -> None:
    model = frozen(TwoLayers())
    model.up.weight.data[0, 0] = torch.inf
    compiled = compile_(model, calibration_steps=1)
    x = torch.zeros(4, 128)
    x[:, 0] = 0
    with pytest.raises(errors.CalibrationError, match=r"down\.weight"):
        compiled(x)
    model.up.weight.data[0, 0] = 0
    compiled(x)
    model.up.weight.data[0, 0] = torch.inf
    for _ in range(2):
        with pytest.raises(errors.WeightError, match=r"up\.weight"):
            compiled(x)


@pytest.mark.parametrize("calls", [1, 3])
def test_a_model_does_not_outlive_its_last_use(calls: int) -> None:
    model = frozen(TwoLayers())
    compiled = compile_(model, calibration_steps=2)
    for _ in range(calls):
        compiled(torch.randn(4, 128))
    gone = [weakref.ref(model.up.weight), weakref.ref(model.down.weight)]
    del model, compiled
    gc.collect()
    assert [ref() for ref in gone] == [None, None]


def test_identities_of_weights_that_died_are_forgotten() -> None:
    graphs: list[Any] = []
    usual = online.OnlineGraph

    def keep(*args: Any) -> Any:
        graphs.append(usual(*args))
        return graphs[-1]

    with mock.patch.object(online, "OnlineGraph", keep):
        model = frozen(TwoLayers())
        compile_(model, calibration_steps=2)(torch.randn(4, 128))
    assert len(graphs[0].met) == 1
    del model
    gc.collect()
    assert len(graphs[0].met) == 0
