"""SafeRoPE for ComfyUI. ComfyUI loads this folder as a package; everything else lives below."""

import sys

WEB_DIRECTORY = "./web"  # docs/<node id>.md: help pages

if __package__ and "folder_paths" in sys.modules:  # pytest imports this file too, and there no ComfyUI is behind it
    from .nodes import comfy_entrypoint  # noqa: F401  (ComfyUI asks the module for it)
