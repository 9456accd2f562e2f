"""Concept files of every kind come back as they were, and an oracle that shares no code with the loader agrees."""

from __future__ import annotations

import dataclasses
import json
import re
import struct
import subprocess
import sys

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import saferope_core
from dev.comfyui import ROOT
from saferope_core import NAMES, STREAMS, Concept, Geometry, load_concepts, save_concepts, sha256, skew, tensors_of
from saferope_core.concept.concept import LEAST_FULL
from saferope_core.concept.concept_file import parse_concepts
from tests.support import concepts as flat
from tests.support.hostile import spoilt
from tests.support.oracle import Unsound, check

EXAMPLES = ROOT / "tests" / "files"
BUDGET = 25  # files of every property


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
    owners = ("", "image_") if image else ("",)
    risks = [f"{kind}_{owner}{role}" for kind in ("gate", "full") for owner in owners for role in "qk"]
    fields |= {name: torch.rand(n).clamp(LEAST_FULL, 1) for name in draw(st.sets(st.sampled_from(risks)))}
    if draw(st.booleans()):
        fields["singular_values"] = torch.rand(n, width - reach) * 10.0 ** draw(st.integers(-42, 30))  # denormals too
    scale = draw(st.sampled_from([0.0, 1e-42, 1.0, 18.0]))
    for stream, columns in (("text", width), ("image", image or width)):
        fields[f"generator_{stream}"] = skew(torch.rand(n, columns, columns) * 2 - 1) * scale
    delta = torch.rand(geometry.blocks, geometry.heads) * 2 - 1
    heads = torch.tensor(rows, dtype=torch.int32)
    return flat.concept_of(
        saferope_core, geometry=geometry, heads=heads, discrimination=delta, reach=reach, **fields, **draw(facts)
    )


def same(a: Concept, b: Concept) -> bool:
    names = [f.name for f in dataclasses.fields(Concept) if f.name not in (*STREAMS, "source")]
    names += [name for names in NAMES.values() for name in tensors_of(a.text, names)] + ["acts_on", "acts_on_image"]
    pairs = [(flat.field(a, name), flat.field(b, name)) for name in names]
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
    assert not same(found[0], flat.changed(found[0], threshold=found[0].threshold / 2 + 0.1))  # control


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


@pytest.mark.parametrize(
    "change",
    [
        lambda data, c: (data, [flat.changed(c, strength=0.5)]),
        lambda data, c: (data, [flat.changed(c, gate_q=torch.zeros(2))]),
        lambda data, c: (data, [flat.changed(c, basis_q=c.text.basis.q.flip(-1))]),
        lambda data, c: (spoilt(data, lambda h: h["__metadata__"]["concepts"][0].update(rank=2.0)), [c]),
        lambda data, c: (
            spoilt(data, lambda h: h["a/basis_k"].update(data_offsets=h["a/basis_q"]["data_offsets"])),
            [c],
        ),
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
    command = [
        sys.executable,
        "-m",
        "tests.support.fuzz",
        "--runs",
        "1000",
        "--report",
        "1000",
        "--out",
        tmp_path / "new",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    figures = json.loads(re.findall(r"{.*}", done.stdout)[-1])
    assert figures["runs"] == 1000 and figures["accepted"] > 0 and figures["kinds of refusal"] > 50
    assert (tmp_path / "new").is_dir(), "made where it is missing"
