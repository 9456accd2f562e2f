"""What an installation holds: six packages, their data, one command, and no word about torch."""

from __future__ import annotations

import re
import subprocess
import sys
import sysconfig
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
import tomllib

from dev.comfyui import ROOT, copy_pack, pack_files

PACKAGES = {"saferope", "saferope_benchmark", "saferope_core", "saferope_credentials", "saferope_training"}
PACKAGES |= {"tinyworld", "workflow_lint"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy: setuptools leaves a build folder, from which files deleted since would come back."""
    source, out = copy_pack(tmp_path_factory.mktemp("source") / "saferope"), tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", out, source]
    subprocess.run(command, check=True)
    (file,) = out.glob("*.whl")
    with zipfile.ZipFile(file) as archive:
        yield archive


def metadata(wheel):
    name = next(name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    return Parser().parsestr(wheel.read(name).decode())


def test_wheel_has_our_packages_alone(wheel):
    tops = {name.split("/")[0] for name in wheel.namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == PACKAGES


def test_wheel_has_every_file_of_them(wheel):
    """Also of sub-packages and data, which setuptools takes only when told."""
    files = [file for file in pack_files() if file.parts[0] in PACKAGES]
    expected = {file.as_posix() for file in files}
    assert len(expected) > 20
    assert expected - set(wheel.namelist()) == set()


def test_licence_is_in_the_wheel(wheel):
    assert metadata(wheel)["License-Expression"] == "Apache-2.0"
    assert any(name.endswith("licenses/LICENSE") for name in wheel.namelist())


def test_torch_is_never_asked_for(wheel):
    """An installer could replace the user's CUDA build. And both lists that users install from say the same."""
    wanted = metadata(wheel).get_all("Requires-Dist")
    assert not [line for line in wanted if re.match(r"torch(?![\w-])", line)]
    listed = [line for line in (ROOT / "requirements.txt").read_text().splitlines() if not line.startswith("#")]
    assert [line for line in wanted if "extra ==" not in line] == listed


def test_versions_agree(wheel):
    from saferope_core.version import __version__

    assert metadata(wheel)["Version"] == __version__


def test_the_registry_gets_addresses_and_pictures(wheel):
    """As ComfyUI's registry asks: a square icon, a banner of 21:9, both at the address of the repository."""
    from PIL import Image

    urls = dict(line.split(", ", 1) for line in metadata(wheel).get_all("Project-URL"))
    assert {"Repository", "Documentation", "Bug Tracker", "Changelog"} <= urls.keys()
    comfy = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["comfy"]
    owner = urls["Repository"].removeprefix("https://github.com/")
    for key, (width, height) in {"Icon": (400, 400), "Banner": (1260, 540)}.items():
        file = comfy[key].removeprefix(f"https://raw.githubusercontent.com/{owner}/main/")
        with Image.open(ROOT / file) as picture:
            assert picture.size == (width, height)


def test_pins_meet_the_ranges(wheel):
    """What the tests run with is within what users are told they may install."""
    from packaging.requirements import Requirement

    lines = (ROOT / "dev" / "requirements.txt").read_text().splitlines()
    pinned = [Requirement(line.split("#")[0]) for line in lines if "==" in line]
    pins = {each.name: str(each.specifier).removeprefix("==") for each in pinned}
    ranges = [Requirement(line) for line in metadata(wheel).get_all("Requires-Dist")]
    assert [str(r) for r in ranges if r.name != "saferope" and not r.specifier.contains(pins[r.name])] == []


def test_command_runs_from_anywhere(tmp_path):
    command = Path(sysconfig.get_path("scripts")) / "saferope"
    done = subprocess.run([command, "--help"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "train" in done.stdout


def test_installed_project_does_not_shadow_comfyui(tmp_path):
    """ComfyUI's own module is called `nodes`; a `tests` or `dev` on everybody's path would be as rude."""
    code = "from importlib.util import find_spec as f; "
    code += "print([f(n).origin or '' for n in ('nodes', 'tests', 'dev') if f(n)])"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert str(ROOT) not in done.stdout.replace(str(ROOT / ".venv"), ""), "other projects may be rude, ours is not"
    present = code.replace("'nodes', 'tests', 'dev'", f"{', '.join(map(repr, sorted(PACKAGES)))}")
    done = subprocess.run([sys.executable, "-c", present], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert len(done.stdout.split(",")) == len(PACKAGES)
