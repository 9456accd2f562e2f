"""What all tests share: fixed seeds, ComfyUI's modules in this process (`comfy`), the pack as ComfyUI loads it
(`pack`).

Where no ComfyUI is to be found these fixtures fail, and say what to do: a host test that is skipped proves nothing.
A whole server, over HTTP, is in host/conftest.py.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.util
import os
import random
import sys

import pytest
import torch

from dev.comfyui import ROOT, find_comfyui

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before any kernel is read: the GPU form runs here on CPU tensors


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A process takes whole files, whose tests share fixtures, and one process all of tests/host, which
    share a server."""
    for item in items:
        file = item.path.relative_to(ROOT / "tests")
        item.add_marker(pytest.mark.xdist_group("host" if file.parts[0] == "host" else str(file)))


@pytest.fixture(autouse=True)
def _seeds():
    random.seed(0)
    torch.manual_seed(0)


class _HostsNodes(importlib.abc.MetaPathFinder):
    """`import nodes` means ComfyUI's nodes.py, here as in ComfyUI, though our own nodes/ is first on the path."""

    def __init__(self, comfyui):
        self.file = comfyui / "nodes.py"

    def find_spec(self, fullname, path=None, target=None):
        return importlib.util.spec_from_file_location("nodes", self.file) if fullname == "nodes" else None


@pytest.fixture(scope="session")
def comfy(tmp_path_factory):
    """ComfyUI's `comfy` package, on the CPU, with models, output etc. below a temporary folder.

    ComfyUI's folder goes to the end of the path: it has names such as `utils`, `app` and `tests`, which must not win
    over anybody's. It reads its options from the command line when `comfy.cli_args` is first imported; that is the only
    moment it sees ours. The path and the modules stay: whatever was imported cannot be taken back.
    """
    comfyui = find_comfyui()
    sys.path.append(str(comfyui))
    sys.meta_path.insert(0, _HostsNodes(comfyui))
    import comfy.options

    comfy.options.enable_args_parsing()
    base = tmp_path_factory.mktemp("comfyui")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["comfyui", "--cpu", "--base-directory", str(base)])
        importlib.import_module("comfy.cli_args")
    return comfy


@pytest.fixture(scope="session")
def pack(comfy):
    """The pack's module, loaded as ComfyUI loads it: from its folder, under its path as a name, relative imports only.

    Its parts are attributes once imported: `pack.nodes.apply`, `pack.saferope_core`. These are a second copy of the
    core: never compare classes with those of `import saferope_core`.
    """
    name = str(ROOT).replace(".", "_x_")
    spec = importlib.util.spec_from_file_location(name, ROOT / "__init__.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
