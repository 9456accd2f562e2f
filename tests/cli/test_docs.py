"""Commands in the docs are commands that there are, with options that there are."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer

from saferope import cli

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/*.md")])
LAUNCHED = r"^ {4}(?:accelerate launch -m saferope|(?:\S+/)?saferope) (.+)$"


def commands(text):
    """Indented lines that call saferope, continued lines joined, what follows a # or a pipe left out."""
    joined = re.sub(r" *\\\n +", " ", text)
    for line in re.findall(LAUNCHED, joined, re.MULTILINE):
        yield shlex.split(re.split(r"\s(?:#|\||&&|>)", line)[0])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_of_the_docs_can_be_called(page):
    for words in commands(page.read_text(encoding="utf-8")):
        accepts(words)


def accepts(words):
    """Raises for an unknown command, option or value; runs nothing."""
    group = typer.main.get_command(cli.app)
    command = group.get_command(None, words[0])
    assert command is not None, f"saferope {words[0]}: no such command"
    command.make_context(words[0], words[1:])


def test_wrong_commands_would_be_noticed():
    text = "Do:\n\n    saferope evaluate --suite tinyworld \\\n        --out here  # a comment\n"
    (words,) = commands(text)
    assert words == ["evaluate", "--suite", "tinyworld", "--out", "here"]
    accepts(words)
    for wrong in (["evaluat"], ["evaluate", "--sweet", "tinyworld"], ["train", "star", "--steps", "many"]):
        with pytest.raises(Exception, match=r"no such command|No such option|valid int"):
            accepts(wrong)
    assert sum(len(list(commands(page.read_text(encoding="utf-8")))) for page in PAGES) > 20
