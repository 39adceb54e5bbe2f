"""Options are checked when they are given, and the message lists what is known."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from fxquant import errors
from fxquant.calibration import Calibration
from fxquant.config import Config


def test_defaults() -> None:
    config = Config.from_options(None)
    assert config.scheme == "nf4"
    assert config.target == "auto"
    assert not config.strict


def test_unknown_option_lists_the_known_ones() -> None:
    with pytest.raises(errors.OptionError, match="unknown fxquant option 'shceme'") as caught:
        Config.from_options({"shceme": "nf4"})
    for field in dataclasses.fields(Config):
        assert field.name in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scheme": 4}, "'scheme' must be the name of a scheme, got 4 of type int"),
        ({"scheme": "nf5"}, "unknown quantization scheme 'nf5': the schemes are .*nf4"),
        ({"skip": "lm_head"}, "'skip' must be a list of patterns"),
        ({"skip": [1]}, "'skip' must be a list of patterns"),
        ({"overrides": ["a"]}, "'overrides' must be a dict"),
        ({"overrides": {"a": 3}}, "'overrides' must be a dict"),
        ({"overrides": {"a": "nf5"}}, "unknown quantization scheme 'nf5'"),
        ({"target": "cuda"}, "'target' must be one of auto, triton, cpp, torch"),
        ({"target": None}, "'target' must be the name of a target"),
        ({"strict": 1}, "'strict' must be a bool"),
        ({"min_coverage": "all"}, "'min_coverage' must be a number"),
        ({"min_coverage": True}, "'min_coverage' must be a number"),
        ({"min_coverage": 1.5}, "'min_coverage' must be from 0 to 1"),
        ({"min_coverage": float("nan")}, "'min_coverage' must be from 0 to 1"),
        ({"compute_dtype": "int3"}, "'compute_dtype' must be None or one of"),
        ({"compute_dtype": torch.int16}, "'compute_dtype' must be None or one of"),
        ({"alpha": 1.5}, "'alpha' must be a number from 0 to 1, 'auto', or a dict"),
        ({"alpha": "best"}, "'alpha' must be a number from 0 to 1"),
        ({"alpha": {"*": -0.1}}, "'alpha' must be a number from 0 to 1"),
        ({"alpha": {3: 0.5}}, "'alpha' must be a dict of patterns"),
        ({"threshold": 0}, "'threshold' must be a number above 0"),
        ({"threshold": "6"}, "'threshold' must be a number above 0"),
        ({"calibration": 3}, "'calibration' must be what fxquant.calibrate gave"),
        ({"calibration_steps": -1}, "'calibration_steps' must be 0 or more"),
        ({"calibration_steps": 2.0}, "'calibration_steps' must be a number of calls"),
        ({"calibration_steps": True}, "'calibration_steps' must be a number of calls"),
        (
            {"calibration_steps": 2, "calibration": Calibration({})},
            "'calibration_steps' must be 0 with a calibration",
        ),
        ({"dump": 3}, "'dump' must be a folder"),
        ({"inductor": 3}, "'inductor' must be a dict"),
    ],
)
def test_bad_values(options: dict[str, Any], message: str) -> None:
    with pytest.raises(errors.OptionError, match=message) as caught:
        Config.from_options(options)
    assert str(caught.value).count("\n") == 0


@pytest.mark.parametrize("options", ["nf4", ["nf4"], 4])
def test_what_is_no_options(options: Any) -> None:
    with pytest.raises(errors.OptionError, match="must be a dict such as") as caught:
        Config.from_options(options)
    assert repr(options) in str(caught.value)


def test_a_config_is_options_too() -> None:
    config = Config(scheme="fp4")
    assert Config.from_options(config) is config


def test_dtypes_and_lists_are_taken() -> None:
    config = Config.from_options({"compute_dtype": torch.bfloat16, "skip": ["a", "b"]})
    assert config.compute_dtype == "bfloat16"
    assert config.skip == ("a", "b")


def test_a_calibration_can_be_a_path(tmp_path: Path) -> None:
    saved = Calibration({})
    saved.save(tmp_path / "file")
    for path in (tmp_path / "file", str(tmp_path / "file")):
        assert Config(calibration=path).calibration == saved
    with pytest.raises(errors.CheckpointError, match="missing"):
        Config(calibration=tmp_path / "nothing")


def test_backend_reports_unknown_option() -> None:
    model = torch.nn.Linear(64, 64).requires_grad_(False)
    compiled = torch.compile(model, backend="fxquant", options={"shceme": "nf4"})
    with pytest.raises(Exception, match="unknown fxquant option 'shceme'"):
        compiled(torch.randn(2, 64))
