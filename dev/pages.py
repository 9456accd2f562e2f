"""Writes every page with figures: the templates in dev/pages/, filled from docs/results.json.

    python -m dev.pages            # README.md and docs/*.md
    python -m dev.pages --check    # exits 1 where a page differs from its template and the results

A template holds no measured figure of its own. It names a table or a figure of docs/results.json, where each has the
command, the commit, the date and the machine that gave it.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import jinja2

from .comfyui import ROOT

TEMPLATES = ROOT / "dev" / "pages"
RESULTS = ROOT / "docs" / "results.json"
CONCEPTS = ("star", "splatter", "zappy", "swirl")
PAIR = ("shown", "shown, held-out words")  # columns of the overview, for each concept


def page_of(template: Path) -> Path:
    """README.md lies at the root, every other page in docs/."""
    return ROOT / template.name if template.name == "README.md" else ROOT / "docs" / template.name


def pages() -> dict[Path, Path]:
    """Template -> page."""
    return {template: page_of(template) for template in sorted(TEMPLATES.glob("*.md"))}


class Results:
    """Tables and figures by name, as text for Markdown. KeyError for a name that the results do not have."""

    def __init__(self, results: dict) -> None:
        self.tables, self.figures = results["tables"], results["figures"]

    def table(self, name: str, rows: list[str] | None = None, columns: list[str] | None = None) -> str:
        """A table, or some of its rows and columns."""
        found = self.tables[name]
        first, *rest = found["columns"]
        kept = [place for place, title in enumerate(rest) if columns is None or title in columns]
        lines = [f"| {' | '.join([first, *(rest[place] for place in kept)])} |", "|---" * (len(kept) + 1) + "|"]
        for row in rows or found["rows"]:
            cells = found["rows"][row]
            lines.append(f"| {' | '.join([row, *(text_of(cells[place]) for place in kept)])} |")
        return "\n".join(lines)

    def cell(self, name: str, row: str, column: str) -> str:
        """One number of a table, with its unit and without its interval; `row` may leave out a strength."""
        found = self.tables[name]
        full = next(each for each in found["rows"] if each == row or each.rpartition(", ")[0] == row)
        value = found["rows"][full][found["columns"][1:].index(column)]
        return text_of({key: value[key] for key in ("value", "digits", "unit") if key in value})

    def span(self, names: list[str], row: str, column: str) -> str:
        """The lowest and the highest of some tables' numbers in a row and column, such as `0 to 25`."""
        numbers = sorted((self.cell(name, row, column) for name in names), key=lambda text: float(text.split()[0]))
        return numbers[0] if numbers[0] == numbers[-1] else f"{numbers[0]} to {numbers[-1]}"

    def figure(self, name: str) -> str:
        """A figure that stands in no table."""
        return self.figures[name]["text"]

    def source(self, name: str) -> str:
        """Where a table comes from: command, commit, date, machine."""
        found = self.tables[name]
        settings = f". Settings: {found['settings']}" if "settings" in found else ""
        return f"`{found['command']}` at {found['commit']}, {found['date']}, on {found['machine']}{settings}"

    def overview(self) -> str:
        """A line for each method, two columns for each concept; the lowest number of each column in bold."""
        columns = [(slug, column) for slug in CONCEPTS for column in PAIR]
        numbers: dict[str, list[float]] = {}
        for slug, column in columns:
            found = self.tables[f"table1/{slug}"]
            at = found["columns"][1:].index(column)
            for row, cells in found["rows"].items():
                numbers.setdefault(_method(row), []).append(cells[at]["value"])
        lowest = [min(values) for values in zip(*numbers.values(), strict=True)]
        head = [f"{slug}{'' if column == PAIR[0] else ', held out'}" for slug, column in columns]
        lines = [f"| shown, % | {' | '.join(head)} |", "|---" * (len(columns) + 1) + "|"]
        for method, values in numbers.items():
            cells = [f"**{v:.0f}**" if v == least else f"{v:.0f}" for v, least in zip(values, lowest, strict=True)]
            lines.append(f"| {method} | {' | '.join(cells)} |")
        return "\n".join(lines)


def _method(row: str) -> str:
    """A method without its strength."""
    name, _, strength = row.rpartition(", ")
    return name if strength.replace(".", "").isdigit() else row


def text_of(cell: Any) -> str:
    """A cell: its number, unit and interval, and an asterisk where McNemar's test tells it from unprotected at 1 %."""
    if isinstance(cell, str):
        return cell
    number, unit = f"{cell['value']:.{cell['digits']}f}", f" {cell['unit']}" if "unit" in cell else ""
    interval = ""
    if "interval" in cell:
        low, high = (f"{end:.{cell['digits']}f}" for end in cell["interval"])
        interval = f" ({low} to {high})"
    return f"{number}{unit}{interval}{' *' if cell.get('told') else ''}"


def render(template: Path, results: dict) -> str:
    """The page of a template."""
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True, autoescape=False)
    own = Results(results)
    names = {name: getattr(own, name) for name in ("table", "cell", "span", "figure", "source", "overview")}
    return environment.from_string(template.read_text(encoding="utf-8")).render(concepts=CONCEPTS, **names)


def read_results() -> dict:
    return json.loads(RESULTS.read_text(encoding="utf-8"))


def write_results(results: dict) -> None:
    """JSON with a line for each row of a table, so that a change can be read."""
    text = json.dumps(results, indent=1, ensure_ascii=False)
    for table in results["tables"].values():
        for row in table["rows"].values():
            long = json.dumps(row, indent=1, ensure_ascii=False).replace("\n", "\n    ")
            text = text.replace(long, json.dumps(row, ensure_ascii=False))
    RESULTS.write_text(text + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description="Write every page with figures from docs/results.json.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 where a page is stale")
    check, results, stale = parser.parse_args().check, read_results(), []
    for template, page in pages().items():
        text = render(template, results)
        if not page.is_file() or page.read_text(encoding="utf-8") != text:
            stale.append(page.relative_to(ROOT).as_posix())
            if not check:
                page.write_text(text, encoding="utf-8")
    print("stale:" if check else "written:", ", ".join(stale) or "none")
    if check and stale:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
