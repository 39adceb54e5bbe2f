"""What the benchmarks must show: ratios that were asked for, beside those that were measured."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from rich.table import Table

READING = "reading the same bytes once"
SQUARE, TALL = (4096, 4096), (11008, 4096)

Seconds = Callable[["Target", str], "float | None"]
"""The median of a contender in the case of a target; None where it was not timed."""


@dataclass(frozen=True)
class Target:
    """One ratio of two contenders' times.

    Attributes:
        case: What was computed, as in ``"4096x4096, M=1"``.
        ours: Our contender.
        against: A peer, another of ours, or `READING`.
        required: Of the ratio: `against` over `ours`, or with `at_most`, `ours` over `against`.
        at_most: The ratio has to be small, not large.
    """

    case: str
    ours: str
    against: str
    required: float
    at_most: bool = False

    def ratio(self, seconds: Seconds) -> float | None:
        """What was measured, None where one of the two was not timed."""
        ours, against = seconds(self, self.ours), seconds(self, self.against)
        if ours is None or against is None:
            return None
        return ours / against if self.at_most else against / ours

    def judge(self, seconds: Seconds) -> dict[str, Any]:
        """The target with its ratio and whether it is met (None where it was not measured)."""
        ratio = self.ratio(seconds)
        met = None
        if ratio is not None:
            met = ratio <= self.required if self.at_most else ratio >= self.required
        return {
            "case": self.case,
            "ours": self.ours,
            "against": self.against,
            "sense": "at most" if self.at_most else "at least",
            "required": self.required,
            "measured": ratio,
            "met": met,
        }


def case_name(shape: tuple[int, int], rows: int) -> str:
    """A product as text: outputs, inputs, rows of the activation."""
    return f"{shape[0]}x{shape[1]}, M={rows}"


def _lines(
    shape: tuple[int, int],
    ours: str,
    against: str,
    required: dict[int, float],
    *,
    at_most: bool = False,
) -> list[Target]:
    return [
        Target(case_name(shape, rows), f"fxquant {ours}", against, ratio, at_most)
        for rows, ratio in required.items()
    ]


_BNB_NF4, _BNB_INT8 = "bitsandbytes nf4", "bitsandbytes LLM.int8(), 1% outliers"
_INT8, _OUTLIERS = "int8 x int8", "int8 x int8, 1% outliers"
LINEAR = (
    *_lines(SQUARE, "nf4 x bf16", _BNB_NF4, {1: 1.4, 4: 1.5, 16: 1.5, 128: 1.3, 512: 1.3}),
    *_lines(SQUARE, "nf4 x bf16", "torch bf16", {16: 2.3, 128: 1.1, 512: 1.0}),
    *_lines(SQUARE, "nf4 x bf16", READING, {1: 1.15, 4: 1.15}, at_most=True),
    *_lines(SQUARE, "nf4 x fp32", "torch fp32", {1: 13.0, 16: 5.0, 128: 2.7}),
    *_lines(SQUARE, "nf4 x int8", "torch bf16", {16: 3.3, 128: 1.8}),
    *_lines(SQUARE, _INT8, "fbgemm dynamic int8", {1: 1.4, 16: 1.9, 128: 1.25}),
    *_lines(
        SQUARE,
        f"{_INT8} + bias + gelu",
        f"fxquant {_INT8}",
        {1: 1.04, 16: 1.04, 128: 1.04},
        at_most=True,
    ),
    *_lines(SQUARE, _OUTLIERS, _BNB_INT8, {1: 4.5, 16: 7.0, 128: 2.2}),
    *_lines(SQUARE, f"{_OUTLIERS}, known", _BNB_INT8, {1: 4.5, 16: 7.0, 128: 2.2}),
    *_lines(TALL, "nf4 x bf16", _BNB_NF4, {1: 1.3, 16: 1.4, 128: 1.3}),
)
_MANY, _ONE, _TORCHAO = "MiniLM, 64 x 128 tokens", "MiniLM, one sentence", "torchao int8 dynamic"
MODELS = (
    Target(_MANY, "fxquant nf4", _BNB_NF4, 1.1),
    Target(_ONE, "fxquant nf4", _BNB_NF4, 3.0),
    Target("Llama 1.1 B, a token", "fxquant nf4", _BNB_NF4, 1.4),
    Target("Llama 1.1 B, a token", "fxquant nf4", "inductor bf16", 2.8),
    Target(_MANY, "fxquant smoothquant", _TORCHAO, 1.3),
    Target(_MANY, "fxquant w8a8", _TORCHAO, 1.3),
    Target(_MANY, "fxquant smoothquant", "inductor fp32", 3.3),
    Target(_MANY, "fxquant w8a8", "inductor fp32", 3.3),
    Target(_ONE, "fxquant smoothquant", _TORCHAO, 1.0),
    Target(_ONE, "fxquant w8a8", _TORCHAO, 1.0),
    Target(_MANY, "fxquant smoothquant", "fxquant w8a8", 1.03, at_most=True),
    Target(_MANY, "fxquant llm_int8", "fxquant w8a8", 0.9),
)

_BIG = (8192, 8192)
GPU = (
    *_lines(_BIG, "nf4", "torch bf16", {1: 2.6, 16: 2.5, 128: 1.4, 512: 0.85, 2048: 0.92}),
    *_lines(_BIG, "w8a8", "torch bf16", {2048: 1.6}),
    *_lines(_BIG, "llm_int8", "torch bf16", {2048: 1.5, 1: 1.7}),
)
"""Of an H100."""


def table(judged: Iterable[dict[str, Any]]) -> Table:
    """The judged targets for the terminal."""
    shown = Table(title="What it must show")
    for heading in ("case", "ours", "against"):
        shown.add_column(heading)
    for heading in ("required", "measured", ""):
        shown.add_column(heading, justify="right")
    verdicts = {True: "[green]met[/green]", False: "[red]not met[/red]", None: "not measured"}
    for line in judged:
        measured = line["measured"]
        shown.add_row(
            line["case"],
            line["ours"],
            line["against"],
            f"{line['sense']} {line['required']:g}x",
            "" if measured is None else f"{measured:.2f}x",
            verdicts[line["met"]],
        )
    return shown
