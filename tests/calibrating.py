"""Shared by the tests of calibration: what hooks see, and a backend that counts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fxquant.calibrate import calibrate as calibrate_with_bar
from fxquant.calibration import SAMPLE, Calibration, SiteStats

BATCHES = [torch.randn(5, 128), torch.randn(5, 128) * 3, torch.randn(2, 128)]


def calibrate(model: Any, batches: Any, **options: Any) -> Calibration:
    return calibrate_with_bar(model, batches, progress=False, **options)


class Hooked:
    """Inputs of the Linears of a model, by the names of their weights, as hooks see them."""

    def __init__(self, model: nn.Module) -> None:
        self.rows: dict[str, list[Tensor]] = {}
        self.handles = [
            module.register_forward_pre_hook(lambda _, args, name=name: self.see(name, args[0]))
            for name, module in model.named_modules(remove_duplicate=False)
            if isinstance(module, nn.Linear)
        ]

    def see(self, name: str, x: Tensor) -> None:
        rows = x.detach().reshape(-1, x.shape[-1]).float()
        self.rows.setdefault(f"{name}.weight", []).append(rows)

    def stats(self, run: Callable[[], object]) -> dict[str, Tensor]:
        with torch.no_grad():
            run()
        for handle in self.handles:
            handle.remove()
        return {name: torch.cat(rows) for name, rows in self.rows.items()}


def check(found: SiteStats, rows: Tensor) -> None:
    assert found.tokens == len(rows)
    assert torch.equal(found.amax, rows.abs().amax(0))
    assert (found.low, found.high) == (float(rows.min()), float(rows.max()))
    if len(rows) <= SAMPLE:
        assert torch.equal(found.token_amax, rows.abs().amax(1).sort().values)


def check_like_hooks(model: nn.Module, batches: list[Any], run: Callable[..., object]) -> None:
    wanted = Hooked(model).stats(lambda: [run(batch) for batch in batches])
    found = calibrate(model, batches).stats
    assert found.keys() == wanted.keys()
    for name, rows in wanted.items():
        check(found[name], rows)


def state_of(model: nn.Module) -> list[Any]:
    return [
        (name, {key: id(value) for key, value in vars(module).items()}, module.training)
        for name, module in model.named_modules()
    ]


class Counter:
    """A backend that counts what it compiles, and remembers which sizes were dynamic."""

    def __init__(self) -> None:
        self.graphs = 0
        self.dynamic = False

    def __call__(self, gm: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        self.graphs += 1
        self.dynamic |= any(isinstance(given, (int, torch.SymInt)) for given in inputs)
        return gm.forward
