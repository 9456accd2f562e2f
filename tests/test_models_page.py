"""docs/models.md says of every family what the tables of the code say."""

import importlib
import re

import pytest

from dev.comfyui import ROOT
from saferope_core import FAMILIES
from saferope_training.flux.attach import LAYOUTS
from saferope_training.flux.pipelines import PIPELINES

PAGE = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
ROWS = {cells[0].strip("`"): cells[1:] for cells in (
    [cell.strip() for cell in line.strip("|").split("|")] for line in PAGE.splitlines() if line.startswith("| `")
)}  # fmt: skip
MODELS, NUMBERS, PROTECT, MAKE, DIFFUSERS, TRAIN = range(6)


def written(geometry):
    if geometry is None:
        return "as in the weights"
    heads = f"{geometry.heads} ({geometry.key_heads})" if geometry.group > 1 else str(geometry.heads)
    return f"{geometry.double_blocks} + {geometry.single_blocks} x {heads} x {geometry.head_dim}"


def said(column):
    return {family for family, cells in ROWS.items() if cells[column].startswith("yes")}


def test_every_family_has_a_row():
    assert list(ROWS) == list(FAMILIES)
    for name, family in FAMILIES.items():
        assert ROWS[name][MODELS] == family.title
        assert ROWS[name][NUMBERS] == written(family.known)


@pytest.mark.host
def test_the_nodes_reach_what_the_page_says(comfy, pack):
    families = importlib.import_module(f"{pack.__name__}.nodes.host.families")
    assert said(PROTECT) == set(families.REACHED)


@pytest.mark.host
def test_concepts_can_be_made_for_what_the_page_says(comfy):
    from tests.nodes.test_chat import ENCODERS

    assert said(MAKE) == {"flux", *ENCODERS}


def test_diffusers_classes_are_those_of_the_page():
    assert said(DIFFUSERS) == {layout.family for layout in LAYOUTS.values()}


def test_pipelines_that_the_trainer_asks_are_those_of_the_page():
    read = {family for family, cells in ROWS.items() if cells[TRAIN].startswith(("yes", "read heads"))}
    assert read == set(PIPELINES)


def test_the_tests_of_the_page_are_there():
    for path in re.findall(r"`(tests/[\w/]+\.py)`", PAGE):
        assert (ROOT / path).is_file(), path


def test_at_least_ten_families_in_comfyui_and_seven_in_diffusers():
    assert len(said(PROTECT)) >= 10 and len(said(DIFFUSERS)) >= 7
