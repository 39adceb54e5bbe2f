"""The main job: `torch.compile(model, backend="fxquant")`, against eager on the decoded weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import fxquant
from fxquant.codegen.cpp.sections import divided
from fxquant.testing import run_and_get_kernels
from tests.bounds import assert_close_within, product_bound
from tests.helpers import TwoLayers, compile_, decoded, frozen, packed_of

pytestmark = pytest.mark.usefixtures("few_heights", "fresh")


@pytest.mark.parametrize("scheme", ["nf4", "fp4", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [False, True])
def test_linear_is_the_product_with_the_decoded_weight(
    scheme: str, dtype: torch.dtype, bias: bool
) -> None:
    model = frozen(nn.Linear(96, 80, bias=bias)).to(dtype)
    x = torch.randn(3, 5, 96, dtype=dtype)
    out = compile_(model, scheme=scheme)(x)
    weight = packed_of(model.weight, scheme).dequantize(dtype)
    expected = x.double() @ weight.double().t()
    if bias:
        expected = expected + model.bias.double()
    assert out.dtype == dtype
    bound = product_bound(x, weight, dtype, model.bias, scaled_apart=True)
    assert_close_within(out, expected, bound)
    assert not torch.equal(out, model(x)), "nothing was quantized"


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activations_in_int8(dtype: torch.dtype, dynamic: bool | None) -> None:
    """Off by at most half a step of each input, and by more than what floats are off by."""
    model = frozen(nn.Linear(128, 64)).to(dtype)
    x = torch.randn(6, 128, dtype=dtype, requires_grad=True)
    options = {"scheme": "int8", "compute_dtype": "int8", "target": "torch"}
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="fxquant", options=options, dynamic=dynamic)
    twin = decoded(model, "int8").double()
    wide = x.detach().double().requires_grad_()
    out, expected = compiled(x), twin(wide)
    off = (out.double() - expected).abs()
    step = wide.detach().abs().amax(-1, keepdim=True) / 127
    most = step / 2 * twin.weight.abs().sum(-1)
    # The twin's weight is rounded to the dtype, and the result; sums in float32 add up to k u.
    size = wide.detach().abs() @ twin.weight.abs().t() + twin.bias.abs()
    assert (off <= most + (torch.finfo(dtype).eps + 128 * 2.0**-24) * size).all()
    assert off.norm() > 3 * (expected.to(dtype).double() - expected).norm()
    grad = torch.autograd.grad(out.square().sum(), x)[0]
    wanted = 2 * out.detach().double() @ twin.weight
    rounds = (2 * out.detach().double().abs()) @ twin.weight.abs()
    assert ((grad.double() - wanted).abs() <= 4 * torch.finfo(dtype).eps * rounds).all()


def test_report_names_each_product_and_its_kernel() -> None:
    model = frozen(TwoLayers())
    compile_(model)(torch.randn(2, 128))
    report = fxquant.report(model)
    assert [row.module for row in report.quantized] == ["up", "down"]
    assert report.coverage == 1
    for row in report.quantized:
        gelu = "_gelu" if row.module == "up" else ""
        assert row.error_db is not None
        assert 15 < row.error_db < 30
        assert row.kernel == f"cpp:nf4_linear_{row.shape[0]}x{row.shape[1]}_bias{gelu}"
        assert "helpers.py:" in row.where
    assert report.bits_per_weight == pytest.approx(4 + 8 / 64 + (32 + 32) / (128 * 64), abs=0.01)
    assert "2 of 2 products quantized" in str(report)
    assert '"coverage": 1.0' in report.to_json()
    assert "<table>" in report.to_html()


def test_torch_operations_are_called_a_fallback() -> None:
    model = frozen(TwoLayers())
    x = torch.randn(2, 128)
    out, kernels = run_and_get_kernels(compile_(model, target="torch"), x)
    torch.testing.assert_close(out, decoded(model)(x), rtol=1e-4, atol=1e-4)
    assert {kernel.target for kernel in kernels} == {"torch"}
    for row in fxquant.report(model).quantized:
        assert row.kernel.startswith("torch:nf4_linear_")
        assert row.kernel.endswith(" (dequantize + matmul fallback)")


def test_adapters_train_over_packed_weights() -> None:
    class Adapted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base = nn.Linear(64, 48).requires_grad_(requires_grad=False)
            self.down = nn.Linear(64, 8, bias=False)
            self.up = nn.Linear(8, 48, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(self.base(x) + self.up(self.down(x)))

    model = Adapted().train()
    twin = decoded(model)
    twin.down.load_state_dict(model.down.state_dict())
    twin.up.load_state_dict(model.up.state_dict())
    x = torch.randn(5, 64, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    compile_(model)(x).square().sum().backward()
    twin(y).square().sum().backward()
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model.up.weight.grad, twin.up.weight.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model.down.weight.grad, twin.down.weight.grad, rtol=1e-4, atol=1e-4)
    assert model.base.weight.grad is None
    reasons = [row.reason for row in fxquant.report(model).left_alone]
    assert len(reasons) == 2
    assert all("requires" in reason or "trainable" in reason for reason in reasons)


def test_trained_bias_of_a_packed_weight() -> None:
    model = nn.Linear(64, 48)
    model.weight.requires_grad_(requires_grad=False)
    twin = decoded(model)
    x = torch.randn(2, 3, 64)
    compile_(model)(x).square().sum().backward()
    twin(x).square().sum().backward()
    torch.testing.assert_close(model.bias.grad, twin.bias.grad, rtol=1e-4, atol=1e-4)


def test_autocast_inside_and_around() -> None:
    model = frozen(nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64)))
    x = torch.randn(3, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = compile_(model)(x)
        expected = decoded(model)(x)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, expected, rtol=0.03, atol=0.03)

    def inside(x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = model(x)
        return y.float() + x

    out = compile_(inside)(x)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, expected.float() + x, rtol=0.03, atol=0.03)


def test_inference_mode() -> None:
    model = nn.Linear(64, 64).eval()
    x = torch.randn(3, 64)
    with torch.inference_mode():
        out = compile_(model)(x)
    torch.testing.assert_close(out, decoded(model)(x), rtol=1e-4, atol=1e-4)


def test_gradient_mode_leaves_trainable_weights_alone_and_says_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = nn.Linear(64, 64)
    x = torch.randn(3, 64)
    compiled = compile_(model)
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-5, atol=1e-5)
    (row,) = fxquant.report(model).left_alone
    assert "requires_grad_(False)" in row.reason
    assert "none of the 1 products against parameters was quantized" in caplog.text
    with torch.no_grad():
        compiled(x)
    assert len(fxquant.report(model).quantized) == 1
    assert fxquant.report(model).left_alone == []


def test_gradient_checkpointing() -> None:
    from torch.utils.checkpoint import checkpoint

    model = frozen(nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64)))
    twin = decoded(model)

    def run(m: nn.Module, x: Tensor) -> Tensor:
        return checkpoint(m, x, use_reentrant=False)

    x = torch.randn(3, 64, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    out = compile_(lambda x: run(model, x))(x)
    out.sum().backward()
    run(twin, y).sum().backward()
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-4, atol=1e-4)
    assert len(fxquant.report(model).quantized) == 2


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated:UserWarning")
@pytest.mark.parametrize("mode", ["default", "reduce-overhead", "max-autotune-no-cudagraphs"])
def test_modes_are_handed_on(mode: str) -> None:
    model = frozen(nn.Linear(64, 64))
    x = torch.randn(3, 64)
    out = torch.compile(model, backend="fxquant", mode=mode)(x)
    torch.testing.assert_close(out, decoded(model)(x), rtol=1e-4, atol=1e-4)


def test_inductor_options_are_handed_on() -> None:
    seen = []
    model = frozen(nn.Linear(64, 64))
    options = {"post_grad_custom_post_pass": seen.append}
    compile_(model, inductor=options)(torch.randn(3, 64))
    assert len(seen) == 1


@pytest.mark.parametrize("options", [{"cpp_wrapper": True}, {}])
def test_inductors_wrapper_in_cpp_is_done_without(
    options: dict[str, bool], caplog: pytest.LogCaptureFixture
) -> None:
    """It writes texts into its code without escaping them, and ours hold quotation marks."""
    model, x = frozen(TwoLayers()), torch.randn(3, 128)
    with torch._inductor.config.patch(cpp_wrapper=not options):
        out, kernels = run_and_get_kernels(compile_(model, inductor=options), x)
    torch.testing.assert_close(out, decoded(model)(x), rtol=1e-4, atol=1e-4)
    assert {kernel.target for kernel in kernels} == {"cpp"}
    said = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert said == ["Inductor's cpp_wrapper cannot call fxquant's kernels: this graph does without"]


def test_kernels_are_collected_and_dumped(tmp_path: Path) -> None:
    layers = [nn.Linear(64, 64), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU()]
    model = frozen(nn.Sequential(*layers, nn.Linear(64, 32)))
    compiled = compile_(model, dump=str(tmp_path))
    _, kernels = run_and_get_kernels(compiled, torch.randn(2, 64))
    assert len(kernels) == 3, "equal specs share a kernel"
    assert {kernel.target for kernel in kernels} == {"cpp"}
    sources = sorted(tmp_path.glob("cpp_*.cpp"))
    written = [divided(kernel.source) for kernel in kernels]
    assert sorted(main for main, _ in written) == sorted(path.read_text() for path in sources)
    for _, sections in written:
        assert all((tmp_path / file).read_text() == text for file, text in sections.items())
    assert all(path.with_suffix(".json").exists() for path in sources)
    assert run_and_get_kernels(lambda: None)[1] == []


def test_triton_sources_are_dumped_without_a_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FXQUANT_DUMP", str(tmp_path))
    model = frozen(nn.Linear(64, 64))
    x = torch.randn(2, 64)
    out, kernels = run_and_get_kernels(compile_(model, target="triton"), x)
    torch.testing.assert_close(out, decoded(model)(x), rtol=1e-4, atol=1e-4)
    printed = {kernel.target: kernel for kernel in kernels}
    assert set(printed) == {"triton", "cpp"}
    assert "need a GPU" in printed["triton"].note
    assert "@triton.jit" in printed["triton"].source
    assert printed["cpp"].note == ""
    (path,) = tmp_path.glob("triton_*.py")
    assert path.read_text().startswith("# Not run: ")
    (row,) = fxquant.report(model).rows
    assert row.kernel.startswith("cpp:nf4_linear_64x64_bias (Triton kernels need a GPU")


def test_the_last_compile_of_a_function_is_announced(caplog: pytest.LogCaptureFixture) -> None:
    model, x = frozen(nn.Linear(64, 64)), torch.randn(2, 64)
    with torch._dynamo.config.patch(recompile_limit=3):
        for number, scheme in enumerate(("nf4", "int8", "fp4"), start=1):
            compile_(model.forward, scheme=scheme)(x)
            said = [r.getMessage() for r in caplog.records if "recompile_limit" in r.getMessage()]
            assert len([text for text in said if "compiled 3 times" in text]) == (number == 3)


def test_a_config_is_taken_for_options() -> None:
    model = frozen(nn.Linear(96, 80))
    torch.compile(model, backend="fxquant", options=fxquant.Config(scheme="fp4"))(
        torch.randn(2, 96)
    )
    assert [row.scheme for row in fxquant.report(model).quantized] == ["fp4"]


def test_overrides_and_skip() -> None:
    model = frozen(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64)))
    compile_(model, overrides={"1": "int8"}, skip=["2"])(torch.randn(2, 64))
    rows = {row.module: row for row in fxquant.report(model).rows}
    assert rows["0"].scheme == "nf4"
    assert rows["1"].scheme == "int8"
    assert "skip pattern '2'" in rows["2"].reason


def test_patterns_meet_modules_whose_names_are_no_identifiers() -> None:
    model = nn.Sequential()
    for name in ("x", "x-y", "a b"):
        model.add_module(name, frozen(nn.Linear(64, 64)))
    compile_(model, skip=["x"])(torch.randn(2, 64))
    statuses = {row.module: row.status for row in fxquant.report(model).rows}
    assert statuses == {"x": "left alone", "x-y": "quantized", "a b": "quantized"}


def test_every_weight_of_a_product_without_quantized_form_counts() -> None:
    model = frozen(nn.LSTM(32, 32, num_layers=2))
    with torch._dynamo.config.patch(allow_rnn=True):
        compile_(model)(torch.randn(5, 2, 32))
    lost = {row.parameter for row in fxquant.report(model).left_alone}
    assert lost == {f"weight_{kind}_l{layer}" for kind in ("ih", "hh") for layer in range(2)}


def test_cond_with_products_in_its_branches() -> None:
    model = frozen(TwoLayers())

    def run(x: Tensor) -> Tensor:
        return torch.cond(x.sum() > 0, model.up, lambda x: model.up(-x) * 2, (x,))

    for x in (torch.rand(3, 128), -torch.rand(3, 128)):
        expected = decoded(model).up(x) if x.sum() > 0 else decoded(model).up(-x) * 2
        torch.testing.assert_close(compile_(run)(x), expected, rtol=1e-4, atol=1e-4)
