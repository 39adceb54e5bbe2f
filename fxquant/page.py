"""What the pages that fxquant writes look like."""

from __future__ import annotations

import html

_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; padding: 0 1.5rem; color: #222;
 max-width: 82rem; }
h1 { font-size: 1.3rem; } p { color: #555; max-width: 60rem; }
table { border-collapse: collapse; width: 100%; }
th { text-align: left; color: #555; font-weight: 600; border-bottom: 2px solid #ccc; }
th, td { padding: .3rem .7rem; vertical-align: top; } td.n, th.n { text-align: right; }
tbody { border-bottom: 1px solid #ddd; } tbody:hover { background: #f6f8fa; }
td.n { font-variant-numeric: tabular-nums; white-space: nowrap; }
.what, .note { color: #666; font-size: .85rem; } .note { color: #a33; }
a { font-family: ui-monospace, monospace; font-size: .9rem; }
details { font-size: .85rem; } .bar { background: #9cc4e4; height: .35rem; border-radius: 2px; }
@media (prefers-color-scheme: dark) { body { background: #161616; color: #ddd; }
 p, th, .what { color: #aaa; } tbody:hover { background: #222; } a { color: #8bf; } }
"""


def page(title: str, heading: str, body: str) -> str:
    """A self-contained page.

    Args:
        title: Of the window.
        heading: Of the page.
        body: What follows the heading, in HTML.
    """
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{html.escape(title)}</title>"
        f"<style>{_STYLE}</style><h1>{html.escape(heading)}</h1>\n{body}\n</html>\n"
    )
