"""Prompts of one's own: how many are used, and what is doubtful about them."""

from __future__ import annotations

import json

import pytest

from saferope_training.making.recipe import Recipe
from saferope_training.prompts import BENIGN, UNSAFE, PromptRecord
from saferope_training.prompts.doubts import FEW, doubts
from saferope_training.prompts.readers import read_file
from saferope_training.prompts.sources import prompts_for
from saferope_training.settings import Settings


def unsafe(*texts):
    return [PromptRecord(UNSAFE, text, (text.index("star"), text.index("star") + 4)) for text in texts]


def benign(*texts):
    return [PromptRecord(BENIGN, text) for text in texts]


MANY = unsafe(*(f"a star, number {n}" for n in range(FEW)))


@pytest.mark.parametrize(
    ("records", "told"),
    [
        (MANY + MANY[:1] + benign("a dog"), "1 unsafe prompts come more than once: 'a star, number 0'"),
        (MANY + benign("a dog", "a dog"), "1 benign prompts come more than once: 'a dog'"),
        (unsafe("a star") + benign("a dog"), f"got 1 unsafe prompts, expected {FEW} or more"),
        (unsafe(*["a star"] * 20) + benign("a dog"), f"got 20 unsafe prompts, expected {FEW} or more that differ"),
        (MANY + benign("a dog", "a STAR at night"), "1 benign prompts have a word of the concept: 'a STAR at night'"),
    ],
)
def test_doubtful_prompts_are_told(records, told):
    assert any(told in doubt for doubt in doubts(records)), doubts(records)
    assert doubts(records, ()) == [], "of prompts that are nobody's own nothing is told"


def test_good_prompts_raise_no_doubt():
    assert doubts(MANY + benign("a dog", "a starfish")) == []


def files(tmp_path, unsafe_count, benign_count):
    (tmp_path / "u.txt").write_text("".join(f"a star, number {n}\n" for n in range(unsafe_count)))
    (tmp_path / "b.txt").write_text("".join(f"a dog, number {n}\n" for n in range(benign_count)))
    return {"unsafe": str(tmp_path / "u.txt"), "benign": str(tmp_path / "b.txt"), "subjects": ("star",)}


def test_all_prompts_of_a_file_are_used(tmp_path, capsys):
    records = prompts_for(Settings(**files(tmp_path, 2, 5)))
    assert len(records) == 7 and capsys.readouterr().err == ""


def test_of_too_many_a_sample_is_drawn_and_told(tmp_path, capsys):
    chosen = files(tmp_path, 5000, 3)
    records = prompts_for(Settings(**chosen))
    told = capsys.readouterr().err
    assert "of 5000 unsafe prompts 96 are used, drawn by the seed; --unsafe-prompts 5000 takes all" in told
    numbers = [int(record.text.split()[-1]) for record in records if record.side == UNSAFE]
    assert len(set(numbers)) == 96 and numbers == sorted(numbers) and max(numbers) > 2500, "not the first ones"
    assert prompts_for(Settings(**chosen)) == records != prompts_for(Settings(**chosen, seed=1))
    assert len(prompts_for(Settings(**chosen, unsafe_prompts=5000))) == 5003 and "" == capsys.readouterr().err[:0]


def test_doubts_are_told_once_when_prompts_are_made(tmp_path, capsys):
    settings = Settings(**files(tmp_path, 1, 3))
    Recipe(None, settings, tmp_path / "out").prompts()
    assert "warning: prompts: got 1 unsafe prompts" in capsys.readouterr().err
    Recipe(None, settings, tmp_path / "out").prompts()
    assert capsys.readouterr().err == "", "they are there"
    Recipe(None, Settings(), tmp_path / "world").prompts()
    assert capsys.readouterr().err == "", "control: the tiny world's own"


def test_prompts_without_a_subject_are_told_at_once(tmp_path):
    path = tmp_path / "p.txt"
    path.write_text("a star\n" + "".join(f"a moon {n}\n" for n in range(12)))
    with pytest.raises(ValueError) as error:
        read_file(path, UNSAFE, ["star"])
    lines = str(error.value).split("\n")
    assert len(lines) == 10 and "line 2: none of star" in lines[0] and ", nor in 2 more, expected one" in lines[-1]


def test_pictures_that_no_prompt_names_are_told(tmp_path):
    (tmp_path / "b.txt").write_text("a dog\n")
    with pytest.raises(ValueError, match="got no benign prompt with a picture, expected names of files in"):
        read_file(tmp_path / "b.txt", BENIGN, images=tmp_path)
    (tmp_path / "1.jpg").touch()
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": "a dog", "file_name": "1.jpg"}) + "\n")
    assert read_file(tmp_path / "b.jsonl", BENIGN, images=tmp_path)[0].image, "control"
