"""Builds example_workflows/ and subgraphs/ against a ComfyUI of its own, thumbnails included.

python -m dev.workflows                       # about a minute on two CPU cores
python -m dev.workflows "SafeRoPE risk map"   # only these thumbnails; the workflows themselves are built in any case
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

from ..comfyui import ComfyUI
from ..workflow import BLUEPRINTS, EXAMPLES
from . import BLUEPRINT, blueprint, build
from .check import problems
from .flux import KNOWN_FILES
from .thumbnails import thumbnail

QUALITY = 88  # of the JPEGs


def text_of(workflow: dict) -> str:
    """As it lies in the file."""
    return json.dumps(workflow, indent=1, ensure_ascii=False) + "\n"


def main(wanted: list[str]) -> None:
    with tempfile.TemporaryDirectory() as base, ComfyUI(Path(base)) as server:
        info = server.object_info()
        built, sampler = build(info), blueprint(info)
        wrong = {name: problems(each, info, KNOWN_FILES) for name, each in (built | {BLUEPRINT: sampler}).items()}
        if any(wrong.values()):
            raise SystemExit("\n".join(f"{name}: {each}" for name, found in wrong.items() for each in found))
        (BLUEPRINTS / f"{BLUEPRINT}.json").write_text(text_of(sampler), encoding="utf-8")
        for name, workflow in built.items():
            (EXAMPLES / f"{name}.json").write_text(text_of(workflow), encoding="utf-8")
            if not wanted or name in wanted:
                thumbnail(server, name, workflow).save(EXAMPLES / f"{name}.jpg", quality=QUALITY, optimize=True)
                print(EXAMPLES.name, name, sep="/")


if __name__ == "__main__":
    main(sys.argv[1:])
