"""The page beside dumped kernels: which module runs which, how often, and in what time.

``index.html`` and ``index.json`` are written when kernels are, when a report is made, and when the
process ends. What other processes wrote about kernels in the same folder is kept.
"""

from __future__ import annotations

import atexit
import dataclasses
import functools
import html
import json
import logging
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fxquant._version import __version__
from fxquant.codegen import Spec
from fxquant.codegen.cpp import cost
from fxquant.codegen.cpp.plan import Plan
from fxquant.codegen.spec import KernelSpec
from fxquant.codegen.work import amount, work_of
from fxquant.page import page
from fxquant.runtime import cache, launch, rates, timing, toolchain
from fxquant.runtime.cpp import usable_threads

LOG = logging.getLogger("fxquant.dump")
PAGE, DATA = "index.html", "index.json"
_MOST_SIZES = 12
"""Numbers of rows that are shown of a kernel: those that took longest."""


@dataclass(frozen=True)
class Line:
    """The calls of a kernel with one number of rows.

    Attributes:
        rows: The number.
        calls: How many there were.
        measured_us: Their median, or None.
        predicted_us: What the cost model expects of a kernel whose weights lie in no cache, without
            its epilogue; None where it knows nothing.
        bytes: That such a call has to move.
        operations: That it has to do.
    """

    rows: int
    calls: int
    measured_us: float | None
    predicted_us: float | None
    bytes: float
    operations: float


@dataclass(frozen=True)
class Entry:
    """One dumped kernel.

    Attributes:
        file: Of its source, in the same folder.
        name: What it does.
        target: What it was printed for.
        what: The spec in a line.
        modules: Paths of the modules whose work it does.
        note: Why it did not run, or ``""``.
        lines: Its calls.
    """

    file: str
    name: str
    target: str
    what: str
    modules: tuple[str, ...]
    note: str
    lines: tuple[Line, ...] = ()

    @property
    def calls(self) -> int:
        """All of them."""
        return sum(line.calls for line in self.lines)

    @property
    def seconds(self) -> float:
        """That they took together, by their medians."""
        return sum(line.calls * (line.measured_us or 0.0) for line in self.lines) / 1e6


_kernels: dict[Path, dict[str, launch.Kernel]] = {}
"""By folder, then by the name of the file."""
_lock = threading.Lock()
_at_exit: list[Callable[[], None]] = []


def add(folder: Path, kernels: Iterable[tuple[str, launch.Kernel]]) -> None:
    """Takes up kernels, each under the name of its file, and writes the page of their folder."""
    folder = folder.absolute()
    with _lock:
        known = _kernels.setdefault(folder, {})
        for name, kernel in kernels:
            before = known.get(name)
            modules = (*(before.modules if before else ()), *kernel.modules)
            known[name] = dataclasses.replace(kernel, modules=tuple(dict.fromkeys(modules)))
        if not _at_exit:
            _at_exit.append(atexit.register(write))
    _write(folder)


def file_of(folder: Path, kernel: launch.Kernel, name: str) -> str:
    """The file that holds a kernel in a folder, by another name when another graph has it too."""
    spec = kernel.spec.to_json()
    known = _kernels.get(folder.absolute(), {}).items()
    same = (f for f, k in known if k.target == kernel.target and k.spec.to_json() == spec)
    return next(same, name)


def write() -> None:
    """Writes the pages of all folders with what is known now; logs where one cannot be written."""
    for folder in list(_kernels):
        _try_to_write(folder)


def _try_to_write(folder: Path) -> None:
    try:
        _write(folder)
    except OSError as error:
        LOG.warning("the index of %s cannot be written: %s", folder, error)


def entries(folder: Path) -> list[Entry]:
    """The kernels of a folder: those of this process, and what others wrote about theirs."""
    folder = folder.absolute()
    own = {name: _entry(name, kernel) for name, kernel in _kernels.get(folder, {}).items()}
    others = [e for e in _read(folder / DATA) if e.file not in own and (folder / e.file).is_file()]
    return sorted([*own.values(), *others], key=lambda e: (-e.seconds, e.target, e.name, e.file))


def _write(folder: Path) -> None:
    with _lock:
        found = entries(folder)
        data = {"fxquant": __version__, "kernels": [dataclasses.asdict(entry) for entry in found]}
        cache.write_atomically(folder / DATA, json.dumps(data, indent=1) + "\n")
        cache.write_atomically(folder / PAGE, _page(found))


def _entry(name: str, kernel: launch.Kernel) -> Entry:
    work = work_of(kernel.spec)
    predict = _prediction(kernel.spec) if kernel.target == "cpp" and not kernel.note else None
    lines = tuple(
        Line(
            rows=calls.rows,
            calls=calls.count,
            measured_us=None if calls.seconds is None else round(calls.seconds * 1e6, 2),
            predicted_us=None if predict is None else round(predict(calls.rows) * 1e6, 2),
            bytes=work.bytes(calls.rows),
            operations=work.operations * calls.rows,
        )
        for calls in timing.calls(kernel.spec.to_json(), kernel.target)
        if calls.rows and not kernel.note
    )
    what = kernel.spec.describe()
    return Entry(name, kernel.name, kernel.target, what, kernel.modules, kernel.note, lines)


@functools.lru_cache(maxsize=1024)
def _prediction(spec: Spec) -> Callable[[int], float] | None:
    """Seconds of a C++ product by the number of rows; None where the cost model knows nothing."""
    chain = toolchain.toolchain()
    if chain is None or not isinstance(spec, KernelSpec) or spec.grouped:
        return None
    threads = usable_threads(openmp=chain.openmp)
    return functools.lru_cache(maxsize=256)(
        cost.prediction(Plan(spec, chain.isa), rates.rates(chain, threads), threads)
    )


def _read(path: Path) -> list[Entry]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        return [
            Entry(
                **{
                    **entry,
                    "modules": tuple(entry["modules"]),
                    "lines": tuple(Line(**line) for line in entry["lines"]),
                }
            )
            for entry in data["kernels"]
        ]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError) as error:
        LOG.warning("%s cannot be read (%r): it is written anew", path, error)
        return []


# --- the page ---------------------------------------------------------------------------------

_COLUMNS = ("rows", "calls", "measured µs", "predicted µs", "moves", "operations", "GB/s", "Gop/s")


def _page(found: list[Entry]) -> str:
    total = sum(entry.seconds for entry in found)
    calls = sum(entry.calls for entry in found)
    head = "".join(f"<th class=n>{name}</th>" for name in _COLUMNS)
    body = "\n".join(_rows_of(entry, total) for entry in found)
    return page(
        "fxquant kernels",
        f"{len(found)} kernels, {calls} calls, {total * 1e3:,.1f} ms in them",
        "<p>Times are medians around launches. Predictions are those of the cost model: weights "
        "from memory, none in a cache, the epilogue left out. Bytes and operations are the least "
        f"that a call needs. fxquant {html.escape(__version__)}.</p>"
        f"<table><thead><tr><th>kernel</th><th>modules</th>{head}</tr></thead>\n{body}\n</table>",
    )


def _rows_of(entry: Entry, total: float) -> str:
    """A kernel's part of the table: a line for each number of rows."""
    longest = sorted(entry.lines, key=lambda line: -line.calls * (line.measured_us or 0))
    shown = sorted(longest[:_MOST_SIZES], key=lambda line: line.rows)
    lines: list[Line | None] = [*shown] or [None]
    share = 100 * entry.seconds / total if total else 0.0
    note = f"<div class=note>not run: {html.escape(entry.note)}</div>" if entry.note else ""
    first = (
        f"<td rowspan={len(lines)}><a href='{html.escape(entry.file)}'>{html.escape(entry.name)}"
        f"</a> {entry.target}<div class=what>{html.escape(entry.what)}</div>{note}"
        f"<div class=bar style='width:{share:.1f}%'></div></td>"
        f"<td rowspan={len(lines)}>{_modules(entry.modules)}</td>"
    )
    rows = [f"<tr>{first if i == 0 else ''}{_cells(line)}</tr>" for i, line in enumerate(lines)]
    return f"<tbody>{''.join(rows)}</tbody>"


def _modules(modules: tuple[str, ...]) -> str:
    names = [html.escape(name) for name in modules]
    if len(names) <= 3:
        return "<br>".join(names)
    rest = "<br>".join(names[2:])
    return (
        f"{'<br>'.join(names[:2])}<details><summary>{len(names) - 2} more</summary>{rest}</details>"
    )


def _cells(line: Line | None) -> str:
    values: list[Any] = ["-"] * len(_COLUMNS)
    if line is not None:
        time = line.measured_us
        values = [
            line.rows,
            line.calls,
            "-" if time is None else f"{time:.1f}",
            "-" if line.predicted_us is None else f"{line.predicted_us:.1f}",
            amount(line.bytes, "B"),
            amount(line.operations),
            f"{line.bytes / time / 1e3:.3g}" if time else "-",
            f"{line.operations / time / 1e3:.3g}" if time else "-",
        ]
    return "".join(f"<td class=n>{value}</td>" for value in values)
