"""Concept files from strangers. Each attack has a test; what is accepted is checked again by an oracle of its own.

The plain ways to break a file are in test_concept_file.py and test_concept.py.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import struct
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dev.comfyui import ROOT
from dev.hostile import apart, seeds, together
from dev.oracle import Unsound, check
from saferope_core import Concept, ConceptFileError, Geometry, load_concepts, save_concepts, sha256, skew, untrusted
from saferope_core.concept_file import parse_concepts

EXAMPLES = ROOT / "tests" / "files"
BUDGET = 25  # files of every property


@pytest.fixture
def path(tmp_path):
    return tmp_path / "star.safetensors"


@pytest.fixture
def good():
    return seeds()[0]


def spoilt(data: bytes, change) -> bytes:
    """The file after change(header): the JSON in its metadata is a value there, and put back as text."""
    header, body = apart(data)
    change(header)
    return together(header, body)


# ------------------------------------------------------------------------------------------------ good files

words = st.text(st.characters(exclude_categories=("C", "Z"), include_characters=" "), min_size=1, max_size=40)
facts = st.fixed_dictionaries(
    {
        "slug": st.from_regex(r"[a-z0-9-]{1,12}", fullmatch=True),
        "name": words.filter(lambda text: text.strip()),
        "description": st.text(st.characters(exclude_categories=("C", "Z"), include_characters=" \n\t"), max_size=60),
        "threshold": st.floats(0, 1),
        "strength": st.floats(0, 100),
        "acts_on": st.sampled_from(["q", "k", "qk"]),
        "acts_on_image": st.sampled_from(["q", "k", "qk", None]),
        "mode": st.sampled_from(["learned", "fixed", "random"]),
        "training": st.dictionaries(st.text(max_size=5), st.none() | st.integers() | st.floats(-1e9, 1e9), max_size=3),
    }
)


@st.composite
def concepts(draw):
    """Any concept of a small geometry."""
    double, single = draw(st.sampled_from([(1, 0), (0, 1), (2, 3)]))
    geometry = Geometry(double, single, draw(st.integers(1, 3)), draw(st.integers(2, 9)))
    places = [(0, b, h) for b in range(double) for h in range(geometry.heads)]
    places += [(1, b, h) for b in range(single) for h in range(geometry.heads)]
    rows = sorted(draw(st.sets(st.sampled_from(places), min_size=1)))
    width = draw(st.integers(2, geometry.head_dim))
    image = draw(st.none() | st.integers(2, geometry.head_dim))
    reach = draw(st.integers(0, min(width, image or width) - 1))
    torch.manual_seed(draw(st.integers(0, 2**32)))
    n, d = len(rows), geometry.head_dim
    fields = {f"basis_{role}": torch.linalg.qr(torch.randn(n, d, width)).Q for role in "qk"}
    if image:
        fields |= {f"basis_image_{role}": torch.linalg.qr(torch.randn(n, d, image)).Q for role in "qk"}
    gates = ["gate_q", "gate_k", *(("gate_image_q", "gate_image_k") if image else ())]
    fields |= {name: torch.rand(n) for name in draw(st.sets(st.sampled_from(gates)))}
    if draw(st.booleans()):
        fields["singular_values"] = torch.rand(n, width - reach) * 10.0 ** draw(st.integers(-42, 30))  # denormals too
    scale = draw(st.sampled_from([0.0, 1e-42, 1.0, 18.0]))
    for stream, columns in (("text", width), ("image", image or width)):
        fields[f"generator_{stream}"] = skew(torch.rand(n, columns, columns) * 2 - 1) * scale
    delta = torch.rand(geometry.blocks, geometry.heads) * 2 - 1
    heads = torch.tensor(rows, dtype=torch.int32)
    return Concept(geometry=geometry, heads=heads, discrimination=delta, reach=reach, **fields, **draw(facts))


def same(a: Concept, b: Concept) -> bool:
    pairs = [(getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(Concept)]
    return all(torch.equal(x, y) if isinstance(x, torch.Tensor) and y is not None else x == y for x, y in pairs)


quiet = settings(max_examples=BUDGET, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


@quiet
@given(concept=concepts(), half=st.booleans())
def test_any_concept_comes_back(tmp_path_factory, concept, half):
    """Bit for bit in float32; in float16 sound, and twice the same. The oracle reads the same from the bytes."""
    path = tmp_path_factory.getbasetemp() / "any.safetensors"
    save_concepts(path, [concept], torch.float16 if half else torch.float32)
    found = load_concepts(path)
    check(path.read_bytes(), found)
    assert half or same(found[0], concept)
    assert same(found[0], load_concepts(path)[0])
    assert not same(found[0], dataclasses.replace(found[0], threshold=found[0].threshold / 2 + 0.1))  # control


@pytest.mark.parametrize("name", ["plain", "whole", "whole-half", "two-half"])
def test_files_of_version_1_load_for_ever(name):
    """Frozen bytes, written when the format was; their identities are in SHA256SUMS."""
    path = EXAMPLES / f"v1-{name}.safetensors"
    frozen = dict(reversed(line.split()) for line in (EXAMPLES / "SHA256SUMS").read_text().splitlines())
    assert sha256(path) == frozen[path.name]
    found = load_concepts(path)
    check(path.read_bytes(), found)
    assert [concept.slug for concept in found] == (["b-2", "c"] if name == "two-half" else ["a"])
    assert found[0].training == {"seed": 1, "loss": [0.5]}


@pytest.mark.parametrize("version", ["2", "0", "1.0", "", "01", " 1", "2" * 300])
def test_unknown_versions_name_two_ways_out(good, version):
    data = spoilt(good, lambda h: h["__metadata__"].update(format_version=version))
    with pytest.raises(ValueError, match="update SafeRoPE, or ask for the concept in version 1"):
        parse_concepts(data)


# ------------------------------------------------------------------------------------------------ bytes


def test_cut_at_every_byte(good):
    assert parse_concepts(good)
    for length in range(len(good)):
        with pytest.raises(ValueError, match=r"cut short|pickle|header"):
            parse_concepts(good[:length])


def test_no_bit_of_the_header_flips_unnoticed_into_something_unsound(good):
    """Every 3rd bit of the header: refused, or the oracle agrees with what was read."""
    size, accepted = int.from_bytes(good[:8], "little"), 0
    for bit in range(0, 8 * (8 + size), 3):
        data = bytearray(good)
        data[bit // 8] ^= 1 << bit % 8
        try:
            found = parse_concepts(bytes(data))
        except ValueError:
            continue
        check(bytes(data), found)
        accepted += 1
    assert 0 < accepted < size  # letters of a name may be others


def offsets(**changes):
    def change(header):
        for key, value in changes.items():
            header[f"a/{key}"]["data_offsets"] = value(header)

    return change


def shape(name, value):
    return lambda header: header[f"a/{name}"].update(shape=value)


def of(name):
    return lambda header: header[f"a/{name}"]["data_offsets"]


LAYOUTS = {
    "shared by two": (offsets(basis_k=of("basis_q")), "damaged or cut short"),
    "overlapping": (
        offsets(generator_text=lambda h: [place - 4 for place in of("generator_text")(h)]),
        "damaged or cut short",
    ),
    "backwards": (offsets(heads=lambda h: h["a/heads"]["data_offsets"][::-1]), "damaged or cut short"),
    "negative": (offsets(heads=lambda h: [-8, 16]), "whole numbers, none negative"),
    "beyond the end": (offsets(heads=lambda h: [10**7, 10**7 + 24]), "damaged or cut short"),
    "beyond 64 bits": (offsets(heads=lambda h: [2**64, 2**64 + 24]), "whole numbers"),
    "fractions": (offsets(heads=lambda h: [0.0, 24.0]), "whole numbers"),
    "one offset": (offsets(heads=lambda h: [0]), "damaged or cut short"),
    "three offsets": (offsets(heads=lambda h: [0, 1, 2]), "2 offsets"),
    "product overflows": (shape("basis_q", [2**31 - 1, 2**31 - 1, 2**31 - 1]), "damaged or cut short"),
    "a length beyond torch": (shape("basis_q", [2**63, 0]), "expected 1 to 3 lengths"),
    "many axes": (shape("basis_q", [1] * 70), "expected 1 to 3 lengths"),
    "negative length": (shape("heads", [-1, 3]), "none negative"),
    "truth as a length": (shape("heads", [True, 3]), "whole numbers"),
    "no shape": (lambda h: h["a/heads"].pop("shape"), "tensor a/heads: missing shape"),
    "more than a shape": (lambda h: h["a/heads"].update(run="x"), "tensor a/heads: unknown run"),
}


@pytest.mark.parametrize(("change", "message"), LAYOUTS.values(), ids=LAYOUTS)
def test_tensors_must_lie_side_by_side(good, change, message):
    with pytest.raises(ValueError, match=message):
        parse_concepts(spoilt(good, change))


# ------------------------------------------------------------------------------------------------ words and numbers


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
}


@pytest.mark.parametrize(("facts", "message"), NUMBERS.values(), ids=NUMBERS)
def test_numbers_of_another_kind(good, facts, message):
    with pytest.raises(ValueError, match=message):
        parse_concepts(spoilt(good, entry(**facts)))


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
    assert found.generator_text[0, 0, 1] > 0


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
    basis = concept.basis_q.clone()
    basis[..., 7] = 0
    half(concept, path, {"basis_q": basis})
    with pytest.raises(ConceptFileError, match="basis_q: columns are not orthonormal"):
        load_concepts(path)


# ------------------------------------------------------------------------------------------------ the file itself


def test_a_link_to_a_good_file_is_read(path, good):
    path.with_name("real").write_bytes(good)
    path.symlink_to("real")
    assert load_concepts(path)[0].slug == "a" and sha256(path)


@pytest.mark.parametrize("target", ["/dev/zero", "pipe"])
def test_what_is_no_file_is_refused_at_once(path, target):
    """A device has no end, and a pipe waits for a writer for ever."""
    if target == "pipe":
        os.mkfifo(path.with_name("pipe"))
    path.symlink_to(target)
    for read in (load_concepts, sha256):
        refused = []
        thread = threading.Thread(
            target=lambda read=read, refused=refused: refused.append(refusal(read, path)), daemon=True
        )
        thread.start()
        thread.join(20)
        assert refused and "not a regular file" in refused[0]


def refusal(read, path) -> str:
    try:
        return f"accepted: {read(path)}"
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize("kind", ["nothing", "a circle", "a folder"])
def test_links_that_lead_to_no_file(path, kind):
    if kind == "a folder":
        path.mkdir()
    else:
        path.symlink_to(path if kind == "a circle" else "nowhere")
    with pytest.raises(OSError):
        load_concepts(path)


def test_what_a_link_leads_to_is_not_told(path):
    """A link to a secret: the refusal does not quote it."""
    path.with_name("secret").write_text("password=hunter2 " * 20)
    path.symlink_to("secret")
    with pytest.raises(ConceptFileError) as refused:
        load_concepts(path)
    assert "hunter2" not in str(refused.value)


class Meddled:
    """An open file to which something happens between the look at its size and the reading."""

    def __init__(self, file, meddle):
        self.file, self.meddle = file, meddle

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()

    def fileno(self):
        return self.file.fileno()

    def read(self, size):
        self.meddle()
        return self.file.read(size)


@pytest.mark.parametrize("kind", ["longer", "shorter", "same length", "replaced"])
def test_changed_while_it_is_read(path, good, monkeypatch, kind):
    """Written over in place: refused. Replaced as a whole: the old file is read to its end."""
    other = seeds()[1]
    new = {"longer": good + b"x", "shorter": good[:-5], "same length": good[:-4] + bytes(4), "replaced": other}[kind]

    def meddle():
        if kind == "replaced":
            path.with_name("new").write_bytes(new)
            os.replace(path.with_name("new"), path)
        else:
            path.write_bytes(new)
            os.utime(path, ns=(1, 1))  # where the clock's ticks are coarse

    path.write_bytes(good)
    real = untrusted.open_regular
    monkeypatch.setattr(untrusted, "open_regular", lambda name: Meddled(real(name), meddle))
    if kind == "replaced":
        (found,) = load_concepts(path)
        check(good, [found])
        return
    with pytest.raises(ConceptFileError, match="changed while it was read: wait until it is written"):
        load_concepts(path)


# ------------------------------------------------------------------------------------------------ time and memory

BOMBS = ("lists", "dicts", "keys", "facts", "text", "tensors", "entries", "escapes", "numbers", "heads")
LOADER = """
import sys, time, torch
from pathlib import Path
from saferope_core import load_concepts
def peak(): return int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1]) * 1024
torch.set_num_threads(1)
load_concepts(sys.argv[1])  # what is loaded on first use
for name in sys.argv[2:]:
    Path("/proc/self/clear_refs").write_text("5")
    before, start = peak(), time.process_time()
    try: load_concepts(name); told = "read"
    except ValueError as error: told = "refused"
    print(name, told, time.process_time() - start, peak() - before)
"""


def bomb(kind: str, room: int) -> bytes:
    """A small file that asks for all the memory and time a header can ask for."""
    header, body = apart(seeds()[0])
    first, many = header["__metadata__"]["concepts"][0], room // 24
    if kind in ("lists", "dicts", "numbers", "escapes"):
        item = {"lists": [], "dicts": {}, "numbers": 1.5, "escapes": "\\"}[kind]
        first["training"] = {"a": [item] * (room // 8)}
    elif kind == "keys":
        first["training"] = {f"{i:x}": 0 for i in range(many)}
    elif kind == "facts":
        first.update({f"{i:x}": 0 for i in range(many)})
    elif kind == "text":
        first["training"] = {"a": "\U0001f600" + "a" * room}
    elif kind == "tensors":
        header.update({f"{i:x}": {} for i in range(many)})
    elif kind == "entries":
        header["__metadata__"]["concepts"] = [{}] * (room // 4)
    elif kind == "heads":
        count = 400_000  # 4.8 MB of the same head
        header["a/heads"].update(shape=[count, 3], data_offsets=[len(body), len(body) + 12 * count])
        body += bytes(12 * count)
    return together(header, body)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak of memory is read as Linux tells it")
def test_bombs_take_no_more_than_a_second_and_their_size(tmp_path, good):
    from saferope_core.concept_file import MAX_HEADER_BYTES

    (tmp_path / "good").write_bytes(good)
    for kind in BOMBS:
        (tmp_path / kind).write_bytes(bomb(kind, MAX_HEADER_BYTES - 4000))
    names = [str(tmp_path / kind) for kind in ("good", *BOMBS)]
    done = subprocess.run([sys.executable, "-c", LOADER, *names], cwd=ROOT, capture_output=True, text=True, check=True)
    lines = [line.split() for line in done.stdout.splitlines()]
    assert len(lines) == len(BOMBS)
    for name, _, seconds, grown in lines:
        assert float(seconds) <= 1, name
        assert int(grown) <= 3 * Path(name).stat().st_size + 64 * 2**20, name
    assert any(told == "read" for _, told, *_ in lines), "control: some reach the end"


# ------------------------------------------------------------------------------------------------ oracle and fuzzer


@pytest.mark.parametrize(
    "change",
    [
        lambda data, c: (data, [dataclasses.replace(c, strength=0.5)]),
        lambda data, c: (data, [dataclasses.replace(c, gate_q=torch.zeros(2))]),
        lambda data, c: (data, [dataclasses.replace(c, basis_q=c.basis_q.flip(-1))]),
        lambda data, c: (spoilt(data, entry(rank=2.0)), [c]),
        lambda data, c: (spoilt(data, offsets(basis_k=of("basis_q"))), [c]),
        lambda data, c: (data[:-4] + struct.pack("<f", 7.0), [c]),
    ],
)
def test_the_oracle_sees_what_is_unsound(good, change):
    found = parse_concepts(good)
    check(good, found)  # control
    with pytest.raises(Unsound):
        check(*change(good, found[0]))


def test_a_short_run_of_the_fuzzer(tmp_path):
    """Guided by coverage where atheris is installed. The long run is in docs/security.md."""
    command = [sys.executable, "-m", "dev.fuzz", "--runs", "1000", "--report", "1000", "--out", tmp_path]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    figures = json.loads(re.findall(r"{.*}", done.stdout)[-1])
    assert figures["runs"] == 1000 and figures["accepted"] > 0 and figures["kinds of refusal"] > 50
