"""Lines of Triton text, with indentation."""

from __future__ import annotations

import contextlib
import textwrap
from collections.abc import Iterable, Iterator


class Lines:
    """Source text in the making."""

    def __init__(self) -> None:
        self._lines: list[str] = []
        self._depth = 0

    def add(self, *lines: str) -> None:
        """Appends lines at the current indentation."""
        pad = "    " * self._depth
        self._lines += [(pad + line).rstrip() for line in lines]

    @contextlib.contextmanager
    def block(self, head: str) -> Iterator[None]:
        """A line that ends in a colon, and what is inside."""
        self.add(head)
        self._depth += 1
        yield
        self._depth -= 1

    @contextlib.contextmanager
    def indented(self) -> Iterator[None]:
        """What is inside of lines that are there already."""
        self._depth += 1
        yield
        self._depth -= 1

    @contextlib.contextmanager
    def function(self, name: str, params: Iterable[str], doc: str, jit: str = "") -> Iterator[None]:
        """A Triton function, its parameters wrapped to the line length."""
        params = list(params)
        self.add("", "", f"@triton.jit{jit}")
        head = f"def {name}({', '.join(params)}):"
        if len(head) > 100:
            self.add(f"def {name}(", *wrap_items(params, 4), "):")
        else:
            self.add(head)
        self._depth += 1
        self.add(f'"""{doc}"""')
        yield
        self._depth -= 1

    def lines(self) -> list[str]:
        """What was added, line by line."""
        return list(self._lines)

    def text(self) -> str:
        """All lines, with a newline at the end."""
        return "\n".join(self._lines).strip("\n") + "\n"


def wrap_items(items: Iterable[str], indent: int, width: int = 100) -> list[str]:
    """Items followed by commas, as many on a line as fit."""
    lines, line = [], " " * indent
    for item in items:
        if line.strip() and len(line) + len(item) + 1 > width:
            lines.append(line.rstrip())
            line = " " * indent
        line += f"{item}, "
    return [*lines, line.rstrip()]


def statement(name: str, text: str, width: int = 90) -> list[str]:
    """An assignment, in several lines if it is long."""
    if len(name) + len(text) + 3 <= width:
        return [f"{name} = {text}"]
    lines = textwrap.wrap(text, width - 4, break_long_words=False, break_on_hyphens=False)
    return [f"{name} = (", *(f"    {line}" for line in lines), ")"]


def call(name: str, args: Iterable[str]) -> str:
    """A call on one line."""
    return f"{name}({', '.join(args)})"
