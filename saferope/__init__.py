"""SafeRoPE for Python: `protect` a diffusers pipeline with concept files, see docs/python.md. `saferope` is the
command.

The names below are imported when they are first asked for: the command answers before torch is loaded.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from saferope_core import __version__, load_concepts

    from .pipeline import protect

__all__ = ["__version__", "load_concepts", "protect"]
_HOMES = {"__version__": "saferope_core", "load_concepts": "saferope_core", "protect": "saferope.pipeline"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
