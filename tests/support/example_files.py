"""Example concept files of version 1, for tests/files: written once, never again. What they hold must load for ever.

python -m tests.support.example_files        # refuses where a file is there already
"""

from __future__ import annotations

from dev.comfyui import ROOT

from .hostile import seeds

FOLDER = ROOT / "tests" / "files"
NAMES = ("plain", "whole", "whole-half", "two-half")  # of the seeds, in their order


def main() -> None:
    for name, data in zip(NAMES, seeds(), strict=True):
        with (FOLDER / f"v1-{name}.safetensors").open("xb") as file:
            file.write(data)
        print(f"v1-{name}.safetensors: {len(data)} bytes")


if __name__ == "__main__":
    main()
