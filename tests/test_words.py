"""Plain words: each rule finds a sentence that breaks it, and none finds a plain sentence."""

from __future__ import annotations

import pytest

from dev.words import LEAST, LONGEST, MESSAGE, findings, findings_in_code, prose, proselint

# A place for a text in code, and the line of the text
PLACES = {
    "docstring": ('def turn():\n    """Turns keys.\n\n    {}\n    """\n', 4),
    "comment": ("x = 1\n\n# Turn keys.\n# {}\ny = 2\n", 4),
    "comment behind code": ("x = 1  # keys\ny = 2  # {}\nz = 3  # keys\n", 2),
    "message": ('raise ValueError(\n    "{}"\n)\n', 2),
    "message with values": ('raise ValueError(\n    f"{{1}}: {} {{2}}"\n)\n', 2),
}
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


def _found(monkeypatch, tmp_path, source: str) -> list[str]:
    (tmp_path / "room").mkdir(exist_ok=True)
    (tmp_path / "room" / "a.py").write_text(source)
    monkeypatch.setattr("dev.words.ROOT", tmp_path)
    return [str(each) for each in findings_in_code(["room"])]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(
    ("broken", "rule"),
    [
        ("The node turns what is risky.", "name the thing: what is"),
        ("Those that are risky turn now.", "name the thing: Those that"),
        ("A killed run goes on from there.", "say resume: goes on from"),
        ("It has a rival in speed.", "say baseline: rival"),
        (" ".join(["word"] * (LONGEST + 1)) + ".", f"{LONGEST + 1} words, at most {LONGEST}: "),
    ],
)
def test_a_broken_rule_is_found_in_code(place, broken, rule, monkeypatch, tmp_path):
    frame, line = PLACES[place]
    (told,) = _found(monkeypatch, tmp_path, frame.format(broken))
    assert told.startswith(f"room/a.py:{line}: {rule}"), told
    assert _found(monkeypatch, tmp_path, frame.format(PLAIN)) == [], "negative control"


def test_code_and_short_strings_are_not_prose(monkeypatch, tmp_path):
    code = 'nobody = those_of(whatever)\npattern = r"nobody|those (?:of|that)"\nlabel = "what is it"\n# `what is`\n'
    assert _found(monkeypatch, tmp_path, code) == []
    name = " ".join(["what is", *["it"] * (MESSAGE - 2)])
    assert _found(monkeypatch, tmp_path, f'{{"{name}": 1}}\n') == []
    assert len(_found(monkeypatch, tmp_path, f'{{"{name} it": 1}}\n')) == 1, "negative control: a word more"


def test_comments_behind_code_are_texts_of_their_own(monkeypatch, tmp_path):
    half = " ".join(["word"] * (LONGEST - 1))
    assert _found(monkeypatch, tmp_path, f"x = 1  # {half}\ny = 2  # {half}\n# {half}\nz = 3  # {half}\n") == []
    assert len(_found(monkeypatch, tmp_path, f"# {half}\n# {half}\n")) == 1, "negative control: one text"
