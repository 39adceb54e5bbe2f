"""Bad input, and machines that lack something: one clear sentence each."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.testing._internal.two_tensor import TwoTensor

import fxquant
from fxquant import errors
from fxquant.runtime import targets
from tests.helpers import compile_, frozen

pytestmark = pytest.mark.usefixtures("fresh")


def test_unknown_mode() -> None:
    model = frozen(nn.Linear(64, 64))
    with pytest.raises(Exception, match="Unrecognized mode=fast, should be one of: default"):
        torch.compile(model, backend="fxquant", mode="fast")(torch.randn(3, 64))


def test_unwritable_dump_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    model = frozen(nn.Linear(64, 64))
    with pytest.raises(Exception, match=r"the dump folder .* cannot be written"):
        compile_(model, dump=str(tmp_path / "file" / "below"))(torch.randn(2, 64))


def test_without_triton_its_kernels_are_still_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    from fxquant.runtime import launch

    monkeypatch.setattr(launch, "has_triton", lambda: False)
    choice = targets.choose("auto", torch.device("cuda"))
    assert choice.runs == "torch"
    assert "not installed" in choice.note
    assert targets.choose("triton", torch.device("cpu")).asked == "triton"


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_nan_in_a_weight_names_the_parameter(bad: float) -> None:
    model = frozen(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)))
    model[1].weight[3, 4] = bad
    with pytest.raises(Exception, match=r"cannot quantize 1\.weight: it holds 1 NaN or Inf"):
        compile_(model)(torch.randn(2, 64))
    with pytest.raises(errors.WeightError, match=r"1\.weight"):
        fxquant.quantize_(model)


@pytest.mark.filterwarnings("ignore:Torchinductor does not support code generation for complex")
def test_complex_weights_are_refused() -> None:
    weight = nn.Parameter(torch.randn(64, 64, dtype=torch.complex64), requires_grad=False)
    report = _report_of(weight, torch.randn(2, 64, dtype=torch.complex64))
    assert "complex64" in report.left_alone[0].reason
    assert report.quantized == []


def test_integer_weights_are_refused() -> None:
    weight = nn.Parameter(torch.randint(-3, 3, (64, 64)), requires_grad=False)
    report = _report_of(weight, torch.randint(-3, 3, (2, 64)))
    assert "int64" in report.left_alone[0].reason


def test_empty_weights_are_refused() -> None:
    weight = nn.Parameter(torch.randn(0, 64), requires_grad=False)
    report = _report_of(weight, torch.randn(2, 64))
    assert "empty" in report.left_alone[0].reason


def test_weights_of_other_tensor_subclasses_are_left_to_them() -> None:
    values = torch.randn(64, 64)
    weight = nn.Parameter(TwoTensor(values, values.clone()), requires_grad=False)
    model = frozen(nn.Linear(64, 64, bias=False))
    model.weight = weight
    x = torch.randn(2, 64)
    torch.testing.assert_close(compile_(model)(x).a, x @ values.t())
    assert "TwoTensor" in fxquant.report(model).left_alone[0].reason
    assert "TwoTensor" in fxquant.quantize_(model).left_alone[-1].reason
    assert model.weight is weight


def _report_of(weight: nn.Parameter, x: Tensor) -> fxquant.Report:
    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = weight

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.weight.t()

    model = Holder()
    assert torch.equal(torch.compile(model, backend="fxquant")(x), model(x))
    return fxquant.report(model)


def test_device_mismatch_of_a_packed_weight() -> None:
    model = frozen(nn.Linear(64, 64))
    fxquant.quantize_(model)
    with pytest.raises(Exception, match="meta"):
        compile_(model)(torch.randn(2, 64, device="meta"))


def test_strict_and_min_coverage() -> None:
    model = frozen(nn.Sequential(nn.Conv1d(64, 64, 1), nn.Conv1d(64, 64, 3)))
    x = torch.randn(2, 64, 5)
    for options in ({"strict": True}, {"min_coverage": 0.3}):
        torch._dynamo.reset()
        with pytest.raises(Exception, match=r"1 .*kernel"):
            compile_(model, **options)(x)
    for options in ({"strict": True, "skip": ["1"]}, {"min_coverage": 0.2}):
        torch._dynamo.reset()
        assert compile_(model, **options)(x).shape == (2, 64, 3)
