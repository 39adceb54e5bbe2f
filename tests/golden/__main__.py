"""``python -m tests.golden``: prints all golden kernels again."""

from tests.golden import FOLDER, printed, texts

for stale in printed():
    stale.unlink()
for name, text in texts().items():
    path = FOLDER / name
    path.write_text(text, encoding="utf-8")
    print(path.relative_to(FOLDER.parent.parent))
