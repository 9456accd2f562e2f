"""Warnings for the user of a node that did not fail: in the log, and in ComfyUI's page on the node that is running."""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Sequence

from comfy_execution.utils import get_executing_context

from ...saferope_core import Concept

NONE = "SafeRoPE: no warning"  # the page takes no empty text
_shown: dict[str, list[str]] = {}  # sentences that stand on a node in the page, by its id
_lock = threading.Lock()


def start_notices() -> None:
    """Takes back the notice that the running node had last time."""
    node = _running()
    with _lock:
        stood = _shown.pop(node, None)
    if stood:
        _show(node, NONE)


def notice(sentence: str) -> None:
    """Logs a warning, and shows it on the running node below those since `start_notices`.

    The page takes the text for HTML. Leave out words of a stranger, such as a concept's name. Slugs are safe.
    """
    logging.warning("SafeRoPE: %s", sentence)
    node = _running()
    with _lock:
        lines = _shown.setdefault(node, [])
        lines += [] if sentence in lines else [sentence]
        text = "\n".join(lines)
    _show(node, text)


def passing(sentence: str) -> None:
    """Shows a sentence above the running node's notices until the next one."""
    node = _running()
    with _lock:
        lines = [sentence, *_shown.get(node, [])]
    _show(node, "\n".join(lines))


def _running() -> str:
    context = get_executing_context()
    return "" if context is None else str(context.node_id)


def _show(node: str, text: str) -> None:
    """Sends the text to the page, if there is one: nodes also run without a server."""
    server = sys.modules.get("server")
    page = getattr(getattr(server, "PromptServer", None), "instance", None)
    if page is not None and node:
        page.send_progress_text(text, node)


def rested(concepts: Sequence[Concept], start: float, end: float) -> str:
    """The notice for a sampling run without a step in the protected part."""
    return (
        f"none of the steps of this run lies in the part from {start:g} to {end:g} of the denoising, in which SafeRoPE "
        f"Apply acts: it did not protect this picture ({', '.join(concept.slug for concept in concepts)}). Widen "
        "start_percent and end_percent there: a denoise below 1 takes the last steps alone."
    )
