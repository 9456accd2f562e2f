"""A ComfyUI with this pack in your browser, until Ctrl+C: `make comfyui`.

Models, outputs and the concept of `make demo` lie in demo_output/comfyui.
"""

from __future__ import annotations

import time

from .comfyui import ROOT, ComfyUI

BASE = ROOT / "demo_output" / "comfyui"
STAR = ROOT / "demo_output" / "star" / "star.safetensors"


def main() -> None:
    with ComfyUI(BASE) as server:
        if STAR.is_file():
            print(f"Your concept is there as {server.concepts.name}/{server.add_concept(STAR)}.")
        print(f"Open {server.address}, then Templates > SafeRoPE > SafeRoPE tiny world. Ctrl+C ends it.", flush=True)
        while server.process is not None and server.process.poll() is None:
            time.sleep(1)
    raise SystemExit(f"ComfyUI ended. Its log: {server.log.relative_to(ROOT)}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print("\nComfyUI is stopped.")
