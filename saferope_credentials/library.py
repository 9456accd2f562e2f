"""c2pa-python, an extra, and the settings that it is used with."""

from __future__ import annotations

from types import ModuleType
from typing import Any

GET_IT = (
    'Install it beside ComfyUI\'s packages: pip install c2pa-python. For the command: pip install "saferope[sign]".'
)
MIME = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}
# Of a leaf certificate: e-mail protection, which every C2PA validator takes, and document signing (RFC 9336)
USAGES = ("1.3.6.1.5.5.7.3.4", "1.3.6.1.5.5.7.3.36")
CLAIMS = "1.3.6.1.4.1.62558.2.1"  # C2PA's own, of certificates by its authorities


def c2pa() -> ModuleType:
    """The library. Raises ImportError that says how to get it."""
    try:
        import c2pa as library
    except ImportError as error:
        raise ImportError(
            f"Content credentials need the package c2pa-python, which is missing ({error}). {GET_IT}"
        ) from None
    return library


def context(anchors: str = "") -> Any:
    """A context that asks nothing of the network, makes no thumbnails and trusts the PEM certificates alone."""
    library = c2pa()
    settings: dict[str, dict[str, Any]] = {
        "builder": {"thumbnail": {"enabled": False}},
        "verify": {"remote_manifest_fetch": False, "ocsp_fetch": False, "verify_trust": True},
        "trust": {"trust_config": "\n".join((*USAGES, CLAIMS))},
    }
    if anchors:
        settings["trust"]["user_anchors"] = anchors
    return library.Context(library.Settings.from_dict(settings))
