"""Pages with figures: each is what its template and docs/results.json give, and no page states a figure by itself."""

from __future__ import annotations

import json
import re

import pytest

from dev.comfyui import ROOT
from dev.measure import CELL, by_strength, cell_of, entry, evaluation_tables, tables_in
from dev.pages import Results, pages, read_results, render, text_of

RESULTS = read_results()
# A number with one of these behind it was measured, or it is a definition that stands below
UNIT = (
    r"(?:%|ms\b|s\b|seconds?\b|minutes?\b|hours?\b|GiB\b|GB\b|MB\b|x\b(?! ?\d)|of 255\b|grey levels\b|points\b|of \d+ )"
)
FIGURE = re.compile(rf"(?<![\w.-])\d[\d.,]*\s?(?:to \d[\d.,]*\s?)?{UNIT}")
# A literal in a template -> the place that defines it
DEFINITIONS = {
    "99.8 %": "saferope_training/settings.py, quantile",
    "0.2 %": "saferope_training/settings.py, 1 - quantile; saferope_benchmark/costs/rotation.py, PASSING",
    "2 MB": "saferope_core/run/few.py, PIECE",
    "95 %": "Wilson's interval",
    "1 %": "level of McNemar's test, dev/measure.py",
    "2 points": "saferope_benchmark/evaluation/compare.py: the allowance of the search",
    "0.5 to 0.6 s": "training the tiny world's own weights: for orientation",
    "1 to 2 minutes": "the same",
    "2 minutes": "the same",
    "8 x": "tinyworld/codec.py: pixels of a latent",
}


def prose(template: str) -> str:
    """A template without code, links' targets and the expressions that the results fill."""
    text = re.sub(r"```.*?```|^    .*$", "", template, flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"\{\{.*?\}\}|\{%.*?%\}|`[^`]*`|\]\([^)]*\)", "", text, flags=re.DOTALL)
    return text


def literals(template: str) -> list[str]:
    """Figures that a template states by itself."""
    found = [" ".join(match[0].split()) for match in FIGURE.finditer(prose(template))]
    known = {" ".join(text.split()) for text in DEFINITIONS}
    return [text for text in found if text not in known]


@pytest.mark.parametrize("template", pages(), ids=lambda path: path.name)
def test_a_page_is_what_the_writer_writes(template):
    assert pages()[template].read_text(encoding="utf-8") == render(template, RESULTS), "run python -m dev.pages"


@pytest.mark.parametrize("template", pages(), ids=lambda path: path.name)
def test_no_template_states_a_figure_by_itself(template):
    assert literals(template.read_text(encoding="utf-8")) == []


OWN_FIGURES = {
    "nodes.md": "python -m dev.nodes_page asks a real ComfyUI and measures the probe",
    "reproducing-the-paper.md": "the paper's own figures",
    "security.md": "limits, each with its constant and test",
}


@pytest.mark.parametrize(
    "page",
    [*sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "web" / "docs").glob("*.md")), *ROOT.glob("C*.md")],
    ids=lambda path: path.name,
)
def test_no_page_without_a_template_states_a_figure(page):
    if page.name not in OWN_FIGURES and page not in pages().values():
        assert literals(page.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "planted",
    [
        "It leaves 4 % of them.",
        "in 2.5 s",
        "takes 12 minutes",
        "1.3 to 16 grey levels",
        "loses 3 of 32 pictures",
        "7.2 GiB",
    ],
)
def test_a_planted_figure_is_found(planted):
    assert len(literals(f"Text. {planted} More.")) == 1
    assert literals("Rank 5 of `9 %` and {{ figure('a') }} in [64 %](64 % of).\n\n    took 3 s\n") == ["64 %"]


def test_every_result_has_a_source_and_a_reader():
    """And a table that no page shows is not kept."""
    texts = [template.read_text(encoding="utf-8") for template in pages()]
    shown = "".join(texts)
    for name, table in RESULTS["tables"].items():
        assert all(table[key] for key in ("command", "commit", "date", "machine")), name
        group = name.rpartition("/")[0]
        assert f'"{name}"' in shown or f'"{group}/" ~' in shown, name
    for name, figure in RESULTS["figures"].items():
        assert figure["command"] and figure["commit"] and f'figure("{name}")' in shown, name


def test_a_result_that_is_not_there_is_an_error(tmp_path):
    page = tmp_path / "a.md"
    for asked in ('table("none")', 'figure("none")', 'cell("demo", "star shown", "none")', "unknown"):
        page.write_text("{{ " + asked + " }}", encoding="utf-8")
        with pytest.raises(Exception, match=r"none|unknown"):
            render(page, RESULTS)


def test_cells_come_back_as_they_were():
    cells = [cell for table in RESULTS["tables"].values() for row in table["rows"].values() for cell in row]
    assert sum(isinstance(cell, dict) for cell in cells) > 500
    for cell in cells:
        assert cell_of(text_of(cell)) == cell, cell


@pytest.mark.parametrize(
    ("text", "cell"),
    [
        ("4 (1..20) *", {"value": 4.0, "digits": 0, "interval": [1.0, 20.0], "told": True}),
        ("58.3 % (32.0 to 80.7)", {"value": 58.3, "digits": 1, "unit": "%", "interval": [32.0, 80.7]}),
        ("1.19 x", {"value": 1.19, "digits": 2, "unit": "x"}),
        ("0.583 of 255", {"value": 0.583, "digits": 3, "unit": "of 255"}),
        ("**0.0 %**", {"value": 0.0, "digits": 1, "unit": "%"}),
        ("not measured", "not measured"),
        ("", ""),
    ],
)
def test_cells_are_read(text, cell):
    assert cell_of(text) == cell


def test_an_evaluation_becomes_tables():
    """As `saferope evaluate` writes it: rates with intervals, a difference, an asterisk below 1 %."""
    common = {"concept": "star", "unit": "", "interval": None, "p_value": None}
    shown = {"column": "concept shown", "measure": "star shown", "set": "unsafe"}
    pixels = {"column": "", "measure": "mean difference", "set": "benign", "unit": "of 255"}
    rows = [
        common | shown | {"method": "unprotected", "strength": None, "value": 1.0, "interval": [0.8, 1.0]},
        common
        | shown
        | {"method": "saferope", "strength": 1.0, "value": 0.25, "interval": [0.1, 0.5], "p_value": 0.001},
        common | pixels | {"method": "saferope", "strength": 1.0, "value": 0.344},
    ]
    (table,) = evaluation_tables({"rows": rows}).values()
    assert table == [
        ["", "shown", "pixels, of 255"],
        ["unprotected", "100 (80 to 100)", ""],
        ["saferope, 1", "25 (10 to 50) *", "0.34"],
    ]
    made = entry(table, ("a", "command"))
    assert made["rows"]["saferope, 1"][0] == {"value": 25.0, "digits": 0, "interval": [10.0, 50.0], "told": True}
    text = Results({"tables": {"t": made}, "figures": {}}).table("t")
    assert tables_in(text) == [table]
    assert json.dumps(made) and CELL.fullmatch("25")


def test_the_lowest_number_of_a_column_is_bold():
    lines = Results(RESULTS).overview().splitlines()
    for place in range(1, 9):
        column = [line.split("|")[place + 1].strip() for line in lines[2:]]
        bold = [float(text.strip("*")) for text in column if text.startswith("**")]
        assert set(bold) == {min(float(text.strip("*")) for text in column)}


def test_strengths_become_a_table():
    def row(method, strength, asked, value):
        own = {"concept": "star", "column": "concept shown", "unit": "", "interval": [0.0, 0.1], "p_value": 0.001}
        return {**own, "method": method, "strength": strength, "set": asked, "value": value, "unprotected": 0.98}

    rows = [
        row(method, strength, asked, value)
        for method, value in (("saferope", 0.1), ("saferope, calibrated", 0.3), ("saferope, seed 1", 0.9))
        for strength in ((0.5, 1.0) if "seed" not in method else (1.0,))
        for asked in ("unsafe", "held-out words")
    ]
    head, bare, half, one = by_strength({"rows": rows}, "star")
    assert head[0] == "strength" and bare == ["0", *4 * ["98"]]
    assert half == ["0.5", *2 * ["10 (0 to 10) *"], *2 * ["30 (0 to 10) *"]] and one[0] == "1"
