"""A real ComfyUI: found, started headless on the CPU with this pack and asked over HTTP, or loaded in this process.

    with ComfyUI(Path("base")) as server:
        outputs = server.run(json.loads(Path("workflow_api.json").read_text()))
        server.images(outputs)[0].save("picture.png")

Standard library only (pictures: Pillow), so that the set-up can import it before anything is installed.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.util
import io
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
UNINSTALLED = ROOT / "dev" / "uninstalled"  # on the process's path: hides the developer's editable installation
FETCHED = ROOT / ".cache" / "ComfyUI"  # where the set-up puts the one it fetches
PACK = "SafeRoPE"  # the pack's folder in custom_nodes
START_SECONDS = 600  # 10 s on two idle cores; minutes where a training runs beside it
POLL_SECONDS = 0.1
TAIL_LINES = 40  # of the log, in errors


class ComfyUIError(RuntimeError):
    """ComfyUI did not start, refused a workflow, or failed in one. The message tells which, with the reason it gave."""


def find_comfyui() -> Path:
    """The checkout named by COMFYUI_PATH, else the one the set-up fetched. ValueError where there is none."""
    named = os.environ.get("COMFYUI_PATH")
    path = Path(named).expanduser() if named else FETCHED
    if (path / "main.py").is_file() and (path / "comfy").is_dir():
        return path.resolve()
    if named:
        raise ValueError(
            f"COMFYUI_PATH is {named!r}, but no ComfyUI lies there (no main.py beside a folder `comfy`). "
            "Set it to a ComfyUI checkout, or unset it to have one fetched."
        )
    raise ValueError("No ComfyUI found. Run `make setup` to fetch one, or set COMFYUI_PATH to a ComfyUI checkout.")


def pack_files(root: Path = ROOT) -> list[Path]:
    """The files that a clone of the working tree would hold, relative to it: tracked by git, or new and not
    ignored."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=root, check=True, capture_output=True).stdout.decode()
    return sorted(Path(name) for name in set(listed.split("\0")) if name and (root / name).is_file())


def copy_pack(target: Path, root: Path = ROOT) -> Path:
    """The pack as a user's `git clone` leaves it: nothing ignored, nothing built. Returns `target`."""
    for name in pack_files(root):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(root / name, target / name)
    return target


class ComfyUI:
    """A ComfyUI process with its own base folder; a context manager that always ends it.

    base: models, custom_nodes, input, output, temp and user lie here; made where missing. pack: a folder to link into
    custom_nodes (this checkout by default), or None for a pack that already lies in `base / "custom_nodes"`.
    """

    def __init__(
        self, base: Path, pack: Path | None = ROOT, comfyui: Path | None = None, python: str = sys.executable
    ) -> None:
        self.base, self.pack, self.python = Path(base).resolve(), pack, python
        self.comfyui = comfyui or find_comfyui()
        self.log = self.base / "comfyui.log"
        self.concepts = self.base / "models" / "saferope"
        self.process: subprocess.Popen | None = None
        self.address = ""

    def __enter__(self) -> ComfyUI:
        for folder in (self.base / "custom_nodes", self.base / "input", self.base / "output", self.concepts):
            folder.mkdir(parents=True, exist_ok=True)
        link = self.base / "custom_nodes" / PACK
        if self.pack is not None and not link.exists():
            link.symlink_to(self.pack, target_is_directory=True)
        self._start(_free_port())
        try:
            self._wait_until_ready()
        except BaseException:  # Ctrl-C included: a `with` that was never entered is never left
            self.stop()
            raise
        return self

    def __exit__(self, *error) -> None:
        self.stop()

    def _start(self, port: int) -> None:
        self.address = f"http://127.0.0.1:{port}"
        flags = ["--cpu", "--port", str(port), "--listen", "127.0.0.1", "--base-directory", str(self.base)]
        flags += ["--database-url", "sqlite:///:memory:", "--disable-api-nodes"]  # the default lies in ComfyUI's folder
        # a log that is whole when we fail; nothing downloaded
        env = os.environ | {"PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(UNINSTALLED)}
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [self.python, "main.py", *flags], cwd=self.comfyui, stdout=log, stderr=log, env=env
            )

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            self._require_running("start")
            try:
                return self.get("/system_stats")
            except (urllib.error.URLError, OSError):
                time.sleep(POLL_SECONDS)
        raise ComfyUIError(f"ComfyUI did not answer within {START_SECONDS} s. Its log ends:\n{self.log_tail()}")

    def _require_running(self, task: str) -> None:
        code = self.process.poll() if self.process else None
        if self.process is None or code is not None:
            raise ComfyUIError(f"ComfyUI ended (exit code {code}) before it could {task}. Log:\n{self.log_tail()}")

    def stop(self) -> None:
        """Ends the process, by force after ten seconds. Nothing to do where it has ended."""
        if self.process is None:
            return
        self.process.terminate()
        try:
            self.process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def get(self, path: str) -> Any:
        """The JSON that ComfyUI answers to GET `path`."""
        return json.loads(self._read(path))

    def _read(self, path: str) -> bytes:
        with urllib.request.urlopen(self.address + path, timeout=30) as answer:
            return answer.read()

    def object_info(self) -> dict:
        """Every node by its id, with inputs and outputs, as the browser sees them."""
        return self.get("/object_info")

    def run(self, prompt: dict, timeout: float = 600, workflow: dict | None = None) -> dict:
        """Runs a workflow in API form ({node id: {"class_type", "inputs"}}) to its end.

        workflow: its form in the editor, which ComfyUI then writes into pictures beside the API form.

        Returns the history's outputs, {node id: {"images": [...], ...}}; a node that was cached shows its outputs too.
        Raises ComfyUIError where ComfyUI refuses the workflow, a node raises, or `timeout` seconds have passed.
        """
        key = self._queue(prompt, workflow)
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            self._require_running("finish the workflow")
            entry = self.get(f"/history/{key}").get(key)
            if entry and entry["status"]["completed"]:
                return entry["outputs"]
            if entry:
                raise ComfyUIError(_failure(entry["status"]["messages"]))
            time.sleep(POLL_SECONDS)
        raise ComfyUIError(f"The workflow did not finish within {timeout:g} s. ComfyUI's log ends:\n{self.log_tail()}")

    def _queue(self, prompt: dict, workflow: dict | None) -> str:
        extra = {"extra_data": {"extra_pnginfo": {"workflow": workflow}}} if workflow else {}
        try:
            answer = self._post("/prompt", {"prompt": prompt} | extra)
        except urllib.error.HTTPError as error:
            raise ComfyUIError(f"ComfyUI refused the workflow: {error.read().decode()}") from None
        if answer["node_errors"]:  # it would run the other outputs; a workflow that is shown must be whole
            self._post("/queue", {"delete": [answer["prompt_id"]]})
            self._post("/interrupt", {"prompt_id": answer["prompt_id"]})
            raise ComfyUIError(f"ComfyUI refused the workflow in part: {json.dumps(answer['node_errors'])}")
        return answer["prompt_id"]

    def _post(self, path: str, body: dict) -> dict:
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self.address + path, json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.loads(answer.read() or "{}")

    def image(self, reference: dict) -> Any:
        """The picture (PIL) of `{"filename", "subfolder", "type"}`, an entry of a node's "images"."""
        from PIL import Image

        return Image.open(io.BytesIO(self.file(reference))).convert("RGB")

    def file(self, reference: dict) -> bytes:
        """The bytes of the picture's file, metadata included."""
        return self._read("/view?" + urllib.parse.urlencode(reference))

    def images(self, outputs: dict) -> list:
        """All pictures (PIL) of a run's outputs, in the order of `references`."""
        return [self.image(reference) for reference in self.references(outputs)]

    def references(self, outputs: dict) -> list[dict]:
        """The entry of each picture of a run's outputs, in the order of node ids as numbers, then of each batch."""
        nodes = sorted(outputs, key=lambda node: (len(node), node))
        return [reference for node in nodes for reference in outputs[node].get("images", [])]

    def add_concept(self, file: Path) -> str:
        """Copies a concept file into models/saferope; returns the name the Load node knows it by."""
        return shutil.copyfile(file, self.concepts / Path(file).name).name

    def failed_imports(self) -> list[str]:
        """Log lines of packs that ComfyUI could not import: it goes on without them.
        Its own nodes are not among them."""
        return [line for line in self.log.read_text(errors="replace").splitlines() if "(IMPORT FAILED)" in line]

    def log_tail(self, lines: int = TAIL_LINES) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])


class _HostsNodes(importlib.abc.MetaPathFinder):
    """`import nodes` means ComfyUI's nodes.py, here as in ComfyUI, though our own nodes/ is first on the path."""

    def __init__(self, comfyui: Path) -> None:
        self.file = comfyui / "nodes.py"

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        return importlib.util.spec_from_file_location("nodes", self.file) if fullname == "nodes" else None


def load_comfy(base: Path, *flags: str) -> ModuleType:
    """ComfyUI's `comfy` package in this process, with models, output etc. below `base`, and these options.

    ComfyUI's folder goes to the end of the path: its `utils`, `app` and `tests` must not win over other packages of
    these names. ComfyUI reads options from the command line when `comfy.cli_args` is first imported. Ours stand there
    at that moment alone. The path and the modules stay, because Python cannot take an import back.
    """
    comfyui = find_comfyui()
    sys.path.append(str(comfyui))
    sys.meta_path.insert(0, _HostsNodes(comfyui))
    importlib.import_module("comfy.options").enable_args_parsing()
    given, sys.argv = sys.argv, ["comfyui", *flags, "--base-directory", str(base)]
    try:
        importlib.import_module("comfy.cli_args")
    finally:
        sys.argv = given
    return importlib.import_module("comfy")


def load_pack() -> ModuleType:
    """The pack's module, loaded as ComfyUI loads it: from its folder, under its path as a name, relative imports only.
    After `load_comfy`."""
    name = str(ROOT).replace(".", "_x_")
    spec = importlib.util.spec_from_file_location(name, ROOT / "__init__.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _failure(messages: list) -> str:
    for kind, detail in messages:
        if kind == "execution_error":
            trace = "".join(detail["traceback"])
            node = f"node {detail['node_id']} ({detail['node_type']})"
            return f"{node} raised {detail['exception_type']}: {detail['exception_message']}\n{trace}"
    return f"The workflow did not complete: {messages}"
