"""Reads the content credentials of a picture, and names their faults. It asks nothing of the network."""

from __future__ import annotations

import io
import json
import struct
import zlib
from dataclasses import dataclass
from typing import Any

from .library import MIME, c2pa, context
from .sign import LABEL, VERSION
from .skeleton import changed

MAX_BYTES = 256 * 2**20  # of a picture
HEADS = {b"\x89PNG\r\n\x1a\n": "png", b"\xff\xd8\xff": "jpeg", b"RIFF": "webp"}
NAMED = 6  # reasons


@dataclass(frozen=True)
class Credential:
    """The content of a picture's credentials. `wrong`: reasons not to believe it; [] where it is whole and trusted."""

    wrong: tuple[str, ...]
    signer: str = ""
    runs: tuple[tuple[Any, ...], ...] = ()  # receipts as JSON, the last run first
    workflow_sha256: str = ""


def credential(picture: bytes, anchors: str) -> Credential:
    """The credentials of the active manifest. anchors: PEM certificates that are trusted.

    Raises ValueError for bytes that are no PNG, JPEG or WEBP, ImportError without c2pa-python.
    """
    kind = next((kind for head, kind in HEADS.items() if picture.startswith(head)), None)
    if kind is None or len(picture) > MAX_BYTES:
        raise ValueError(f"is no PNG, JPEG or WEBP of at most {MAX_BYTES} bytes")
    library = c2pa()
    try:
        reader = library.Reader(MIME[kind], io.BytesIO(picture), context=context(anchors))
        found, state = json.loads(reader.json()), reader.get_validation_state()
    except library.C2paError as error:
        return Credential((_missing(str(error)),))
    wrong = _statuses(found)
    if state != "Trusted" and not wrong:
        wrong = [f"the credentials are {state}"]
    wrong += changed(picture, kind) if not wrong else []
    wrong += _damaged_chunks(picture) if kind == "png" else []
    active = found.get("manifests", {}).get(found.get("active_manifest"), {})
    signer = active.get("signature_info") or {}
    name = f"{signer.get('common_name', '?')} ({signer.get('issuer', '?')})"
    assertions = [each.get("data") for each in active.get("assertions", []) if each.get("label") == LABEL]
    if len(assertions) != 1 or not _known(assertions[0]):
        return Credential((*wrong, f"it has {len(assertions)} assertions {LABEL} that can be read, expected 1"), name)
    runs = tuple(tuple(run) for run in assertions[0]["runs"])
    return Credential(tuple(wrong), name, runs, assertions[0].get("workflow_sha256", ""))


def _missing(error: str) -> str:
    if "ManifestNotFound" in error or "no JUMBF" in error:
        return "it has no content credentials"
    return f"its content credentials cannot be read ({error:.200})"


def _statuses(found: dict) -> list[str]:
    """The failures of the active manifest and of its ingredients, as C2PA names them."""
    results = found.get("validation_results") or {}
    rows = list((results.get("activeManifest") or {}).get("failure", []))
    for each in results.get("ingredientDeltas") or []:
        rows += (each.get("validationDeltas") or {}).get("failure", [])
    return [f"{row.get('code')}: {row.get('explanation', '')}" for row in rows][:NAMED]


def _known(data: Any) -> bool:
    if not isinstance(data, dict) or data.get("version") != VERSION or not isinstance(data.get("runs"), list):
        return False
    return all(isinstance(run, list) for run in data["runs"]) and isinstance(data.get("workflow_sha256", ""), str)


def _damaged_chunks(picture: bytes) -> list[str]:
    """Chunks of a PNG whose checksum is wrong: that of the credentials themselves is in no hash."""
    place, found = 8, []
    while place + 12 <= len(picture):
        size, kind = struct.unpack(">I4s", picture[place : place + 8])
        body, told = picture[place + 4 : place + 8 + size], picture[place + 8 + size : place + 12 + size]
        if zlib.crc32(body) != int.from_bytes(told, "big"):
            found.append(f"a chunk of the PNG is damaged ({kind!r})")
        place += 12 + size
    return found
