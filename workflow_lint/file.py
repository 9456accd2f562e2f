"""What a file says of how it was made: a workflow's JSON, or the metadata of a PNG or WEBP that ComfyUI has saved.

Files are untrusted: every size is capped before anything is read or inflated, pictures are never decoded, and JSON that
two readers could understand differently (equal keys, two texts of one name) is refused. NaN is let through: older
versions of ComfyUI wrote it into harmless places, and no value that counts may be one.
"""

from __future__ import annotations

import json
import os
import struct
import warnings
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from stat import S_ISREG
from typing import Any, BinaryIO

MAX_TEXT = 16 * 2**20  # bytes of one workflow; the largest of ComfyUI's own blueprints has 0.2 MiB
MAX_CHUNKS = 100_000  # of a picture; a large PNG has some thousand
MAX_DEPTH = 100  # of nested lists and objects; workflows have about 15
PNG, RIFF = b"\x89PNG\r\n\x1a\n", b"RIFF"
NAMES = ("prompt", "workflow")  # what ran, in API form; and what the editor showed
EXIF_TAGS = range(0x0100, 0x0111)  # ComfyUI counts down from 0x0110 (Model), a text "name:JSON" in each


class Unreadable(ValueError):
    """A file that tells nothing that can be judged; the message says what was got and what was expected."""


@dataclass(frozen=True)
class Documents:
    """What a file holds: the API form that ran, the editor's form, or both. A JSON file holds one of them."""

    prompt: Any = None
    workflow: Any = None
    picture: bool = False


def read(path: Path) -> Documents:
    """The workflow in a file. Raises Unreadable for whatever is none, OSError where there is no such file."""
    with open(path, "rb", opener=_without_waiting) as file:
        if not S_ISREG(os.fstat(file.fileno()).st_mode):
            raise Unreadable("is a pipe, a device or the like, expected a regular file")
        head = file.read(12)
        if head.startswith(PNG):
            file.seek(len(PNG))
            return _documents(_png_texts(file))
        if head.startswith(RIFF) and head.endswith(b"WEBP"):
            return _documents(_webp_texts(file))
        text = head + file.read(MAX_TEXT)
    if len(text) > MAX_TEXT:
        raise Unreadable(
            f"is larger than {MAX_TEXT} bytes, expected a workflow (JSON), or a PNG or WEBP made by ComfyUI"
        )
    return sorted_out(loads(text))


def _without_waiting(path: str, flags: int) -> int:
    """A pipe would wait for a writer for ever."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def sorted_out(value: Any) -> Documents:
    """A JSON value as the form it is in: the editor's has a list of nodes, the API's an object for each node."""
    if not isinstance(value, dict):
        raise Unreadable(f"holds a JSON {type(value).__name__}, expected a workflow, which is an object")
    if isinstance(value.get("nodes"), list):
        return Documents(workflow=value)
    inner = value.get("prompt")
    if isinstance(inner, dict) and "class_type" not in inner:  # the body of a request to ComfyUI
        return Documents(prompt=inner)
    return Documents(prompt=value)


def loads(text: bytes) -> Any:
    """The value of a JSON text. Raises Unreadable where it is none, too deep, or has an object with equal keys."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError("an object has the same key twice")
        return found

    try:
        decoded = text.decode("utf-8-sig")
        if _deeper(decoded, MAX_DEPTH):
            raise ValueError(f"nested more than {MAX_DEPTH} deep")
        return json.loads(decoded, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise Unreadable(
            f"is not JSON that can be read ({error}), expected a workflow, or a PNG or WEBP made by ComfyUI"
        ) from None


def _deeper(text: str, most: int) -> bool:
    """Whether brackets outside of strings nest deeper than `most`; without recursion,
    since the parser itself recurses."""
    level = 0
    quoted = escaped = False
    for letter in text:
        if quoted:
            escaped, quoted = letter == "\\" and not escaped, letter != '"' or escaped
        elif letter == '"':
            quoted = True
        elif letter in "[{":
            level += 1
            if level > most:
                return True
        elif letter in "]}":
            level -= 1
    return False


def _documents(texts: dict[str, bytes]) -> Documents:
    if not texts:
        raise Unreadable(
            "holds no workflow: ComfyUI was told not to save one, or another program has written the picture since"
        )
    found = {}
    for name, text in texts.items():
        try:
            found[name] = loads(text)
        except Unreadable as error:
            raise Unreadable(f"its text {name!r} {error}") from None
        if found[name] is None:
            raise Unreadable(f"its text {name!r} is null, expected a workflow")
    return Documents(**found, picture=True)


def _add(texts: dict[str, bytes], name: str, text: bytes) -> None:
    """Readers differ in which of two equal names they take, so that two different ones say nothing."""
    if name in NAMES and texts.setdefault(name, text) != text:
        raise Unreadable(f"holds two different texts {name!r}, expected one")


def _png_texts(file: BinaryIO) -> dict[str, bytes]:
    texts: dict[str, bytes] = {}
    for kind, body in _png_chunks(file):
        name, found, rest = body.partition(b"\0")
        if found and (name := name.decode("latin-1")) in NAMES:
            _add(texts, name, _png_text(kind, rest))
    return texts


def _png_text(kind: bytes, rest: bytes) -> bytes:
    """UTF-8 of the text after its name. tEXt is Latin-1 by the standard; ComfyUI's JSON is ASCII, which is both."""
    if kind == b"zTXt":
        return _inflated(rest[1:]).decode("latin-1").encode()
    if kind == b"iTXt":
        text = rest[2:].split(b"\0", 2)[-1]  # after the language and the translated name
        return _inflated(text) if rest[:1] == b"\x01" else text
    return rest.decode("latin-1").encode()


def _inflated(data: bytes) -> bytes:
    stream = zlib.decompressobj()
    try:
        text = stream.decompress(data, MAX_TEXT)
    except zlib.error as error:
        raise Unreadable(f"holds a compressed text that is damaged ({error})") from None
    if not stream.eof:
        raise Unreadable(f"holds a compressed text of more than {MAX_TEXT} bytes, or half of one")
    return text


def _png_chunks(file: BinaryIO) -> Iterator[tuple[bytes, bytes]]:
    """Kind and content of the chunks that may hold a text; all others are stepped over. ComfyUI's own are `comf`."""
    for _ in range(MAX_CHUNKS):
        head = file.read(8)
        if len(head) < 8:
            raise Unreadable("is a PNG that ends before its end")
        size, kind = struct.unpack(">I4s", head)
        if kind == b"IEND":
            return
        if kind in (b"tEXt", b"zTXt", b"iTXt", b"comf"):
            body = _exactly(file, size)
            if zlib.crc32(kind + body) != int.from_bytes(_exactly(file, 4), "big"):
                raise Unreadable("is a PNG with a damaged text (its checksum is wrong)")
            yield kind, body
        else:
            file.seek(size + 4, 1)
    raise Unreadable(f"is a PNG of more than {MAX_CHUNKS} chunks")


def _exactly(file: BinaryIO, size: int) -> bytes:
    if size > MAX_TEXT:
        raise Unreadable(f"holds a text of {size} bytes, expected at most {MAX_TEXT}")
    data = file.read(size)
    if len(data) < size:
        raise Unreadable("is a picture that ends in the middle of a text")
    return data


def _webp_texts(file: BinaryIO) -> dict[str, bytes]:
    """ComfyUI writes `prompt:JSON` and `workflow:JSON` into tags of a WEBP's EXIF."""
    texts: dict[str, bytes] = {}
    for _ in range(MAX_CHUNKS):
        head = file.read(8)
        if len(head) < 8:
            return texts
        kind, size = struct.unpack("<4sI", head)
        if kind != b"EXIF":
            file.seek(size + size % 2, 1)
            continue
        for entry in _exif_texts(_exactly(file, size)):
            name, _, text = entry.partition(":")
            _add(texts, name, text.encode("utf-8", "replace"))
        file.seek(size % 2, 1)
    raise Unreadable(f"is a WEBP of more than {MAX_CHUNKS} chunks")


def _exif_texts(data: bytes) -> list[str]:
    from PIL import Image

    exif = Image.Exif()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's word on a damaged table
            exif.load(data)
            values = [exif.get(tag) for tag in EXIF_TAGS]
    except Exception as error:  # Pillow raises whatever a damaged table leads it to
        raise Unreadable(f"holds EXIF that cannot be read ({type(error).__name__})") from None
    return [value for value in values if isinstance(value, str)]
