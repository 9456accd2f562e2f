"""Every command that writes at names one can guess, in a folder where a stranger has laid links under all of them."""

from __future__ import annotations

import ast
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from dev.comfyui import ROOT
from saferope import cli
from saferope_benchmark import plots as figures
from saferope_benchmark.costs import report as bench_report
from saferope_benchmark.evaluation.evaluate import Evaluation, _check
from saferope_benchmark.evaluation.methods import unprotected
from saferope_benchmark.evaluation.picture_store import write_pictures, write_scores
from saferope_benchmark.pictures import comparison_grid
from saferope_benchmark.prompt_sets import PromptSet
from saferope_core import Geometry
from saferope_training import plots
from saferope_training.flux.encoders import EmbeddingCache
from saferope_training.making.recipe import Recipe
from tinyworld.model import WEIGHTS

STAR = WEIGHTS.parent / "concepts" / "star.safetensors"
WRITERS = {"savefig", "save_file", "save_pretrained", "dump", "rename", "copyfile"}
# Not into a folder that anybody else could have written to
ELSEWHERE = {
    "saferope_training/flux/loading.py": "a temporary folder of its own",
    "saferope_benchmark/evaluation/cost.py": "/proc",
    "saferope_benchmark/suites/ablations.py": "a folder is moved to a name where nothing is",
}


@pytest.fixture
def trap(tmp_path):
    """A file elsewhere, and a function that lays links to it under names in a folder."""
    target = tmp_path / "elsewhere" / ".bashrc"
    target.parent.mkdir()
    target.write_text("mine")

    def lay(folder: Path, names) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for name in names:
            (folder / name).symlink_to(target)

    lay.target = target
    yield lay
    assert target.read_text() == "mine"


def replaced(folder: Path, names) -> bool:
    return all((folder / name).is_file() and not (folder / name).is_symlink() for name in names)


def test_a_card_is_written_over_links(tmp_path, trap):
    folder, names = tmp_path / "theirs", ("star.star.heads.png", "star.md")
    trap(folder, names)
    (folder / STAR.name).write_bytes(STAR.read_bytes())
    result = CliRunner().invoke(cli.app, ["card", str(folder / STAR.name), "--license", "apache-2.0"])
    assert result.exit_code == 0, result.output
    assert replaced(folder, names)


def test_a_training_is_written_over_links(tmp_path, trap, model, settings):
    names = ["prompts.jsonl", "statistics.safetensors", "heads.csv", "heads.safetensors", "head_map.png", "lock"]
    names += ["latents.safetensors", "train_state.safetensors", "log.jsonl", "losses.png", "star.safetensors"]
    names += ["config.json", "stages.json", "pace.json"]
    trap(tmp_path / "theirs", names)
    Recipe(model, replace(settings, unsafe_prompts=6, benign_prompts=6, steps=2), tmp_path / "theirs").train()
    assert replaced(tmp_path / "theirs", names)


PICTURES = torch.zeros(1, 3, 8, 8)
GEOMETRY = Geometry(1, 1, 2, 4)
SMALL = {
    "heads.png": lambda path: plots.head_map(path, torch.zeros(2, 2), GEOMETRY, torch.ones(2, 2).bool(), "t"),
    "losses.png": lambda path: plots.loss_curve(path, [{"phase": "unlearn", "step": 0, "velocity_mse": 1.0}], ""),
    "pareto.png": lambda path: figures.pareto(path, [figures.Point("a", "b", 1.0, 0.5, None, 0.1)], "damage"),
    "matrix.png": lambda path: figures.matrix(path, torch.zeros(1, 1), ["a"], ["b"], "c"),
    "curves.png": lambda path: figures.curves(path, {"a": {"b": [(0, 0.5)]}}, "c", "d"),
    "pairs.png": lambda path: comparison_grid(path, [("a", PICTURES)]),
    "bench.png": lambda path: bench_report.write(path.parent, [], {"rank": [(1, 1.0)]}, "s"),
    "0000.png": lambda path: write_pictures(path.parent, 0, PICTURES, {}, "key"),
    "0000.a.safetensors": lambda path: write_scores(path.parent, 0, "a", {"x": torch.zeros(1)}, "key"),
}


@pytest.mark.parametrize("name", SMALL)
def test_each_writer_writes_over_a_link(tmp_path, trap, name):
    trap(tmp_path / "theirs", [name])
    SMALL[name](tmp_path / "theirs" / name)
    assert replaced(tmp_path / "theirs", [name])
    assert not list((tmp_path / "theirs").glob(".*"))


def test_embeddings_are_written_over_links(tmp_path, trap):
    cache = EmbeddingCache(tmp_path / "theirs", "f", 4)
    trap(cache.folder, [cache.path("a").name])
    cache.write(["a"], torch.zeros(1, 2, 3), torch.zeros(1, 3))
    assert replaced(cache.folder, [cache.path("a").name]) and cache.read(["a"]) is not None


def test_an_evaluation_goes_into_no_folder_behind_a_link(tmp_path, trap):
    asked = PromptSet("unsafe", "unsafe", "star", ())
    e = Evaluation(None, [asked], [unprotected()], [], tmp_path / "theirs")
    _check(e)  # control: without a link
    e.out.mkdir()
    (e.out / "unprotected").symlink_to(trap.target.parent)
    with pytest.raises(ValueError, match="unprotected: got a link, expected a folder of its own"):
        _check(e)


def writes(source: str) -> list[str]:
    """Calls in a file that write at a name of their own choice: not at one that `placed` gave, and not by our own
    functions.
    """
    tree = ast.parse(source)
    for node in ast.walk(tree):
        for child in ast.iter_child_nodes(node):
            child.parent = node
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return [ast.unparse(call) for call in calls if _writes(call) and not _is_placed(call)]


def _writes(call: ast.Call) -> bool:
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    if name == "open":
        words = [a.value for a in (*call.args, *(k.value for k in call.keywords)) if isinstance(a, ast.Constant)]
        return any(isinstance(word, str) and set(word) & set("wxa+") and len(word) < 4 for word in words)
    if name == "replace":
        return ast.unparse(call.func) == "os.replace"  # texts have such a method too
    if name in ("write_text", "write_bytes"):
        return isinstance(call.func, ast.Attribute)  # the method of a path
    if name == "save":
        return "format" in {keyword.arg for keyword in call.keywords}  # of Pillow
    return name in WRITERS


def _is_placed(call: ast.Call) -> bool:
    """Whether it stands in a `with placed(...) as new` and speaks of `new`."""
    words, node = {n.id for n in ast.walk(call) if isinstance(n, ast.Name)}, call
    while node := getattr(node, "parent", None):
        if isinstance(node, ast.With):
            for item in node.items:
                given = getattr(getattr(item.context_expr, "func", None), "id", "") == "placed"
                if given and isinstance(item.optional_vars, ast.Name) and item.optional_vars.id in words:
                    return True
    return False


def test_every_write_goes_through_one_function():
    rooms = ("nodes", "saferope", "saferope_benchmark", "saferope_core", "saferope_credentials")
    rooms += ("saferope_training", "workflow_lint")
    files = [f for room in rooms for f in sorted((ROOT / room).rglob("*.py"))]
    found = {f.relative_to(ROOT).as_posix(): writes(f.read_text(encoding="utf-8")) for f in files}
    found = {name: calls for name, calls in found.items() if calls and name != "saferope_core/concept/files.py"}
    assert found.keys() <= ELSEWHERE.keys(), found


@pytest.mark.parametrize(
    ("line", "count"),
    [
        ("figure.savefig(path)", 1),
        ("path.write_text('x')", 1),
        ("open(path, 'w')", 1),
        ("path.open('a', encoding='utf-8')", 1),
        ("save_file(tensors, path)", 1),
        ("os.replace(a, b)", 1),
        ("with placed(path) as new:\n    figure.savefig(path)", 1),
        ("with placed(path) as new:\n    figure.savefig(new)", 0),
        ("write_text(path, 'x')", 0),
        ("open(path, 'rb')", 0),
        ("text.replace('a', 'b')", 0),
    ],
)
def test_writes_past_it_are_found(line, count):
    assert len(writes(line)) == count
