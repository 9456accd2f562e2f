"""What all tests share: fixed seeds, ComfyUI's modules in this process (`comfy`), the pack as ComfyUI loads it
(`pack`).

Where no ComfyUI is to be found these fixtures fail, and say what to do: a host test that is skipped proves nothing.
A whole server, over HTTP, is in host/conftest.py.
"""

from __future__ import annotations

import os
import random

import pytest
import torch

from dev.comfyui import ROOT, load_comfy, load_pack

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


@pytest.fixture(scope="session")
def comfy(tmp_path_factory):
    """ComfyUI's `comfy` package, on the CPU, with models, output etc. below a temporary folder."""
    return load_comfy(tmp_path_factory.mktemp("comfyui"), "--cpu")


@pytest.fixture(scope="session")
def pack(comfy):
    """The pack's module, loaded as ComfyUI loads it.

    Its parts are attributes once imported: `pack.nodes.apply`, `pack.saferope_core`. These are a second copy of the
    core: never compare classes with those of `import saferope_core`.
    """
    return load_pack()
