"""What a printed file is made of: what is its own, and sections that kernels share.

A file is compiled as one text. In it every section starts with a line of its name and what it is
about. To be read it is taken apart (`divided`): the kernel with its numbers, its levels and its
epilogue, and beside it the sections, named by what they hold, so that kernels that share one
include the same file.
"""

from __future__ import annotations

import hashlib
import re

from fxquant.codegen.cpp import support
from fxquant.codegen.cpp.isa import ISAS
from fxquant.codegen.header import Describable, Header

KERNEL = "kernel"
"""The section that stays where it is."""

_MARK = re.compile(r"^// --- (\w+): (.+) ---\n", re.MULTILINE)


def section(name: str, title: str, *parts: str, exported: str = "") -> str:
    """A section's text.

    Args:
        name: An identifier; of an instruction set, or ``"floats"``, for what `support` prints.
        title: What it is about.
        parts: Definitions.
        exported: What stands behind them and is seen from outside of the file.

    Returns:
        ``""`` if there is nothing in it.
    """
    inner = joined(*parts)
    if inner and name not in support.NAMES:
        inner = joined("namespace {", inner, "}  // namespace")
    body = joined(inner, exported)
    return f"// --- {name}: {title} ---\n\n{body}\n" if body else ""


def joined(*parts: str) -> str:
    """Texts with a blank line between each two; empty ones are left out."""
    return "\n\n".join(part.strip("\n") for part in parts if part.strip())


def comment(header: Header, spec: Describable) -> str:
    """What a file says on top of itself."""
    text = header.comment(spec).strip('"').rstrip('"\n')
    return "\n".join(f"// {line}".rstrip() for line in text.splitlines())


def divided(source: str) -> tuple[str, dict[str, str]]:
    """Takes a printed file apart.

    Args:
        source: A C++ file of ours.

    Returns:
        The kernel, which includes its sections, and each section's text by the name of its file.
        Of what all kernels share the whole is given, not only what this one uses.
    """
    head, *found = _MARK.split(source)
    lines: list[str] = []
    files: dict[str, str] = {}
    for name, title, text in zip(found[::3], found[1::3], found[2::3], strict=True):
        if name == KERNEL:
            lines += ["", text.strip("\n"), ""]
            continue
        if name in support.NAMES:
            whole, file = support.text(ISAS.get(name)), f"fxquant_{name}.h"
        else:
            whole = text
            file = f"{name}_{hashlib.sha256(text.encode()).hexdigest()[:8]}.h"
        files[file] = f"// {title[0].upper()}{title[1:]}.\n\n{whole.strip()}\n"
        lines.append(f'#include "{file}"  // {title}')
    main = f"{head.strip()}\n\n" + "\n".join(lines).strip("\n") + "\n"
    return main, files
