"""Measures the figures of the pages and writes them into docs/results.json, each with its source.

    python -m dev.measure suites        # two hours on two cores; kept in .cache/results, so that it can be resumed
    python -m dev.measure dial          # 50 minutes: strengths from 0 to 2, three seeds; kept as well
    python -m dev.measure now           # the trained files of `dial` asked more, and attacked: an hour or more
    python -m dev.measure cost          # some minutes on two cores that do nothing else
    python -m dev.measure count         # seconds, on any machine
    python -m dev.measure demo          # the star of `make demo`, evaluated
    python -m dev.measure hardened      # an hour or two: concepts hardened by two rounds, evaluated and attacked;
                                        # `hardened star` does one of them
    python -m dev.measure hour          # seconds: the least time of first-hour.md's commands on FLUX.1-dev, counted
    python -m dev.measure double-only   # the four concepts in the second tiny model, which is made first where it is
                                        # not there; `double-only star` does one of them
    python -m dev.measure detectors     # a minute: the tiny world's two detectors where the truth is known
    python -m dev.measure bundled       # minutes: the bundled star, attacked
    python -m dev.measure memory        # seconds, on any machine
    python -m dev.measure tiny-world    # two minutes
    python -m dev.measure scale         # defaults on a wider, a deeper and another model; `scale wide` is one of them

`python -m dev.pages` writes the pages afterwards. Sentences in their templates may need another look.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

from PIL import Image

from .comfyui import ROOT
from .pages import CONCEPTS, read_results, write_results

WORK = Path(".cache/results")
DOCS = ROOT / "docs"
COLOURS = 128  # of the pictures in the docs: a quarter of the size, hardly a difference
TABLE1, TABLE2, FEW_STEP = WORK / "tinyworld", WORK / "ablations", WORK / "few_step"
DIAL, NOW, HARDENED, DOUBLE_ONLY = WORK / "dial", WORK / "now", WORK / "hardened", WORK / "double_only"
SAFEROPE = (sys.executable, "-m", "saferope")
SUITE = (*SAFEROPE, "evaluate", "--suite")
FILES = ("--concepts", str(TABLE1 / "concepts"))
COUNTS = ("--unsafe", "24", "--benign", "24")  # more than the suite's own: narrower intervals
FEW = ("--model", str(FEW_STEP / "model"), "--resolution", "96", *FILES, "--baselines", "none", "--no-search")
FEW_OUT, DEMO = FEW_STEP / "evaluation", Path("demo_output/star")
# FLUX.1-dev: text tokens, heads, bytes of T5-XXL's encoder and CLIP-L in bf16, and of the VAE; R + S by the defaults
TEXT, HEADS, ENCODERS, VAE, WIDTH = 512, 57 * 24, 9_770_000_000, 170_000_000, 28
EMBEDDING, GGUF = 2 * 32128 * 4096, 6_810_000_000  # T5's embedding in bf16; city96's Q4_K_S of FLUX.1-dev
Command = tuple[str, ...]
# product -> the command that makes it
SUITES: dict[Path, Command] = {
    TABLE1 / "evaluation.json": (*SUITE, "tinyworld", *COUNTS, "--out", str(TABLE1)),
    TABLE2 / "evaluation.json": (*SUITE, "ablations", "--only", "zappy", "--out", str(TABLE2)),
    WORK / "crossed" / "crossed.png": (*SUITE, "crossed", *FILES, "--out", str(WORK / "crossed")),
    WORK / "positions" / "positions.png": (*SUITE, "positions", "--out", str(WORK / "positions")),
    WORK / "rotations" / "rotations.png": (*SUITE, "rotations", "--out", str(WORK / "rotations")),
    FEW_STEP / "model" / "model_index.json": (
        *(sys.executable, "-m", "tinyworld.few_step", "--out", str(FEW_STEP / "model")),
        *("--work", str(FEW_STEP / "work")),
    ),
    FEW_OUT / "evaluation.json": (*SUITE, "tinyworld", *COUNTS, *FEW, "--out", str(FEW_OUT)),
    TABLE1 / "attack" / "attack.md": (*SAFEROPE, "attack", str(TABLE1)),
}
PICTURES = {
    "results-pareto.png": TABLE1 / "pareto.png",
    "results-crossed.png": WORK / "crossed" / "crossed.png",
    "results-positions.png": WORK / "positions" / "positions.png",
    "results-rotations.png": WORK / "rotations" / "rotations.png",
    "results-attack.png": TABLE1 / "attack" / "attack.png",
}
PICTURES |= {f"results-pairs-{slug}.png": TABLE1 / f"pairs-{slug}.png" for slug in CONCEPTS}
PICTURES |= {f"results-heads-{slug}.png": TABLE1 / "concepts" / slug / "head_map.png" for slug in CONCEPTS}
# a column's title -> the rows of an evaluation that it shows: column and set, or measure and set
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
# a row of README's table -> the measure of `saferope evaluate`
DEMO_ROWS = {
    "star shown": "star shown, unsafe",
    "star shown, held-out words": "star shown, held-out words",
    "rest of the prompt right, where a star was asked for": "rest of the prompt right, unsafe",
    "a whole picture, where a star was asked for": "a whole picture of this world, unsafe",
    "near neighbours, shape right": "shape right, neighbours",
    "benign, all attributes right": "all attributes right, benign",
    "benign, mean change of a pixel (of 255)": "mean difference, benign",
}
CELL = re.compile(
    r"(?P<value>\d+(?:\.\d+)?)(?: (?P<unit>%|x|ms|s|MB|of 255))?"
    r"(?: \((?P<low>-?[\d.]+)(?:\.\.| to )(?P<high>[\d.]+)\))?(?P<told> \*)?"
)
# a model like the tiny one -> how `tinyworld.train` makes it: 3 heads, 3 + 6 blocks, another seed
SCALED = {"wide": ("--heads", "3"), "deep": ("--double", "3", "--single", "6"), "seed": ("--seed", "1")}
SCALE = WORK / "scale"
FLUX = "black-forest-labs/FLUX.1-dev"
HOUR = ("4090 class", "H100 class")  # classes of cards that a dry run names
ROUNDS = ("cost", "cost/side", "cost/share", "cost/concepts", "cost/rank", "cost/batch")  # tables of bench.md, in order


def cell_of(text: str) -> Any:
    """A cell of a Markdown table: value, digits, unit, interval, told; the text itself where it is no number."""
    found = CELL.fullmatch(re.sub(r"^\*\*(.*)\*\*$", r"\1", text.strip()))
    if not found:
        return text.strip()
    cell: dict[str, Any] = {"value": float(found["value"]), "digits": len(found["value"].partition(".")[2])}
    if found["unit"]:
        cell["unit"] = found["unit"]
    if found["low"]:
        cell["interval"] = [float(found["low"]), float(found["high"])]
    return cell | ({"told": True} if found["told"] else {})


def tables_in(text: str) -> list[list[list[str]]]:
    """All Markdown tables of a text: rows of cells, the heads first."""
    blocks = re.findall(r"(?:^\|.*\n?)+", text, re.MULTILINE)
    rows = [[line.strip().strip("|").split("|") for line in block.splitlines()] for block in blocks]
    return [[[cell.strip() for cell in row] for place, row in enumerate(table) if place != 1] for table in rows]


def entry(table: list[list[str]], command: Command, **more: Any) -> dict:
    """A table of docs/results.json with its source."""
    head, *rows = table
    about = {"command": shown(command), "commit": _git("rev-parse", "--short", "HEAD")}
    about |= {"date": date.today().isoformat(), "machine": machine()}
    return {**about, **more, "columns": head, "rows": {row[0]: [cell_of(cell) for cell in row[1:]] for row in rows}}


def shown(command: Command) -> str:
    """A command as a person types it."""
    return shlex.join(command).replace(shlex.join(SAFEROPE), "saferope").replace(sys.executable, "python")


def machine() -> str:
    import torch

    bf16 = "with" if torch.ops.mkldnn._is_mkldnn_bf16_supported() else "without"
    return f"{torch.get_num_threads()} cores of a {platform.machine()} CPU {bf16} bf16 instructions"


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


def run(command: Command) -> None:
    print("$", shown(command), flush=True)
    subprocess.run(command, cwd=ROOT, check=True)


def evaluation_tables(evaluation: dict) -> dict[str, list[list[str]]]:
    """A table for each concept of an `evaluation.json`."""
    found = {}
    for concept in dict.fromkeys(row["concept"] for row in evaluation["rows"]):
        own = [row for row in evaluation["rows"] if row["concept"] == concept]
        titles = [title for title, where in COLUMNS.items() if any(_is(row, where) for row in own)]
        found[concept] = [["", *titles]]
        for method, strength in dict.fromkeys((row["method"], row["strength"]) for row in own):
            mine = [row for row in own if (row["method"], row["strength"]) == (method, strength)]
            cells = [next((_number(row) for row in mine if _is(row, COLUMNS[title])), "") for title in titles]
            found[concept].append([method if strength is None else f"{method}, {strength:g}", *cells])
    return found


def _is(row: dict, where: tuple[str, str]) -> bool:
    return where[0] in (row["column"], row["measure"]) and row["set"] == where[1]


def _number(row: dict) -> str:
    """With Wilson's interval, and an asterisk where McNemar's test tells it from unprotected at 1 %."""
    if row["unit"]:
        return f"{row['value']:.2f}{' x' if row['unit'] == 'x' else ''}"
    between = "" if row["interval"] is None else " ({:.0f} to {:.0f})".format(*(100 * end for end in row["interval"]))
    told = " *" if row["p_value"] is not None and row["p_value"] < 0.01 else ""
    return f"{100 * row['value']:.0f}{between}{told}"


def suites() -> dict[str, dict]:
    """Runs every command whose product is not there yet; tables of results.md, and its pictures."""
    for product, command in SUITES.items():
        if not (ROOT / product).is_file():
            run(command)
    found = {}
    for name, folder in (("table1", TABLE1), ("few-step", FEW_OUT), ("ablations", TABLE2)):
        evaluation = json.loads((ROOT / folder / "evaluation.json").read_text(encoding="utf-8"))
        command = SUITES[folder / "evaluation.json"]
        found |= {f"{name}/{slug}": entry(table, command) for slug, table in evaluation_tables(evaluation).items()}
    attack = TABLE1 / "attack" / "attack.md"
    text = (ROOT / attack).read_text(encoding="utf-8")
    found |= {f"attack/{slug}": entry(table, SUITES[attack]) for slug, table in _titled(text).items()}
    for name, source in PICTURES.items():
        _keep(ROOT / source, name)
    return found


def dial() -> dict[str, dict]:
    """Mean and range over three seeds, and the concept shown by strength."""
    command = (*SUITE, "dial", "--unsafe", "32", "--benign", "32", "--out", str(DIAL))
    if not (ROOT / DIAL / "dial.md").is_file():
        run(command)
    _keep(ROOT / DIAL / "dial.png", "results-dial.png")
    text = (ROOT / DIAL / "dial.md").read_text(encoding="utf-8")
    evaluation = json.loads((ROOT / DIAL / "evaluation.json").read_text(encoding="utf-8"))
    found = {f"dial/{slug}": entry(table, command) for slug, table in _titled(text).items()}
    return found | {f"strength/{slug}": entry(by_strength(evaluation, slug), command) for slug in CONCEPTS}


def now() -> dict[str, dict]:
    """The first seed's trained files of `dial`: Table 1's questions, and the attack."""
    files = NOW / "concepts"
    (ROOT / files).mkdir(parents=True, exist_ok=True)
    for slug in CONCEPTS:
        shutil.copyfile(ROOT / DIAL / "concepts" / slug / f"{slug}.safetensors", ROOT / files / f"{slug}.safetensors")
    own = ("--concepts", str(files), "--baselines", "none")
    asked = (*SUITE, "tinyworld", *COUNTS, *own, "--no-search", "--out", str(NOW))
    attack = (*SAFEROPE, "attack", str(NOW), *own)
    run(asked)
    run(attack)
    _keep(ROOT / NOW / "attack" / "attack.png", "results-attack-now.png")
    evaluation = json.loads((ROOT / NOW / "evaluation.json").read_text(encoding="utf-8"))
    text = (ROOT / NOW / "attack" / "attack.md").read_text(encoding="utf-8")
    found = {f"now/{slug}": entry(table, asked) for slug, table in evaluation_tables(evaluation).items()}
    return found | {f"now-attack/{slug}": entry(table, attack) for slug, table in _titled(text).items()}


def by_strength(evaluation: dict, slug: str) -> list[list[str]]:
    """A row a strength: how often files of the first seed, trained and calibrated, let the concept show."""
    rows = [row for row in evaluation["rows"] if row["concept"] == slug and row["column"] == "concept shown"]
    sides = [
        (method, asked) for method in ("saferope", "saferope, calibrated") for asked in ("unsafe", "held-out words")
    ]
    table = [["strength", "trained", "trained, held-out words", "calibrated", "calibrated, held-out words"]]
    for strength in sorted({row["strength"] for row in rows if row["strength"] is not None}):
        own = {(row["method"], row["set"]): row for row in rows if row["strength"] == strength}
        table.append([f"{strength:g}", *(_number(own[side]) for side in sides)])
    bare = {row["set"]: row["unprotected"] for row in rows}
    table.insert(1, ["0", *(f"{100 * bare[asked]:.0f}" for _, asked in sides)])
    return table


def _titled(text: str) -> dict[str, list[list[str]]]:
    """The tables of a text by the titles above them."""
    return dict(zip(re.findall(r"^## (.+)$", text, re.MULTILINE), tables_in(text), strict=True))


def _keep(source: Path, name: str) -> None:
    """A small copy of a picture in the docs."""
    with Image.open(source) as picture:
        picture.convert("RGB").quantize(COLOURS).save(DOCS / name, optimize=True)


def cost() -> dict[str, dict]:
    """The tables of performance.md, and its picture."""
    out = ROOT / WORK / "bench"
    command = (*SAFEROPE, "bench", "--out", str(out.relative_to(ROOT)))
    run(command)
    text = (out / "bench.md").read_text(encoding="utf-8")
    about = re.search(r"^Measured on (?P<machine>.*?); (?P<settings>.*)\.$", text, re.MULTILINE)
    shutil.copyfile(out / "bench.png", DOCS / "performance.png")
    pairs = zip(ROUNDS, tables_in(text), strict=True)
    return {name: entry(table, command) | (about.groupdict() if about else {}) for name, table in pairs}


def count() -> dict[str, dict]:
    """The cost of a step on a GPU, for performance.md."""
    out = WORK / "count"
    command = (*SAFEROPE, "bench", "--count", "--out", str(out))
    run(command)
    tables = tables_in((ROOT / out / "count.md").read_text(encoding="utf-8"))
    return {name: entry(table, command) for name, table in zip(("count", "rounding", "compiled"), tables, strict=True)}


def hour() -> dict[str, dict]:
    """The least time of first-hour.md's longest commands on FLUX.1-dev, counted."""
    rows, command = [["", *HOUR]], ()
    for what in ("calibrate", "train"):
        command = (
            *SAFEROPE,
            what,
            "nudity",
            *shlex.split(f"--model {FLUX} --checkpointing --passes-of 1 --dry-run --out x"),
        )
        text = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
        told = dict(re.findall(r"^  (.+? class): at least (.*), counted$", text, re.MULTILINE))
        rows.append([f"`saferope {what}`", *(told[card] for card in HOUR)])
    return {"hour": entry(rows, command)}


def memory() -> dict[str, dict]:
    """The memory of training FLUX.1-dev, counted: a prompt a pass, checkpointed, every head critical."""
    import torch
    from diffusers import FluxTransformer2DModel

    from saferope_training.making.memory import (
        GIB,
        Plan,
        activation_bytes,
        embedding_bytes,
        gathering_bytes,
        generator_bytes,
        transformer_bytes,
    )

    with torch.device("meta"):
        config = FluxTransformer2DModel(guidance_embeds=True).config  # its other defaults are FLUX.1-dev's
    flux = {name: value for name, value in config.items() if not name.startswith("_")}
    rows = [["FLUX.1-dev, checkpointed, one prompt a pass", "NF4", "Q4 GGUF", "8 bit"]]
    embedding = embedding_bytes(ENCODERS, EMBEDDING, TEXT, lent=True)
    for pixels in (512, 1024):
        tokens, cells = (pixels // 16) ** 2, []
        for kind in ("nf4", "gguf", "int8"):
            weights = GGUF if kind == "gguf" else transformer_bytes(flux, kind, torch.bfloat16)
            kept = activation_bytes(flux, TEXT, tokens, 1, True, torch.bfloat16)
            learned = generator_bytes(HEADS, (WIDTH, WIDTH))
            heard = gathering_bytes(flux, TEXT, tokens, 1, torch.bfloat16)
            phases = ((embedding, 0, 0, 0), (0, 0, 0, heard), (0, kept, learned, 0))
            peaks = [Plan(weights, phase[0], VAE, *phase[1:]).peak / GIB for phase in phases]
            told = "{:.1f} GiB while embedding, {:.1f} while listening, {:.1f} while training"
            cells.append(told.format(*peaks))
        rows.append([f"{pixels} x {pixels}", *cells])
    command = (sys.executable, "-m", "dev.measure", "memory")
    return {"training-memory": entry(rows, command) | {"machine": "counted, not measured"}}


def demo() -> dict[str, dict]:
    """README's table: the star of `make demo`."""
    if not (ROOT / DEMO / "star.safetensors").is_file():
        run((sys.executable, "-m", "dev.demo"))
    run((*SAFEROPE, "evaluate", str(DEMO / "star.safetensors")))
    (table,) = tables_in((ROOT / DEMO / "star.evaluation.md").read_text(encoding="utf-8"))
    rows = {row[0]: row[1:4] for row in table[1:]}
    chosen = [[title, *rows[measure]] for title, measure in DEMO_ROWS.items()]
    return {"demo": entry([["", "pictures", "unprotected", "protected"], *chosen], ("make", "demo"))}


def hardened(slugs: Sequence[str] = tuple(CONCEPTS)) -> dict[str, dict]:
    """Concepts hardened by two rounds beside the ones before them: as README's table, and attacked."""
    found = {}
    for slug in slugs:
        folder = HARDENED / slug
        files = {"trained": folder / f"{slug}.safetensors", "hardened": folder / f"{slug}.hardened.safetensors"}
        if not (ROOT / files["hardened"]).is_file():
            run((*SAFEROPE, "train", slug, "--harden", "2", "--no-verdict", "--out", str(folder)))
        for name, file in files.items():
            attack = (*SAFEROPE, "attack", str(file))
            run(attack)
            text = (ROOT / file.with_suffix(".attack") / "attack.md").read_text(encoding="utf-8")
            found[f"{name}-attack/{slug}"] = entry(_titled(text)[slug], attack)
            found[f"{name}/{slug}"] = _evaluated(file, slug)
    return found


def double_only(slugs: Sequence[str] = tuple(CONCEPTS)) -> dict[str, dict]:
    """Concepts trained by the defaults in the second tiny model, of Qwen-Image's layout, as README's table."""
    folder, found = DOUBLE_ONLY / "model", {}
    if not (ROOT / folder / "model_index.json").is_file():
        make = (sys.executable, "-m", "tinyworld.double_only", "--out", str(folder))
        run((*make, "--work", str(DOUBLE_ONLY / "work")))
    model = ("--model", str(folder))
    for slug in slugs:
        file = DOUBLE_ONLY / slug / f"{slug}.safetensors"
        run((*SAFEROPE, "train", slug, *model, "--no-verdict", "--out", str(file.parent)))
        found[f"double-only/{slug}"] = _evaluated(file, slug, *model)
    return found


def _evaluated(file: Path, slug: str, *more: str) -> dict:
    """README's rows of one concept's file."""
    command = (*SAFEROPE, "evaluate", str(file), *more)
    run(command)
    (table,) = tables_in((ROOT / file.with_suffix(".evaluation.md")).read_text(encoding="utf-8"))
    return entry([["", "pictures", "unprotected", "protected"], *_chosen(table, slug)], command)


def bundled() -> dict[str, dict]:
    """The star that comes with the pack, attacked; two detectors judge."""
    file = WORK / "bundled" / "star.safetensors"
    (ROOT / file).parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(ROOT / "tinyworld" / "concepts" / file.name, ROOT / file)
    attack = (*SAFEROPE, "attack", str(file))
    run(attack)
    text = (ROOT / file.with_suffix(".attack") / "attack.md").read_text(encoding="utf-8")
    return {"bundled-attack/star": entry(_titled(text)["star"], attack)}


def _chosen(table: list[list[str]], slug: str) -> list[list[str]]:
    """README's rows of a concept's report."""
    from saferope_benchmark.scores.second_reading import field_of

    rows = {row[0]: row[1:4] for row in table[1:]}
    titles = {title.replace("star", slug): measure.replace("star", slug) for title, measure in DEMO_ROWS.items()}
    titles = {title: measure.replace("shape right", f"{field_of(slug)} right") for title, measure in titles.items()}
    return [[title, *rows[measure]] for title, measure in titles.items()]


def detectors() -> dict[str, dict]:
    """How good the tiny world's two detectors are where the truth is known."""
    from saferope_benchmark.scores.metrics import wilson_interval
    from tinyworld.agreement import HEAD, rows

    def share(hits: int, count: int) -> str:
        low, high = wilson_interval(hits, count)
        return f"{100 * hits / count:.1f} % ({100 * low:.1f} to {100 * high:.1f})"

    table = [[name, str(n), *(share(each, n) for each in hits)] for name, (n, *hits) in rows()]
    command = (sys.executable, "-m", "dev.measure", "detectors")
    return {"tiny-world/detectors": entry([list(HEAD), *table], command)}


def tiny_world() -> dict[str, dict]:
    """The tables of tiny-world.md."""
    command = (sys.executable, "-m", "tinyworld.report")
    text = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    names = ("tiny-world/seen", "tiny-world/right")
    return {name: entry(table, command) for name, table in zip(names, tables_in(text), strict=True)}


def scale(names: Sequence[str] = tuple(SCALED)) -> dict[str, dict]:
    """The four concepts, trained with untouched defaults and calibrated, on models of other shapes and seeds.

    Runs on a GPU where there is one; products in `.cache/results/scale` are taken as they are.
    """
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    about = {"machine": torch.cuda.get_device_name()} if device == "cuda" else {}
    found = {}
    for name in names:
        folder = SCALE / name
        model, product = folder / "model", folder / "evaluation.json"
        if not (ROOT / model / "model_index.json").is_file():
            made = ("--reuse", "--device", device, "--out", str(model), "--work", str(folder / "work"))
            run((sys.executable, "-m", "tinyworld.train", *SCALED[name], *made))
        asked: Command = (*SUITE, "tinyworld", *COUNTS, "--model", str(model), "--resolution", "96")
        asked = (*asked, "--baselines", "none", "--device", device, "--out", str(folder))
        if not (ROOT / product).is_file():
            run(asked)
        evaluation = json.loads((ROOT / product).read_text(encoding="utf-8"))
        tables = evaluation_tables(evaluation)
        found |= {f"scale/{name}/{slug}": entry(table, asked, **about) for slug, table in tables.items()}
    return found


MEASURES = {"suites": suites, "dial": dial, "now": now, "cost": cost, "count": count, "demo": demo}
MEASURES |= {
    "bundled": bundled,
    "detectors": detectors,
    "double-only": double_only,
    "hardened": hardened,
    "hour": hour,
    "memory": memory,
    "scale": scale,
    "tiny-world": tiny_world,
}
PARTS = {"hardened": tuple(CONCEPTS), "double-only": tuple(CONCEPTS), "scale": tuple(SCALED)}


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure figures of the pages and write docs/results.json.")
    parser.add_argument("what", choices=MEASURES)
    parser.add_argument("some", nargs="*", help="concepts, or models of `scale`; all if left out")
    arguments = parser.parse_args()
    parts = PARTS.get(arguments.what, ())
    if not set(arguments.some) <= set(parts):
        parser.error(f"{arguments.what}: got {arguments.some}, expected {f'some of {parts}' if parts else 'none'}")
    measure: Any = MEASURES[arguments.what]
    found = measure(arguments.some) if arguments.some else measure()
    results = read_results()
    write_results({**results, "tables": {**results["tables"], **found}})
    print("written:", ", ".join(found))


if __name__ == "__main__":
    main()
