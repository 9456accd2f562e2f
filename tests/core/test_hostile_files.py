"""Concept files from strangers: bytes, layout, the file itself, the time and memory it asks for.

Hostile words and numbers are in test_hostile_words.py, good files and the oracle in test_any_files.py; the plain ways
to break a file in test_concept_file.py and test_concept.py.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from dev.comfyui import ROOT
from saferope_core import ConceptFileError, load_concepts, sha256
from saferope_core.concept import untrusted
from saferope_core.concept.concept_file import parse_concepts
from saferope_core.concept.files import write_bytes
from tests.support.hostile import apart, seeds, spoilt, together
from tests.support.oracle import check


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


BOMBS = ("lists", "dicts", "keys", "facts", "text", "tensors", "entries", "escapes", "numbers", "heads")
CALLS = 8  # and returns for each byte; an empty {} takes 2.5, and all pairs of a header's names would take 40,000
LOADER = """
import itertools, sys, torch
from pathlib import Path
from saferope_core import load_concepts
def peak(): return int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1]) * 1024
torch.set_num_threads(1)
load_concepts(sys.argv[1])  # what is loaded on first use
for name in sys.argv[2:]:
    Path("/proc/self/clear_refs").write_text("5")
    before, calls = peak(), itertools.count()
    sys.setprofile(lambda *_: next(calls))
    try: load_concepts(name); told = "read"
    except ValueError as error: told = "refused"
    sys.setprofile(None)
    print(name, told, next(calls), peak() - before)
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
def test_bombs_take_work_and_memory_of_their_size(tmp_path, good):
    from saferope_core.concept.concept_file import MAX_HEADER_BYTES

    (tmp_path / "good").write_bytes(good)
    for kind in BOMBS:
        (tmp_path / kind).write_bytes(bomb(kind, MAX_HEADER_BYTES - 4000))
    names = [str(tmp_path / kind) for kind in ("good", *BOMBS)]
    done = subprocess.run([sys.executable, "-c", LOADER, *names], cwd=ROOT, capture_output=True, text=True, check=True)
    lines = [line.split() for line in done.stdout.splitlines()]
    assert len(lines) == len(BOMBS)
    for name, _, calls, grown in lines:
        assert int(calls) <= CALLS * Path(name).stat().st_size, name
        assert int(grown) <= 3 * Path(name).stat().st_size + 64 * 2**20, name
    assert any(told == "read" for _, told, *_ in lines), "control: some reach the end"


@pytest.mark.skipif(os.name == "nt", reason="POSIX modes")
@pytest.mark.parametrize("private", [True, False])
def test_a_private_file_is_closed_from_its_first_byte_on(tmp_path, monkeypatch, private):
    modes, sync = [], os.fsync

    def watched(number):
        modes.append(os.fstat(number).st_mode & 0o777)
        sync(number)

    monkeypatch.setattr(os, "fsync", watched)
    before = os.umask(0)
    try:
        write_bytes(tmp_path / "key.pem", b"key", private)
    finally:
        os.umask(before)
    modes.append((tmp_path / "key.pem").stat().st_mode & 0o777)
    assert modes == ([0o600] * 2 if private else [0o666] * 2)
