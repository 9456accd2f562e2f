"""Checks for plain words: in pages by proselint and rules of our own, in docstrings, comments and messages of the code
by these rules.

    python -m dev.words           # prints file, line, rule and words; exits 1 where there are any
    python -m dev.words nodes     # of the Python files below `nodes` alone

Our rules: a clause names its thing (no `what took it up`, `those that`, `nobody`), a sentence is short, colons and
semicolons are few, and one thing has one word. Code, tables, headings and links are not prose.
"""

from __future__ import annotations

import ast
import inspect
import io
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from .comfyui import ROOT

PAGES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/*.md", "web/docs/*.md")
CODE = (
    "nodes saferope_core saferope_training saferope_benchmark saferope_credentials workflow_lint saferope tinyworld dev"
)
MESSAGE = 5  # words at most of a name, a label or a key; longer strings are read by people
LONGEST = 32  # words of a sentence; readers lose a longer one (plain-language guides say 20 to 25 on average)
MARKS = 14  # colons and semicolons for 1,000 words; the READMEs of flux and peft have 1 to 10
LEAST = 150  # words of a page whose marks are counted: in fewer, one list is many
# Words without a noun in the place of a thing. "what" and "that" after a noun are fine.
HEADLESS = re.compile(
    r"\b(?:those (?:that|who|which|of)|whoever|whatever|whichever|nobody|anybody|everybody|somebody|no one"
    r"|what (?:is|was|are|were|it|they|a|an|the|one|comes?|came|took|has|have|can|people|others?))\b",
    re.IGNORECASE,
)
# The field's word <- words in its place
FIELD = {
    "resume": r"\b(?:go|goes|going|gone|went) on (?:from|with|to the same)\b",
    "baseline": r"\b(?:rival|contender)s?\b(?! here)",
    "held-out": r"\bheld out words\b|\bunseen words\b",
    "threshold or gate": r"\bcut-?off\b",
    "query and key": r"\bq-?vectors?\b|\bk-?vectors?\b",
}
# Checks of proselint that are left out: quotes, dashes and times signs (pages are plain text), repeated words (cells of
# tables), spelling (names of the tiny world), times of day (a sampler's name), "very" (it is a word)
LEFT_OUT = ("typography", "lexical_illusions", "spelling", "dates_times", "weasel_words.very")


class Finding(NamedTuple):
    page: str
    line: int
    rule: str
    words: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}: {self.rule}: {self.words}"


def prose(text: str) -> str:
    """The page with blanks in the place of code, tables, headings, links' targets and list labels; lines stay lines."""

    def blank(match: re.Match[str]) -> str:
        return re.sub(r"[^\n]", " ", match[0])

    text = re.sub(r"```.*?```", blank, text, flags=re.DOTALL)
    text = re.sub(r"^(?:    .*|\s*\|.*|#.*|<.*|!\[.*)$", blank, text, flags=re.MULTILINE)
    text = re.sub(r"`[^`\n]*`", "X", text)
    text = re.sub(r"\]\([^)]*\)", "", text)
    return re.sub(r"^\s*(?:[-*]|\d+\.)\s+(?:\*[^\n:]*\*:?\*?:|[^\n:.]{1,60}:)(?= )", blank, text, flags=re.MULTILINE)


def spoken(source: str) -> Iterator[tuple[int, str]]:
    """(line, text) of each docstring, comment and message of a Python file.

    Lines with nothing but a comment are one text where they follow each other. A comment behind code is its own text.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and len(node.value.split()) > MESSAGE:
            yield node.lineno, inspect.cleandoc(node.value).rstrip() + "\n"
    last, begun, said = -1, 0, ""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            behind_code = not token.line.lstrip().startswith("#")
            if behind_code or token.start[0] != last + 1:
                yield begun, said
                begun, said = token.start[0], ""
            last, said = -1 if behind_code else token.start[0], f"{said}{token.string.lstrip('# ')}\n"
    yield begun, said


def findings(page: str, text: str) -> Iterator[Finding]:
    """Everything that our rules find in a page."""
    own = prose(text)
    yield from plain(page, own)
    words = len(re.findall(r"[A-Za-z]+", own))
    marks = len(re.findall(r"[;:](?=\s)", own))
    if words >= LEAST and marks * 1000 > MARKS * words:
        yield Finding(page, 1, "colons and semicolons", f"{marks * 1000 / words:.0f} for 1,000 words, at most {MARKS}")


def plain(page: str, own: str) -> Iterator[Finding]:
    """Findings of the rules that hold for prose of any length."""
    for match in HEADLESS.finditer(own):
        yield Finding(page, _line(own, match.start()), "name the thing", match[0].strip())
    for word, other in FIELD.items():
        for match in re.finditer(other, own, re.IGNORECASE):
            yield Finding(page, _line(own, match.start()), f"say {word}", match[0])
    for start, sentence in _sentences(own):
        if (count := len(sentence.split())) > LONGEST:
            yield Finding(page, _line(own, start), f"{count} words, at most {LONGEST}", " ".join(sentence.split()[:8]))


def findings_in_code(below: list[str]) -> Iterator[Finding]:
    """Everything that our rules find in the Python files of these folders."""
    for file in sorted(file for folder in below for file in (ROOT / folder).rglob("*.py")):
        for line, text in spoken(file.read_text("utf-8")):
            for each in plain(file.relative_to(ROOT).as_posix(), prose(text)):
                yield each._replace(line=line + each.line - 1)


def _sentences(text: str) -> Iterator[tuple[int, str]]:
    """Sentences and where they begin: they end at a full stop, a colon, a blank line, or where a list goes on."""
    start = 0
    for match in re.finditer(r"[.!?:](?=\s)|\n\s*\n|\n(?=\s*(?:[-*]|\d+\.)\s)", text):
        yield start, text[start : match.end()]
        start = match.end()
    yield start, text[start:]


def _line(text: str, place: int) -> int:
    return text.count("\n", 0, place + len(text[place:]) - len(text[place:].lstrip())) + 1


def proselint(pages: list[Path]) -> list[str]:
    """The lines `path:line:column: check: message` of proselint, without the checks that are left out."""
    command = [str(Path(sys.executable).with_name("proselint")), "-o", "compact", "check", *map(str, pages)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    found = re.findall(r"^(.+?:\d+:\d+: )([\w.]+)(: .*)$", done.stdout, re.MULTILINE)
    return ["".join(each).replace(f"{ROOT}/", "") for each in found if not each[1].startswith(LEFT_OUT)]


def main() -> None:
    below = sys.argv[1:]
    pages = [] if below else sorted(page for pattern in PAGES for page in ROOT.glob(pattern))
    told = [
        str(each) for page in pages for each in findings(page.relative_to(ROOT).as_posix(), page.read_text("utf-8"))
    ]
    told += proselint(pages) if pages else []
    told += map(str, findings_in_code(below or CODE.split()))
    print("\n".join(told) or f"{len(pages)} pages and the code in plain words")
    raise SystemExit(bool(told))


if __name__ == "__main__":
    main()
