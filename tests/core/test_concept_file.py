"""Concept files: a round trip loses nothing, and every kind of broken file is refused with its own message."""

import json
import os
import pickle

import pytest
import safetensors.torch
import torch

from saferope_core import ConceptFileError, Geometry, load_concepts, made_for, save_concepts, sha256
from saferope_core.concept import concept_file
from tests.support import concepts as flat

TENSORS = ("heads", "basis_q", "basis_k", "generator_text", "generator_image", "discrimination")
OPTIONAL = ("gate_q", "gate_k", "singular_values", "basis_image_q", "basis_image_k", "gate_image_q", "gate_image_k")
FACTS = (
    "slug",
    "name",
    "description",
    "threshold",
    "strength",
    "acts_on",
    "acts_on_image",
    "mode",
    "training",
    "geometry",
    "rank",
    "reach",
)


@pytest.fixture
def concept(make_concept):
    return make_concept(
        name="A star ★",
        description="Two\nlines.",
        gate_q=torch.rand(6),
        gate_k=torch.rand(6),
        singular_values=torch.rand(6, 5) * 1e6,
        strength=0.9,
        acts_on="k",
        mode="fixed",
        basis_image_q=torch.linalg.qr(torch.randn(6, 32, 3)).Q,
        basis_image_k=torch.linalg.qr(torch.randn(6, 32, 3)).Q,
        generator_image=torch.zeros(6, 3, 3),
        gate_image_q=torch.rand(6),
        gate_image_k=torch.rand(6),
        acts_on_image="qk",
        training={"seed": 7, "loss": [0.1, 2e-9], "nested": {"torch": "2.13"}},
    )


@pytest.fixture
def path(tmp_path):
    return tmp_path / "star.safetensors"


def assert_same(found, expected):
    for name in FACTS:
        assert flat.field(found, name) == flat.field(expected, name), name
    for name in (*TENSORS, *OPTIONAL):
        a, b = flat.field(found, name), flat.field(expected, name)
        assert (a is None and b is None) or (a.dtype == b.dtype and torch.equal(a, b)), name


def test_round_trip_bit_for_bit(path, concept, make_concept):
    plain = make_concept("zappy-2", rank=4, reach=1)
    save_concepts(path, [concept, plain])
    found = load_concepts(path)
    assert len(found) == 2
    assert_same(found[0], concept)
    assert_same(found[1], plain)
    with pytest.raises(AssertionError):  # control
        assert_same(found[0], flat.changed(concept, gate_k=concept.text.gate.k + 1e-3))


def test_equal_arguments_give_equal_bytes(path, concept):
    identities = set()
    for _ in range(4):
        save_concepts(path, [concept], created="2025-01-01T00:00:00+00:00", license="CC0-1.0")
        identities.add(sha256(path))
    assert len(identities) == 1 and len(identities.pop()) == 64
    save_concepts(path, [concept], created="2025-01-01T00:00:01+00:00", license="CC0-1.0")
    assert sha256(path) not in identities


def test_the_header_tells_the_geometry(path, concept):
    save_concepts(path, [concept])
    assert made_for(path) == concept.geometry
    whole = path.read_bytes()
    path.write_bytes(whole[:-4])  # the header is all that is read
    assert made_for(path) == concept.geometry
    for broken in (b"", whole[:100], whole.replace(b"saferope.concept", b"saferope.cancept")):
        path.write_bytes(broken)
        with pytest.raises(ValueError):
            made_for(path)


def test_sha256_of_known_bytes(path):
    path.write_bytes(b"abc")
    assert sha256(path) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_any_safetensors_reader_understands_it(path, concept):
    save_concepts(path, [concept], license="CC0-1.0")
    with safetensors.safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        assert sorted(file.keys()) == sorted(f"star/{name}" for name in (*TENSORS, *OPTIONAL))
        assert torch.equal(file.get_tensor("star/basis_q"), concept.text.basis.q)
    assert (metadata["format"], metadata["format_version"], metadata["license"]) == ("saferope.concept", "1", "CC0-1.0")
    assert json.loads(metadata["geometry"])["head_dim"] == 32
    assert json.loads(metadata["concepts"])[0]["rank"] == 5
    assert int.from_bytes(path.read_bytes()[:8], "little") % 8 == 0  # tensors start aligned


def test_float16_is_orthonormal_and_skew_again(path, concept):
    save_concepts(path, [concept], dtype=torch.float16)
    half = path.stat().st_size
    (found,) = load_concepts(path)
    identity = torch.eye(5).expand(6, -1, -1)
    for name in ("basis_q", "basis_k"):
        basis = flat.field(found, name)
        assert basis.dtype == torch.float32
        torch.testing.assert_close(basis.mT @ basis, identity, rtol=0, atol=1e-6)
        torch.testing.assert_close(basis, flat.field(concept, name), rtol=0, atol=1e-3)
        rounded = flat.field(concept, name).half().float()
        assert (rounded.mT @ rounded - identity).abs().max() > 1e-5  # control: rounding did break it
    assert torch.equal(found.text.generator, -found.text.generator.mT)
    for name in ("discrimination", "gate_q", "gate_k", "singular_values"):
        assert torch.equal(flat.field(found, name), flat.field(concept, name))
    save_concepts(path, [concept])
    assert half < 0.6 * path.stat().st_size


def test_a_float16_generator_that_is_skew_only_up_to_rounding(path, concept):
    def loosened(tensors):
        generator = tensors["star/generator_text"].half()
        generator[:, 0, 1] *= 1 + 2**-9
        return {**tensors, "star/generator_text": generator}

    write(path, concept, tensors=loosened)
    (found,) = load_concepts(path)
    assert torch.equal(found.text.generator, -found.text.generator.mT)
    torch.testing.assert_close(found.text.generator, concept.text.generator, rtol=1e-2, atol=1e-2)


def test_saving_replaces_the_file_and_leaves_nothing_beside_it(path, concept, make_concept):
    save_concepts(path, [make_concept("old")])
    save_concepts(path, [concept])
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    assert load_concepts(path)[0].slug == "star"


def test_a_failed_save_keeps_the_old_file(path, concept, monkeypatch):
    save_concepts(path, [concept])
    before = sha256(path)

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        save_concepts(path, [flat.changed(concept, strength=0.5)])
    assert [file.name for file in path.parent.iterdir()] == [path.name] and sha256(path) == before


def test_what_cannot_be_saved(path, concept, make_concept):
    elsewhere = make_concept("far", geometry=Geometry(2, 3, 3, 48))
    deep = {}
    for _ in range(20):
        deep = {"deeper": deep}
    for concepts, options, message in (
        ([], {}, "got 0 concepts, expected 1 to 64"),
        ([concept, concept], {}, "are not unique"),
        ([concept, elsewhere], {}, "concept 'far' was made for .* x 48, but the model is .* x 32"),
        ([concept], {"dtype": torch.bfloat16}, "dtype is torch.bfloat16, expected torch.float32 or torch.float16"),
        ([flat.changed(concept, training=deep)], {}, "concepts: .* nested 23 deep"),
    ):
        with pytest.raises(ValueError, match=message):
            save_concepts(path, concepts, **options)
    assert not path.exists()


def test_a_missing_file_is_not_a_broken_one(path):
    with pytest.raises(FileNotFoundError):
        load_concepts(path)


# Broken files. Each starts as a good one and is spoilt in one place.


def write(path, concept, metadata=lambda m: m, tensors=lambda t: t):
    """Save a good file, then pass its metadata and tensors through functions that may change them."""
    save_concepts(path, [concept])
    with safetensors.safe_open(path, framework="pt") as file:
        found = file.metadata()
    values = safetensors.torch.load_file(path)
    safetensors.torch.save_file(tensors(values), path, metadata=metadata(found))


def meta(**changes):
    """Replace metadata; None removes."""
    return {"metadata": lambda m: {k: v for k, v in {**m, **changes}.items() if v is not None}}


def fact(**changes):
    """Replace facts in the JSON of the concept; ... removes."""

    def change(metadata):
        entry = {**json.loads(metadata["concepts"])[0], **changes}
        return {**metadata, "concepts": json.dumps([{k: v for k, v in entry.items() if v is not ...}])}

    return {"metadata": change}


def numbers(**changes):
    def change(metadata):
        return {**metadata, "geometry": json.dumps({**json.loads(metadata["geometry"]), **changes})}

    return {"metadata": change}


def tensor(name, change):
    """Replace one tensor; a change to None removes it."""

    def changed(tensors):
        new = change(tensors.pop(f"star/{name}"))
        return tensors if new is None else {**tensors, f"star/{name}": new.contiguous()}

    return {"tensors": changed}


def poke(value, position=0):
    def change(tensor):
        tensor.view(-1)[position] = value
        return tensor

    return change


BROKEN = {
    "another format": (meta(format="pt"), "format is 'pt', expected 'saferope.concept': a safetensors file, but not"),
    "no format": (meta(format=None), "format is None"),
    "newer version": (
        meta(format_version="2"),
        "version is '2', this is SafeRoPE .* reads version 1: update .*, or ask",
    ),
    "no licence": (meta(license=None), "metadata: missing license"),
    "unknown metadata": (meta(mood="good"), "metadata: unknown mood"),
    "geometry not JSON": (meta(geometry="{"), "geometry: not the JSON expected here"),
    "geometry list": (meta(geometry="[]"), "geometry: got list, expected a JSON object"),
    "geometry key missing": (meta(geometry='{"family": "flux"}'), "geometry: missing double_blocks, head_dim, heads"),
    "geometry key unknown": (numbers(depth=3), "geometry: unknown depth"),
    "geometry twice": (meta(geometry='{"heads": 1, "heads": 2}'), "geometry: .* duplicate keys heads"),
    "geometry absurd": (numbers(heads=10**9), "geometry: heads is 1000000000, expected an integer from 1 to 96"),
    "geometry other": (numbers(heads=2), "no head 2 in flux: 2 double"),
    "concepts object": (meta(concepts="{}"), "concepts: expected a JSON list of objects"),
    "concepts numbers": (meta(concepts="[1]"), "concepts: expected a JSON list of objects"),
    "concepts none": (meta(concepts="[]"), "0 concepts, expected 1 to 64"),
    "concepts many": (meta(concepts=json.dumps([{}] * 65)), "65 concepts, expected 1 to 64"),
    "concepts deep": (meta(concepts="[" * 5000 + "]" * 5000), "concepts: .* nested 5000 deep, expected at most 16"),
    "concepts nan": (meta(concepts='[{"strength": NaN}]'), "concepts: .* NaN, expected finite numbers"),
    "fact missing": (fact(mode=...), "concepts: missing mode"),
    "fact unknown": (fact(colour="red"), "concepts: unknown colour"),
    "slug with a slash": (fact(slug="../star"), "tensors: missing ../star/basis_k"),
    "slug number": (fact(slug=7), "tensors: missing 7/basis_k"),
    "name": (fact(name="\x1b[31m"), "concept 'star': name: holds control characters"),
    "rank": (fact(rank=4), "concept 'star': rank says 4, its bases have 5 columns"),
    "threshold": (fact(threshold=7), "concept 'star': threshold is 7, expected a number from 0 to 1"),
    "strength overflow": (fact(strength=10**400), "concept 'star': strength is"),
    "acts_on": (fact(acts_on="v"), "concept 'star': acts_on is 'v'"),
    "mode": (fact(mode={}), "concept 'star': mode is {}"),
    "training": (fact(training="long"), "concept 'star': training: got str, expected a dict"),
    "tensor missing": (tensor("basis_k", lambda t: None), "tensors: missing star/basis_k: the file is incomplete"),
    "tensor unknown": ({"tensors": lambda t: {**t, "star/extra": torch.ones(1)}}, "tensors: unknown star/extra"),
    "tensor of nobody": ({"tensors": lambda t: {**t, "moon/heads": torch.ones(1)}}, "tensors: unknown moon/heads"),
    "heads dtype": (tensor("heads", lambda t: t.long()), "tensor star/heads has dtype 'I64', expected I32"),
    "basis dtype": (tensor("basis_q", lambda t: t.bfloat16()), "star/basis_q has dtype 'BF16', expected F32 or F16"),
    "gate dtype": (tensor("gate_q", lambda t: t.double()), "star/gate_q has dtype 'F64'"),
    "heads shape": (tensor("heads", lambda t: t.flatten()), r"heads: shape is \(18,\)"),
    "heads none": (tensor("heads", lambda t: t[:0]), "protects from nothing"),
    "heads order": (tensor("heads", lambda t: t.flip(0)), "heads: rows are not sorted or not unique"),
    "heads range": (tensor("heads", poke(5, 1)), r"heads: no block \(0, 5\)"),
    "basis axes": (tensor("basis_q", lambda t: t.flatten()), r"basis_q: got \(960,\)"),
    "basis empty": (tensor("basis_q", lambda t: t[:, :, :0]), "rank is 0"),
    "basis nan": (tensor("basis_q", poke(float("nan"))), "basis_q: holds NaN or infinity"),
    "basis half nan": (tensor("basis_q", lambda t: poke(float("nan"))(t.half())), "basis_q: holds NaN or infinity"),
    "basis bit flip": (tensor("basis_k", poke(0.9)), "basis_k: columns are not orthonormal"),
    "basis half wrong": (tensor("basis_k", lambda t: t.half() * 1.1), "basis_k: columns are not orthonormal"),
    "generator axes": (tensor("generator_text", lambda t: t.half()[:, :4]), r"generator_text: shape is \(6, 4, 5\)"),
    "generator skew": (tensor("generator_text", poke(0.1, 1)), "generator_text: not skew"),
    "generator half skew": (tensor("generator_image", lambda t: poke(0.1)(t.half())), "generator_image: not skew"),
    "generator inf": (tensor("generator_image", poke(float("inf"))), "generator_image: holds NaN or infinity"),
    "generator huge": (tensor("generator_text", lambda t: t * 1e6), "generator_text: reaches from"),
    "discrimination": (
        tensor("discrimination", lambda t: t[1:]),
        r"discrimination: shape is \(4, 3\), expected \(5, 3\)",
    ),
    "gate range": (tensor("gate_k", poke(-0.5)), "gate_k: reaches from -0.5"),
    "singular values": (tensor("singular_values", poke(-1.0)), "singular_values: reaches from -1"),
}


@pytest.mark.parametrize(("change", "message"), BROKEN.values(), ids=BROKEN.keys())
def test_broken_files_are_refused(path, concept, change, message):
    write(path, concept)
    load_concepts(path)  # control: unchanged, the rewritten file is good
    write(path, concept, **change)
    with pytest.raises(ConceptFileError, match=message) as refusal:
        load_concepts(path)
    assert str(refusal.value).startswith(f"{path}: ")


def with_header(data, change):
    """The file with the JSON text of its header passed through a function."""
    size = int.from_bytes(data[:8], "little")
    header = change(data[8 : 8 + size])
    return len(header).to_bytes(8, "little") + header + data[8 + size :]


DUPLICATE = b'{"__metadata__":{},"__metadata__":{'
RAW = {
    "empty": (lambda d: b"", "not a safetensors file, or cut short: fetch the file again"),
    "text": (lambda d: b"<!DOCTYPE html><html>", "not a safetensors file"),
    "cut in the header": (lambda d: d[:300], "not a safetensors file, or cut short"),
    "cut in the tensors": (lambda d: d[:-4], "damaged or cut short"),
    "tail": (lambda d: d + b"more", "damaged or cut short"),
    "pickle": (lambda d: pickle.dumps({"a": 1}), "this is a pickle .* never opened"),
    "zip": (lambda d: b"PK\x03\x04\x00\x00\x08\x08" + d, "this is a pickle"),
    "header not JSON": (lambda d: with_header(d, lambda h: b"x" + h[1:]), "header: not the JSON"),
    "header list": (lambda d: with_header(d, lambda h: b"[]"), "header is not a JSON object of objects"),
    "header of numbers": (lambda d: with_header(d, lambda h: b'{"a": 1}'), "header is not a JSON object of objects"),
    "header without metadata": (lambda d: with_header(d, lambda h: b"{}"), "format is None"),
    "header deep": (lambda d: with_header(d, lambda h: b"[" * 9999), "header: .* nested 9999 deep"),
    "metadata not text": (
        lambda d: with_header(d, lambda h: h.replace(b'"license":"NOASSERTION"', b'"license":["MIT"]')),
        "metadata: license is list, expected text",
    ),
    "metadata twice": (
        lambda d: with_header(d, lambda h: h.replace(b'{"__metadata__":{', DUPLICATE, 1)),
        "header: .* duplicate keys __metadata__",
    ),
    "tensor twice": (
        lambda d: with_header(d, lambda h: h.replace(b'"star/gate_k"', b'"star/gate_q"')),
        "header: .* duplicate keys star/gate_q",
    ),
    "tensors overlap": (
        lambda d: with_header(d, lambda h: h.replace(b'"data_offsets":[0,', b'"data_offsets":[4,', 1)),
        "damaged or cut short",
    ),
    "header too long": (
        lambda d: (9 * 2**20).to_bytes(8, "little") + b" " * (9 * 2**20),
        "header of 9437184 bytes, expected at most 1048576",
    ),
}


@pytest.mark.parametrize(("change", "message"), RAW.values(), ids=RAW.keys())
def test_damaged_bytes_are_refused(path, concept, change, message):
    save_concepts(path, [concept])
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ConceptFileError, match=message):
        load_concepts(path)


def test_a_header_length_that_looks_like_a_pickle_is_no_pickle(path, concept):
    """19,280 bytes of header, a multiple of 8, begin with 'PK' and 640 with 0x80 0x02."""
    save_concepts(path, [concept])
    path.write_bytes(with_header(path.read_bytes(), lambda header: header.ljust(19280)))
    assert path.read_bytes()[:2] == b"PK"
    assert load_concepts(path)[0].slug == "star"


def test_size_is_checked_before_anything_is_read(path, monkeypatch):
    with open(path, "wb") as file:
        file.truncate(concept_file.MAX_BYTES + 1)  # sparse: takes no room
    with pytest.raises(ConceptFileError, match="536870913 bytes, expected at most 536870912"):
        load_concepts(path)


def test_slugs_in_a_file_are_unique(path, concept):
    save_concepts(path, [concept])
    twice = {"metadata": lambda m: {**m, "concepts": json.dumps(json.loads(m["concepts"]) * 2)}}
    write(path, concept, **twice)
    with pytest.raises(ConceptFileError, match="are not unique"):
        load_concepts(path)


def test_nothing_is_ever_unpickled(path, concept, monkeypatch):
    def forbidden(*_, **__):
        raise AssertionError("unpickled")

    save_concepts(path, [concept])
    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, forbidden)
    monkeypatch.setattr(torch, "load", forbidden)
    load_concepts(path)
    path.write_bytes(b"\x80\x04}q\x00.")
    with pytest.raises(ConceptFileError, match="pickle"):
        load_concepts(path)
