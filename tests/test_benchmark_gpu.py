"""The GPU benchmark's logic, on a CPU: a rehearsal measures nothing and says so."""

import functools
import json
import shutil
import subprocess
import sys
from importlib import metadata

import pytest
import torch

from benchmarks.gpu import __main__ as command
from benchmarks.gpu import decoder, products, session, tree
from benchmarks.gpu.device import Rates, Rehearsal
from benchmarks.gpu.peers import CUBLAS, peers
from benchmarks.gpu.products import Contender, Prepared


@pytest.fixture
def rehearse(tmp_path, monkeypatch):
    """Runs the command with few peers, and reads what it wrote."""
    few = [peer for peer in peers() if peer.name in (CUBLAS, "torch._int_mm alone")]
    monkeypatch.setattr(session, "peers", lambda: few)

    def run(*arguments):
        path = tmp_path / "gpu.json"
        options = ["--rehearse", "--skip-decoder", "--rounds", "2", "--output", str(path)]
        return command.main([*options, *arguments]), json.loads(path.read_text())

    return run


def test_a_rehearsal_runs_everyone_and_is_no_measurement(rehearse):
    code, found = rehearse()
    assert code == 0
    assert found["is_gpu_measurement"] is False
    assert "no GPU measurement" in found["device"]
    assert found["failures"] == found["left_out"] == []
    one, many = found["cases"]
    ours = {f"fxquant {name}" for name in products.schemes()}
    assert {line["name"] for line in one["contenders"]} == {*ours, CUBLAS}
    assert {line["name"] for line in many["contenders"]} == {*ours, CUBLAS, "torch._int_mm alone"}
    errors = {line["name"]: line["error"] for line in many["contenders"]}
    assert errors["fxquant int8"] < errors["fxquant w8a8"] < errors["fxquant nf4"]
    assert all(target["met"] is None for target in found["targets"])
    assert {target["case"].split(",")[0] for target in found["targets"]} == {"8192x8192"}


def test_who_computes_something_else_is_not_timed(rehearse, monkeypatch):
    wrong = Contender("fxquant wrong", lambda w: Prepared(lambda x: 1.1 * (x @ w.t()), w.nbytes))
    broken = Contender("fxquant broken", functools.partial(divmod, 1))
    monkeypatch.setattr(products, "ours", lambda target: [wrong, broken])
    code, found = rehearse()
    assert code == 1
    assert [line["name"] for line in found["cases"][0]["contenders"]] == [CUBLAS]
    told = " ".join(found["failures"])
    assert "fxquant wrong, 64x128, M=1 failed: RuntimeError: error 0.1" in told
    assert "fxquant broken, 64x128 failed: TypeError" in told


def test_who_replays_something_else_is_not_listed(rehearse, monkeypatch):
    """As where memory that a graph reads was given to others."""

    def captured(self, run):
        captured.count += 1
        return (lambda: 2 * run()) if captured.count == 1 else run, False

    captured.count = 0
    ours = products.ours("torch")[:2]
    monkeypatch.setattr(products, "ours", lambda target: ours)
    monkeypatch.setattr(Rehearsal, "captured", captured)
    code, found = rehearse()
    assert code == 1
    one, many = found["cases"]
    assert {line["name"] for line in one["contenders"]} == {ours[1].name, CUBLAS}
    assert ours[0].name in {line["name"] for line in many["contenders"]}
    (told,) = found["failures"]
    assert told.startswith(f"{ours[0].name}, 64x128, M=1, after its calls, failed: RuntimeError")


def test_what_there_is_no_time_for_is_named(rehearse):
    code, found = rehearse("--limit", "0")
    assert code == 0
    assert found["cases"] == []
    assert found["left_out"] == ["64x128, M=1", "64x128, M=32"]


def test_only_tests_measure_nothing(tmp_path):
    path = tmp_path / "gpu.json"
    assert command.main(["--rehearse", "--only-tests", "--output", str(path)]) == 1
    assert not path.exists()


def test_without_a_gpu_it_is_one_sentence(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert command.main([]) == command.MISSING_DEVICE
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.startswith("No GPU:")
    assert told.err.count("\n") == 1


def test_shares_of_the_roofline():
    rates = Rates(100.0, {"int8": 50.0})
    found = rates.shares(20.0, 10.0, "int8", 0.4)
    assert found == {"bandwidth_share": 0.5, "throughput_share": 0.5}


@pytest.mark.parametrize("factor", [1.0, -1.0])
def test_decoder_makes_tokens_and_is_checked(monkeypatch, factor):
    def changed(block):
        return lambda x, *where: factor * block(x, *where)

    monkeypatch.setattr(decoder, "builders", lambda target: {"ours": changed})
    measure = functools.partial(decoder.measure, Rehearsal(), decoder.SMALL, "ours", 3, 2)
    if factor < 0:
        with pytest.raises(RuntimeError, match="logits have cosine"):
            measure()
        return
    found = measure()
    assert found["cosine"] == pytest.approx(1.0)
    assert found["tokens_per_second"] == pytest.approx(3e6 / found["median_us"])


def test_decoder_is_causal_and_remembers():
    """Tokens depend on those before: of two prompts that end alike, the logits differ."""
    made = decoder.Decoder(decoder.SMALL, 2, torch.device("cpu"), lambda block: block)
    made.tokens[1] = 5
    made.step()
    made.tokens.fill_(7)
    made.step()
    assert not torch.allclose(made.logits[0], made.logits[1])
    again = decoder.Decoder(decoder.SMALL, 2, torch.device("cpu"), lambda block: block)
    again.tokens.fill_(7)
    again.step()
    assert torch.allclose(again.logits[0], again.logits[1])


def test_a_checkout_that_is_not_installed_can_be_imported():
    script = (
        "import sys\n"
        "sys.meta_path = [f for f in sys.meta_path if 'editable' not in str(f).lower()]\n"
        f"sys.path = [p for p in sys.path if 'editable' not in p] + [{str(tree.ROOT)!r}]\n"
        "from benchmarks.gpu.tree import make_importable\n"
        "make_importable()\n"
        "import fxquant.codegen.spec, fxquant.passes\n"
        "print(fxquant.codegen.spec.__file__)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd="/"
    )
    assert "fxquant-tree-" in done.stdout


def test_a_checkout_that_is_not_installed_has_the_package_and_its_entry_point():
    made = tree.make_tree()
    (found,) = metadata.distributions(path=[str(made)])
    (backend,) = found.entry_points
    installed = metadata.distribution("fxquant").entry_points
    assert backend in installed.select(group="torch_dynamo_backends")
    for name in ("passes", "codegen", "runtime"):
        assert (made / "fxquant" / name / "__init__.py").is_file()
    shutil.rmtree(made)
