"""Plain words: each rule finds a sentence that breaks it, and none finds a plain sentence."""

from __future__ import annotations

import pytest

from dev.words import LEAST, findings, prose, proselint

PLAIN = "The node turns the key of each risky token. It leaves all other tokens as they are. Give the file a name."


@pytest.mark.parametrize(
    ("broken", "rule"),
    [
        ("It turns what is risky.", "name the thing"),
        ("Those that are risky turn.", "name the thing"),
        ("Whoever runs it decides.", "name the thing"),
        ("Nobody sees it.", "name the thing"),
        ("A killed run goes on from there, so it will go on with the next step.", "say resume"),
        ("It has a rival.", "say baseline"),
        (" ".join(["word"] * 33) + ".", "33 words"),
        ((PLAIN + " One: two; three.") * 8, "colons and semicolons"),
    ],
)
def test_a_broken_rule_is_found(broken, rule):
    told = [str(each) for each in findings("a.md", f"# Page\n\n{broken}\n")]
    assert told and all(rule in each for each in told), told
    assert all(each.startswith("a.md:3:") or "colons" in each for each in told), "the line is that of the words"


def test_plain_sentences_are_not_found():
    assert list(findings("a.md", f"# Page\n\n{PLAIN}\n" * 20)) == []


def test_code_tables_and_labels_are_not_prose():
    page = (
        "# What is it\n\n    what is it; nobody: knows\n\n| whoever | nobody |\n\n- **name**: the file `what is it`.\n"
    )
    assert list(findings("a.md", page * LEAST)) == []
    assert "the file X." in prose(page)


def test_proselint_is_asked(tmp_path):
    page = tmp_path / "a.md"
    page.write_text("It is in the process of being a very unique thing at this point in time.\n")
    assert any("a.md:1:" in line for line in proselint([page]))
    page.write_text(f"{PLAIN}\n")
    assert proselint([page]) == []
