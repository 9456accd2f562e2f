"""Writes docs/performance.md from docs/performance.md.in and docs/performance.png: what `saferope bench` measures here.

python -m dev.performance_page [folder of a bench that has run]        # some minutes on two cores that do nothing else
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from .comfyui import ROOT

PAGE = ROOT / "docs" / "performance.md"
MEASURED = "@MEASURED@"


def page(template: str, measured: str) -> str:
    """The template with the bench's Markdown in its place."""
    assert template.count(MEASURED) == 1, f"expected {MEASURED} once"
    return template.replace(MEASURED, measured.rstrip())


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(sys.argv[1] if len(sys.argv) > 1 else scratch)
        if len(sys.argv) == 1:
            subprocess.run([sys.executable, "-m", "saferope", "bench", "--out", str(folder)], cwd=ROOT, check=True)
        template = PAGE.with_suffix(".md.in").read_text(encoding="utf-8")
        PAGE.write_text(page(template, (folder / "bench.md").read_text(encoding="utf-8")), encoding="utf-8")
        shutil.copyfile(folder / "bench.png", PAGE.with_suffix(".png"))


if __name__ == "__main__":
    main()
