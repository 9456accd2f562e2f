"""Compares and attacks on the tiny world and writes docs/results.md: `python -m dev.results`.

Two hours on two cores. Every step is a command of its own, printed as it runs; what is done is kept in .cache/results
and not done again. `--page` writes the page from what is there.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from pathlib import Path

from PIL import Image

from .comfyui import ROOT

WORK = Path(".cache/results")
DOCS = ROOT / "docs"
COLOURS = 128
TABLE1, TABLE2, FEW_STEP = WORK / "tinyworld", WORK / "ablations", WORK / "few_step"
SAFEROPE = (sys.executable, "-m", "saferope")
SUITE = (*SAFEROPE, "evaluate", "--suite")
FILES = ("--concepts", str(TABLE1 / "concepts"))
COUNTS = ("--unsafe", "24", "--benign", "24")  # more than the suite's own: narrower intervals
FEW = ("--model", str(FEW_STEP / "model"), "--resolution", "96", *FILES, "--baselines", "none", "--no-search")
# what is made -> the command that makes it
COMMANDS = {
    TABLE1 / "evaluation.json": (*SUITE, "tinyworld", *COUNTS, "--out", str(TABLE1)),
    TABLE2 / "evaluation.json": (*SUITE, "ablations", "--only", "zappy", "--out", str(TABLE2)),
    WORK / "crossed" / "crossed.png": (*SUITE, "crossed", *FILES, "--out", str(WORK / "crossed")),
    WORK / "positions" / "positions.png": (*SUITE, "positions", "--out", str(WORK / "positions")),
    WORK / "rotations" / "rotations.png": (*SUITE, "rotations", "--out", str(WORK / "rotations")),
    FEW_STEP / "model" / "model_index.json": (
        *(sys.executable, "-m", "tinyworld.few_step", "--out", str(FEW_STEP / "model")),
        *("--work", str(FEW_STEP / "work")),
    ),
    FEW_STEP / "evaluation" / "evaluation.json": (
        *SUITE,
        "tinyworld",
        *COUNTS,
        *FEW,
        "--out",
        str(FEW_STEP / "evaluation"),
    ),
    TABLE1 / "attack" / "attack.md": (*SAFEROPE, "attack", str(TABLE1)),
}
PICTURES = {
    "results-pareto.png": TABLE1 / "pareto.png",
    "results-crossed.png": WORK / "crossed" / "crossed.png",
    "results-positions.png": WORK / "positions" / "positions.png",
    "results-rotations.png": WORK / "rotations" / "rotations.png",
    "results-attack.png": TABLE1 / "attack" / "attack.png",
}
CONCEPTS = ("star", "splatter", "zappy", "swirl")
PICTURES |= {f"results-pairs-{slug}.png": TABLE1 / f"pairs-{slug}.png" for slug in CONCEPTS}
PICTURES |= {f"results-heads-{slug}.png": TABLE1 / "concepts" / slug / "head_map.png" for slug in CONCEPTS}


def run_all() -> None:
    """Runs every command whose product is not there yet."""
    for product, command in COMMANDS.items():
        if not (ROOT / product).is_file():
            print("$", shown(command), flush=True)
            subprocess.run(command, cwd=ROOT, check=True)


def shown(command: tuple[str, ...]) -> str:
    """As a person would type it."""
    return shlex.join(command).replace(shlex.join(SAFEROPE), "saferope").replace(sys.executable, "python")


def rows_of(folder: Path) -> list[dict]:
    """The rows of an evaluation."""
    return json.loads((ROOT / folder / "evaluation.json").read_text(encoding="utf-8"))["rows"]


# a column's title -> the rows it shows: column and set of an evaluation, or measure and set
COLUMNS = {
    "shown": ("concept shown", "unsafe"),
    "shown, held-out words": ("concept shown", "held-out words"),
    "rest of the prompt": ("rest of the prompt right", "unsafe"),
    "neighbours": ("right", "neighbours"),
    "benign": ("right", "benign"),
    "pixels, of 255": ("mean difference", "benign"),
    "FID": ("FID to base, detector", "benign"),
    "time": ("time", ""),
}


def tables_of(folder: Path) -> str:
    """A table a concept: what people ask first. All measures are in the evaluation's own files."""
    rows = rows_of(folder)
    parts = []
    for concept in dict.fromkeys(row["concept"] for row in rows):
        own = [row for row in rows if row["concept"] == concept]
        titles = [title for title, where in COLUMNS.items() if any(_is(row, where) for row in own)]
        parts += [f"### {concept}", "", f"| | {' | '.join(titles)} |", "|---" * (len(titles) + 1) + "|"]
        for method, strength in dict.fromkeys((row["method"], row["strength"]) for row in own):
            found = [row for row in own if (row["method"], row["strength"]) == (method, strength)]
            cells = [next((_number(row) for row in found if _is(row, COLUMNS[title])), "") for title in titles]
            label = method if strength is None else f"{method}, {strength:g}"
            parts.append(f"| {label} | {' | '.join(cells)} |")
        parts.append("")
    left_out = json.loads((ROOT / folder / "evaluation.json").read_text(encoding="utf-8"))["left_out"]
    parts += [f"- **{entry['name']}**: {entry['why']}" for entry in left_out]
    return "\n".join(parts).strip()


def _is(row: dict, where: tuple[str, str]) -> bool:
    return where[0] in (row["column"], row["measure"]) and row["set"] == where[1]


def _number(row: dict) -> str:
    """With Wilson's interval, and a star where McNemar's test tells it from unprotected at 1 %."""
    if row["unit"]:
        return f"{row['value']:.2f}{' x' if row['unit'] == 'x' else ''}"
    between = "" if row["interval"] is None else " ({:.0f}..{:.0f})".format(*(100 * end for end in row["interval"]))
    told = " *" if row["p_value"] is not None and row["p_value"] < 0.01 else ""
    return f"{100 * row['value']:.0f}{between}{told}"


def overview(folder: Path) -> str:
    """A line a method, two columns a concept: shown for the words of training, for held-out ones; lowest in bold."""
    shown_rows = [row for row in rows_of(folder) if row["column"] == "concept shown"]
    cells = {(row["method"], (row["concept"], row["set"])): row["value"] for row in shown_rows}
    columns = [(slug, kind) for slug in CONCEPTS for kind in ("unsafe", "held-out words")]
    methods = list(dict.fromkeys(row["method"] for row in shown_rows))
    lowest = {column: min(value for (_, where), value in cells.items() if where == column) for column in columns}
    head = [f"{slug}{'' if kind == 'unsafe' else ', held out'}" for slug, kind in columns]
    lines = [f"| shown, % | {' | '.join(head)} |", "|---" * (len(columns) + 1) + "|"]
    for method in methods:
        values = [(cells.get((method, column)), lowest[column]) for column in columns]
        lines.append(f"| {method} | {' | '.join(_cell(*value) for value in values)} |")
    return "\n".join(lines)


def _cell(value: float | None, lowest: float) -> str:
    if value is None:
        return "-"
    text = f"{100 * value:.0f}"
    return f"**{text}**" if value == lowest else text


def write_page() -> None:
    """docs/results.md from its template, and the pictures in it."""
    page = (DOCS / "results.md.in").read_text(encoding="utf-8")
    parts = {"OVERVIEW": overview(TABLE1), "TABLE1": tables_of(TABLE1)}
    parts |= {"ABLATIONS": tables_of(TABLE2).replace("### zappy\n\n", "")}
    parts |= {"TRANSFER": tables_of(FEW_STEP / "evaluation")}
    attack = (ROOT / TABLE1 / "attack" / "attack.md").read_text(encoding="utf-8")
    parts["ATTACK"] = attack.replace("## ", "### ").strip()
    parts["COMMANDS"] = "\n".join(f"    {shown(command)}" for command in COMMANDS.values())
    for name, text in parts.items():
        page = page.replace(f"@{name}@", text)
    (DOCS / "results.md").write_text(page, encoding="utf-8")
    for name, source in PICTURES.items():
        with Image.open(ROOT / source) as picture:
            picture.convert("RGB").quantize(COLOURS).save(DOCS / name, optimize=True)


def main() -> None:
    """Everything that is missing, then the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--page", action="store_true", help="write the page alone, from what is there")
    if not parser.parse_args().page:
        run_all()
    write_page()


if __name__ == "__main__":
    main()
