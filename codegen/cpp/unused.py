"""Drops what a printed file defines and does not use, so that it holds nothing of other kernels."""

from __future__ import annotations

import re
from collections import Counter

_NAMES = tuple(
    map(
        re.compile,
        (
            r"#define (\w+)",
            r"using (\w+) =",
            r"typedef .*?(\w+) __attribute__",
            r"(?:alignas\(\w+\) )?(?:static )?constexpr [\w:]+ (\w+)(?:\[\w+\])* =",
            r"(?:template <[^{(;]*> ?)?struct (\w+)",
            r"(?!extern|namespace|#)(?:\[\[[^\]]*\]\] )?[^=(;]*?(\w+)\(",
        ),
    )
)
_WORD = re.compile(r"\w+")


def without_unused(text: str) -> str:
    """A file's text without the definitions whose names stand in no other definition.

    A definition starts at the margin, with the comment lines right above it, and ends where its
    braces do. Overloads stay or go together. ``extern "C"`` functions are what is exported.
    """
    parts = _parts(text)
    names = [_name(part) for part in parts]
    words = [Counter(_WORD.findall(_code(part))) for part in parts]
    kept = list(range(len(parts)))
    while True:
        total: Counter[str] = Counter()
        own: Counter[str] = Counter()
        for at in kept:
            total.update(words[at])
            own[names[at]] += words[at][names[at]]
        used = [at for at in kept if not names[at] or total[names[at]] > own[names[at]]]
        if used == kept:
            break
        kept = used
    return re.sub(r"\n{3,}", "\n\n", "".join(parts[at] for at in kept))


def _code(text: str) -> str:
    return re.sub(r"//.*", "", text)


def _name(part: str) -> str:
    """What a part defines, or ``""``."""
    code = " ".join(line for line in _code(part).splitlines() if line)
    return next((found[1] for name in _NAMES if (found := name.match(code))), "")


def _parts(text: str) -> list[str]:
    """The text cut before every definition; blank lines and directives are parts, too."""
    parts, lines, depth = [], [], 0
    for line in text.splitlines(keepends=True):
        code = _code(line).strip()
        lines.append(line)
        alone = not depth and (not line.strip() or line.startswith(("#", "namespace", "}  //")))
        if not alone:
            depth += code.count("{") - code.count("}")
        if alone or (not depth and code.endswith((";", "}"))):
            parts.append("".join(lines))
            lines = []
    return [*parts, "".join(lines)]
