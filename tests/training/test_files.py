"""Commands on concept files: inspect, merge, convert, card. Their words, their pictures, and what they refuse."""

from __future__ import annotations

import json
import pickle

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from saferope_core import Geometry, Protection, load_concepts, overlap
from tinyworld.model import WEIGHTS
from training import cli
from training.convert import convert

STAR = WEIGHTS.parent / "concepts" / "star.safetensors"


def run(*arguments, code=0):
    result = CliRunner().invoke(cli.app, [str(each) for each in arguments])
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    return " ".join(result.output.split())


@pytest.fixture
def star(tmp_path):
    path = tmp_path / "star.safetensors"
    path.write_bytes(STAR.read_bytes())
    return path


def test_inspect_tells_and_draws(star):
    told = run("inspect", star)
    assert "star (Star)" in told and "flux: 2 double + 4 single blocks x 2 heads x 128" in told and "sha256" in told
    with Image.open(star.with_suffix(".star.heads.png")) as picture:
        assert picture.width > 300
    assert "head map" not in run("inspect", star, "--no-draw")


def test_merge_packs_with_strengths_and_reports_overlap(star, tmp_path):
    from dataclasses import replace

    from saferope_core import save_concepts

    (concept,) = load_concepts(star)
    generator = torch.Generator().manual_seed(0)
    other = {
        name: torch.linalg.qr(torch.randn(getattr(concept, name).shape, generator=generator)).Q
        for name in ("basis_q", "basis_k", "basis_image_q", "basis_image_k")
    }
    save_concepts(tmp_path / "moon.safetensors", [replace(concept, slug="moon", **other)])
    told = run("merge", f"{star}:0.5", tmp_path / "moon.safetensors", "--out", tmp_path / "both.safetensors")
    assert f"star / moon: {overlap(concept, replace(concept, slug='moon', **other)).mean:.3f}" in told
    both = load_concepts(tmp_path / "both.safetensors")
    assert [(each.slug, each.strength) for each in both] == [("star", 0.5), ("moon", 1.0)]
    arguments = ("merge", star, tmp_path / "moon.safetensors", "--orthogonalise", "--half")
    run(*arguments, "--out", tmp_path / "free.safetensors")
    free = load_concepts(tmp_path / "free.safetensors")
    assert overlap(*free).mean < 1e-5 < overlap(*both).mean
    assert (tmp_path / "free.safetensors").stat().st_size < 0.7 * (tmp_path / "both.safetensors").stat().st_size


def test_merge_refuses_the_same_concept_twice(star, tmp_path):
    assert "not unique" in run("merge", star, star, "--out", tmp_path / "x.safetensors", code=2)
    assert not (tmp_path / "x.safetensors").exists()


@pytest.mark.parametrize("strength", ["much", "nan"])
def test_bad_strengths_are_told(star, tmp_path, strength):
    run("merge", f"{star}:{strength}", "--out", tmp_path / "x.safetensors", code=2)


def test_card_has_provenance_and_the_evaluation(star):
    (star.parent / "star.evaluation.md").write_text("| star shown | 0.0 % |\n")
    run("card", star, "--license", "cc0-1.0")
    text = star.with_suffix(".md").read_text()
    for part in ("license: cc0-1.0", "sha256 `", "![Which heads tell Star apart](star.star.heads.png)", "star shown"):
        assert part in text
    (star.parent / "star.evaluation.md").unlink()
    run("card", star)
    assert "Not evaluated" in star.with_suffix(".md").read_text()


def official(rank=5, double=2, single=3, heads=2, width=16):
    """A state dict as the authors' class makes one, one head left out; generators no longer skew, as after training."""
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape):
        return torch.randn(*shape, generator=generator)

    state = {f"S_param_Double.{i}": drawn(heads, rank, rank) for i in range(double)}
    state |= {f"S_param_Single.{i}": drawn(2, heads, rank, rank) for i in range(single)}
    for name, blocks in (("D", double), ("S", single)):
        for role in ("key", "query"):
            basis = torch.linalg.qr(drawn(blocks, heads, width, rank)).Q
            basis[1, 0] = 0
            state[f"_U_{role}_cache_{name}"] = basis
    return {name: value.half() for name, value in state.items()}


@pytest.fixture
def adapter(tmp_path):
    path = tmp_path / "adapter.pth"
    torch.save(official(), path)
    return path


def test_converted_adapter_turns_as_it_was_meant_to(adapter, tmp_path):
    """Against their formula: q + U exp(r S)^T U^T q - U U^T q on row vectors, r above 0.7, S made skew."""
    run("convert", adapter, "--out", tmp_path / "nude.safetensors", "--slug", "nude")
    (concept,) = load_concepts(tmp_path / "nude.safetensors")
    assert concept.geometry == Geometry(2, 3, 2, 16) and len(concept.heads) == 8
    state = {name: value.float() for name, value in official().items()}
    u = torch.linalg.qr(state["_U_query_cache_S"][2, 1]).Q
    u = u * (u * state["_U_query_cache_S"][2, 1]).sum(0).sign()
    generator = torch.Generator().manual_seed(1)
    inside = torch.randn(5, generator=generator)
    row = inside @ u.T + 0.1 * torch.randn(16, generator=generator)
    risk = ((row @ u).square().sum() / row.square().sum()).item()
    assert risk > 0.7
    for number, spans in ((1, ((0, 1), (1, 1))), (0, ((0, 0), (0, 1)))):
        s = state["S_param_Single.2"][number, 1]
        expected = row + (row @ u) @ torch.matrix_exp(risk * (s - s.T) / 2) @ u.T - (row @ u) @ u.T
        x = torch.zeros(1, 2, 1, 16)
        x[0, 1, 0] = row
        turned = Protection([concept], concept.geometry).rotate(x, "q", "single", 2, *spans)
        torch.testing.assert_close(turned[0, 1, 0], expected, atol=5e-3, rtol=5e-3)
        assert (turned[0, 1, 0] - row).norm() > 0.1


class Harm:
    def __reduce__(self):
        return (eval, ("1/0",))


@pytest.mark.parametrize(
    "content, told",
    [
        (b"no pickle", "not a state dict of tensors"),
        (pickle.dumps(Harm()), "not a state dict of tensors"),
        ({"a": torch.zeros(1)}, "expected S_param_Double.0"),
        ({"a": [1]}, "expected a dict of tensors"),
        ({**official(), "S_param_Double.7": torch.zeros(1)}, "expected S_param_Double.0"),
        ({k: v for k, v in official().items() if "key" not in k}, "_U_key_cache_D"),
        ({**official(), "_U_key_cache_D": torch.zeros(1, 2, 16, 5)}, "bases of"),
    ],
)
def test_what_is_no_adapter_is_refused(tmp_path, content, told):
    path = tmp_path / "x.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(ValueError, match=told):
        convert(path, "x")
    run("convert", path, "--out", tmp_path / "x.safetensors", "--slug", "x", code=2)
    assert not (tmp_path / "x.safetensors").exists()


def test_generate_leaves_pairs_and_a_record(star, tmp_path):
    out = tmp_path / "pictures"
    prompts = ("--prompt", "a red star in the center on a white background", "--prompt", "a blue circle")
    run("generate", *prompts, "--seed", 3, "--steps", 4, "--concept", star, "--out", out)
    record = json.loads((out / "pictures.json").read_text())
    assert [(each["prompt"][:6], each["seed"]) for each in record] == [("a red ", 3), ("a blue", 3)]
    star_risk, circle_risk = (each["risk"]["star"] for each in record)
    assert star_risk["text"] > 0.8 and circle_risk["text"] == 0
    pixels = [Image.open(out / name).tobytes() for each in record for name in each["files"]]
    assert pixels[0] != pixels[1]
    assert (pixels[2] == pixels[3]) == (circle_risk["image"] == 0), "what was not at risk stays, bit for bit"
    assert (out / "pairs.png").is_file()


def test_generate_in_no_step_is_no_protection(star, tmp_path):
    arguments = ("generate", "--prompt", "a red star", "--steps", 4, "--concept", star, "--out", tmp_path)
    run(*arguments, "--start", 1, "--end", 1)
    same = [Image.open(tmp_path / name).tobytes() for name in ("0000.png", "0000.protected.png")]
    assert same[0] == same[1]
    run(*arguments, "--end", 0.5)
    assert Image.open(tmp_path / "0000.protected.png").tobytes() != same[0], "negative control"


@pytest.mark.parametrize(
    "arguments, told",
    [
        ([], "got none, expected --prompt"),
        (["--prompt", "x", "--start", "0.9", "--end", "0.1"], "expected 0 <= start <= end <= 1"),
        (["--prompt", "x", "--concept", "none.safetensors"], "none.safetensors"),
        (["--prompts", "none.txt"], "none.txt"),
    ],
)
def test_generate_tells_mistakes(tmp_path, arguments, told):
    assert told in run("generate", "--out", tmp_path / "out", *arguments, code=2)
    assert not (tmp_path / "out").exists()


def test_a_file_s_own_words_stay_words(star):
    """They come from strangers: no terminal obeys them, and a card shows them as they are."""
    from dataclasses import replace

    from saferope_core import save_concepts

    evil = {"torch": "\x1b]0;owned\x07 | <img src=x>"}
    (concept,) = load_concepts(star)
    save_concepts(star, [replace(concept, name="[a](http://b)", description="x\n# y", training={"versions": evil})])
    assert "\x1b" not in CliRunner().invoke(cli.app, ["inspect", str(star), "--no-draw"]).output
    run("card", star)
    text = next(star.parent.glob("*.md")).read_text(encoding="utf-8")
    assert (
        "\x1b" not in text and "<img" not in text.replace("\\<img", "") and "](http" not in text.replace("\\](http", "")
    )
    assert "\n# y" not in text and "\\[a\\](http://b)" in text
