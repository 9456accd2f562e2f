"""Where ComfyUI keeps concept files."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import folder_paths

from ...saferope_core import ConceptFileError, made_for
from ...saferope_core.concept.untrusted import printable

FOLDER = "saferope"  # models/saferope, output/saferope and `saferope:` in extra_model_paths.yaml
EXTENSIONS = {".safetensors"}  # never a pickle; an empty set would list every file
LISTED = 4096  # files whose models are remembered
BUNDLED = Path(__file__).resolve().parents[2] / "tinyworld" / "concepts"


def register_folders() -> None:
    """Tell ComfyUI where concept files lie: the user's folders first, then the tiny world's folder."""
    home = os.path.join(folder_paths.models_dir, FOLDER)
    folder_paths.add_model_folder_path(FOLDER, home, is_default=True)
    folder_paths.add_model_folder_path(FOLDER, os.path.join(folder_paths.get_output_directory(), FOLDER))
    folder_paths.add_model_folder_path(FOLDER, str(BUNDLED))
    folder_paths.folder_names_and_paths[FOLDER][1].update(EXTENSIONS)


def find(name: str) -> str:
    """Path of a listed concept file. Raises FileNotFoundError for any other name: links can bring any text here."""
    listed = folder_paths.get_filename_list(FOLDER)
    path = folder_paths.get_full_path(FOLDER, name) if name in listed else None
    if path is None:
        raise FileNotFoundError(
            f"Concept file {name!r} was not found. Expected one of {listed}. Put the file into models/{FOLDER} and "
            "press R, or choose another."
        )
    return path


def models() -> dict[str, str]:
    """By listed name: the model that the file's header is made for, such as "FLUX.1". Nothing for other files."""
    found = {}
    for name in folder_paths.get_filename_list(FOLDER):
        path = folder_paths.get_full_path(FOLDER, name)
        if path is not None and (model := _model(path, *_stamp(path))):
            found[name] = model
    return found


def _stamp(path: str) -> tuple[int, int]:
    try:
        told = os.stat(path)
    except OSError:
        return 0, 0
    return told.st_size, told.st_mtime_ns


@lru_cache(maxsize=LISTED)
def _model(path: str, size: int, changed: int) -> str:
    """Kept until the file changes: ComfyUI asks for the list at every run."""
    try:
        geometry = made_for(path)
    except (OSError, ValueError):
        return ""
    title = geometry.title()
    return geometry.family if title == geometry.describe() else title.removeprefix("the ")


@contextmanager
def named(name: str, path: str) -> Iterator[None]:
    """While a concept file is read, errors tell its listed name, never its path on the server."""
    try:
        yield
    except OSError as error:
        raise ValueError(f"Concept file {name!r} cannot be read: {error.strerror or 'it is no plain file'}.") from None
    except ConceptFileError as error:
        told = str(error).removeprefix(f"{printable(path)}: ").replace(printable(path), name)
        raise ConceptFileError(f"Concept file {name!r} cannot be used: {told}") from None


def require_pin(name: str, digest: str, pin: str) -> None:
    """Raises ValueError unless the pin is empty or the sha256, in any case, with or without `sha256:` before it."""
    wanted = pin.strip().lower().removeprefix("sha256").lstrip(": ")
    if pin.strip() and wanted != digest:
        raise ValueError(
            f"Concept file {name!r} has the sha256 {digest}, expected {pin.strip()[:80]!r}. It is another file than "
            "the one this workflow was made with: fetch that one, or clear the field if you trust this one."
        )
