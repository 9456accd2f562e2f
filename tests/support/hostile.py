"""Concept files as an attacker would make them: good ones, spoilt in places that matter, with the rest left whole.

Bytes flipped blindly hardly get past the header. These changes take a file apart, spoil one thing, and put it together
again with lengths and offsets that fit, so that the checks behind the header are reached as well.
"""

from __future__ import annotations

import copy
import json
import random
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

import saferope_core
from saferope_core import Concept, Geometry, save_concepts, skew
from tests.support.concepts import concept_of

VALUES = [
    *(0, 1, 2, 3, -1, 0.5, 1.5, 1.0, 5.0, True, False, None, 2**31, 2**63, 2**64, 10**300, -0.0, 1e-320, 1e308),
    *("", " ", "a", "star", "../star", "..\\star", "\\\\host\\share", "/etc/passwd", "C:", "nul", "a/b", "a\0b"),
    *("\x1b[2J", "\u202eevil", "\u2066", "\u200b", "\ud800", "\ufeff", "\n", "\U000e0041", "x" * 201, "y" * 5000),
    *("q", "k", "qk", "kq", "learned", "fixed", "random", "F32", "F16", "I32", "F64", "BOOL", "F8_E4M3", "1", "2"),
    *([], {}, [[]], [{}], {"a": {}}, [0], [0, 0], [1, 0], [2**62, 0], [2**40, 2**40], [-1, 4], [0] * 70, "[" * 40),
]
RAW_VALUES = [
    b"NaN",
    b"-Infinity",
    b"1e999",
    b"-1e999",
    b"9" * 5000,
    b"1e-9999",
    b"[" * 99,
    b'{"a":1,"a":1}',
    b"\xff",
    b'"',
]
FLOATS = [
    0.0,
    -0.0,
    1.0,
    -1.0,
    0.5,
    2.0,
    1e-45,
    1e-38,
    6e-8,
    65504.0,
    65520.0,
    1e30,
    3.4e38,
    100.0,
    101.0,
    1.00001,
    0.999,
]
FLOATS += [float("nan"), float("inf"), float("-inf")]
WORDS = {"F32": 4, "F16": 2, "I32": 4, "F64": 8, "BF16": 2, "I64": 8, "U8": 1}


def seeds() -> list[bytes]:
    """Good files, a few kilobytes each, that use every part of the format; always the same."""
    state = torch.get_rng_state()
    torch.manual_seed(1)
    small, square = Geometry(1, 1, 2, 4), Geometry(0, 1, 1, 2, "tiny")
    files = [
        ([_concept("a", small, 2)], torch.float32),
        ([_concept("a", small, 3, reach=1, image=2)], torch.float32),
        ([_concept("a", small, 3, reach=1, image=2)], torch.float16),
        ([_concept("b-2", square, 2), _concept("c", square, 2)], torch.float16),
    ]
    with tempfile.TemporaryDirectory() as folder:
        path, found = Path(folder) / "seed.safetensors", []
        for concepts, dtype in files:
            save_concepts(path, concepts, dtype, created="2025-01-01T00:00:00+00:00")
            found.append(path.read_bytes())
    torch.set_rng_state(state)
    return found


def _concept(slug: str, geometry: Geometry, width: int, reach: int = 0, image: int = 0) -> Concept:
    rows = [(kind, 0, 0) for kind in (0, 1) if (geometry.double_blocks, geometry.single_blocks)[kind]]
    count, more = len(rows), {}

    def basis(columns: int):
        return torch.linalg.qr(torch.randn(count, geometry.head_dim, columns)).Q

    if image:
        more = {f"basis_image_{role}": basis(image) for role in "qk"} | {"gate_image_q": torch.rand(count)}
    more |= (
        {
            "gate_q": torch.rand(count),
            "full_q": torch.rand(count).clamp(0.1, 1),
            "singular_values": torch.rand(count, width - reach),
        }
        if reach
        else {}
    )
    generators = [skew(torch.randn(count, columns, columns)) for columns in (width, image or width)]
    delta = torch.rand(geometry.blocks, geometry.heads)
    heads = torch.tensor(rows, dtype=torch.int32)
    facts = {"reach": reach, "training": {"seed": 1, "loss": [0.5]}}
    names = ("slug", "name", "description", "geometry", "heads", "basis_q", "basis_k")
    values = (slug, slug.upper(), "", geometry, heads, basis(width), basis(width), *generators, delta)
    fields = dict(zip((*names, "generator_text", "generator_image", "discrimination"), values, strict=True))
    return concept_of(saferope_core, **fields, **facts, **more)


def apart(data: bytes) -> tuple[dict, bytes] | None:
    """Header, with the JSON inside its metadata read too, and body; None where that cannot be done."""
    size = int.from_bytes(data[:8], "little")
    try:
        header = json.loads(data[8 : 8 + size])
        for key in ("concepts", "geometry"):
            header["__metadata__"][key] = json.loads(header["__metadata__"][key])
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return header, data[8 + size :]


def together(header: dict, body: bytes, spoil=lambda text: text) -> bytes:
    """The file of a header as `apart` gives it; `spoil` may change the header's bytes before their length is
    written."""
    header = copy.copy(header)
    if isinstance(metadata := header.get("__metadata__"), dict):
        inner = {key: json.dumps(metadata[key]) for key in ("concepts", "geometry") if key in metadata}
        header["__metadata__"] = {**metadata, **inner}
    text = spoil(json.dumps(header).encode("utf-8", "surrogatepass"))
    return len(text).to_bytes(8, "little") + text + body


def spoilt(data: bytes, change: Callable[[dict], object]) -> bytes:
    """The file after change(header): the JSON in its metadata is a value there, and put back as text."""
    header, body = apart(data)
    change(header)
    return together(header, body)


def mutate(data: bytes, chance: random.Random) -> bytes:
    """The file, spoilt in one to three places."""
    for _ in range(chance.choice((1, 1, 2, 3))):
        parts = apart(data)
        if parts is None or chance.random() < 0.1:
            data = _bytes(data, chance)
            continue
        try:
            data = chance.choice(CHANGES)(*parts, chance)
        except (
            TypeError,
            KeyError,
            ValueError,
            AttributeError,
            OverflowError,
        ):  # spoilt before: nothing is where it was
            data = _bytes(data, chance)
    return data


def _bytes(data: bytes, chance: random.Random) -> bytes:
    """Blindly: a byte set, a piece cut out, doubled, or the end cut off."""
    found = bytearray(data or b"\0")
    place, other = chance.randrange(len(found)), chance.randrange(len(found))
    kind = chance.randrange(4)
    if kind == 0:
        found[place] = chance.randrange(256)
    elif kind == 1:
        del found[min(place, other) : max(place, other)]
    elif kind == 2:
        found[place:place] = found[min(place, other) : max(place, other)][:200]
    else:
        del found[place:]
    return bytes(found)


def _places(value) -> list[tuple]:
    """(container, key) of everything inside."""
    found, todo = [], [value]
    while todo:
        each = todo.pop()
        keys = each.keys() if isinstance(each, dict) else range(len(each)) if isinstance(each, list) else ()
        found += [(each, key) for key in keys]
        todo += [each[key] for key in keys]
    return found


def _value(header: dict, body: bytes, chance: random.Random) -> bytes:
    """One value of the header, anywhere, replaced, removed, or moved a little."""
    container, key = chance.choice(_places(header))
    old = container[key]
    if chance.random() < 0.15:
        del container[key]
    elif type(old) in (int, float) and chance.random() < 0.5:
        container[key] = old + chance.choice((-1, 1, 0.5, 4, 1e-9))
    else:
        container[key] = chance.choice(VALUES)
    return together(header, body)


def _key(header: dict, body: bytes, chance: random.Random) -> bytes:
    """One key of the header renamed or added."""
    containers = [header, *(c[k] for c, k in _places(header) if isinstance(c[k], dict))]
    found = chance.choice(containers)
    name = str(chance.choice(VALUES))
    if found and chance.random() < 0.5:
        found[name] = found.pop(chance.choice(list(found)))
    else:
        found[name] = chance.choice(VALUES)
    return together(header, body)


def _token(header: dict, body: bytes, chance: random.Random) -> bytes:
    """What json would not write: NaN, numbers without end, a key twice."""

    def spoil(text: bytes) -> bytes:
        places = [i for i, byte in enumerate(text) if byte in b"0123456789"]
        place = chance.choice(places or [0])
        return text[:place] + chance.choice(RAW_VALUES) + text[place + 1 :]

    return together(header, body, spoil)


def _tensors_of(header: dict, body: bytes) -> list[tuple[str, int, int]]:
    """(dtype, begin, end) of the tensors that can be found."""
    found = []
    for entry in header.values():
        try:
            begin, end = entry["data_offsets"]
            if entry["dtype"] in WORDS and 0 <= begin < end <= len(body):
                found.append((entry["dtype"], begin, end))
        except (KeyError, TypeError, ValueError):
            continue
    return found


def _number(header: dict, body: bytes, chance: random.Random) -> bytes:
    """One number of a tensor."""
    tensors = _tensors_of(header, body)
    if not tensors:
        return _bytes(together(header, body), chance)
    dtype, begin, end = chance.choice(tensors)
    width = WORDS[dtype]
    place = begin + width * chance.randrange(max(1, (end - begin) // width))
    old = body[place : place + width]
    return together(header, body[:place] + _word(dtype, old, chance) + body[place + width :])


def _word(dtype: str, old: bytes, chance: random.Random) -> bytes:
    code = {"F32": "<f", "F16": "<e"}.get(dtype)
    if code is None or len(old) != WORDS[dtype]:
        return bytes(chance.choice((0, 1, 2, 127, 255)) for _ in old)
    value = chance.choice(FLOATS)
    if chance.random() < 0.4:
        value = struct.unpack(code, old)[0] * (1 + chance.choice((-1, 1)) * 10 ** chance.uniform(-8, 0))
    try:
        return struct.pack(code, value)
    except (OverflowError, struct.error):
        return struct.pack(code, float("inf"))


def _layout(header: dict, body: bytes, chance: random.Random) -> bytes:
    """Another shape or dtype for a tensor, with bytes that fit; or two tensors in one place."""
    names = [key for key, entry in header.items() if isinstance(entry, dict) and "data_offsets" in entry]
    if not names:
        return _bytes(together(header, body), chance)
    entry = header[chance.choice(names)]
    kind = chance.randrange(4)
    if kind == 0:
        entry["dtype"] = chance.choice(list(WORDS))
    elif kind == 1 and isinstance(entry.get("shape"), list):
        chance.shuffle(entry["shape"])
    elif kind == 2:
        entry["data_offsets"] = copy.copy(header[chance.choice(names)]["data_offsets"])
    else:
        entry["shape"] = [chance.choice((0, 1, 2, 3, 4, 2**33)) for _ in range(chance.randrange(5))]
    return together(header, body)


CHANGES = [_value, _value, _key, _token, _number, _number, _number, _layout]
