"""The main job: `torch.compile(model, backend="fxquant")`, against eager on the decoded weights."""

from __future__ import annotations

import copy
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor, nn
from torch.testing._internal.two_tensor import TwoTensor

import fxquant
from fxquant import errors
from fxquant.formats import PackedWeight, pack
from fxquant.runtime import targets
from fxquant.runtime.store import STORE
from fxquant.schemes import get_scheme
from fxquant.testing import run_and_get_kernels
from tests.bounds import assert_close_within, product_bound


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    torch.manual_seed(0)


def frozen(module: nn.Module) -> nn.Module:
    return module.eval().requires_grad_(requires_grad=False)


def compile_(model: nn.Module | Callable[..., Any], **options: Any) -> Any:
    return torch.compile(model, backend="fxquant", options=options or None)


def packed_of(weight: Tensor, scheme: str = "nf4") -> PackedWeight:
    encoding = get_scheme(scheme).recipe.weight.oriented(weight.dim(), (0,), (1,))
    return pack(weight.detach(), encoding)


def decoded(model: nn.Module, scheme: str = "nf4") -> nn.Module:
    """The same model with every Linear's weight replaced by its packed and decoded self."""
    twin = copy.deepcopy(model)
    for module in twin.modules():
        if isinstance(module, nn.Linear):
            module.weight.data = packed_of(module.weight, scheme).dequantize()
    return twin


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
    assert_close_within(out, expected, product_bound(x, weight, dtype, model.bias))
    assert not torch.equal(out, model(x)), "nothing was quantized"


class TwoLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(128, 64)
        self.down = nn.Linear(64, 128)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(nn.functional.gelu(self.up(x)))


def test_report_names_each_product_and_its_kernel() -> None:
    model = frozen(TwoLayers())
    compile_(model)(torch.randn(2, 128))
    report = fxquant.report(model)
    assert [row.module for row in report.quantized] == ["up", "down"]
    assert report.coverage == 1
    for row in report.quantized:
        assert row.error_db is not None
        assert 15 < row.error_db < 30
        assert "fallback" in row.kernel
        assert "test_backend.py:" in row.where
    assert report.bits_per_weight == pytest.approx(4 + 8 / 64 + (32 + 32) / (128 * 64), abs=0.01)
    assert "2 of 2 products quantized" in str(report)
    assert '"coverage": 1.0' in report.to_json()
    assert "<table>" in report.to_html()


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


def test_release_weights_frees_and_does_not_repack() -> None:
    model = frozen(nn.Sequential(nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 128)))
    compiled = compile_(model)
    x = torch.randn(3, 128)
    out = compiled(x)
    before = STORE.packed_count
    freed = fxquant.release_weights(compiled)
    assert freed == 2 * 128 * 128 * 4
    assert isinstance(model[0].weight, PackedWeight)
    assert torch.equal(compiled(x), out)
    assert STORE.packed_count == before
    torch.testing.assert_close(model(x), out, rtol=1e-4, atol=1e-4)
    state = compiled.state_dict()
    assert {key.removeprefix("_orig_mod.") for key in state} == set(model.state_dict())
    model.load_state_dict(model.state_dict())
    assert len(fxquant.report(model).quantized) == 2


def test_quantize_then_compile() -> None:
    model = frozen(nn.Sequential(nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 96)))
    x = torch.randn(4, 128)
    expected = decoded(model)(x)
    report = fxquant.quantize_(model, {"scheme": "nf4"})
    assert len(report.quantized) == 2
    assert all(isinstance(m.weight, PackedWeight) for m in (model[0], model[2]))
    before = STORE.packed_count
    torch.testing.assert_close(model(x), expected)
    torch.testing.assert_close(compile_(model)(x), expected, rtol=1e-4, atol=1e-4)
    assert STORE.packed_count == before


def test_quantize_frees_each_original_before_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    model = frozen(nn.Sequential(*[nn.Linear(64, 64) for _ in range(5)]))
    model[4].weight = model[3].weight
    originals = [weakref.ref(module.weight) for module in model]
    pack_weight, alive = STORE.pack, []

    def watched(*args: Any) -> PackedWeight:
        alive.append(len({id(ref()) for ref in originals if ref() is not None}))
        return pack_weight(*args)

    monkeypatch.setattr(STORE, "pack", watched)
    report = fxquant.quantize_(model)
    assert alive == [4, 3, 2, 1], "two of the five are one"
    assert len(report.quantized) == 5
    assert model[3].weight is model[4].weight


def test_quantize_leaves_tied_embeddings_and_heads_alone() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(64, 128)
            self.body = nn.Linear(128, 128)
            self.out = nn.Linear(128, 64, bias=False)
            self.out.weight = self.embed.weight
            self.lm_head = nn.Linear(128, 64)

    model = frozen(Tied())
    report = fxquant.quantize_(model)
    assert [row.module for row in report.quantized] == ["body"]
    reasons = {row.module: row.reason for row in report.left_alone}
    assert "embed" in reasons["out"]
    assert "skip" in reasons["lm_head"]
    assert model.out.weight is model.embed.weight


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


# Autotuning in Inductor of torch 2.11 reads `Tensor.storage()`.
@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated:UserWarning")
@pytest.mark.parametrize("mode", ["default", "reduce-overhead", "max-autotune-no-cudagraphs"])
def test_modes_are_handed_on(mode: str) -> None:
    model = frozen(nn.Linear(64, 64))
    x = torch.randn(3, 64)
    out = torch.compile(model, backend="fxquant", mode=mode)(x)
    torch.testing.assert_close(out, decoded(model)(x), rtol=1e-4, atol=1e-4)


def test_unknown_mode() -> None:
    model = frozen(nn.Linear(64, 64))
    with pytest.raises(Exception, match="Unrecognized mode=fast, should be one of: default"):
        torch.compile(model, backend="fxquant", mode="fast")(torch.randn(3, 64))


def test_inductor_options_are_handed_on() -> None:
    seen = []
    model = frozen(nn.Linear(64, 64))
    options = {"post_grad_custom_post_pass": seen.append}
    compile_(model, inductor=options)(torch.randn(3, 64))
    assert len(seen) == 1


def test_kernels_are_collected_and_dumped(tmp_path: Path) -> None:
    model = frozen(
        nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.Linear(64, 32))
    )
    compiled = compile_(model, dump=str(tmp_path))
    _, kernels = run_and_get_kernels(compiled, torch.randn(2, 64))
    assert len(kernels) == 2, "equal specs share a kernel"
    assert {kernel.target for kernel in kernels} == {"torch"}
    sources = sorted(tmp_path.glob("*.py"))
    assert sorted(kernel.source for kernel in kernels) == sorted(p.read_text() for p in sources)
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
    assert set(printed) == {"triton", "torch"}
    assert "need a GPU" in printed["triton"].note
    assert "@triton.jit" in printed["triton"].source
    assert printed["torch"].note == ""
    (path,) = tmp_path.glob("triton_*.py")
    assert path.read_text().startswith("# Not run: ")
    assert "fallback" in fxquant.report(model).rows[0].kernel


def test_unwritable_dump_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    model = frozen(nn.Linear(64, 64))
    with pytest.raises(Exception, match=r"the dump folder .* cannot be written"):
        compile_(model, dump=str(tmp_path / "file" / "below"))(torch.randn(2, 64))


def test_without_a_compiler_the_graph_runs_op_by_op(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(targets, "cxx_compiler", lambda: None)
    model = frozen(nn.Linear(64, 64))
    x = torch.randn(2, 64)
    out = compile_(model)(x)
    assert "no C++ compiler was found" in caplog.text
    torch.testing.assert_close(out, decoded(model)(x), rtol=1e-4, atol=1e-4)


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


def test_cond_with_products_in_its_branches() -> None:
    model = frozen(TwoLayers())

    def run(x: Tensor) -> Tensor:
        return torch.cond(x.sum() > 0, model.up, lambda x: model.up(-x) * 2, (x,))

    for x in (torch.rand(3, 128), -torch.rand(3, 128)):
        expected = decoded(model).up(x) if x.sum() > 0 else decoded(model).up(-x) * 2
        torch.testing.assert_close(compile_(run)(x), expected, rtol=1e-4, atol=1e-4)


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
