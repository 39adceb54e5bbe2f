"""The bar chart of `benchmarks.linear`, as SVG; ``python -m benchmarks.chart`` draws it again.

The background is transparent and the text of a grey that is read on white and on black, so one file
serves pages in light and in dark.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks import results

BASELINE = "torch bf16"
SHOWN = (
    "fxquant nf4 x bf16",
    "fxquant nf4 x int8",
    "fxquant int8 x int8",
    "bitsandbytes nf4",
    "torchao int4 weight-only",
    "fbgemm dynamic int8",
    "torchao int8 dynamic",
    "bitsandbytes LLM.int8()",
    "torch bf16",
    "torch fp32",
)
TEXT, GRID, OURS, THEIRS = "#7d8590", "#7d859040", "#1a9e76", "#93a1b0"


def draw_linear(
    cases: Sequence[Mapping[str, Any]], circumstances: Mapping[str, Any], path: Path
) -> bool:
    """Draws speeds against torch bf16, a panel for each number of rows of one shape.

    Args:
        cases: As `benchmarks.linear` writes them.
        circumstances: As `benchmarks.results.circumstances` finds them.
        path: Of the SVG.

    Returns:
        Whether there was anything to draw: a case with the baseline.
    """
    panels = _panels(cases)
    if not panels:
        return False
    if find_spec("matplotlib") is None:
        raise SystemExit("The chart needs matplotlib: pip install 'fxquant[bench]'.")
    import matplotlib as mpl
    from matplotlib.figure import Figure

    style: Any = {
        "svg.fonttype": "none",
        "svg.hashsalt": "fxquant",
        "font.family": "sans-serif",
        "font.sans-serif": ["Helvetica", "Arial", "DejaVu Sans"],
        "font.size": 9,
        **dict.fromkeys(("text.color", "xtick.color", "ytick.color", "axes.labelcolor"), TEXT),
    }
    names = [name for name in SHOWN if any(name in speeds for _, speeds in panels)]
    with mpl.rc_context(style):
        figure = Figure(figsize=(2.1 + 1.65 * len(panels), 0.9 + 0.27 * len(names)))
        axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        for axis, (rows, speeds) in zip(axes, panels, strict=True):
            _panel(axis, names, speeds)
            axis.set_title(f"{rows} row{'s' if rows > 1 else ''}", fontsize=9, color=TEXT)
        shape = panels_shape(cases)
        figure.suptitle(
            f"Speed against torch bf16, weight {shape}, {circumstances['device']}, "
            f"{circumstances['threads']} threads, cold caches",
            fontsize=9.5,
            color=TEXT,
        )
        figure.tight_layout(rect=(0, 0, 1, 0.99), w_pad=0.6)
        figure.savefig(path, transparent=True, metadata={"Date": None, "Creator": None})
    return True


def panels_shape(cases: Sequence[Mapping[str, Any]]) -> str:
    """The shape that is drawn: the first."""
    n, k = cases[0]["shape"]
    return f"{n} x {k}"


def _panels(cases: Sequence[Mapping[str, Any]]) -> list[tuple[int, dict[str, float]]]:
    """Rows, and the speed of each contender against the baseline, of the first shape."""
    found = []
    for case in cases:
        medians = {line["name"]: line["median_us"] for line in case["contenders"]}
        if case["shape"] == cases[0]["shape"] and BASELINE in medians:
            baseline = medians[BASELINE]
            found.append((case["rows"], {name: baseline / us for name, us in medians.items()}))
    return found


def _panel(axis: Any, names: Sequence[str], speeds: Mapping[str, float]) -> None:
    known = [speeds.get(name, 0.0) for name in names]
    colours = [OURS if name.startswith("fxquant") else THEIRS for name in names]
    bars = axis.barh(range(len(names)), known, color=colours, height=0.72)
    axis.bar_label(bars, [f"{speed:.1f}" if speed else "" for speed in known], padding=2, size=8)
    axis.axvline(1.0, color=TEXT, linewidth=0.8, linestyle=(0, (3, 3)))
    axis.set_yticks(range(len(names)), names)
    axis.set_xlim(0, 1.22 * max(known))
    axis.invert_yaxis()
    axis.tick_params(length=0)
    axis.xaxis.grid(visible=True, color=GRID, linewidth=0.6)
    axis.set_axisbelow(True)
    for spine in axis.spines.values():
        spine.set_visible(False)
    for label in axis.get_yticklabels():
        label.set_fontweight("bold" if label.get_text().startswith("fxquant") else "normal")


def main() -> None:
    """Draws the chart of the written results."""
    found = json.loads((results.FOLDER / "linear.json").read_text(encoding="utf-8"))
    draw_linear(found["cases"], found, results.FOLDER / "linear.svg")


if __name__ == "__main__":
    main()
