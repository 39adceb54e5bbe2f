"""The command line: ``fxquant doctor | demo | schemes | dump | report``.

Exit codes: 0 when it worked, 1 for an error (one sentence on stderr), 2 for wrong usage.
"""

from __future__ import annotations

import argparse
import os
import runpy
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fxquant import __version__, errors

PIPED_WIDTH = 120


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        arguments: What follows the program's name; `sys.argv` by default.

    Returns:
        The exit code.
    """
    options = _parser().parse_args(arguments)
    # Into a file or a pipe, rich would fold every table to 80 columns.
    piped = not sys.stdout.isatty() and "COLUMNS" not in os.environ
    try:
        return int(options.run(options, Console(width=PIPED_WIDTH if piped else None)))
    # Dynamo wraps what a backend raises; anything that is not ours keeps its traceback.
    except Exception as error:
        ours = _ours(error)
        if ours is None:
            raise
        Console(stderr=True).print(
            f"[red]error:[/red] {escape(str(ours))}", highlight=False, soft_wrap=True
        )
        return 1


def _ours(error: BaseException) -> errors.FxquantError | None:
    """The message of ours behind an exception, if there is one."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, errors.FxquantError):
        # Dynamo keeps what a backend raised in `inner_exception`.
        cause = getattr(cause, "inner_exception", None) or cause.__cause__
    return cause


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fxquant", description="A torch.compile backend that quantizes the model it compiles."
    )
    parser.add_argument("--version", action="version", version=f"fxquant {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    doctor = commands.add_parser("doctor", help="what this machine has, and what is missing")
    doctor.set_defaults(run=_doctor)

    demo = commands.add_parser("demo", help="quantize a real model and show what it cost")
    demo.add_argument("--batch-size", type=_positive, default=32, metavar="N")
    demo.add_argument(
        "--limit", type=_positive, metavar="N", help="encode the first N sentences only"
    )
    demo.add_argument(
        "--dump", type=Path, metavar="DIR", help="where the kernels go (a temporary folder)"
    )
    demo.add_argument("--skip-llama", action="store_true", help="leave out the second part")
    demo.set_defaults(run=_demo)

    schemes = commands.add_parser("schemes", help="the schemes, their papers and recipes")
    schemes.set_defaults(run=_schemes)

    dump = commands.add_parser(
        "dump", help="run a script, write the kernels of its models and what they took"
    )
    dump.add_argument("--out", type=Path, default=Path("dump"), metavar="DIR", help="(./dump)")
    _add_script(dump)
    dump.set_defaults(run=_dump)

    report = commands.add_parser("report", help="run a script and report on its models")
    report.add_argument("--json", type=Path, metavar="FILE", help="write the report as JSON too")
    report.add_argument("--html", type=Path, metavar="FILE", help="write the report as HTML too")
    _add_script(report)
    report.set_defaults(run=_report)
    return parser


def _add_script(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("script", type=Path, metavar="SCRIPT", help="a Python file")
    rest = parser.add_argument(
        "arguments", nargs=argparse.REMAINDER, metavar="...", help="the script's own arguments"
    )
    # Else argparse before Python 3.13 says that they are missing when SCRIPT is.
    rest.required = False


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        message = f"{text!r} is not a positive whole number"
        raise argparse.ArgumentTypeError(message)
    return int(text)


def _doctor(_: argparse.Namespace, console: Console) -> int:
    from fxquant import doctor

    return 0 if doctor.show(console) else 1


def _demo(options: argparse.Namespace, console: Console) -> int:
    from fxquant import demo

    demo.run(
        console,
        batch_size=options.batch_size,
        limit=options.limit,
        dump=options.dump,
        llama=not options.skip_llama,
    )
    return 0


def _schemes(_: argparse.Namespace, console: Console) -> int:
    from fxquant.schemes import schemes

    table = Table(title="Schemes", title_justify="left")
    for column in ("name", "for", "paper", "weight", "activation"):
        table.add_column(column, overflow="fold")
    for name, scheme in schemes().items():
        weight, activation = scheme.recipe.weight, scheme.recipe.activation
        how = "-" if activation is None else str(activation)
        table.add_row(name, scheme.summary, scheme.paper, escape(str(weight)), how)
    console.print(table)
    return 0


def _dump(options: argparse.Namespace, console: Console) -> int:
    from fxquant.report import watch
    from fxquant.runtime import dump, index

    _check_script(options.script)
    dump.check(options.out, "--out")
    os.environ[dump.ENVIRONMENT] = str(options.out)
    before = _written(options.out)
    with watch() as rows:
        _run_script(options.script, options.arguments)
    new = [path for path, stamp in _written(options.out).items() if before.get(path) != stamp]
    if not new and rows:
        raise errors.nothing_quantized(options.script)
    if not new:
        raise errors.nothing_compiled(options.script)
    console.print(f"{len(new)} kernels in {options.out}:", highlight=False, markup=False)
    for path in new:
        console.print(f"  {path.name}", highlight=False, markup=False)
    index.write()
    console.print(f"index: {options.out / index.PAGE}", highlight=False, markup=False)
    return 0


def _written(folder: Path) -> dict[Path, int]:
    """The kernel sources in a folder and when each was written."""
    from fxquant.runtime import dump

    return {path: path.stat().st_mtime_ns for path in dump.sources(folder)}


def _report(options: argparse.Namespace, console: Console) -> int:
    from fxquant.report import Report, watch
    from fxquant.runtime import cache

    with watch() as rows:
        _run_script(options.script, options.arguments)
    if not rows:
        raise errors.nothing_compiled(options.script)
    report = Report(tuple({(row.site, row.scheme): row for row in rows}.values()))
    console.print(report.table())
    for path, text in ((options.json, report.to_json()), (options.html, report.to_html())):
        if path is not None:
            try:
                cache.write_atomically(path, text)
            except OSError as error:
                raise errors.unwritable_file(path, error) from error
    return 0


def _check_script(script: Path) -> None:
    if not script.is_file():
        raise errors.no_script(script)


def _run_script(script: Path, arguments: Sequence[str]) -> None:
    """Runs a Python file as ``python SCRIPT ARGUMENTS`` would.

    Raises:
        ScriptError: There is no such file, or it stopped with an exception.
    """
    _check_script(script)
    with _as_program(script, arguments):
        try:
            runpy.run_path(str(script), run_name="__main__")
        except SystemExit as stop:
            if stop.code not in (None, 0):
                raise errors.script_failed(script, f"exit code {stop.code}", "") from stop
        # Anything can come out of the user's script; the message says what, and from which line.
        except Exception as error:
            raise errors.script_failed(script, _reason(error), _line_of(error, script)) from error


@contextmanager
def _as_program(script: Path, arguments: Sequence[str]) -> Iterator[None]:
    argv, path = sys.argv, sys.path[:]
    sys.argv = [str(script), *arguments]
    sys.path.insert(0, str(script.resolve().parent))
    try:
        yield
    finally:
        sys.argv, sys.path[:] = argv, path


def _line_of(error: BaseException, script: Path) -> str:
    """``file:line`` of the script's own frame, or ``""``."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if frame.filename == str(script):
            return f"{script}:{frame.lineno}"
    return ""


def _reason(error: BaseException) -> str:
    """One line: our own message where there is one behind the exception."""
    shown = _ours(error) or error
    lines = str(shown).strip().splitlines() or [""]
    return f"{type(shown).__name__}: {lines[0]}"
