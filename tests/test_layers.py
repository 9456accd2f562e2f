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

OURS = {"nodes", "dev", "tests", "tinyworld", "workflow_lint", "saferope"}
OURS |= {"saferope_benchmark", "saferope_core", "saferope_credentials", "saferope_training"}
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
# Parts of a room, bottom first: each may use those of rows above it in this list, and its own
PARTS = {
    "saferope_core": (
        {"version", "presets"},
        {"maths"},
        {"concept"},
        {"measure", "run"},
    ),
    "saferope_training": (
        {"console", "settings", "processes"},
        {"plots"},
        {"stages"},
        {"flux"},
        {"prompts"},
        {"making"},
    ),
    "saferope_benchmark": (
        {"pictures", "plots", "prompt_sets", "sample"},
        {"costs", "baselines"},
        {"scores"},
        {"evaluation"},
        {"suites"},
    ),
    "saferope": (
        {"audit_cost", "concept_effect", "concept_report", "convert", "generate", "pipeline"},
        {"commands"},
        {"cli"},
        {"__main__"},
    ),
    "nodes": (
        {"inputs", "draw"},
        {"host"},
        {
            "apply",
            "calibrate",
            "combine",
            "inspect",
            "load",
            "risk_map",
            "risk_probe",
            "save",
            "save_image",
            "tiny_world",
        },
    ),
}


class Rule(NamedTuple):
    may: set[str] | None  # absolute imports allowed, None: whatever is not forbidden
    must_not: set[str]  # absolute imports forbidden
    above: set[str] = frozenset()  # folders of ours reached by `..folder`


NOT_BELOW = COMFYUI | {"nodes", "tests", "dev"}
RULES = {
    "saferope_core": Rule(STDLIB | BROUGHT | {"triton"}, set()),  # triton comes with torch on GPUs of Linux
    "tinyworld": Rule(None, OURS | COMFYUI),
    "workflow_lint": Rule(STDLIB | {"PIL"}, set()),
    "saferope_credentials": Rule(STDLIB | {"c2pa", "cryptography"}, set()),
    "saferope_training": Rule(
        None, NOT_BELOW | {"saferope", "saferope_benchmark", "workflow_lint", "saferope_training"}
    ),
    "saferope_benchmark": Rule(None, NOT_BELOW | {"saferope", "workflow_lint", "saferope_benchmark"}),
    "saferope": Rule(None, NOT_BELOW | {"saferope"}),
    "nodes": Rule(
        STDLIB | BROUGHT_BY_COMFYUI | COMFYUI, set(), above={"saferope_core", "saferope_credentials", "tinyworld"}
    ),
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
        ("saferope_core", "from saferope_core.maths.risk import gated"),
        ("saferope_core", "import diffusers"),
        ("saferope_core", "from ..tinyworld import world"),
        ("saferope_core", "def f():\n    from comfy.ldm.flux import model"),
        ("tinyworld", "from saferope_core import Concept"),
        ("tinyworld", "from tinyworld import world"),
        ("workflow_lint", "import torch"),
        ("workflow_lint", "from saferope_core import Concept"),
        ("saferope_training", "import comfy.sd"),
        ("saferope_training", "from ..saferope_core import Concept"),
        ("saferope_training", "from saferope_training import plots"),
        ("saferope_training", "from saferope_benchmark import scores"),
        ("saferope_benchmark", "from saferope.console import say"),
        ("saferope", "from nodes import Apply"),
        ("nodes", "from saferope_core import Concept"),
        ("nodes", "from ..saferope_training import plots"),
        ("nodes", "from .. import saferope_training"),
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
        ("saferope_training", "from saferope_core import Concept"),
        ("nodes", "from ..tinyworld.codec import BlockDCT"),
        ("nodes", "import comfy.utils"),
    ],
)
def test_right_imports_are_let_through(folder, line):
    assert violations(line, RULES[folder]) == []


def reached(source: str, parts: tuple[str, ...]) -> set[str]:
    """Parts of its room that a file imports; `parts`: the file's path inside of the room."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and 0 < node.level <= len(parts):
            package = parts[:-1][: len(parts) - node.level]
            names = [node.module] if node.module else [alias.name for alias in node.names]
            found |= {(package[0] if package else name.split(".")[0]) for name in names}
    return found


def downward(room: str, part: str, others: set[str]) -> bool:
    row = next(row for row, parts in enumerate(PARTS[room]) if part in parts)
    return others - {part} <= set().union(*PARTS[room][:row])


@pytest.mark.parametrize("room", PARTS)
def test_parts_of_a_room_import_downwards(room):
    paths = {file: file.relative_to(ROOT / room).with_suffix("").parts for file in sources(room)}
    paths = {file: parts for file, parts in paths.items() if parts != ("__init__",)}
    assert {parts[0] for parts in paths.values()} == set().union(*PARTS[room]), "every part has its row"
    found = {file: reached(file.read_text(encoding="utf-8"), parts) for file, parts in paths.items()}
    assert {str(file): each for file, each in found.items() if not downward(room, paths[file][0], each)} == {}


@pytest.mark.parametrize(
    ("room", "file", "line", "right"),
    [
        ("saferope_training", ("flux", "models"), "from ..making.recipe import Recipe", False),
        ("saferope_training", ("prompts", "__init__"), "def f():\n    from .. import making", False),
        ("saferope_training", ("flux", "__init__"), "from ..prompts import sources", False),
        ("saferope_benchmark", ("evaluation", "tables"), "from ..scores import Measure", True),
        ("saferope_benchmark", ("scores", "clip"), "from . import Metric", True),
        ("saferope", ("cli",), "from .commands import files", True),
        ("saferope_core", ("maths", "risk"), "from ..concept import Concept", False),
        ("nodes", ("apply",), "from .load import find", False),
    ],
)
def test_imports_upwards_in_a_room_are_found(room, file, line, right):
    assert downward(room, file[0], reached(line, file)) == right


@pytest.mark.parametrize("folder", list(RULES))
def test_syntax_is_of_the_oldest_python(folder):
    for file in sources(folder):
        ast.parse(file.read_text(encoding="utf-8"), feature_version=(3, 10))


@pytest.mark.parametrize(
    ("mark", "only"),
    [("set_model_attn1_patch", "nodes/host/patch.py"), ("norm_added", "saferope_training/flux/attach.py")],
)
def test_one_file_knows_each_hosts_attention(mark, only):
    files = [file for folder in RULES for file in sources(folder) if mark in file.read_text(encoding="utf-8")]
    assert [file.relative_to(ROOT).as_posix() for file in files] == [only]


def modules_after(statement: str) -> set[str]:
    """Top-level modules in a fresh interpreter after `statement`; relative to the repository, started elsewhere."""
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); {statement}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd="/", capture_output=True, text=True, check=True)
    return {name.split(".")[0] for name in done.stdout.split()}


@pytest.mark.parametrize("module", ["saferope_core", "tinyworld.codec", "tinyworld.second_detector"])
def test_what_nodes_import_brings_no_host(module):
    strangers = {"diffusers", "transformers", "comfy", "typer", "matplotlib", "rich"}
    assert modules_after(f"import {module}") & strangers == set()


def test_fresh_interpreter_tells_what_was_imported():
    assert "diffusers" in modules_after("import diffusers")


def test_command_line_answers_before_torch_is_loaded():
    """Help should not take seconds."""
    assert modules_after("import saferope.cli") & {"torch", "diffusers", "transformers"} == set()


def test_every_public_name_of_the_core_is_there():
    import saferope_core

    assert [name for name in saferope_core.__all__ if not hasattr(saferope_core, name)] == []
