"""The bytes of a manifest that no signature and no hash of C2PA covers: box headers, labels, padding.

A changed byte there changes nothing that a picture says, and C2PA's own check lets it pass. This check does not:
c2pa-python always writes the same bytes there, and all others are told.

JUMBF (ISO 19566-5): a box is its size, its kind and its content; a `jumb` holds a `jumd` (16 bytes of type, toggles, a
label that ends in 0) and more boxes.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

TYPE_TAIL = bytes.fromhex("00110010800000aa00389b71")  # of C2PA's and of ISO's types, behind four letters
REQUESTABLE, SALTED = 0x03, 0x13  # Toggles: requestable by its label; the same, with a box of salt.
# Label of a box within a manifest -> the letters of its type, and the kind of its content
PARTS = {
    "c2pa.assertions": (b"c2as", b"jumb"),
    "c2pa.claim.v2": (b"c2cl", b"cbor"),
    "c2pa.signature": (b"c2cs", b"cbor"),
}
INSTANCE = b"\x02\x11"  # c2pa-python's number of the box in a JPEG
PAD = b"\x63pad"  # a key of the signature's unprotected header, in CBOR
SIZES = {0x58: 1, 0x59: 2, 0x5A: 4}  # CBOR: bytes of this many bytes of length


def changed(picture: bytes, kind: str) -> list[str]:
    """Faults in the uncovered bytes of a picture's one manifest; kind: "png", "jpeg", "webp"."""
    try:
        store = b"".join(PIECES[kind](picture))
        ((label, letters, manifests),) = [_super(box) for box in _boxes(store)]
        ((name, own, parts),) = [_super(box) for box in manifests]
        found = {label: (letters, content) for label, letters, content in map(_super, parts)}
        right = (label, letters, own) == ("c2pa", b"c2pa", b"c2ma") and name.startswith("urn:c2pa:")
        if not right or [(key, found[key][0]) for key in found] != [(key, value[0]) for key, value in PARTS.items()]:
            raise ValueError
        for key, (_, content) in found.items():
            if {box for box, _ in content} != {PARTS[key][1]}:
                raise ValueError
        for assertion in found["c2pa.assertions"][1]:
            _super(assertion, SALTED)
        _require_zeros(found["c2pa.signature"][1][0][1])
    except (ValueError, struct.error, UnicodeDecodeError, IndexError):
        return ["the frame of its manifest was changed"]
    return []


def _boxes(data: bytes) -> list[tuple[bytes, bytes]]:
    """Kind and content of the boxes that fill the data."""
    place, found = 0, []
    while place < len(data):
        size, kind = struct.unpack_from(">I4s", data, place)
        if size < 8 or place + size > len(data):
            raise ValueError
        found.append((kind, data[place + 8 : place + size]))
        place += size
    return found


def _super(box: tuple[bytes, bytes], toggles: int = REQUESTABLE) -> tuple[str, bytes, list[tuple[bytes, bytes]]]:
    """Label, letters of the type, and inner boxes of a `jumb` with these toggles."""
    kind, content = box
    (first, described), *inner = _boxes(content)
    label, end, rest = described[17:].partition(b"\0")
    salt = [kind for kind, _ in _boxes(rest)]
    if (
        (kind, first, described[16]) != (b"jumb", b"jumd", toggles)
        or not end
        or salt != [b"c2sh"] * (toggles == SALTED)
    ):
        raise ValueError
    if toggles == REQUESTABLE and described[4:16] != TYPE_TAIL:
        raise ValueError
    return label.decode("ascii"), described[:4], inner


def _require_zeros(signature: bytes) -> None:
    place = signature.index(PAD) + len(PAD)
    width = SIZES[signature[place]] if signature[place] in SIZES else 0
    size = int.from_bytes(signature[place + 1 : place + 1 + width], "big")
    pad = signature[place + 1 + width : place + 1 + width + size]
    if not width or any(pad) or len(pad) != size:
        raise ValueError


def _png(picture: bytes) -> Iterator[bytes]:
    place = 8
    while place + 12 <= len(picture):
        size, kind = struct.unpack_from(">I4s", picture, place)
        if kind == b"caBX":
            yield picture[place + 8 : place + 8 + size]
        place += 12 + size


def _webp(picture: bytes) -> Iterator[bytes]:
    place = 12
    while place + 8 <= len(picture):
        kind, size = struct.unpack_from("<4sI", picture, place)
        if kind == b"C2PA":
            yield picture[place + 8 : place + 8 + size]
        place += 8 + size + size % 2


def _jpeg(picture: bytes) -> Iterator[bytes]:
    """APP11 segments: "JP", the box's number, the segment's; from the second segment on the box's header again."""
    place, number = 2, 0
    while place + 4 <= len(picture) and picture[place] == 0xFF and picture[place + 1] != 0xDA:
        marker, size = picture[place + 1], int.from_bytes(picture[place + 2 : place + 4], "big")
        body = picture[place + 4 : place + 2 + size]
        if marker == 0xEB and body[:2] == b"JP":
            number += 1
            if body[2:8] != INSTANCE + number.to_bytes(4, "big"):
                raise ValueError
            yield body[8:] if number == 1 else body[16:]
        place += 2 + size


PIECES = {"png": _png, "jpeg": _jpeg, "webp": _webp}
