"""Puts content credentials into the bytes of a picture: that a model made it, and the receipts of its sampling runs."""

from __future__ import annotations

import hashlib
import io
import json
from typing import Any

from .keys import Config
from .library import MIME, c2pa, context

LABEL, VERSION = "org.saferope.protection", 1  # of the assertion
MADE_BY_A_MODEL = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"  # IPTC's word for it


def signed(
    picture: bytes,
    kind: str,
    title: str,
    runs: list[list[dict]],
    versions: tuple[str, str],
    config: Config,
    workflow: Any = None,
) -> bytes:
    """The picture with credentials. kind: "png", "jpeg" or "webp"; runs: receipts of each sampling run, the last first.

    versions: of this pack and of ComfyUI; workflow: JSON whose SHA-256 goes in, or None. Raises RuntimeError where the
    library cannot sign, ImportError where it is missing.
    """
    library = c2pa()
    algorithm = getattr(library.C2paSigningAlg, config.algorithm.upper())
    try:
        signer = library.Signer.from_callback(config.sign, algorithm, config.chain, config.timestamp or None)
        builder = library.Builder(json.dumps(manifest(kind, title, runs, versions, workflow)), context())
        out = io.BytesIO()
        builder.sign(signer, MIME[kind], io.BytesIO(picture), out)
    except library.C2paError as error:
        raise RuntimeError(f"The picture could not be signed ({error}). Look at the certificate and key.") from None
    return out.getvalue()


def manifest(kind: str, title: str, runs: list[list[dict]], versions: tuple[str, str], workflow: Any) -> dict[str, Any]:
    """The manifest as c2pa-python takes it."""
    created = {
        "action": "c2pa.created",
        "digitalSourceType": MADE_BY_A_MODEL,
        "softwareAgent": {"name": "ComfyUI", "version": versions[1]},
    }
    told: dict[str, Any] = {"version": VERSION, "runs": runs}
    if workflow is not None:
        told["workflow_sha256"] = digest_of_json(workflow)
    return {
        "claim_generator_info": [{"name": "SafeRoPE", "version": versions[0]}],
        "title": title,
        "format": MIME[kind],
        "assertions": [
            {"label": "c2pa.actions", "data": {"actions": [created]}},
            {"label": LABEL, "kind": "Json", "data": told},
        ],
    }


def digest_of_json(value: Any) -> str:
    """SHA-256 of a JSON value with sorted keys and no spaces."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
