"""Concept files, version 1: safetensors with checked metadata. Files are untrusted input, read whole or refused.

Order of the checks: size before anything is read, the header as strict JSON, format and version, keys, dtypes and sizes
of metadata and tensors, and only then the values, which a Concept checks itself. Nothing is ever unpickled.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from ..maths.rotation import skew
from ..maths.subspace import orthonormal
from ..version import __version__
from .concept import LONGEST_NAME, Concept, require_orthonormal, require_skew
from .files import write_bytes
from .geometry import Geometry
from .stream import NAMES, ROLES, Stream, stream_of, tensors_of
from .strict_json import dumps, loads
from .untrusted import open_regular, printable, read_whole

FORMAT = "saferope.concept"
FORMAT_VERSION = "1"

MAX_BYTES = 512 * 2**20  # all 1,368 heads of FLUX.1 at rank 10 take 15 MB
MAX_HEADER_BYTES = 2**20  # 64 concepts take 150 KB; JSON may take 40 times its size in memory, and a second for 8 MB
MAX_CONCEPTS = 64
MAX_AXES, MAX_LENGTH = 3, 2**31 - 1  # of a tensor; beyond it torch itself gives up, each time in another way
_HEADS_AT_ONCE = 64  # in float64
LICENSE_UNSTATED = "NOASSERTION"  # SPDX's word for it

_PICKLES = (b"PK\x03\x04", b"\x80")  # how the files of torch.save begin: a zip archive, or a bare pickle
_METADATA = {"format", "format_version", "concepts", "geometry", "created", "saferope_version", "license"}
_FACTS = (
    "slug",
    "name",
    "description",
    "rank",
    "reach",
    "threshold",
    "strength",
    "acts_on",
    "acts_on_image",
    "mode",
    "training",
)
_FACTS_OPTIONAL = {"description": "", "reach": 0, "strength": 1.0, "acts_on_image": None, "training": {}}
_TEXT, _IMAGE = NAMES["text"], NAMES["image"]
_BASES = tuple(names.basis[role] for names in (_TEXT, _IMAGE) for role in ROLES)
_GENERATORS = (_TEXT.generator, _IMAGE.generator)
_GATES = tuple(own[role] for names in (_TEXT, _IMAGE) for own in (names.gate, names.full) for role in ROLES)
_NARROW = (*_BASES, *_GENERATORS)  # float16 in float16 files
_TENSORS = ("heads", *_BASES[:2], *_GENERATORS, "discrimination")
_TENSORS_OPTIONAL = ("singular_values", *_BASES[2:], *_GATES)


class ConceptFileError(ValueError):
    """A concept file that cannot be trusted; the message says the value found, the value expected and the remedy."""


def save_concepts(
    path: str | os.PathLike,
    concepts: Sequence[Concept],
    dtype: torch.dtype = torch.float32,
    license: str = LICENSE_UNSTATED,
    created: str | None = None,
) -> None:
    """Write one or more concepts of one geometry to one file, under a temporary name that is then moved.

    dtype float32 loses nothing; float16 halves bases and generators (gates and Δ stay float32, where a rounded gate
    could let a safe token through). created: ISO time, default now; equal arguments give the same bytes.
    Raises ValueError for no concepts, equal slugs, different geometries or another dtype.
    """
    require_together(concepts)
    if dtype not in (torch.float32, torch.float16):
        raise ValueError(f"dtype is {dtype}, expected torch.float32 or torch.float16")
    created = created or datetime.now(timezone.utc).isoformat(timespec="seconds")
    metadata = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "concepts": dumps([_facts(concept) for concept in concepts]),
        "geometry": dumps(_geometry_facts(concepts[0].geometry)),
        "created": created,
        "saferope_version": __version__,
        "license": license,
    }
    data = _sorted_header(safetensors.torch.save(_tensors(concepts, dtype), metadata))
    parse_concepts(data)  # never write a file that would be refused
    write_bytes(path, data)


def load_concepts(path: str | os.PathLike) -> list[Concept]:
    """Read and check a concept file whole. Raises ConceptFileError where the file breaks a rule of version 1.

    float16 bases are re-orthonormalised and generators re-skewed; float32 comes back bit for bit.
    """
    try:
        return parse_concepts(read_whole(path, MAX_BYTES))
    except ValueError as error:
        raise ConceptFileError(printable(f"{path}: {error}")) from None


def made_for(path: str | os.PathLike) -> Geometry:
    """The geometry that the header of a concept file names: for lists of files, as nothing else is read or checked.

    Raises ValueError where there is no such header, OSError where the file cannot be read.
    """
    with open_regular(path) as file:
        data = file.read(8 + MAX_HEADER_BYTES)
    return _geometry(_metadata(_header(data).get("__metadata__"))["geometry"])


def sha256(path: str | os.PathLike) -> str:
    """The identity of a regular file: the hexadecimal SHA-256 of its bytes."""
    digest = hashlib.sha256()
    with open_regular(path) as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()


def require_together(concepts: Sequence[Concept]) -> None:
    """Raise ValueError unless these can be in one file: not too many, of one geometry, every slug once."""
    if not 1 <= len(concepts) <= MAX_CONCEPTS:
        raise ValueError(f"got {len(concepts)} concepts, expected 1 to {MAX_CONCEPTS} in one file")
    slugs = [concept.slug for concept in concepts]
    if len(set(slugs)) != len(slugs):
        raise ValueError(f"slugs {slugs} are not unique: a file holds every concept under its own slug")
    for concept in concepts[1:]:
        concepts[0].geometry.require(concept.geometry, f"concept {concept.slug!r}")


def _facts(concept: Concept) -> dict[str, object]:
    """A concept's entry in the metadata."""
    acts = {_TEXT.acts_on: concept.text.acts_on, _IMAGE.acts_on: concept.image and concept.image.acts_on}
    return {name: acts[name] if name in acts else getattr(concept, name) for name in _FACTS}


def _tensors(concepts: Sequence[Concept], dtype: torch.dtype) -> dict[str, Tensor]:
    tensors = {}
    for concept in concepts:
        image = concept.image or Stream(concept.generator("image"))
        own = {name: getattr(concept, name) for name in ("heads", "discrimination", "singular_values")}
        own |= tensors_of(concept.text, _TEXT) | tensors_of(image, _IMAGE)
        for name, value in own.items():
            if value is not None:
                tensors[f"{concept.slug}/{name}"] = value.to(dtype) if name in _NARROW else value
    return tensors


def _sorted_header(data: bytes) -> bytes:
    """The same safetensors file with its header in one fixed order; the library writes metadata in a random one."""
    size = int.from_bytes(data[:8], "little")
    header = dumps(loads("header", data[8 : 8 + size])).encode()
    header += b" " * (-len(header) % 8)  # keeps the tensors aligned
    return len(header).to_bytes(8, "little") + header + data[8 + size :]


def parse_concepts(data: bytes) -> list[Concept]:
    """The concepts of a file's bytes, checked whole. Raises ValueError, and no other error, for anything else."""
    source = hashlib.sha256(data).hexdigest()
    header = _header(data)
    metadata = _metadata(header.pop("__metadata__", None))
    geometry = _geometry(metadata["geometry"])
    entries = _entries(metadata["concepts"])
    _check_tensors(header, [entry["slug"] for entry in entries])
    try:
        tensors = safetensors.torch.load(data)
    except safetensors.SafetensorError as error:
        raise ValueError(f"damaged or cut short ({error}): fetch the file again") from None
    del data  # a large file need not be held a third time
    return [_concept(entry, geometry, tensors, source) for entry in entries]


def _header(data: bytes) -> dict:
    size = int.from_bytes(data[:8], "little")
    if len(data) < 8 or size > len(data) - 8:
        if data.startswith(_PICKLES):
            raise ValueError("this is a pickle (.pt, .pth), which could run code and is never opened: convert it first")
        raise ValueError("not a safetensors file, or cut short: fetch the file again")
    if size > MAX_HEADER_BYTES:
        raise ValueError(f"header of {size} bytes, expected at most {MAX_HEADER_BYTES}: this is no concept file")
    header = loads("header", data[8 : 8 + size])
    if not isinstance(header, dict) or not all(isinstance(value, dict) for value in header.values()):
        raise ValueError("header is not a JSON object of objects: not a safetensors file")
    return header


def _metadata(metadata: dict | None) -> dict[str, str]:
    metadata = metadata or {}
    found = metadata.get("format")
    if found != FORMAT:
        raise ValueError(f"format is {found!r}, expected {FORMAT!r}: a safetensors file, but not a concept file")
    version = metadata.get("format_version")
    if version != FORMAT_VERSION:
        raise ValueError(
            f"format version is {version!r}, this is SafeRoPE {__version__}, which reads version {FORMAT_VERSION}:"
            f" update SafeRoPE, or ask for the concept in version {FORMAT_VERSION}"
        )
    _check_keys("metadata", metadata, _METADATA, set())
    for key, value in metadata.items():
        if not isinstance(value, str):
            raise ValueError(f"metadata: {key} is {type(value).__name__}, expected text")
    for key in ("created", "saferope_version", "license"):
        if len(metadata[key]) > LONGEST_NAME or not metadata[key].isprintable():
            raise ValueError(f"metadata: {key} is {metadata[key]!r:.60}, expected a short printable line")
    return metadata


def _geometry(text: str) -> Geometry:
    values = loads("geometry", text)
    if not isinstance(values, dict):
        raise ValueError(f"geometry: got {type(values).__name__}, expected a JSON object")
    needed = {"family", "double_blocks", "single_blocks", "heads", "head_dim"}
    _check_keys("geometry", values, needed, {"key_heads"})
    return Geometry(**values)


def _geometry_facts(geometry: Geometry) -> dict[str, object]:
    """A geometry's entry in the metadata. It has key heads only where keys are grouped: all readers know the rest."""
    facts = asdict(geometry)
    return facts if geometry.group > 1 else {name: value for name, value in facts.items() if name != "key_heads"}


def _entries(text: str) -> list[dict]:
    entries = loads("concepts", text)
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ValueError("concepts: expected a JSON list of objects")
    if not 1 <= len(entries) <= MAX_CONCEPTS:
        raise ValueError(f"{len(entries)} concepts, expected 1 to {MAX_CONCEPTS}")
    for entry in entries:
        _check_keys("concepts", entry, set(_FACTS) - set(_FACTS_OPTIONAL), set(_FACTS_OPTIONAL))
    slugs = [str(entry["slug"]) for entry in entries]
    if len(set(slugs)) != len(slugs):
        raise ValueError(f"slugs {slugs} are not unique")
    return [{**_FACTS_OPTIONAL, **entry} for entry in entries]


def _check_tensors(header: dict, slugs: list) -> None:
    """Names and dtypes, before any tensor is made."""
    needed = {f"{slug}/{name}" for slug in slugs for name in _TENSORS}
    optional = {f"{slug}/{name}" for slug in slugs for name in _TENSORS_OPTIONAL}
    _check_keys("tensors", header, needed, optional)
    for key, entry in header.items():
        allowed = ("I32",) if key.endswith("/heads") else ("F32", "F16")
        if entry.get("dtype") not in allowed:
            raise ValueError(f"tensor {key} has dtype {entry.get('dtype')!r}, expected {' or '.join(allowed)}")
        _check_keys(f"tensor {key}", entry, {"dtype", "shape", "data_offsets"}, set())
        if not _are_sizes(entry["shape"], MAX_AXES, MAX_LENGTH) or not _are_sizes(entry["data_offsets"], 2, MAX_BYTES):
            raise ValueError(
                f"tensor {key} has shape {entry['shape']!r:.60} at {entry['data_offsets']!r:.60}, expected 1 to "
                f"{MAX_AXES} lengths and 2 offsets: whole numbers, none negative"
            )


def _are_sizes(values: object, most: int, largest: int) -> bool:
    return (
        isinstance(values, list)
        and 1 <= len(values) <= most
        and all(type(value) is int and 0 <= value <= largest for value in values)
    )


def _concept(entry: dict, geometry: Geometry, tensors: dict[str, Tensor], source: str) -> Concept:
    slug = entry["slug"]
    own: dict[str, Any] = {name: tensors.pop(f"{slug}/{name}", None) for name in (*_TENSORS, *_TENSORS_OPTIONAL)}
    facts = {name: entry[name] for name in _FACTS if name not in ("rank", _TEXT.acts_on, _IMAGE.acts_on)}
    try:
        for name in _NARROW:
            if own[name] is not None and own[name].dtype == torch.float16:
                own[name] = _restored(name, own[name])
        streams: dict[str, Any] = {name: stream_of(own, entry[names.acts_on], names) for name, names in NAMES.items()}
        rest = {name: own[name] for name in ("heads", "discrimination", "singular_values")}
        concept = Concept(geometry=geometry, source=source, **facts, **streams, **rest)
    except ValueError as error:
        raise ValueError(f"concept {slug!r}: {error}") from None
    if type(entry["rank"]) is not int or entry["rank"] != concept.rank:
        raise ValueError(
            f"concept {slug!r}: rank says {entry['rank']!r}, its bases have {concept.rank} columns besides the reach"
        )
    return concept


def _restored(name: str, value: Tensor) -> Tensor:
    """A float16 basis or generator as float32, exactly orthonormal or skew again if it was so up to its rounding."""
    value = value.float()
    if value.ndim != 3 or value.numel() == 0 or not value.isfinite().all():
        return value  # for the Concept to refuse
    if name.startswith("basis"):
        require_orthonormal(name, value, torch.float16)
        return torch.cat(
            [orthonormal(part) for part in value.split(_HEADS_AT_ONCE)]
        )  # float64 takes eight times the file
    if value.shape[1] == value.shape[2]:
        require_skew(name, value, torch.float16)
        return skew(value)
    return value


def _check_keys(what: str, found: dict, needed: set, optional: set) -> None:
    if missing := sorted(needed - found.keys()):
        raise ValueError(f"{what}: missing {', '.join(missing)}: the file is incomplete")
    if unknown := sorted(found.keys() - needed - optional):
        raise ValueError(f"{what}: unknown {', '.join(unknown)}: version {FORMAT_VERSION} has no such entries")
