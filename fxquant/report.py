"""`Report`: what became of every product, and why some were left alone."""

from __future__ import annotations

import dataclasses
import html
import io
import json
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from fxquant.formats import anchor_of
from fxquant.page import page
from fxquant.runtime import index

QUANTIZED, LEFT_ALONE = "quantized", "left alone"
PACKED = "packed"
"""Scheme of a weight that arrived packed: from a file, or by `quantize_`."""


@dataclass(frozen=True)
class Row:
    """One product.

    Attributes:
        module: Path of the module, as in ``"encoder.layer.0.output.dense"``.
        parameter: Name of the weight, or ``""``.
        shape: Shape of the weight.
        status: ``"quantized"`` or ``"left alone"``.
        scheme: Name of the scheme, or ``""``.
        bits: Stored bits a weight, scales included; the dtype's bits when left alone.
        error_db: Signal to quantization noise of the weight in dB, None when left alone.
        kernel: ``target:name`` of the kernel, or ``""``; says so where it is a fallback.
        reason: Why it was left alone, or ``""``.
        where: ``file:line`` in the user's source, or ``""``.
        activation: How its activation is quantized, as in ``"int8 per token"``, or ``""``.
        notes: What else was done, a clause each: where scales went, and what kernels had counted
            when the report was made.
        fused: What its kernel does beside the product, and why it does no more, a clause each.
    """

    module: str
    parameter: str
    shape: tuple[int, ...]
    status: str
    scheme: str = ""
    bits: float = 0.0
    error_db: float | None = None
    kernel: str = ""
    reason: str = ""
    where: str = ""
    activation: str = ""
    notes: tuple[str, ...] = ()
    fused: tuple[str, ...] = ()

    @property
    def numel(self) -> int:
        """Elements of the weight."""
        count = 1 if self.shape else 0
        for size in self.shape:
            count *= size
        return count

    @property
    def site(self) -> tuple[str, str, str]:
        """What tells this product from the others of a model."""
        return (self.module, self.parameter, self.where)


class _Column(NamedTuple):
    """A column of the report.

    Attributes:
        name: Its heading.
        side: Where its texts are lined up.
        text: What a row has in it.
    """

    name: str
    side: Literal["left", "right"]
    text: Callable[[Row], str]


_COLUMNS = (
    _Column("module", "left", lambda row: row.module or row.parameter),
    _Column("shape", "right", lambda row: "x".join(map(str, row.shape))),
    _Column("scheme", "left", lambda row: row.scheme or "-"),
    _Column("activation", "left", lambda row: row.activation or "-"),
    _Column("bits", "right", lambda row: f"{row.bits:.3f}" if row.bits else "-"),
    _Column(
        "error dB", "right", lambda row: "-" if row.error_db is None else f"{row.error_db:.1f}"
    ),
)
_LAST = "kernel, or why it was left alone"


@dataclass(frozen=True)
class Report:
    """The products of a model, in the order in which they were met."""

    rows: tuple[Row, ...]

    @property
    def quantized(self) -> list[Row]:
        """Products that run on packed weights."""
        return [row for row in self.rows if row.status == QUANTIZED]

    @property
    def left_alone(self) -> list[Row]:
        """Products that do not, each with its reason."""
        return [row for row in self.rows if row.status == LEFT_ALONE]

    @property
    def coverage(self) -> float:
        """Share of the products' weight elements that are quantized (0 when there are none)."""
        total = sum(row.numel for row in self.rows)
        return sum(row.numel for row in self.quantized) / total if total else 0.0

    @property
    def bits_per_weight(self) -> float:
        """Mean stored bits over the quantized weights, each parameter counted once."""
        weights = {row.parameter or row.module: row for row in self.quantized}.values()
        total = sum(row.numel for row in weights)
        return sum(row.bits * row.numel for row in weights) / total if total else 0.0

    def table(self, most: int | None = None) -> Table:
        """The report for `rich.print`.

        Args:
            most: Products to show, the first ones; a last line says how many there are beside them.
        """
        table = Table(title=self.summary(), title_justify="left")
        columns = self._columns()
        for column in columns:
            table.add_column(column.name, justify=column.side, overflow="fold")
        table.add_column(_LAST, overflow="fold")
        shown = self.rows if most is None else self.rows[:most]
        for row in shown:
            said = "\n".join([_outcome(row), *row.fused, *row.notes])
            table.add_row(*(escape(column.text(row)) for column in columns), escape(said))
        if len(shown) < len(self.rows):
            table.add_row(f"... {len(self.rows) - len(shown)} more products")
        return table

    def _columns(self) -> list[_Column]:
        """All but the last. Of weights alone there is nothing to say about activations."""
        has_activations = any(row.activation for row in self.rows)
        return [one for one in _COLUMNS if has_activations or one.name != "activation"]

    def summary(self) -> str:
        """One line."""
        return (
            f"fxquant: {len(self.quantized)} of {len(self.rows)} products quantized "
            f"({self.coverage:.1%} of their weights), {self.bits_per_weight:.3f} bits a weight"
        )

    def __str__(self) -> str:
        buffer = io.StringIO()
        Console(file=buffer, width=120, color_system=None).print(self.table())
        return buffer.getvalue().rstrip()

    def to_json(self) -> str:
        """The rows and the totals as JSON text."""
        return json.dumps(
            {
                "coverage": self.coverage,
                "bits_per_weight": self.bits_per_weight,
                "rows": [dataclasses.asdict(row) for row in self.rows],
            },
            indent=2,
        )

    def to_html(self) -> str:
        """A self-contained page."""
        columns = self._columns()
        sides = {column: " class=n" if column.side == "right" else "" for column in columns}
        head = "".join(f"<th{sides[one]}>{html.escape(one.name)}</th>" for one in columns)
        rows = []
        for row in self.rows:
            cells = "".join(f"<td{sides[one]}>{html.escape(one.text(row))}</td>" for one in columns)
            kind = " class=note" if row.status == LEFT_ALONE else ""
            said = f"<div{kind}>{html.escape(_outcome(row))}</div>" + "".join(
                f"<div class=what>{html.escape(text)}</div>" for text in (*row.fused, *row.notes)
            )
            rows.append(f"<tbody><tr>{cells}<td>{said}</td></tr></tbody>")
        body = "\n".join(rows)
        head = f"<thead><tr>{head}<th>{html.escape(_LAST)}</th></tr></thead>"
        return page("fxquant report", self.summary(), f"<table>{head}\n{body}\n</table>")


def _outcome(row: Row) -> str:
    """What computes a product, or why it was left alone, and where that is."""
    return row.kernel or (f"{row.reason} ({row.where})" if row.where else row.reason)


class _Record:
    """The rows of one compile, found again by the parameters of its graph.

    Args:
        rows: Each with the parameter that it is about, or None.
        tensors: All parameters of the graph.
    """

    def __init__(
        self, rows: Iterable[tuple[Row, Tensor | None]], tensors: Iterable[Tensor]
    ) -> None:
        self.rows = [(row, None if about is None else _ref(about)) for row, about in rows]
        self.refs = [_ref(tensor) for tensor in tensors]

    def is_dead(self) -> bool:
        return all(ref() is None for ref in self.refs)

    def follow(self, old: Tensor, new: Tensor) -> None:
        """A parameter was replaced."""
        ref, was = _ref(new), anchor_of(old)
        self.refs = [ref if known() is was else known for known in self.refs]
        self.rows = [
            (row, ref if about is not None and about() is was else about)
            for row, about in self.rows
        ]

    def rows_for(self, names: Mapping[int, str]) -> Iterator[Row]:
        """Rows about a model's tensors, under the names that they have there.

        Names are given by the identity of each tensor's anchor.

        A block that was compiled on its own knows only the end of its parameters' paths.
        """
        tensors = [ref() for ref in self.refs]
        is_concerned = any(id(tensor) in names for tensor in tensors if tensor is not None)
        for row, ref in self.rows:
            about = None if ref is None else ref()
            if ref is None and is_concerned:
                yield row
            elif about is not None and id(about) in names:
                full = names[id(about)]
                prefix = full.removesuffix(row.parameter) if full.endswith(row.parameter) else ""
                module = f"{prefix}{row.module}" if row.module else prefix.rstrip(".")
                reads = _gauges.get(about, {}).get(row.site, {})
                counted = tuple(filter(None, (read() for read in reads.values())))
                yield dataclasses.replace(
                    row,
                    module=module,
                    parameter=prefix + row.parameter,
                    notes=(*row.notes, *counted),
                )


def _ref(tensor: Tensor) -> weakref.ref[Any]:
    return weakref.ref(anchor_of(tensor))


_records: list[_Record] = []
_gauges: WeakIdKeyDictionary = WeakIdKeyDictionary()
"""By the anchor of a parameter, then by product and topic: what reads a counter, as a note."""
_watchers: list[list[Row]] = []
_lock = threading.Lock()


def remember(rows: Iterable[tuple[Row, Tensor | None]], tensors: Iterable[Tensor]) -> None:
    """Keeps the rows of a compile for as long as one of its parameters lives.

    Args:
        rows: Each with the parameter that it is about, or None.
        tensors: All parameters of the graph.
    """
    record = _Record(rows, tensors)
    with _lock:
        _records[:] = [old for old in _records if not old.is_dead()]
        _records.append(record)
        for watcher in _watchers:
            watcher.extend(row for row, _ in record.rows)


@contextmanager
def watch() -> Iterator[list[Row]]:
    """Collects the rows of every compile while it is entered, whether its model lives on or not."""
    rows: list[Row] = []
    with _lock:
        _watchers.append(rows)
    try:
        yield rows
    finally:
        with _lock:
            _watchers[:] = [watcher for watcher in _watchers if watcher is not rows]


def gauge(row: Row, parameter: Tensor, read: Callable[[], str], topic: str = "") -> None:
    """Adds a note to a product that is read anew for every report, in place of an earlier one.

    Args:
        row: The product, as it was remembered.
        parameter: The product's; the note dies with it.
        read: Gives the note, ``""`` for none. It must not hold the parameter.
        topic: What the note is about: one of each is kept.
    """
    with _lock:
        _gauges.setdefault(anchor_of(parameter), {}).setdefault(row.site, {})[topic] = read


def follow(old: Tensor, new: Tensor) -> None:
    """A parameter was replaced: its rows are now about the new one."""
    with _lock:
        for record in _records:
            record.follow(old, new)


def report(model: nn.Module) -> Report:
    """What was done to the products of a model, by every compile of it so far.

    Where kernels are dumped, the page beside them is brought up to date.

    Args:
        model: A module, or what `torch.compile` made of it.

    Returns:
        The latest row of every product. Empty if the model was never compiled by fxquant: a
        graph is compiled at its first call.
    """
    model = getattr(model, "_orig_mod", model)
    names = {id(tensor): name for name, tensor in model.named_buffers()}
    names.update({id(anchor_of(tensor)): name for name, tensor in model.named_parameters()})
    latest: dict[tuple[str, str, str], Row] = {}
    with _lock:
        for record in _records:
            for row in record.rows_for(names):
                _supersede(latest, row)
    index.write()
    return Report(tuple(latest.values()))


def _supersede(latest: dict[tuple[str, str, str], Row], row: Row) -> None:
    """Takes in a newer row: a compile knows the line, and `quantize_` knew the scheme."""
    ahead = latest.pop((row.module, row.parameter, ""), None) if row.where else None
    if row.scheme == PACKED:
        before = ahead or latest.get(row.site)
        row = dataclasses.replace(row, scheme=before.scheme if before else PACKED)
    latest[row.site] = row
