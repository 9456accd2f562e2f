"""Commands on concept files: inspect, merge, convert, card. Their words, their pictures, and what they refuse."""

from __future__ import annotations

import json
import pickle
import re
import shlex
import sys
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import pytest
import torch
from matplotlib.patches import Rectangle
from PIL import Image
from typer.testing import CliRunner

from saferope import cli
from saferope import concept_report as inspect
from saferope.convert import convert
from saferope_benchmark.evaluation import file_report
from saferope_benchmark.evaluation.file_report import Pair, Report
from saferope_core import Concept, Geometry, Protection, Roles, Stream, load_concepts, overlap, save_concepts, sha256
from saferope_training.plots import words
from tests.support import concepts as flat
from tinyworld.model import WEIGHTS

STAR = WEIGHTS.parent / "concepts" / "star.safetensors"
OLD_STAR = Path(__file__).parents[1] / "files" / "star-0.1.0.safetensors"


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
    assert "angles at risk 1 up to 3.14 rad" in told and "stands in circle" in told
    assert "stands in -" in run("inspect", OLD_STAR), "control: driven away"
    assert "head map" not in told and list(star.parent.iterdir()) == [star], "it writes nothing unless asked"
    assert "head map" in run("inspect", star, "--pictures", star.parent / "maps")
    assert set(star.parent.iterdir()) == {star.parent / "maps", star}
    with Image.open(star.parent / "maps" / "star.star.heads.png") as picture:
        assert picture.width > 300


def test_merge_packs_with_strengths_and_reports_overlap(star, tmp_path):
    (concept,) = load_concepts(star)
    generator = torch.Generator().manual_seed(0)
    other = {
        name: torch.linalg.qr(torch.randn(flat.field(concept, name).shape, generator=generator)).Q
        for name in ("basis_q", "basis_k", "basis_image_q", "basis_image_k")
    }
    save_concepts(tmp_path / "moon.safetensors", [flat.changed(concept, slug="moon", **other)])
    told = run("merge", f"{star}:0.5", tmp_path / "moon.safetensors", "--out", tmp_path / "both.safetensors")
    assert f"star / moon: {overlap(concept, flat.changed(concept, slug='moon', **other)).most:.3f}" in told
    both = load_concepts(tmp_path / "both.safetensors")
    assert [(each.slug, each.strength) for each in both] == [("star", 0.5), ("moon", 1.0)]
    run("merge", star, tmp_path / "moon.safetensors", "--half", "--out", tmp_path / "half.safetensors")
    assert (tmp_path / "half.safetensors").stat().st_size < 0.7 * (tmp_path / "both.safetensors").stat().st_size


def test_merge_refuses_the_same_concept_twice(star, tmp_path):
    assert "not unique" in run("merge", star, star, "--out", tmp_path / "x.safetensors", code=2)
    assert not (tmp_path / "x.safetensors").exists()


@pytest.mark.parametrize("strength", ["much", "nan"])
def test_bad_strengths_are_told(star, tmp_path, strength):
    run("merge", f"{star}:{strength}", "--out", tmp_path / "x.safetensors", code=2)


def report_of(star, **changes):
    """An evaluation of the file, as `saferope evaluate` leaves it beside it."""
    rows = [Pair("star shown, unsafe", 64, 1.0, 0.0, (0.94, 1.0), (0.0, 0.06), 1e-9)]
    report = Report("star", sha256(star), "tinyworld", 1.0, 9_000_000, rows, [("x", torch.zeros(1, 3, 8, 8))])
    file_report.write_reports(star.parent, [replace(report, **changes)], star)
    return star.with_name("star.evaluation.json")


def test_card_has_provenance_and_the_evaluation(star):
    report_of(star)
    run("card", star, "--license", "cc0-1.0")
    text = star.with_suffix(".md").read_text()
    for part in ("license: cc0-1.0", "sha256 `", "![Which heads tell Star apart](star.star.heads.png)"):
        assert part in text
    assert (star.parent / "star.evaluation.md").read_text().strip() in text and "star shown, unsafe" in text
    report_of(star, file_sha256="0" * 64)
    run("card", star, "--license", "apache-2.0")
    assert "Not evaluated as it is: `saferope evaluate star.safetensors`" in star.with_suffix(".md").read_text()


def test_the_command_of_a_card_runs(star, monkeypatch):
    run("card", star, "--license", "apache-2.0")
    (command,) = re.findall(r"`(saferope generate [^`]+)`", star.with_suffix(".md").read_text())
    monkeypatch.chdir(star.parent)
    run(*shlex.split(command.replace("MODEL", "tinyworld"))[1:], "--steps", "1")
    assert list((star.parent / "pairs").glob("*.png"))


@pytest.mark.parametrize("license", ["a\nb: c", "", "x" * 61])
def test_a_licence_writes_one_line(star, license):
    assert "expected an SPDX name" in run("card", star, "--license", license, code=2)
    assert list(star.parent.iterdir()) == [star]


@pytest.mark.parametrize("change", ["[]", "{}", '{"rows": [{}]}', '{"rows": 3}', "words of a secret", "text", "large"])
def test_what_is_no_report_is_not_told_in_a_card(star, change):
    path = report_of(star)
    text = path.read_text()
    numbers = {"text": '"<b>"', "large": "9" * 400}
    path.write_text(
        text.replace('"protected": 0.0', f'"protected": {numbers.get(change)}') if change in numbers else change
    )
    assert path.read_text() != text
    told = run("card", star, "--license", "apache-2.0", code=2)
    assert "star.evaluation.json" in told and "secret" not in told and not star.with_suffix(".md").exists()


def test_a_report_s_own_words_stay_words(star):
    rows = [Pair("x | <img src=y>\n# z", 1, 0.5, 0.5, unit="\x1b[2J")]
    report_of(star, rows=rows, model="[a](http://b)")
    run("card", star, "--license", "apache-2.0")
    text = star.with_suffix(".md").read_text()
    assert (
        "<img" not in text.replace("\\<img", "") and "\n# z" not in text and "\x1b" not in text and "[a](" not in text
    )


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


def test_what_was_not_measured_is_null_in_the_record(star, tmp_path):
    """It was 0."""
    (concept,) = load_concepts(OLD_STAR)
    still = flat.changed(concept, slug="still", generator_text=torch.zeros_like(concept.text.generator))
    save_concepts(tmp_path / "still.safetensors", [still])
    concepts = (
        "--concept",
        star,
        "--concept",
        tmp_path / "still.safetensors",
        "--concept",
        f"{renamed(star, 'off')}:0",
    )
    run("generate", "--prompt", "a red star", "--steps", 1, *concepts, "--out", tmp_path / "pictures")
    (record,) = json.loads((tmp_path / "pictures" / "pictures.json").read_text())
    risk = record["risk"]
    assert risk["off"] == {"text": None, "image": None} and risk["still"]["text"] is None
    assert risk["still"]["image"] is not None and risk["star"]["text"] > 0.8, "control"


@pytest.mark.parametrize("held", [True, False])
def test_generate_says_where_a_strength_is_held(star, tmp_path, held):
    """The star of 0.1.0 was made with more than half a turn: a strength of 1.5 is that of 1. Today's turns further."""
    made, more = (tmp_path / name for name in ("made", "more"))
    file = OLD_STAR if held else star
    arguments = ("generate", "--prompt", "a red star", "--steps", 2, "--concept")
    said = [run(*arguments, f"{file}:{strength}", "--out", out) for strength, out in ((1, made), (1.5, more))]
    assert "acts as" not in said[0] and ("concept 'star': strength 1.5 acts as 1." in said[1]) is held
    pictures = [(folder / "0000.protected.png").read_bytes() for folder in (made, more)]
    assert (pictures[0] == pictures[1]) is held


def test_generate_in_no_step_is_no_protection(star, tmp_path):
    arguments = ("generate", "--prompt", "a red star", "--steps", 4, "--concept", star, "--out", tmp_path)
    assert "none of the 4 steps starts from 0.8 to below 1: nothing" in run(*arguments, "--start", 0.8)
    run(*arguments, "--start", 1, "--end", 1)
    same = [Image.open(tmp_path / name).tobytes() for name in ("0000.png", "0000.protected.png")]
    assert same[0] == same[1]
    assert "none of" not in run(*arguments, "--end", 0.5)
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
    evil = {"torch": "\x1b]0;owned\x07 | <img src=x>"}
    (concept,) = load_concepts(star)
    save_concepts(
        star, [flat.changed(concept, name="[a](http://b)", description="x\n# y", training={"versions": evil})]
    )
    assert "\x1b" not in CliRunner().invoke(cli.app, ["inspect", str(star)]).output
    run("card", star, "--license", "apache-2.0")
    text = next(star.parent.glob("*.md")).read_text(encoding="utf-8")
    assert (
        "\x1b" not in text and "<img" not in text.replace("\\<img", "") and "](http" not in text.replace("\\](http", "")
    )
    assert "\n# y" not in text and "\\[a\\](http://b)" in text


NAMES = [
    r"Nudity $\bad$",
    r"$\frac{$",
    "$$",
    "[red]x[/red] [link=http://b]y[/link]",
    "![x](y) <b>",
    "\\",
    "a | b",
    "星" * 200,
]


def test_a_file_s_name_is_words_in_a_card(star):
    path = star.with_name("a](x) `b` <i>.safetensors")
    star.rename(path)
    run("card", path, "--license", "apache-2.0")
    text = path.with_suffix(".md").read_text(encoding="utf-8")
    assert "](a%5D%28x%29%20%60b%60%20%3Ci%3E.star.heads.png)" in text and "``a](x) `b` <i>" in text
    assert path.with_name(f"{path.stem}.star.heads.png").is_file()


@pytest.mark.parametrize("name", NAMES)
def test_any_name_is_drawn_and_told(star, name):
    (concept,) = load_concepts(star)
    save_concepts(star, [flat.changed(concept, name=name)])
    assert name.split()[0] in run("inspect", star, "--pictures", star.parent / "maps")
    assert len(list((star.parent / "maps").iterdir())) == 1


def test_a_formula_is_what_breaks_a_plot():
    """The control of the test above."""
    from matplotlib.figure import Figure

    figure = Figure()
    figure.suptitle(NAMES[0])
    with pytest.raises(ValueError, match="bad"):
        figure.savefig(BytesIO())
    figure.suptitle(words(NAMES[0]))
    figure.savefig(BytesIO())


def test_a_description_cannot_pass_for_the_sha256(star):
    (concept,) = load_concepts(star)
    lie = f"harmless\nsha256 {'0' * 64}, 1 KiB: star.safetensors" + "\n" * 15_000 + "end"
    save_concepts(star, [flat.changed(concept, description=lie)])
    lines = CliRunner().invoke(cli.app, ["inspect", str(star)]).output.splitlines()
    assert [line for line in lines if line.startswith("sha256")] == [lines[0]] and sha256(star) in lines[0]
    assert f"  | sha256 {'0' * 64}, 1 KiB: star.safetensors" in lines
    assert len(lines) < 50 and lines[-1] == "  | ... and 14982 lines more"


def large(heads: int):
    """A concept in 128 blocks of `heads` heads, all of them turned."""
    geometry = Geometry(64, 64, heads, 2)
    rows = torch.cartesian_prod(torch.arange(2), torch.arange(64), torch.arange(heads)).int()
    still, basis = torch.zeros(len(rows), 2, 2), torch.eye(2).expand(len(rows), 2, 2)
    text = Stream(still, Roles(basis, basis), acts_on="qk")
    return Concept("large", "Large", "", geometry, rows, text, None, torch.rand(128, heads))


def steps(work) -> int:
    """Calls of functions while it works: what it costs, on any machine."""
    count = 0

    def note(_frame, event, _argument):
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(note)
    try:
        work()
    finally:
        sys.setprofile(None)
    return count


def test_the_largest_geometry_costs_little_and_draws_a_picture_of_bounded_size(tmp_path):
    """A patch for each head took 42 s and 2 GB for a file of half a megabyte. Counted, not timed."""
    path, concepts = tmp_path / "large.safetensors", {heads: large(heads) for heads in (6, 96)}
    inspect.draw(path, [concepts[6]], tmp_path)  # imports
    few, many = (steps(lambda c=concept: inspect.draw(path, [c], tmp_path)) for concept in concepts.values())
    assert many - few < 3 * 96 * 128, "calls for each head"
    with Image.open(tmp_path / "large.large.heads.png") as picture:
        assert picture.width < 1500 and picture.height < 1200
    assert steps(lambda: [Rectangle((n, 0), 1, 1) for n in range(96 * 128)]) > 3 * 96 * 128, "control: patches alone"


def test_merge_refuses_too_many_before_it_compares_them(star, tmp_path, monkeypatch):
    monkeypatch.setattr("saferope_core.overlap", lambda *_: 1 / 0)
    run_65 = run("merge", *[star] * 65, "--out", tmp_path / "x.safetensors", code=2)
    assert "got 65 concepts, expected 1 to 64" in run_65
    with pytest.raises(AssertionError):  # control: of few, the pairs are compared
        run("merge", star, renamed(star, "moon"), "--out", tmp_path / "x.safetensors")


def renamed(star, slug):
    (concept,) = load_concepts(star)
    path = star.with_name(f"{slug}.safetensors")
    save_concepts(path, [flat.changed(concept, slug=slug)])
    return path
