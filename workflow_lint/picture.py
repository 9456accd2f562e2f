"""The texts that ComfyUI puts into a PNG or WEBP. Sizes are capped before anything is read; pixels are not decoded."""

from __future__ import annotations

import struct
import warnings
import zlib
from collections.abc import Iterator
from typing import BinaryIO

MAX_TEXT = 16 * 2**20  # Bytes of one workflow. ComfyUI's largest blueprint has 0.2 MiB.
MAX_CHUNKS = 100_000  # Of a picture. A large PNG has some thousand.
PNG, RIFF, WEBP, HEAD = b"\x89PNG\r\n\x1a\n", b"RIFF", b"WEBP", 12  # Bytes of the longest head.
NAMES = ("prompt", "workflow")  # The workflow that ran, in API form, and the editor's.
TEXTS = (b"tEXt", b"zTXt", b"iTXt", b"comf")  # The last is ComfyUI's own, in animated files.
EXIF_TAGS = range(0x0100, 0x0111)  # ComfyUI counts down from 0x0110 (Model), a text "name:JSON" in each.


class Unreadable(ValueError):
    """A file without anything to judge. The message says the fault of the file and the expected content."""


def texts_of(file: BinaryIO) -> dict[str, bytes] | None:
    """UTF-8 of the texts `prompt` and `workflow` of a picture; None for other files, read up to their head.

    Readers differ in which of two equal names they take, so two different texts of one name say nothing. Raises
    Unreadable for them, and for a damaged file.
    """
    head = file.read(HEAD)
    if head.startswith(PNG):
        file.seek(len(PNG))
    elif not (head.startswith(RIFF) and head.endswith(WEBP)):
        return None
    texts: dict[str, bytes] = {}
    for name, text in _in_png(file) if head.startswith(PNG) else _in_webp(file):
        if name in NAMES and texts.setdefault(name, text) != text:
            raise Unreadable(f"holds two different texts {name!r}, expected one")
    return texts


def _in_png(file: BinaryIO) -> Iterator[tuple[str, bytes]]:
    for kind, size in _chunks(file, ">I4s"):
        if kind == b"IEND":
            return
        if kind not in TEXTS:
            file.seek(size + 4, 1)
            continue
        body = _exactly(file, size)
        if zlib.crc32(kind + body) != int.from_bytes(_exactly(file, 4), "big"):
            raise Unreadable("is a PNG with a damaged text (its checksum is wrong)")
        name, _, rest = body.partition(b"\0")
        if name.decode("latin-1") in NAMES:
            yield name.decode(), _png_text(kind, rest)
    raise Unreadable("is a PNG that ends before its end")


def _png_text(kind: bytes, rest: bytes) -> bytes:
    """UTF-8 of the text after its name. tEXt is Latin-1 by the standard; ComfyUI's JSON is ASCII, which is both."""
    if kind == b"iTXt":
        text = rest[2:].split(b"\0", 2)[-1]  # after the language and the translated name
        return _inflated(text) if rest[:1] == b"\x01" else text
    return (_inflated(rest[1:]) if kind == b"zTXt" else rest).decode("latin-1").encode()


def _inflated(data: bytes) -> bytes:
    stream = zlib.decompressobj()
    try:
        text = stream.decompress(data, MAX_TEXT)
    except zlib.error as error:
        raise Unreadable(f"holds a compressed text that is damaged ({error})") from None
    if not stream.eof:
        raise Unreadable(f"holds a compressed text of more than {MAX_TEXT} bytes, or half of one")
    return text


def _chunks(file: BinaryIO, head: str) -> Iterator[tuple[bytes, int]]:
    """Kind and size of each chunk, the file standing at its content, until the file ends."""
    for _ in range(MAX_CHUNKS):
        found = file.read(8)
        if len(found) < 8:
            return
        first, second = struct.unpack(head, found)
        yield (first, second) if isinstance(first, bytes) else (second, first)
    raise Unreadable(f"is a picture of more than {MAX_CHUNKS} chunks")


def _exactly(file: BinaryIO, size: int) -> bytes:
    if size > MAX_TEXT:
        raise Unreadable(f"holds a text of {size} bytes, expected at most {MAX_TEXT}")
    data = file.read(size)
    if len(data) < size:
        raise Unreadable("is a picture that ends in the middle of a text")
    return data


def _in_webp(file: BinaryIO) -> Iterator[tuple[str, bytes]]:
    """ComfyUI writes `prompt:JSON` and `workflow:JSON` into tags of a WEBP's EXIF."""
    for kind, size in _chunks(file, "<4sI"):
        texts = _exif_texts(_exactly(file, size)) if kind == b"EXIF" else []
        file.seek(size % 2 if kind == b"EXIF" else size + size % 2, 1)
        for name, _, text in (each.partition(":") for each in texts):
            yield name, text.encode("utf-8", "replace")


def _exif_texts(data: bytes) -> list[str]:
    from PIL import Image

    exif = Image.Exif()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's word on a damaged table
            exif.load(data)
            values = [exif.get(tag) for tag in EXIF_TAGS]
    except Exception as error:  # Pillow raises errors of many kinds on a damaged table
        raise Unreadable(f"holds EXIF that cannot be read ({type(error).__name__})") from None
    return [value for value in values if isinstance(value, str)]
