"""What the pack may do in somebody's ComfyUI: no code from strings, no other program, no network, no pickle. And what
it leans on.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import tomllib

from dev.comfyui import ROOT

PACK = ("nodes", "saferope_core", "saferope_credentials", "tinyworld")  # what ComfyUI imports
CALLS = {"eval", "exec", "compile", "__import__", "breakpoint", "input"}
ATTRIBUTES = {
    ("os", "system"),
    ("os", "popen"),
    ("os", "execv"),
    ("torch", "load"),
    ("torch", "hub"),
    ("builtins", "eval"),
}
MODULES = {
    "aiohttp",
    "ctypes",
    "ftplib",
    "http",
    "huggingface_hub",
    "marshal",
    "multiprocessing",
    "pickle",
    "pip",
    "requests",
}
MODULES |= {"runpy", "shelve", "smtplib", "socket", "ssl", "subprocess", "telnetlib", "urllib", "webbrowser", "xmlrpc"}


def forbidden(source: str) -> list[str]:
    """What a file does that the pack must not do."""
    found, tree = [], ast.parse(source)
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    tensors_only = {id(call.func) for call in calls if "weights_only=True" in ast.unparse(call)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.split(".")[0] in MODULES]
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module.split(".")[0] in MODULES:
            found.append(node.module)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in CALLS:
            found.append(node.func.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and id(node) not in tensors_only:
            if (node.value.id, node.attr) in ATTRIBUTES:
                found.append(f"{node.value.id}.{node.attr}")
        elif isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
            found.append(node.arg)
    return found


@pytest.mark.parametrize("folder", PACK)
def test_no_code_from_strings_no_programs_no_network_no_pickle(folder):
    files = [*(ROOT / folder).rglob("*.py"), ROOT / "__init__.py"]
    assert len(files) > 3
    found = {file.relative_to(ROOT).as_posix(): forbidden(file.read_text(encoding="utf-8")) for file in files}
    assert {name: what for name, what in found.items() if what} == {}


@pytest.mark.parametrize(
    "line",
    [
        "eval('1')",
        "import pickle",
        "from urllib.request import urlopen",
        "torch.load(x)",
        "torch.load(x, weights_only=False)",
        "import os; os.system('x')",
        "def f():\n  import subprocess",
        "AutoModel.from_pretrained(x, trust_remote_code=True)",
        "__import__('socket')",
    ],
)
def test_what_is_forbidden_is_found(line):
    assert len(forbidden(line)) == 1


def test_the_trainer_unpickles_only_tensors():
    """`saferope convert` reads the published .pth files: with weights_only, which runs no code."""
    calls = [
        node
        for file in ROOT.glob("saferope*/**/*.py")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load"
    ]
    assert calls
    for call in calls:
        assert {k.arg: ast.unparse(k.value) for k in call.keywords}.get("weights_only") == "True"
    files = [
        file for file in ROOT.glob("saferope*/**/*.py") if re.search(r"\btrust_remote_code=True", file.read_text())
    ]
    assert files == []


SCRIPT_ASKS = re.compile(
    r"\bfetch\w*\([^)]*\)|\b(?:innerHTML|outerHTML|eval|Function|import\(|XMLHttpRequest|WebSocket)\b"
)
SCRIPT_KEEPS = re.compile(r"\b(?:localStorage|sessionStorage|cookie|indexedDB|sendBeacon|document|prototype)\b")
SCRIPT_MAY = ['fetchApi("/i18n")']


def reaches(script: str) -> list[str]:
    """What a script asks the network, builds or keeps."""
    return [*SCRIPT_ASKS.findall(script), *SCRIPT_KEEPS.findall(script)]


def test_our_script_in_the_page_asks_for_translations_alone():
    files = [file for file in (ROOT / "web").rglob("*") if file.is_file() and file.suffix != ".md"]
    assert files == [ROOT / "web" / "saferope.js"]
    script = files[0].read_text(encoding="utf-8")
    assert reaches(script) == SCRIPT_MAY
    assert re.findall(r'from "(.*)"', script) == ["../../scripts/api.js", "../../scripts/app.js"]


@pytest.mark.parametrize("line", ["fetch('https://a.b')", "x.innerHTML = y", "localStorage.a = 1", "new WebSocket(x)"])
def test_what_a_script_may_not_is_found(line):
    assert reaches(line) != [] and reaches(line) != SCRIPT_MAY


def dependencies() -> list[tuple[str, str]]:
    """(requirement, the line it stands in) of pyproject.toml, our own extras left out."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    project = tomllib.loads(text)["project"]
    wanted = [
        *project["dependencies"],
        *(each for extra in project["optional-dependencies"].values() for each in extra),
    ]
    lines = text.splitlines()
    return [(each, next(l for l in lines if f'"{each}"' in l)) for each in wanted if not each.startswith("saferope")]


def test_every_dependency_has_a_range_and_a_reason():
    assert len(dependencies()) > 15
    for requirement, line in dependencies():
        assert re.fullmatch(r"[a-z0-9-]+(>=|==)[\d.]+(; python_version >= '3\.\d+')?", requirement), requirement
        assert re.search(r'",\s+# \w', line), f"{requirement}: why?"


def test_every_dependency_s_licence_is_listed():
    page = (ROOT / "docs" / "security.md").read_text(encoding="utf-8")
    for requirement, _ in dependencies():
        name = re.split("[><=]", requirement)[0]
        assert re.search(rf"^\| {re.escape(name)} \| [\w.-]+", page, re.M), name


def test_every_test_that_a_promise_names_is_there():
    """docs/security.md points at tests by file and name."""
    page = (ROOT / "docs" / "security.md").read_text(encoding="utf-8")
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", page)
    assert len(named) > 25
    for file, name in named:
        assert f"def {name}(" in Path(ROOT / file).read_text(encoding="utf-8"), f"{file}::{name}"


def rows() -> list[str]:
    """The rows of every table of docs/security.md that has a column of tests."""
    page = (ROOT / "docs" / "security.md").read_text(encoding="utf-8")
    tables = [block.split("\n") for block in re.findall(r"(?:^\|.*\n)+", page, re.M)]
    last = ("test", "now held by")
    return [
        row
        for head, _, *body in (table[:-1] for table in tables)
        if head.split("|")[-2].strip() in last
        for row in body
    ]


@pytest.mark.parametrize("row", rows(), ids=lambda row: row.split("|")[1].strip()[:60])
def test_every_promise_names_a_test(row):
    assert re.search(r"`tests/[\w/]+\.py::test_\w+`", row.split("|")[-2]), row


def test_rows_without_a_test_would_be_seen():
    assert len(rows()) > 100
    assert not re.search(r"`tests/[\w/]+\.py::test_\w+`", "| a promise | none |".split("|")[-2])


def test_python_versions_are_those_that_are_promised():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["requires-python"] == ">=3.10"
    named = {
        each.rsplit(" ", 1)[-1]
        for each in project["classifiers"]
        if each.startswith("Programming Language :: Python :: 3.")
    }
    assert named == {"3.10", "3.11", "3.12", "3.13"}
