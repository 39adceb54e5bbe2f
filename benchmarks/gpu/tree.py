"""Makes the package importable from a checkout that is not installed.

``passes/`` and ``codegen/`` are installed as `fxquant.passes` and `fxquant.codegen`. On a machine
where nothing can be installed, a folder of links does the same.
"""

from __future__ import annotations

import importlib
import os
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent

BACKEND = "fxquant.backend:fxquant"
"""What ``torch.compile`` finds under our name, as in ``pyproject.toml``."""


def make_importable() -> None:
    """Puts the checkout on `sys.path`, and into the environment for what is started from here."""
    try:
        importlib.import_module("fxquant.codegen")
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith("fxquant"):
            raise
    else:
        return
    for name in [name for name in sys.modules if name.split(".")[0] == "fxquant"]:
        del sys.modules[name]
    tree = make_tree()
    sys.path[:0] = [str(tree), str(ROOT)]
    before = os.environ.get("PYTHONPATH")
    parts = [str(tree), str(ROOT), *([before] if before else [])]
    os.environ["PYTHONPATH"] = os.pathsep.join(parts)


def make_tree() -> Path:
    """A folder that holds the package as if it were installed, its entry point with it."""
    tree = Path(tempfile.mkdtemp(prefix="fxquant-tree-"))
    package, described = tree / "fxquant", tree / "fxquant-0.dist-info"
    package.mkdir()
    for source in (*(ROOT / "fxquant").iterdir(), ROOT / "passes", ROOT / "codegen"):
        (package / source.name).symlink_to(source)
    described.mkdir()
    (described / "METADATA").write_text("Metadata-Version: 2.1\nName: fxquant\nVersion: 0\n")
    entry = f"[torch_dynamo_backends]\nfxquant = {BACKEND}\n"
    (described / "entry_points.txt").write_text(entry)
    return tree
