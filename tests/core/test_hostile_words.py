"""Concept files from strangers: what their words and numbers may say."""

from __future__ import annotations

import struct

import pytest
import torch

from saferope_core import ConceptFileError, Geometry, load_concepts, save_concepts
from saferope_core.concept.concept_file import parse_concepts
from tests.support.hostile import apart, spoilt, together


def entry(**changes):
    return lambda header: header["__metadata__"]["concepts"][0].update(changes)


def renamed(slug):
    """The slug, with its tensors under it: nothing but the slug is wrong."""

    def change(header):
        header["__metadata__"]["concepts"][0]["slug"] = slug
        for key in [key for key in header if key.startswith("a/")]:
            header[f"{slug}/{key[2:]}"] = header.pop(key)

    return change


PATHS = [
    "../a",
    "..",
    ".",
    "/etc/passwd",
    "a/b",
    "a\\b",
    "\\\\host\\share",
    "C:a",
    "~",
    "a\0b",
    "a\n",
    "ä",
    "A",
    "",
    "a" * 201,
]
UNSEEN = {
    "right to left": "\u202egnp.exe",
    "isolate": "\u2066a\u2069",
    "zero width": "a\u200bb",
    "joiner": "a\u200db",
    "byte order mark": "\ufeffa",
    "escape": "\x1b]0;owned\x07",
    "carriage return": "safe\revil",
    "null": "a\0b",
    "line separator": "a\u2028b",
    "tag": "a\U000e0041",
    "private": "a\ue000",
    "surrogate": "a\ud800",
}


@pytest.mark.parametrize("slug", PATHS)
def test_slugs_that_lead_somewhere(good, slug):
    with pytest.raises(ValueError, match=r"slug is|JSON|damaged"):
        parse_concepts(spoilt(good, renamed(slug)))


def test_a_slug_that_leads_nowhere(good):
    """The control of the test above."""
    assert parse_concepts(spoilt(good, renamed("b-2")))[0].slug == "b-2"


@pytest.mark.parametrize("field", ["name", "description"])
@pytest.mark.parametrize("text", UNSEEN.values(), ids=UNSEEN)
def test_words_that_hide_or_turn(good, field, text):
    with pytest.raises(ValueError, match=f"{field}: holds control characters"):
        parse_concepts(spoilt(good, entry(**{field: text})))


@pytest.mark.parametrize("key", ["license", "created", "saferope_version"])
@pytest.mark.parametrize("text", ["\u202ea", "\x1b[2J", "x" * 201])
def test_words_of_the_metadata(good, key, text):
    with pytest.raises(ValueError, match=f"metadata: {key} is .* expected a short printable line"):
        parse_concepts(spoilt(good, lambda header: header["__metadata__"].update({key: text})))


@pytest.mark.parametrize("place", ["metadata", "tensor", "fact", "duplicate", "format"])
def test_messages_hold_no_control_characters(path, good, place):
    """A terminal or a log must not obey the file that was refused, nor be filled by it."""
    evil = "\x1b[2J\u202e" + "long" * 9000
    changes = {
        "metadata": lambda h: h["__metadata__"].update({evil: ""}),
        "tensor": lambda h: h.update({evil: {}}),
        "fact": lambda h: h["__metadata__"]["concepts"][0].update({evil: 1}),
        "duplicate": lambda h: h["__metadata__"]["concepts"][0].update(twice=1),
        "format": lambda h: h["__metadata__"].update(format=evil),
    }
    header, body = apart(good)
    changes[place](header)
    twice = rb"\"\\u001b[2J\": 1"  # in JSON inside of JSON
    path.write_bytes(together(header, body, lambda text: text.replace(rb"\"twice\": 1", twice + b", " + twice)))
    with pytest.raises(ConceptFileError) as refusal:
        load_concepts(path)
    told = str(refusal.value)
    assert told.isprintable() and len(told) < 1100 and "\x1b" not in told
    assert place != "duplicate" or "duplicate keys" in told


NUMBERS = {
    "rank as a fraction": ({"rank": 2.0}, r"rank says 2\.0"),
    "rank as truth": ({"rank": True}, "rank says True"),
    "reach as truth": ({"reach": False}, "reach is False"),
    "strength above all": ({"strength": 1e6}, "strength is 1000000.0"),
    "threshold as truth": ({"threshold": True}, "threshold is True"),
    "strength of 400 digits": ({"strength": 10**399}, "strength is"),
    "a number of 600 digits": ({"training": {"n": 10**599}}, "a number of 600 digits, expected at most 500"),
    "training as a list": ({"training": []}, "training: got list"),
    "settings as a list": ({"training": {"settings": ["seed"]}}, "training: settings is list, expected a dict"),
    "settings as nothing": ({"training": {"settings": None}}, "training: settings is NoneType, expected a dict"),
    "versions as text": ({"training": {"versions": "torch"}}, "training: versions is str, expected a dict"),
}


@pytest.mark.parametrize(("facts", "message"), NUMBERS.values(), ids=NUMBERS)
def test_numbers_of_another_kind(good, facts, message):
    with pytest.raises(ValueError, match=message):
        parse_concepts(spoilt(good, entry(**facts)))


@pytest.mark.parametrize("record", [{}, {"settings": {"seed": 1}}, {"versions": {}}, {"loss": ["settings"]}])
def test_records_of_the_right_kind(good, record):
    """The control of the test above: objects, or nothing."""
    assert parse_concepts(spoilt(good, entry(training=record)))[0].training == record


@pytest.mark.parametrize("number", ["1e999", "-1e999", "NaN", "Infinity"])
def test_numbers_without_end(good, number):
    data = spoilt(good, entry(strength=0.123456))
    text = data.replace(b"0.123456", number.encode().ljust(8))
    assert text != data
    with pytest.raises(ValueError, match=f"{number}, expected finite numbers"):
        parse_concepts(text)


def test_denormals_are_numbers(good):
    """The smallest that float32 has: in a generator they turn nothing, and nothing breaks on them."""
    header, body = apart(good)
    begin, end = header["a/generator_text"]["data_offsets"]
    tiny = struct.pack("<8f", *([0.0, 1e-45, -1e-45, 0.0] * 2))
    (found,) = parse_concepts(together(header, body[:begin] + tiny + body[end:]))
    assert found.text.generator[0, 0, 1] > 0


def half(concept, path, change):
    """A float16 file with one tensor changed."""
    save_concepts(path, [concept], torch.float16)
    header, body = apart(path.read_bytes())
    for name, tensor in change.items():
        begin, end = header[f"star/{name}"]["data_offsets"]
        raw = tensor.half().contiguous().numpy().tobytes()
        assert len(raw) == end - begin
        body = body[:begin] + raw + body[end:]
    path.write_bytes(together(header, body))
    return path


def test_float16_overflow(make_concept, path):
    half(make_concept(), path, {"generator_text": torch.full((6, 5, 5), 1e9)})
    with pytest.raises(ConceptFileError, match="generator_text: holds NaN or infinity"):
        load_concepts(path)


def test_a_wide_float16_basis_with_a_column_missing(make_concept, path):
    """A tolerance that grows with the rank reaches 1 at rank 103: then a column of zeros would pass as rounding."""
    concept = make_concept(rank=120, heads=[(0, 0, 0)], geometry=Geometry(1, 0, 1, 128))
    load_concepts(half(concept, path, {}))  # control
    basis = concept.text.basis.q.clone()
    basis[..., 7] = 0
    half(concept, path, {"basis_q": basis})
    with pytest.raises(ConceptFileError, match="basis_q: columns are not orthonormal"):
        load_concepts(path)
