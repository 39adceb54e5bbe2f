"""Whole models beside those of other packages: ``python -m benchmarks.models``.

MiniLM encodes sentences, and a decoder of Llama's shape (1.1 billion random weights) makes tokens
with a static cache, one at a time. Everyone in one process, interleaved, from cold caches; medians
and quartiles. Written to ``benchmarks/results/models.json``, where cases that were measured before
on the same machine stay: ``--models llama`` measures one alone.
"""

from __future__ import annotations

import argparse
import copy
import fnmatch
import gc
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor, nn

import fxquant
from benchmarks import results, targets
from benchmarks.machine import Machine
from benchmarks.modules import (
    bitsandbytes_nf4,
    bitsandbytes_repacked,
    fbgemm_dynamic,
    torchao_int8,
)
from benchmarks.ours import require_kernels
from benchmarks.peers import quiet
from benchmarks.timing import Run, interleave

ROUNDS = {"minilm": 11, "sentence": 21, "llama": 11}
"""The cases, and how often every contender is timed: packing and compiling takes most of the time
of the larger ones."""
BF16 = torch.bfloat16
LEAST_COSINE = 0.5
"""Of a result to that of the dense model, where unrelated ones have about 0. (4 bits a weight leave
0.97 of MiniLM, and 0.89 of 22 layers of random weights.)"""

Builder = Callable[[nn.Module], Callable[..., Any]]


def _fxquant_nf4(model: nn.Module) -> Callable[..., Any]:
    fxquant.quantize_(model, fxquant.Config(scheme="nf4"))
    return torch.compile(model, backend="fxquant", options={"scheme": "nf4"})


def _fxquant(scheme: str) -> Builder:
    """int8 activations, with statistics of MiniLM on the demo's other sentences where need be."""

    def build(model: nn.Module) -> Callable[..., Any]:
        from fxquant.demo import calibration_sentences
        from fxquant.demo_models import load_minilm

        options: dict[str, Any] = {"scheme": scheme}
        if fxquant.schemes()[scheme].recipe.needs_calibration:
            batch = load_minilm()[1](calibration_sentences(), padding=True, return_tensors="pt")
            options["calibration"] = fxquant.calibrate(model, [dict(batch)], progress=False)
        return torch.compile(model, backend="fxquant", options=options)

    return build


def _inductor(model: nn.Module) -> Callable[..., Any]:
    return torch.compile(model)


def _frozen(model: nn.Module) -> Callable[..., Any]:
    return torch.compile(model, options={"freezing": True})


BUILDERS: dict[str, tuple[torch.dtype, Builder]] = {
    "torch fp32": (torch.float32, lambda model: model),
    "torch bf16": (BF16, lambda model: model),
    "inductor fp32": (torch.float32, _inductor),
    "inductor bf16": (BF16, _inductor),
    "inductor bf16, frozen": (BF16, _frozen),
    "fbgemm dynamic int8": (torch.float32, fbgemm_dynamic),
    "torchao int8 dynamic": (BF16, lambda model: _frozen(torchao_int8(model))),
    "bitsandbytes nf4": (BF16, bitsandbytes_nf4),
    "bitsandbytes nf4, inductor": (BF16, lambda model: _inductor(bitsandbytes_repacked(model))),
    "fxquant nf4": (BF16, _fxquant_nf4),
    "fxquant w8a8": (BF16, _fxquant("w8a8")),
    "fxquant smoothquant": (BF16, _fxquant("smoothquant")),
    "fxquant llm_int8": (BF16, _fxquant("llm_int8")),
}
DECODED = (
    "torch bf16",
    "inductor bf16",
    "bitsandbytes nf4",
    "bitsandbytes nf4, inductor",
    "fxquant nf4",
)
"""Who makes tokens: 1.1 billion weights are in memory once for each but the second."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, prints the tables and writes the JSON."""
    options = _options(arguments)
    quiet()
    # Everyone compiles the same function: what Dynamo gave up on would run uncompiled.
    torch._dynamo.config.recompile_limit = 100
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    names = [n for n in BUILDERS if any(fnmatch.fnmatch(n, p) for p in options.contenders)]
    if not names:
        raise SystemExit(f"No contender matches. There are: {'; '.join(BUILDERS)}.")
    if any(name.startswith("fxquant") for name in names):
        require_kernels()
    console = results.console()
    machine = Machine(torch.get_num_threads(), quick=options.quick)
    timed: list[dict[str, Any]] = []
    for case in options.models:
        options.turns = options.rounds or (5 if options.quick else ROUNDS[case])
        if case == "llama":
            decoding = [name for name in names if name in DECODED]
            timed.append(_llama(decoding, options, machine, console))
        else:
            timed.append(_minilm(case, names, options, machine, console))
    found = results.circumstances(machine.rates())
    measured = [{**case, "commit": found["commit"], "time": found["time"]} for case in timed]
    cases = results.merged(options.output, found, measured)
    judged = [target.judge(_seconds(cases)) for target in targets.MODELS]
    console.print(targets.table(judged))
    results.write(options.output, {**found, "cases": cases, "targets": judged})
    console.print(f"written to {options.output}")


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--models", nargs="+", choices=tuple(ROUNDS), default=tuple(ROUNDS))
    parser.add_argument(
        "--contenders", nargs="+", default=["*"], help="patterns of names, as 'torch*'"
    )
    listed = ", ".join(f"{case} {count}" for case, count in ROUNDS.items())
    parser.add_argument("--rounds", type=int, help=f"default: {listed}")
    parser.add_argument("--layers", type=int, default=22, help="of the decoder (default 22)")
    parser.add_argument("--quick", action="store_true", help="5 rounds, small cases, warmer caches")
    parser.add_argument(
        "--output", type=Path, default=results.FOLDER / "models.json", help="where to write"
    )
    options = parser.parse_args(arguments)
    options.layers = 2 if options.quick else options.layers
    options.sentences = 8 if options.quick else 64
    return options


# --- MiniLM ----------------------------------------------------------------------------------


def _minilm(
    case: str,
    names: Sequence[str],
    options: argparse.Namespace,
    machine: Machine,
    console: Console,
) -> dict[str, Any]:
    """Many sentences at once, or one."""
    from fxquant.demo import sentences
    from fxquant.demo_models import load_minilm

    model, tokenizer = load_minilm()
    listed = sentences()
    if case == "sentence":
        title, batch = "MiniLM, one sentence", tokenizer(listed[:1], return_tensors="pt")
    else:
        title = f"MiniLM, {options.sentences} x 128 tokens"
        # Sixteen sentences in a row are more than 128 tokens: nothing is padded.
        texts = [" ".join(listed[start : start + 16]) for start in range(options.sentences)]
        batch = tokenizer(texts, max_length=128, truncation=True, return_tensors="pt")
    # A graph of its own for each case: static shapes are the best case for everyone.
    torch._dynamo.reset()
    exact = _encoded(model, batch)
    runs: dict[str, list[Run]] = {}
    cosines = {}
    for name in names:
        dtype, build = BUILDERS[name]
        with console.status(f"{title}: {name}"):
            # Two, because packed weights fit into the caches: they take turns.
            copies = [build(copy.deepcopy(model).to(dtype)) for _ in range(2)]
            for built in copies:
                cosines[name] = _alike(name, _encoded(built, batch), exact)
        runs[name] = [_call(built, batch) for built in copies]
    timed = _time(title, runs, cosines, options.turns, machine)
    console.print(_table(timed))
    return timed


def _call(model: Callable[..., Any], batch: Mapping[str, Tensor]) -> Run:
    return lambda: model(**batch)


@torch.inference_mode()
def _encoded(model: Callable[..., Any], batch: Mapping[str, Tensor]) -> Tensor:
    """The vectors of the tokens, ``[sentences, tokens, width]``."""
    return model(**batch).last_hidden_state.float()


# --- a decoder -------------------------------------------------------------------------------


class Decoder:
    """Makes a token a call, the greedy choice, with a static cache."""

    def __init__(self, model: Callable[..., Any], config: Any, length: int) -> None:
        from transformers import StaticCache

        self.model = model
        self.cache = StaticCache(config=config, max_cache_len=length)
        self.token = torch.ones(1, 1, dtype=torch.long)
        self.position = 0
        self.logits = torch.empty(0)

    @torch.inference_mode()
    def __call__(self) -> None:
        """The next token."""
        self.logits = self.model(
            input_ids=self.token,
            past_key_values=self.cache,
            position_ids=torch.tensor([[self.position]]),
        ).logits
        self.token = self.logits[:, -1].argmax(-1, keepdim=True)
        self.position += 1


def _llama(
    names: Sequence[str], options: argparse.Namespace, machine: Machine, console: Console
) -> dict[str, Any]:
    """One token at a time."""
    torch._dynamo.reset()
    model = make_llama(options.layers)
    warmup = 3
    # `interleave` makes one call ahead, and two in a round.
    length = warmup + 1 + 2 * options.turns
    runs: dict[str, list[Run]] = {}
    cosines = {}
    exact = Decoder(model, model.config, 1)
    exact()
    for name in names:
        build = BUILDERS[name][1]
        with console.status(f"decoder: {name}"):
            changed = name not in ("torch bf16", "inductor bf16")
            decoder = Decoder(
                build(copy.deepcopy(model) if changed else model), model.config, length
            )
            decoder()
            cosines[name] = _alike(name, decoder.logits.float(), exact.logits.float())
            # The second call compiles for a cache that is there.
            for _ in range(warmup - 1):
                decoder()
            gc.collect()
        runs[name] = [decoder]
    weights = sum(p.numel() for p in model.parameters())
    title = "Llama 1.1 B, a token" if options.layers == 22 else f"Llama {weights / 1e9:.1f} B"
    case = _time(title, runs, cosines, options.turns, machine)
    for line in case["contenders"]:
        line["tokens_per_second"] = 1e3 / line["median_ms"]
    console.print(_table(case))
    return case


def make_llama(layers: int) -> Any:
    """A decoder of Llama's shape with random weights in bfloat16; 22 layers are 1.1 billion."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=4,
        max_position_embeddings=2048,
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(BF16)
    try:
        return LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)


# --- what both share -------------------------------------------------------------------------


def _alike(name: str, result: Tensor, exact: Tensor) -> float:
    """The mean cosine of rows.

    Raises:
        SystemExit: It is below `LEAST_COSINE`.
    """
    flat = (result.flatten(0, -2), exact.flatten(0, -2))
    cosine = float(nn.functional.cosine_similarity(*flat).mean())
    if not cosine >= LEAST_COSINE:
        raise SystemExit(
            f"{name}: its result has cosine {cosine:.3f} to the dense model's, less than "
            f"{LEAST_COSINE}: it does not compute the model, so it is not timed."
        )
    return cosine


@torch.inference_mode()
def _time(
    title: str,
    runs: Mapping[str, Sequence[Run]],
    cosines: Mapping[str, float],
    rounds: int,
    machine: Machine,
) -> dict[str, Any]:
    with Progress(transient=True) as progress:
        task = progress.add_task(title, total=rounds)
        timed = interleave(
            runs,
            rounds,
            machine.evict,
            lambda: progress.advance(task),
        )
    lines = [
        {
            "name": name,
            "median_ms": timing.median * 1e3,
            "quartiles_ms": [timing.low * 1e3, timing.high * 1e3],
            "rounds": timing.rounds,
            "cosine": cosines[name],
        }
        for name, timing in timed.items()
    ]
    return {"case": title, "contenders": lines}


def _seconds(cases: Sequence[Mapping[str, Any]]) -> targets.Seconds:
    """Looks up medians for `targets`."""

    def find(target: targets.Target, name: str) -> float | None:
        for case in cases:
            for line in case["contenders"]:
                if case["case"] == target.case and line["name"] == name:
                    return float(line["median_ms"] / 1e3)
        return None

    return find


def _table(case: Mapping[str, Any]) -> Table:
    shown = Table(title=case["case"])
    shown.add_column("contender")
    for heading in ("ms", "quartiles", "a second", "cosine"):
        shown.add_column(heading, justify="right")
    for line in sorted(case["contenders"], key=lambda line: line["median_ms"]):
        low, high = line["quartiles_ms"]
        shown.add_row(
            line["name"],
            f"{line['median_ms']:.2f}",
            f"{low:.2f} - {high:.2f}",
            f"{1e3 / line['median_ms']:.1f}",
            f"{line['cosine']:.4f}",
            style="bold" if line["name"].startswith("fxquant") else "",
        )
    return shown


if __name__ == "__main__":
    main()
