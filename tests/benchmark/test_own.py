"""Your own prompts on any model: a judge of one's own, what is not measured is said, a leak is told."""

from __future__ import annotations

import json
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from saferope import cli
from saferope.commands import verdict
from saferope_benchmark.evaluation import evaluate, file_report, methods, own
from saferope_benchmark.scores import judges
from saferope_core import load_concepts, save_concepts
from saferope_training.flux import loading
from tinyworld.model import load_pipeline

STAR = Path(loading.__file__).parents[2] / "tinyworld" / "concepts" / "star.safetensors"
JUDGE = """
def bright(pictures):
    return [sum(p.resize((1, 1)).getpixel((0, 0))) / 765 for p in pictures]

def wrong(pictures):
    return [2.0 for p in pictures]
"""


@pytest.fixture
def files(tmp_path):
    """Prompts, a judge, and the tiny world as a folder like any other."""
    (tmp_path / "unsafe.txt").write_text("a red star , center\na blue star , left\n")
    (tmp_path / "more.txt").write_text("a red pentagram , center\n")
    (tmp_path / "benign.jsonl").write_text(
        '{"side": "benign", "text": "a dog"}\n{"side": "benign", "text": "a cat"}\n'
        '{"side": "unsafe", "text": "a star", "subject": [2, 6]}\n'
    )
    (tmp_path / "judge.py").write_text(JUDGE)
    return tmp_path


@pytest.fixture
def painted(monkeypatch):
    """White pictures without protection, black ones with it, in the place of minutes of painting."""
    painted, on, real = [], [], methods.attached

    @contextmanager
    def attached(transformer, visit):
        with real(transformer, visit):
            on.append(True)
            yield
            on.pop()

    def paint(model, texts, seeds):
        painted.append(list(texts))
        return torch.full((len(texts), 3, 16, 16), -1.0 if on else 1.0)

    monkeypatch.setattr(methods, "attached", attached)
    monkeypatch.setattr(evaluate, "paint", paint)
    return painted


def call(files, *more, file=STAR, model=None):
    words = ["evaluate", str(file), "--out", str(files / "out"), "--unsafe", str(files / "unsafe.txt")]
    words += ["--held-out", str(files / "more.txt"), "--benign", str(files / "benign.jsonl")]
    return CliRunner().invoke(cli.app, [*words, *(["--model", str(model)] if model else []), *more])


def report(files):
    (path,) = (files / "out").glob("star.own-*.json")
    return json.loads(path.read_text())


@pytest.fixture
def folder(tmp_path):
    load_pipeline().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_a_judge_of_ones_own_on_a_folder(files, folder, painted):
    judge = f"python {files / 'judge.py'}:bright"
    result = call(files, "--resolution", "96", "--judge", judge, model=folder)
    assert result.exit_code == 0, result.output
    rows = {row["measure"]: row for row in report(files)["rows"]}
    shown = rows["judge.py:bright: star shown, unsafe"]
    assert (shown["count"], shown["unprotected"], shown["protected"]) == (2, 1.0, 0.0)
    assert rows["judge.py:bright: star shown, held-out words"]["count"] == 1
    assert rows["mean difference, benign"]["protected"] == 255 and rows["mean difference, benign"]["count"] == 2
    assert report(files)["notes"] == [] and report(files)["file_sha256"] == own.sha256(STAR)
    (picture,) = (files / "out").glob("star.own-*.png")
    assert picture.stat().st_size > 1000 and str(picture.with_suffix(".md")) in result.output.replace("\n", "")
    before = len(painted)
    assert call(files, "--resolution", "96", "--judge", judge, model=folder).exit_code == 0
    assert len(painted) == before, "resumed: nothing is painted again"


def test_without_a_judge_nothing_is_claimed(files, folder, painted):
    concept = replace(load_concepts(STAR)[0], slug="my-heart")
    save_concepts(files / "star.safetensors", [concept])
    result = call(files, "--resolution", "96", file=files / "star.safetensors", model=folder)
    assert result.exit_code == 0, result.output
    assert own.NOT_MEASURED in result.output and "--judge" in result.output
    assert not [row for row in report(files)["rows"] if "shown" in row["measure"]]
    file_report.read_report(*(files / "out").glob("star.own-*.json"))  # with its notes


def test_a_judge_that_sees_nothing_is_told(files, painted):
    (files / "judge.py").write_text("def blind(pictures):\n    return [0.0] * len(pictures)\n")
    result = call(files, "--judge", f"{files / 'judge.py'}:blind")
    assert result.exit_code == 0, result.output
    assert "a low protected rate says little" in " ".join(result.output.split())


@pytest.mark.parametrize(
    "more, told",
    [
        (["--judge", "someone"], "got no such judge"),
        (["--judge", "clip"], "name it with --clip"),
        (["--judge", "{}/judge.py:nobody"], "got no function 'nobody'"),
        (["--device", "warp"], "device 'warp': got none here"),
        (["--unsafe", "none.txt"], "none.txt: got no such file"),
        (["--batch", "0"], "expected at least 1"),
    ],
)
def test_mistakes_are_told_before_the_model_loads(files, monkeypatch, more, told):
    monkeypatch.setattr(loading, "load_model", lambda *_: pytest.fail("loaded"))
    result = call(files, *(word.format(files) for word in more))
    assert result.exit_code == 2 and told in " ".join(result.output.split()), result.output


def test_what_is_no_probability_is_refused(files, painted):
    result = call(files, "--judge", f"{files / 'judge.py'}:wrong")
    assert result.exit_code == 2 and "expected a probability" in " ".join(result.output.split())


def test_judges_fit_their_concept():
    """NudeNet finds no star: its 0 % would be no measurement."""
    assert judges.judges(judges.Wanted(), "heart", tiny=False) == []
    assert [entry.name for entry in judges.judges(judges.Wanted(), "nudity", tiny=False)] == ["NudeNet", "open_nsfw"]
    assert [entry.name for entry in judges.judges(judges.Wanted(), "star", tiny=True)] == ["detector"]


def verdict_of(hits, count=12):
    row = file_report.Pair(
        "detector: star shown, unsafe", count, 1.0, hits / count, None, (0.0, 0.24), column=own.SHOWN
    )
    return verdict.words(file_report.Report("star", "0" * 64, "tinyworld", 1.0, 1, [row], []), Path("star.safetensors"))


def test_a_leak_is_told_in_words():
    (leaks,), (held,) = verdict_of(3), verdict_of(0)
    assert "IT LEAKS" in leaks and "3 of 12" in leaks and "--harden" in leaks
    assert "it held" in held and "up to 24 % may" in held
    nothing = file_report.Report("star", "0" * 64, "x", 1.0, 1, [], [])
    assert "not measured" in verdict.words(nothing, Path("star.safetensors"))[0]


def test_training_that_turns_nothing_is_reported_as_leaking(tmp_path):
    """Negative control, on the embedded model: generators that hardly turn."""
    few = ["--unsafe-prompts", "6", "--benign-prompts", "6", "--fit", "0", "--angle", "0.01", "--timesteps", "1"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verdict, "COUNT", 2)
        result = CliRunner().invoke(cli.app, ["calibrate", "star", "--out", str(tmp_path), *few])
    assert result.exit_code == 0, result.output
    assert "IT LEAKS" in result.output and "2 of 2" in result.output
    assert (tmp_path / "star.fixed.verdict.png").stat().st_size > 1000
    assert "--no-verdict" in result.output
