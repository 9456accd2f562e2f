"""A real ComfyUI as a process of its own, asked over HTTP.

    @pytest.mark.host
    def test_my_workflow(comfyui):
        comfyui.add_concept(path)                      # -> the file name to choose in the Load node
        outputs = comfyui.run(workflow_in_api_form)    # raises ComfyUIError with the node's own error
        (picture,) = comfyui.images(outputs)           # PIL, RGB

The server is one for the session: ComfyUI caches nodes from one workflow to the next. A test that needs its own
(another pack, an empty cache) takes `start_comfyui`.
"""

from __future__ import annotations

from contextlib import ExitStack

import pytest

from dev.comfyui import ComfyUI, copy_pack


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The file that abuses the server comes after those that only use it."""
    items.sort(key=lambda item: item.path.name == "test_hostile_workflows.py")


@pytest.fixture(scope="session")
def comfyui(tmp_path_factory):
    """The server, with the pack in custom_nodes as `git clone` would leave it: a copy, without what git ignores."""
    base = tmp_path_factory.mktemp("server")
    with ComfyUI(base, pack=copy_pack(base / "custom_nodes" / "SafeRoPE")) as server:
        yield server


@pytest.fixture
def start_comfyui(tmp_path):
    """start_comfyui(pack) -> a server of one's own with that folder as the pack; ended after the test."""
    with ExitStack() as servers:
        yield lambda pack: servers.enter_context(ComfyUI(tmp_path / "server", pack=pack))
