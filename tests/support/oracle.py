"""A second opinion on what the loader of concept files let through: the format again, in NumPy, sharing no code with
it.

Slow and plain on purpose: every law of the format written out, in float64.
"""

from __future__ import annotations

import json
import math
import re
import unicodedata
from itertools import pairwise

import numpy as np

from saferope_core import Concept
from tests.support.concepts import field

KINDS = {"F32": np.float32, "F16": np.float16, "I32": np.int32}
REQUIRED = {"heads", "basis_q", "basis_k", "generator_text", "generator_image", "discrimination"}
IMAGE = {"basis_image_q", "basis_image_k"}
IMAGE_GATES = {"gate_image_q", "gate_image_k", "full_image_q", "full_image_k"}
OPTIONAL = {"gate_q", "gate_k", "full_q", "full_k", "singular_values"} | IMAGE | IMAGE_GATES
FACTS = {"slug", "name", "rank", "threshold", "acts_on", "mode"}
MORE_FACTS = {"description", "reach", "strength", "acts_on_image", "training"}
METADATA = {"format", "format_version", "concepts", "geometry", "created", "saferope_version", "license"}
UNSEEN = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")  # control, invisible, turning the reading direction, unassigned
ROUNDING = {np.dtype(np.float32): 1e-5, np.dtype(np.float16): 1.1e-2}  # of a dot product of unit vectors, generously


class Unsound(AssertionError):
    """The loader accepted what the format forbids."""


def require(good: bool, what: str) -> None:
    if not good:
        raise Unsound(what)


def check(data: bytes, concepts: list[Concept]) -> None:
    """Raises Unsound unless the bytes are a concept file of version 1 and `concepts` is what it says."""
    size = int.from_bytes(data[:8], "little")
    header = _json(data[8 : 8 + size])
    metadata = header.pop("__metadata__")
    require(set(metadata) == METADATA and all(type(v) is str for v in metadata.values()), "metadata")
    require((metadata["format"], metadata["format_version"]) == ("saferope.concept", "1"), "format")
    require(all(_seen(metadata[key]) for key in ("created", "license", "saferope_version")), "words of the metadata")
    tensors = _tensors(header, data[8 + size :])
    geometry, entries = _json(metadata["geometry"]), _json(metadata["concepts"])
    _check_geometry(geometry)
    require(1 <= len(entries) <= 64 and len(entries) == len(concepts), "number of concepts")
    require(len({entry["slug"] for entry in entries}) == len(entries), "equal slugs")
    for entry, concept in zip(entries, concepts, strict=True):
        own = {key.split("/", 1)[1]: tensors.pop(key) for key in list(tensors) if key.split("/", 1)[0] == entry["slug"]}
        _check_facts(entry, concept)
        _check_tensors(own, entry, geometry)
        _check_taken(own, concept)
    require(not tensors, "tensors of nobody")


def _json(text):
    def pairs(found):
        require(len({key for key, _ in found}) == len(found), "equal keys")
        return dict(found)

    return json.loads(text, object_pairs_hook=pairs)


def _tensors(header: dict, body: bytes) -> dict[str, np.ndarray]:
    """Every tensor; together they cover the body once, without a gap and without sharing a byte."""
    spans, found = [], {}
    for key, entry in header.items():
        begin, end = entry["data_offsets"]
        kind = np.dtype(KINDS[entry["dtype"]])
        require(end - begin == math.prod(entry["shape"]) * kind.itemsize, f"{key}: bytes and shape")
        spans.append((begin, end))
        found[key] = np.frombuffer(body[begin:end], kind).reshape(entry["shape"])
    spans.sort()
    require(spans[0][0] == 0 and spans[-1][1] == len(body), "the body is not covered")
    require(all(a[1] == b[0] for a, b in pairwise(spans)), "gaps or shared bytes")
    return found


def _check_geometry(g: dict) -> None:
    require(set(g) == {"family", "double_blocks", "single_blocks", "heads", "head_dim"}, "keys of the geometry")
    numbers = [g[name] for name in ("double_blocks", "single_blocks", "heads", "head_dim")]
    require(all(type(n) is int and 0 <= n <= 1024 for n in numbers), "numbers of the geometry")
    require(g["heads"] >= 1 and g["head_dim"] >= 2 and g["double_blocks"] + g["single_blocks"] >= 1, "geometry")
    require(type(g["family"]) is str and re.fullmatch("[a-z0-9-]{1,60}", g["family"]) is not None, "family")


def _seen(text: str, also: str = "") -> bool:
    return all(c in also or c == " " or unicodedata.category(c) not in (*UNSEEN, "Zs") for c in text)


def _check_facts(entry: dict, concept: Concept) -> None:
    require(set(entry) >= FACTS and set(entry) <= FACTS | MORE_FACTS, "keys of a concept")
    require(type(entry["slug"]) is str and re.fullmatch("[a-z0-9-]{1,200}", entry["slug"]) is not None, "slug")
    name, description = entry["name"], entry.get("description", "")
    require(type(name) is str and 1 <= len(name) <= 200 and name.strip() != "" and _seen(name), "name")
    require(type(description) is str and len(description) <= 20000 and _seen(description, "\n\t"), "description")
    require(entry["acts_on"] in ("q", "k", "qk") and entry.get("acts_on_image") in ("q", "k", "qk", None), "acts_on")
    require(entry["mode"] in ("learned", "fixed", "random"), "mode")
    for key, low, high in (("threshold", 0, 1), ("strength", 0, 100)):
        value = entry.get(key, 1.0)
        require(type(value) in (int, float) and low <= value <= high, key)
    require(all(type(entry.get(key, 0)) is int for key in ("rank", "reach")), "rank")
    require(type(entry.get("training", {})) is dict, "training")
    for key, value in entry.items():
        require(field(concept, key) == value, f"{key} was changed on the way")


def _check_tensors(own: dict[str, np.ndarray], entry: dict, g: dict) -> None:
    require(set(own) >= REQUIRED and set(own) <= REQUIRED | OPTIONAL, "names of tensors")
    require(len(IMAGE & set(own)) in (0, 2) and (IMAGE <= set(own) or not IMAGE_GATES & set(own)), "image tensors")
    for name, tensor in own.items():
        require((tensor.dtype == np.int32) == (name == "heads"), f"dtype of {name}")
        require(bool(np.isfinite(tensor).all()), f"{name} is not finite")
    count, reach, width = len(own["heads"]), entry.get("reach", 0), own["basis_q"].shape[-1]
    image = own.get("basis_image_q", own["basis_q"]).shape[-1]
    require(entry["rank"] == width - reach and 0 <= reach < min(width, image), "rank and reach")
    _check_heads(own["heads"], g)
    for name, columns in (("basis_q", width), ("basis_k", width), ("basis_image_q", image), ("basis_image_k", image)):
        if name in own:
            _check_basis(name, own[name], (count, g["head_dim"], columns))
    for name, columns in (("generator_text", width), ("generator_image", image)):
        _check_generator(name, own[name], (count, columns, columns))
    _check_range("discrimination", own, (g["double_blocks"] + g["single_blocks"], g["heads"]), -1, 1)
    for name in ("gate_q", "gate_k", "gate_image_q", "gate_image_k"):
        _check_range(name, own, (count,), 0, 1)
    for name in ("full_q", "full_k", "full_image_q", "full_image_k"):
        _check_range(name, own, (count,), 1e-4, 1)
    _check_range("singular_values", own, (count, width - reach), 0, math.inf)


def _check_heads(heads: np.ndarray, g: dict) -> None:
    require(heads.ndim == 2 and heads.shape[1] == 3 and len(heads) > 0, "shape of heads")
    rows = [tuple(map(int, row)) for row in heads]
    require(all(a < b for a, b in pairwise(rows)), "heads are not in order")
    for kind, block, head in rows:
        require(kind in (0, 1) and 0 <= head < g["heads"], "no such head")
        require(0 <= block < g[("double_blocks", "single_blocks")[kind]], "no such block")


def _check_basis(name: str, basis: np.ndarray, shape: tuple[int, ...]) -> None:
    require(basis.shape == shape and 2 <= shape[2] <= shape[1], f"shape of {name}")
    for head in basis.astype(np.float64):
        error = np.abs(head.T @ head - np.eye(shape[2])).max()
        require(error <= max(ROUNDING[basis.dtype], 1.3e-6 * shape[2]), f"{name} is not orthonormal: {error}")


def _check_generator(name: str, generator: np.ndarray, shape: tuple[int, ...]) -> None:
    require(generator.shape == shape, f"shape of {name}")
    wide = generator.astype(np.float64)
    require(np.abs(wide).max() <= 100.001, f"range of {name}")
    loose = 1.3e-6 if generator.dtype == np.float32 else 1e-2
    error = np.abs(wide + wide.transpose(0, 2, 1)).max()
    require(error <= loose * max(1.0, np.abs(wide).max()), f"{name} is not skew: {error}")


def _check_range(name: str, own: dict, shape: tuple[int, ...], low: float, high: float) -> None:
    if name in own:
        require(own[name].shape == shape, f"shape of {name}")
        require(own[name].min() >= low - 2e-6 and own[name].max() <= high + 2e-6, f"range of {name}")


def _check_taken(own: dict[str, np.ndarray], concept: Concept) -> None:
    """What the concept holds is what the file holds; half precision comes back exactly orthonormal and skew."""
    for name in REQUIRED | OPTIONAL:
        taken = field(concept, name)
        require((taken is None) == (name not in own), f"{name} came from nowhere or was lost")
        if taken is None:
            continue
        taken = taken.numpy()
        require(taken.shape == own[name].shape, f"{name} changed its shape")
        if own[name].dtype != np.float16:
            require(taken.tobytes() == own[name].tobytes(), f"{name} changed on the way")
            continue
        wide = taken.astype(np.float64)
        loose = 1e-2 * max(1.0, float(np.abs(wide).max()))
        require(bool(np.abs(wide - own[name]).max() <= loose), f"{name} moved when it was widened")
        if name.startswith("basis"):
            gram = np.einsum("ndr,nds->nrs", wide, wide) - np.eye(wide.shape[2])
            require(np.abs(gram).max() < 1e-5, f"{name} is not orthonormal")
        if name.startswith("generator"):
            require(bool((wide == -wide.transpose(0, 2, 1)).all()), f"{name} is not skew")
