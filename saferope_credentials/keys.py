"""The key that signs: of a local authority made by `saferope keys init`, or of a configuration file.

The configuration is `signing.json` in the user's own folder, and never a widget: a stranger's workflow must not choose
a key. Its fields:

- "certificates": a PEM file, the leaf first.
- "key": a PEM file. For a key in hardware or in a service give "callback": "module:function" and "algorithm": "es256"
  instead. The function gets bytes and returns their signature, for ECDSA r and s side by side.
- "timestamp": the address of an RFC 3161 service. The service is asked only where it is named.
"""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

from .library import USAGES

CONFIG, AUTHORITY, AUTHORITY_KEY = "signing.json", "authority.pem", "authority.key"
CHAIN, KEY = "signer.pem", "signer.key"
PRIVATE = (AUTHORITY_KEY, KEY)  # files for the user alone, 0600
AUTHORITY_DAYS, LEAF_DAYS = 3650, 365
ORGANISATION = "SafeRoPE, a local authority"
CLOCKS = timedelta(minutes=5)  # by which clocks may differ
ALGORITHMS = ("es256", "es384", "es512", "ps256", "ps384", "ps512", "ed25519")
FIELDS = {"certificates", "key", "callback", "algorithm", "timestamp"}


@dataclass(frozen=True)
class Config:
    """The signer: a PEM chain, leaf first, and a function from bytes to their signature. timestamp: "" for none."""

    chain: str
    algorithm: str
    sign: Callable[[bytes], bytes]
    timestamp: str = ""


def folder() -> Path:
    """The user's own folder of keys: SAFEROPE_KEYS, else where the system keeps settings of programs."""
    if named := os.environ.get("SAFEROPE_KEYS"):
        return Path(named)
    home = os.environ.get("APPDATA") or os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    return Path(home) / "saferope"


def init_keys(name: str, old: tuple[bytes, bytes] | None = None) -> dict[str, bytes]:
    """A signer's certificate and key by a local authority: the content of files, by their names.

    name: of the signer, in the certificate. old: certificate and key of an authority to keep. All who trust it
    then trust the new signer.
    """
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    def pem(key: Any) -> bytes:
        none = serialization.NoEncryption()
        return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, none)

    made = {} if old else _authority(ec.generate_private_key(ec.SECP256R1()), pem)
    certificate, authority_key = old or (made[AUTHORITY], made[AUTHORITY_KEY])
    key = ec.generate_private_key(ec.SECP256R1())
    leaf = _leaf(name, key.public_key(), certificate, serialization.load_pem_private_key(authority_key, None))
    config = json.dumps({"certificates": CHAIN, "key": KEY}, indent=1).encode()
    return made | {CHAIN: leaf + certificate, KEY: pem(key), CONFIG: config}


def configured(home: Path | None = None) -> Config:
    """The user's configuration. Raises ValueError that names the missing thing and the remedy."""
    home = home or folder()
    path = home / CONFIG
    if not path.is_file():
        raise ValueError(
            f"There is no key to sign with: no {path}. Make one with `saferope keys init`, or name your own "
            "certificate and key in that file."
        )
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(told, dict) or not told.keys() <= FIELDS or not all(type(v) is str for v in told.values()):
            raise ValueError(f"expected an object with texts for {', '.join(sorted(FIELDS))}")
        chain = (home / told["certificates"]).read_text(encoding="ascii")
        algorithm, sign = _callback(told) if "callback" in told else _key((home / told["key"]).read_bytes())
    except (OSError, ValueError, KeyError, TypeError, ImportError, AttributeError) as error:
        raise ValueError(
            f"{path} cannot be used ({type(error).__name__}: {error}). Mend it, or make it anew."
        ) from None
    return Config(chain, algorithm, sign, told.get("timestamp", ""))


def _callback(told: dict[str, str]) -> tuple[str, Callable[[bytes], bytes]]:
    module, _, function = told["callback"].partition(":")
    if told.get("algorithm") not in ALGORITHMS:
        raise ValueError(f"algorithm is {told.get('algorithm')!r}, expected one of {', '.join(ALGORITHMS)}")
    return told["algorithm"], getattr(importlib.import_module(module), function)


def _key(data: bytes) -> tuple[str, Callable[[bytes], bytes]]:
    """Algorithm and signature of a private key in PEM; a signature of ECDSA is r and s side by side, as COSE has it."""
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519
    from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature

    key = serialization.load_pem_private_key(data, None)
    if isinstance(key, ed25519.Ed25519PrivateKey):
        return "ed25519", key.sign
    found = {256: ("es256", hashes.SHA256()), 384: ("es384", hashes.SHA384()), 521: ("es512", hashes.SHA512())}
    if not isinstance(key, ec.EllipticCurvePrivateKey) or key.curve.key_size not in found:
        raise ValueError(f"the key is a {type(key).__name__}, expected ECDSA (P-256, P-384, P-521) or Ed25519")
    (algorithm, digest), size, elliptic = found[key.curve.key_size], (key.curve.key_size + 7) // 8, key

    def sign(data: bytes) -> bytes:
        pair = decode_dss_signature(elliptic.sign(data, ec.ECDSA(digest)))
        return b"".join(number.to_bytes(size, "big") for number in pair)

    return algorithm, sign


def _authority(key: Any, pem: Callable[[Any], bytes]) -> dict[str, bytes]:
    from cryptography import x509

    name = _name("SafeRoPE local authority")
    own = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
    extensions = [(x509.BasicConstraints(True, 0), True), (_usage(authority=True), True), (own, False)]
    return {
        AUTHORITY: _certificate(name, name, key.public_key(), key, AUTHORITY_DAYS, extensions),
        AUTHORITY_KEY: pem(key),
    }


def _leaf(name: str, public: Any, authority: bytes, authority_key: Any) -> bytes:
    from cryptography import x509

    issuer = x509.load_pem_x509_certificate(authority)
    known = issuer.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    extensions = [
        (x509.BasicConstraints(False, None), True),
        (_usage(authority=False), True),
        (x509.ExtendedKeyUsage([x509.ObjectIdentifier(each) for each in USAGES]), False),
        (x509.SubjectKeyIdentifier.from_public_key(public), False),
        (x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(known), False),
    ]
    return _certificate(_name(name), issuer.subject, public, authority_key, LEAF_DAYS, extensions)


def _certificate(subject: Any, issuer: Any, public: Any, key: Any, days: int, extensions: list) -> bytes:
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization

    start = datetime.now(timezone.utc) - CLOCKS
    made = x509.CertificateBuilder(issuer, subject, public, x509.random_serial_number(), start, start + timedelta(days))
    for extension, critical in extensions:
        made = made.add_extension(extension, critical)
    return made.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def _name(common: str) -> Any:
    from cryptography import x509
    from cryptography.x509.oid import NameOID

    parts = ((NameOID.ORGANIZATION_NAME, ORGANISATION), (NameOID.COMMON_NAME, common))
    return x509.Name([x509.NameAttribute(*part) for part in parts])


def _usage(authority: bool) -> Any:
    from cryptography import x509

    never = (
        "content_commitment",
        "key_encipherment",
        "data_encipherment",
        "key_agreement",
        "encipher_only",
        "decipher_only",
    )
    signs = {"digital_signature": not authority, "key_cert_sign": authority, "crl_sign": authority}
    return x509.KeyUsage(**signs, **dict.fromkeys(never, False))
