"""One way to write a file: beside its place in a new folder, then moved. A link at the file's name is replaced, never
followed.

A folder may come from a stranger, with links laid under every name that a command is known to write.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_FIRST, _LAST = ".saferope-", ".partial"  # around the random part of the new folder's name


@contextmanager
def placed(path: str | os.PathLike) -> Iterator[Path]:
    """Gives a free path with `path`'s name. The file that is written there is moved to `path` at the end.

    So `path` is the old file or the new one, never half of it. The folder of the new path is made for this write alone,
    has a random name and is closed to other users, so no link can lie in it. An error leaves `path` as it was. A kill
    may leave the folder: see `sweep`.
    """
    path = Path(path)
    folder = Path(tempfile.mkdtemp(suffix=_LAST, prefix=_FIRST, dir=path.parent))
    try:
        yield folder / path.name
        os.replace(folder / path.name, path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def write_bytes(path: str | os.PathLike, data: bytes, private: bool = False) -> None:
    """Writes a file as `placed` does, on the disk itself before it is moved.

    private: no other user may ever open it (0600 from its first byte on).
    """
    with placed(path) as new, open(new, "xb", opener=_closed if private else None) as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def write_text(path: str | os.PathLike, text: str) -> None:
    """Writes a file as `placed` does, in UTF-8. Line ends stay as they are. Lone surrogates, which UTF-8 cannot hold,
    are escaped.
    """
    with placed(path) as new:
        new.write_text(text, encoding="utf-8", errors="backslashreplace", newline="")


def append_text(path: str | os.PathLike, text: str) -> None:
    """Adds text to the end of a file. OSError where a link lies at its name, on systems that can tell."""
    with open(path, "a", encoding="utf-8", opener=_without_following) as file:
        file.write(text)


def sweep(folder: str | os.PathLike) -> None:
    """Removes the remains of killed writes from `folder`, if it exists. Only for the one process that writes there."""
    for left in Path(folder).glob(f"{_FIRST}*{_LAST}"):
        shutil.rmtree(left, ignore_errors=True)  # removes nothing where it is a link


def require_no_link(root: Path, folder: Path) -> None:
    """Raises ValueError where a part of `folder` below `root` is a link: files written there would land elsewhere."""
    for part in (folder, *folder.parents):
        if part == root:
            return
        if part.is_symlink():
            raise ValueError(f"{part}: got a link, expected a folder of its own in {root}; remove the link")


def _closed(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _without_following(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0), 0o666)
