"""`saferope audit --concepts`: what the files turn counts, not that they are there; the bundled star, and what was made
of it.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from saferope import cli
from saferope_core import load_concepts, save_concepts, sha256
from tests.support import concepts as flat
from tests.support.workflows import STAR, node, protected
from tinyworld.model import WEIGHTS

BUNDLED = WEIGHTS.parent / "concepts" / STAR
# Its risk is the paper's, in the unsafe subspace: what is left outside of a space can be foreseen
OLDER = Path(__file__).parents[1] / "files" / "star-0.1.0.safetensors"


def zeroed(concept, factor=0.0):
    generators = {
        f"generator_{stream}": factor * flat.field(concept, f"generator_{stream}") for stream in ("text", "image")
    }
    return flat.changed(concept, **generators)


def never(concept, gate=1.0):
    gates = [
        name for name in ("gate_q", "gate_k", "gate_image_q", "gate_image_k") if flat.field(concept, name) is not None
    ]
    return flat.changed(
        concept, threshold=gate, **{name: torch.full_like(flat.field(concept, name), gate) for name in gates}
    )


def half(concept):
    """The generators of half of the heads are zero."""
    some = (torch.arange(len(concept.heads)) % 2)[:, None, None].float()
    generators = {
        f"generator_{stream}": some * flat.field(concept, f"generator_{stream}") for stream in ("text", "image")
    }
    return flat.changed(concept, **generators)


def inside(concept, factor=1.0):
    """Turns within the unsafe subspaces alone, so that the risk stays, and a second Apply meets the same."""
    changed = {}
    for name in ("generator_text", "generator_image"):
        generator, width = (
            torch.zeros_like(flat.field(concept, name)),
            flat.field(concept, name).shape[-1] - concept.reach,
        )
        generator[:, :width, :width] = factor * flat.field(concept, name)[:, :width, :width]
        changed[name] = generator
    return flat.changed(concept, **changed)


MADE = {
    "gates-1": never,
    "gates-nearly-1": lambda concept: never(concept, 0.9999),
    "zero": zeroed,
    "tiny": lambda concept: zeroed(concept, 1e-4),
    "strength-0": lambda concept: flat.changed(concept, strength=0.0),
    "inverse": lambda concept: flat.changed(zeroed(concept, -1.0), slug="inverse"),
    "nearly-inverse": lambda concept: flat.changed(zeroed(concept, -0.9), slug="inverse"),
    "inside": inside,
    "inside-inverse": lambda concept: inside(concept, -1.0),
    "half": half,
    "twice-as-strong": lambda concept: flat.changed(concept, strength=2.0),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """star, each of MADE, `sub/star2` and a file that is none; beside it one that is outside."""
    folder = tmp_path_factory.mktemp("concepts") / "in"
    (folder / "sub").mkdir(parents=True)
    (concept,) = load_concepts(OLDER)
    for name, make in MADE.items():
        save_concepts(folder / f"{name}.safetensors", [make(concept)])
    for path in (folder / STAR, folder / "sub" / "star2.safetensors", folder.parent / "outside.safetensors"):
        path.write_bytes(OLDER.read_bytes())
    (folder / "bundled.safetensors").write_bytes(BUNDLED.read_bytes())
    (folder / "none.safetensors").write_bytes(b"a concept")
    return folder


def audit(tmp_path, prompt, *arguments):
    """Exit code and output of the real command."""
    (tmp_path / "a.json").write_text(json.dumps(prompt), encoding="utf-8")
    result = CliRunner().invoke(cli.app, ["audit", str(tmp_path / "a.json"), *map(str, arguments)])
    assert "Traceback" not in result.output
    return result.exit_code, result.output


def load(folder, name, pinned=True):
    return node("SafeRoPE_LoadConcept", concept=name, sha256=sha256(folder / name.replace("\\", "/")) if pinned else "")


def one(folder, name, **apply):
    return protected(**apply) | {"2": load(folder, name)}


def combined(folder, first, second, apart=False):
    inputs = {"concepts__concept0": ("7", 0), "concepts__concept1": ("2", 0), "orthogonalise": apart}
    return protected(concept=("8", 0)) | {
        "2": load(folder, second),
        "7": load(folder, first, pinned=False),
        "8": node("SafeRoPE_CombineConcepts", **inputs),
    }


def in_a_row(folder, first, second):
    return protected() | {
        "2": load(folder, first),
        "7": load(folder, second),
        "8": node("SafeRoPE_Apply", model=("3", 0), concept=("7", 0), strength=1.0),
        "4": node("KSampler", model=("8", 0), denoise=1.0),
    }


def test_the_bundled_star_turns_in_all_of_its_heads(tmp_path, folder):
    pin = sha256(BUNDLED)
    code, told = audit(tmp_path, one(folder, "bundled.safetensors"), "--concepts", folder, "--require-sha256", pin)
    assert code == 0 and "turns in 12 of 12 heads" in told and "was not looked at" not in told
    code, told = audit(tmp_path, one(folder, STAR), "--concepts", folder, "--json")
    (concept,) = json.loads(told)[0]["protections"][0]["concepts"]
    assert code == 0 and concept["turns_in_heads"] == [12, 12]


@pytest.mark.parametrize("name", ["gates-1", "gates-nearly-1", "zero", "tiny", "strength-0", "none"])
def test_a_file_that_turns_nothing_does_not_protect(tmp_path, folder, name):
    """Pinned, required, and bit for bit unprotected. Without the files, only what the workflow asks for is told."""
    name = f"{name}.safetensors"
    required = ("--require-sha256", sha256(folder / name))
    code, told = audit(tmp_path, one(folder, name), *required)
    assert code == 0 and "was not looked at, only the settings of the workflow" in told
    assert audit(tmp_path, one(folder, name), "--concepts", folder)[0] == 1
    assert audit(tmp_path, one(folder, name), *required, "--concepts", folder)[0] == 1


def test_a_file_that_turns_in_some_of_its_heads_is_not_full(tmp_path, folder):
    code, told = audit(tmp_path, one(folder, "half.safetensors"), "--concepts", folder)
    assert code == 3 and "turns in 6 of its 12 heads" in told


def test_the_strength_of_the_file_counts(tmp_path, folder):
    code, told = audit(tmp_path, one(folder, "twice-as-strong.safetensors"), "--concepts", folder)
    assert code == 3 and "has strength 2, expected 1" in told
    assert audit(tmp_path, one(folder, "twice-as-strong.safetensors", strength=0.5), "--concepts", folder)[0] == 0


@pytest.mark.parametrize(
    ("arrange", "inverse", "name"),
    [(combined, "inverse.safetensors", STAR), (in_a_row, "inside-inverse.safetensors", "inside.safetensors")],
)
def test_a_concept_and_its_inverse_turn_nothing(tmp_path, folder, arrange, inverse, name):
    prompt, other = arrange(folder, inverse, name), arrange(folder, "half.safetensors", name)
    assert audit(tmp_path, prompt, "--concepts", folder)[0] == 1
    assert audit(tmp_path, other, "--concepts", folder)[0] == 0
    required = ("--require-sha256", sha256(folder / name))
    code, told = audit(tmp_path, prompt, *required)
    assert code == 1 and "is not pinned to one of the required files" in told


def test_what_is_left_beside_another_concept_is_for_the_one_who_requires_it(tmp_path, folder):
    """Nearly the inverse leaves something that turns; under a required pin no other concept passes unless required
    too."""
    prompt, pin = combined(folder, "nearly-inverse.safetensors", STAR), sha256(OLDER)
    prompt["7"] = load(folder, "nearly-inverse.safetensors")
    assert audit(tmp_path, prompt, "--concepts", folder)[0] == 0
    assert audit(tmp_path, prompt, "--concepts", folder, "--require-sha256", pin)[0] == 1
    both = ("--require-sha256", pin, "--require-sha256", sha256(folder / "nearly-inverse.safetensors"))
    assert audit(tmp_path, prompt, "--concepts", folder, *both)[0] == 0


def test_concepts_that_an_older_version_took_apart_are_not_verified(tmp_path, folder):
    """The option left little of the later concept: of the bundled star or swirl, none of the protection."""
    code, told = audit(tmp_path, combined(folder, "bundled.safetensors", STAR, apart=True), "--concepts", folder)
    assert code == 1 and "takes concepts apart (orthogonalise)" in told
    assert audit(tmp_path, combined(folder, "bundled.safetensors", STAR), "--concepts", folder)[0] == 0, "control"


@pytest.mark.parametrize(
    ("apply", "code"),
    [
        ({"blocks": "s0-3"}, 3),
        ({"blocks": "s40"}, 1),
        ({"streams": "image"}, 3),
        ({"blocks": "d0", "streams": "image"}, 1),
    ],
)
def test_blocks_and_streams_are_tried(tmp_path, folder, apply, code):
    """In double blocks star turns text alone; without its file none of them is known to act."""
    assert audit(tmp_path, one(folder, STAR, **apply), "--concepts", folder)[0] == code
    assert audit(tmp_path, one(folder, STAR, **apply))[0] == 1


def test_files_must_be_there_and_fit_their_pins(tmp_path, folder):
    def code(name, pin):
        prompt = protected() | {"2": node("SafeRoPE_LoadConcept", concept=name, sha256=pin)}
        return audit(tmp_path, prompt, "--concepts", folder)[0]

    pin = sha256(OLDER)
    assert code(STAR, pin) == code(STAR, "") == code("sub/star2.safetensors", pin) == 0
    assert code(STAR, "ab" * 32) == code("gone.safetensors", "") == 1
    for outside in (
        "../outside.safetensors",
        "..\\outside.safetensors",
        str(folder.parent / "outside.safetensors"),
        "a\0b",
    ):
        assert code(outside, pin) == 1
    assert audit(tmp_path, protected(), "--concepts", folder / "gone")[0] == 2
    assert audit(tmp_path, protected(), "--require-sha256", "1234")[0] == 2


def test_names_of_windows_are_found_on_every_machine(tmp_path, folder):
    prompt = one(folder, "sub\\star2.safetensors")
    assert audit(tmp_path, prompt, "--concepts", folder)[0] == 0
    assert audit(tmp_path, one(folder, "sub/star2.safetensors"), "--concepts", folder)[0] == 0
    prompt["2"]["inputs"]["concept"] = "sub\\star3.safetensors"
    code, told = audit(tmp_path, prompt, "--concepts", folder)
    assert code == 1 and "there is no file of this name" in told


def test_every_concept_pinned(tmp_path, folder):
    """Any pin of a file will do, but each concept on the way needs one; exit codes as everywhere."""
    name, option = "bundled.safetensors", "--every-concept-pinned"
    assert audit(tmp_path, one(folder, name), option)[0] == 0
    assert audit(tmp_path, one(folder, name, end_percent=0.5), option)[0] == 3
    unpinned = one(folder, name) | {"2": load(folder, name, pinned=False)}
    code, told = audit(tmp_path, unpinned, option)
    assert code == 1 and f"concept '{name}' of node 2 is not pinned by a sha256" in told
    assert audit(tmp_path, unpinned)[0] == 0, "control"
    assert audit(tmp_path, unpinned, option, "--concepts", folder)[0] == 1, "a file at hand is not a pin"


def test_every_concept_of_several_must_be_pinned(tmp_path, folder):
    option, two = "--every-concept-pinned", ("bundled.safetensors", "nearly-inverse.safetensors")
    both = combined(folder, *two)
    assert audit(tmp_path, both, option)[0] == 1 and audit(tmp_path, both)[0] == 0
    assert audit(tmp_path, both | {"7": load(folder, two[0])}, option)[0] == 0
    row = in_a_row(folder, *two)
    assert audit(tmp_path, row, option)[0] == 0
    assert audit(tmp_path, row | {"7": load(folder, two[1], pinned=False)}, option)[0] == 1
    made = one(folder, two[0]) | {"2": node("SafeRoPE_CalibrateConcept", model=("1", 0))}
    assert audit(tmp_path, made)[0] == 0 and audit(tmp_path, made, option)[0] == 1, "without a file to pin"
