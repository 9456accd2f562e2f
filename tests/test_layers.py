"""Who may import whom: hosts above, grounds below, every arrow points down (CONTRIBUTING.md has the picture).

Why a test: with the repository on the path, a core file that says `from saferope_core.x import y` passes everywhere
but in ComfyUI, where the core has no such name.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from dev.comfyui import ROOT

OURS = {"nodes", "saferope_core", "saferope_training", "tests", "tinyworld", "training", "dev"}
COMFYUI = {
    "comfy",
    "comfy_api",
    "comfy_execution",
    "comfy_extras",
    "comfyui_version",
    "folder_paths",
    "node_helpers",
    "server",
}
BROUGHT = {"torch", "safetensors"}
BROUGHT_BY_COMFYUI = BROUGHT | {"numpy", "PIL", "transformers", "tokenizers", "einops", "tqdm"}
STDLIB = set(sys.stdlib_module_names)
# The trainer's own parts, bottom first: each may use those of rows above it in this list, and its own
TRAINER = (
    {"console", "settings", "processes"},
    {"plots"},
    {"stages", "pictures"},
    {"flux"},
    {"prompts"},
    {"making"},
    {"baselines"},
    {"scores"},
    {"evaluation"},
    {"suites"},
    {"audit", "bench", "convert", "generate", "inspect"},
    {"commands"},
    {"cli"},
    {"__main__"},
)


class Rule(NamedTuple):
    may: set[str] | None  # absolute imports allowed, None: whatever is not forbidden
    must_not: set[str]  # absolute imports forbidden
    above: set[str] = frozenset()  # folders of ours reached by `..folder`


RULES = {
    "saferope_core": Rule(STDLIB | BROUGHT, set()),
    "tinyworld": Rule(None, OURS | COMFYUI),
    "training": Rule(None, COMFYUI | {"nodes", "training", "saferope_training", "tests", "dev"}),
    "nodes": Rule(STDLIB | BROUGHT_BY_COMFYUI | COMFYUI, set(), above={"saferope_core", "tinyworld"}),
}


def violations(source: str, rule: Rule, depth: int = 0) -> list[str]:
    """Imports in `source` that `rule` forbids; `depth`: folders between the file and the rule's folder."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if not _allowed(alias.name, rule)]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found += [node.module] if not _allowed(node.module, rule) else []
        elif isinstance(node, ast.ImportFrom) and node.level > depth + 1:
            reached = [node.module] if node.module else [alias.name for alias in node.names]
            leaves = node.level > depth + 2  # the repository itself
            found += ["." * node.level + name for name in reached if leaves or name.split(".")[0] not in rule.above]
    return found


def _allowed(module: str, rule: Rule) -> bool:
    top = module.split(".")[0]
    return top not in rule.must_not and (rule.may is None or top in rule.may)


def sources(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


@pytest.mark.parametrize("folder", RULES)
def test_imports_point_down(folder):
    files = sources(folder)
    assert len(files) > 3, "nothing to look at"
    depths = {file: len(file.relative_to(ROOT / folder).parts) - 1 for file in files}
    found = {file: violations(file.read_text(encoding="utf-8"), RULES[folder], depths[file]) for file in files}
    assert {str(file.relative_to(ROOT)): names for file, names in found.items() if names} == {}


@pytest.mark.parametrize(
    ("folder", "line"),
    [
        ("saferope_core", "from saferope_core.risk import gated"),
        ("saferope_core", "import diffusers"),
        ("saferope_core", "from ..tinyworld import world"),
        ("saferope_core", "def f():\n    from comfy.ldm.flux import model"),
        ("tinyworld", "from saferope_core import Concept"),
        ("tinyworld", "from tinyworld import world"),
        ("training", "import comfy.sd"),
        ("training", "from ..saferope_core import Concept"),
        ("training", "from training import losses"),
        ("nodes", "from saferope_core import Concept"),
        ("nodes", "from ..training import losses"),
        ("nodes", "from .. import training"),
        ("nodes", "from diffusers import FluxPipeline"),
        ("nodes", "import nodes"),
        ("nodes", "from ...other_pack import anything"),
    ],
)
def test_wrong_imports_are_found(folder, line):
    assert len(violations(line, RULES[folder])) == 1


@pytest.mark.parametrize(
    ("folder", "line"),
    [
        ("saferope_core", "from .risk import gated"),
        ("training", "from saferope_core import Concept"),
        ("nodes", "from ..tinyworld.codec import BlockDCT"),
        ("nodes", "import comfy.utils"),
    ],
)
def test_right_imports_are_let_through(folder, line):
    assert violations(line, RULES[folder]) == []


def reached(source: str, parts: tuple[str, ...]) -> set[str]:
    """Parts of the trainer that a file imports; `parts`: the file's path inside of it."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.level:
            package = parts[:-1][: len(parts) - node.level]
            names = [node.module] if node.module else [alias.name for alias in node.names]
            found |= {(package[0] if package else name.split(".")[0]) for name in names}
    return found


def downward(part: str, others: set[str]) -> bool:
    row = next(row for row, parts in enumerate(TRAINER) if part in parts)
    return others - {part} <= set().union(*TRAINER[:row])


def part_of(file: Path) -> tuple[str, tuple[str, ...]]:
    parts = file.relative_to(ROOT / "training").with_suffix("").parts
    return parts[0], parts


def test_parts_of_the_trainer_import_downwards():
    files = [file for file in sources("training") if part_of(file)[0] != "__init__"]
    assert {part_of(file)[0] for file in files} == set().union(*TRAINER), "every part has its row"
    wrong = {str(f): reached(f.read_text(encoding="utf-8"), part_of(f)[1]) for f in files}
    assert {name: parts for name, parts in wrong.items() if not downward(part_of(Path(name))[0], parts)} == {}


@pytest.mark.parametrize(
    ("file", "line", "right"),
    [
        (("flux", "models"), "from ..making.recipe import Recipe", False),
        (("prompts", "__init__"), "def f():\n    from .. import evaluation", False),
        (("flux", "__init__"), "from ..prompts import sources", False),
        (("evaluation", "tables"), "from ..scores import Measure", True),
        (("scores", "clip"), "from . import Metric", True),
        (("cli",), "from .commands import files", True),
    ],
)
def test_imports_upwards_in_the_trainer_are_found(file, line, right):
    assert downward(file[0], reached(line, file)) == right


@pytest.mark.parametrize("folder", ["saferope_core", "tinyworld", "nodes", "training"])
def test_syntax_is_of_the_oldest_python(folder):
    for file in sources(folder):
        ast.parse(file.read_text(encoding="utf-8"), feature_version=(3, 10))


@pytest.mark.parametrize(
    ("mark", "only"), [("set_model_attn1_patch", "nodes/patch.py"), ("norm_added_", "training/flux/attach.py")]
)
def test_one_file_knows_each_hosts_attention(mark, only):
    files = [file for folder in RULES for file in sources(folder) if mark in file.read_text(encoding="utf-8")]
    assert [file.relative_to(ROOT).as_posix() for file in files] == [only]


def modules_after(statement: str) -> set[str]:
    """Top-level modules in a fresh interpreter after `statement`; relative to the repository, started elsewhere."""
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); {statement}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd="/", capture_output=True, text=True, check=True)
    return {name.split(".")[0] for name in done.stdout.split()}


@pytest.mark.parametrize("module", ["saferope_core", "tinyworld.codec", "tinyworld.world"])
def test_what_nodes_import_brings_no_host(module):
    assert modules_after(f"import {module}") & {"diffusers", "transformers", "comfy", "typer", "matplotlib"} == set()


def test_fresh_interpreter_tells_what_was_imported():
    assert "diffusers" in modules_after("import diffusers")


def test_command_line_answers_before_torch_is_loaded():
    """Help should not take seconds."""
    assert modules_after("import training.cli") & {"torch", "diffusers", "transformers"} == set()
