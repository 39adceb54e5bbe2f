"""``python -m tests.golden``: prints all golden kernels again."""

from tests.golden import FOLDER, SPECS, render

for stale in FOLDER.glob("kernel_*.py"):
    stale.unlink()
for spec in SPECS:
    path = FOLDER / f"kernel_{spec.name}.py"
    path.write_text(render(spec), encoding="utf-8")
    print(path.relative_to(FOLDER.parent.parent))
