"""The core stands alone: no host, no trainer, and it never says its own name."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import saferope_core

CORE = Path(saferope_core.__file__).parent
ALLOWED = {"torch", "safetensors"} | sys.stdlib_module_names
HOSTS = {"comfy", "comfy_api", "diffusers", "transformers", "accelerate", "nodes", "training", "tinyworld"}


def modules_after(statement):
    """Top-level names a fresh interpreter has imported after this statement."""
    code = f"import sys; sys.path.insert(0, {str(CORE.parent)!r}); {statement}; print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return {name.partition(".")[0] for name in run.stdout.split()}


def test_importing_the_core_brings_no_host():
    assert not modules_after("import saferope_core") & HOSTS
    assert "wave" in modules_after("import wave")  # control


def absolute_imports(source):
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module.partition(".")[0]


@pytest.mark.parametrize("path", sorted(CORE.glob("*.py")), ids=lambda path: path.name)
def test_imports_are_torch_safetensors_or_relative(path):
    """ComfyUI reaches the core under a name that is the user's folder: an absolute import of itself fails there."""
    assert set(absolute_imports(path.read_text(encoding="utf-8"))) <= ALLOWED


def test_the_check_sees_forbidden_imports():
    assert list(
        absolute_imports("import diffusers.models\nfrom saferope_core.risk import gated\nfrom .x import y")
    ) == [
        "diffusers",
        "saferope_core",
    ]


def test_all_names_exist():
    assert all(hasattr(saferope_core, name) for name in saferope_core.__all__)
