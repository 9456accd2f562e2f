"""docs/concept-file.md: its example is a concept file, and its tables name what the reader takes."""

from __future__ import annotations

import re

import pytest

from dev.comfyui import ROOT
from saferope_core import ConceptFileError, load_concepts
from saferope_core.concept import concept_file

PAGE = (ROOT / "docs" / "concept-file.md").read_text(encoding="utf-8")
(CODE,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


def written(tmp_path, monkeypatch, code):
    monkeypatch.chdir(tmp_path)
    exec(code, {})  # noqa: S102  (our own page)
    return tmp_path / "moon.safetensors"


def test_the_example_is_a_concept_file(tmp_path, monkeypatch):
    (concept,) = load_concepts(written(tmp_path, monkeypatch, CODE))
    assert (concept.slug, concept.rank, concept.text.acts_on, concept.reach) == ("moon", 4, "k", 0)
    assert concept.moving("text").all() and not concept.moving("image").any()


@pytest.mark.parametrize(
    ("good", "bad"),
    [('"rank": 4', '"rank": 5'), ("half - half.mT", "half"), ("torch.zeros(1 + 3, 2)", "torch.zeros(3, 2)")],
)
def test_a_change_of_the_example_is_refused(tmp_path, monkeypatch, good, bad):
    assert good in CODE
    with pytest.raises(ConceptFileError):
        load_concepts(written(tmp_path, monkeypatch, CODE.replace(good, bad)))


def first_cells(head):
    """The names in the first column of the table under a head, marked as code."""
    table = PAGE[PAGE.index(f"| {head} |") :].split("\n\n")[0].splitlines()[2:]
    return {name for row in table for name in re.findall(r"`([a-z_]+)`", row.split("|")[1])}


def test_the_tables_name_all_that_the_reader_takes():
    assert first_cells("name | dtype") == {*concept_file._TENSORS, *concept_file._TENSORS_OPTIONAL}
    assert first_cells("key") == concept_file._METADATA
    assert first_cells("field of a concept") == set(concept_file._FACTS)
