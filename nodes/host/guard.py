"""Lets only a protected forward run the network of a protected model, as long as ComfyUI has that model loaded.

Some code asks neither our wrappers nor our attention patch: a sampler with a loop of its own over the network (XLabs),
or a guider whose extra pass brings options of its own. So hooks on modules that every picture needs ask us.

In ComfyUI all clones of a model share one network, and one of them is loaded at a time. An *injection* of the protected
clone puts the hooks there when that clone is loaded. It takes them off when the clone is unloaded or freed, or another
clone is loaded. The unprotected clone of the same network runs as ever. Hooks are used, not object patches: a name can
have one object patch only. After it ComfyUI puts back a bound method, a reference cycle that keeps the network in
memory.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import comfy.model_management
import torch
from comfy.patcher_extension import PatcherInjection

from .families import layout_of, parts, way
from .network import WRAPPER_KEY

HANDLES = (
    "saferope_handles"  # on a ModelPatcher: takes off its own hooks, at the latest when it is gone; a clone has none
)
NO_BACKWARD = -1  # torch's number of the backward pass that this thread is in
HOSTS = ("torch", "comfy", "contextlib", "functools")  # packages that run a network for other code


def guard(patcher: Any) -> None:
    """From its next loading on, the network of this ModelPatcher raises RuntimeError outside of `protected_forward`."""
    patcher.set_injections(WRAPPER_KEY, [PatcherInjection(_watch, _release)])


@contextmanager
def protected_forward(base_model: Any) -> Iterator[None]:
    """While it lasts this thread may run the network of `base_model` (ModelPatcher.model)."""
    _forwards.models.append(base_model)
    try:
        yield
    finally:
        _forwards.models.pop()


class _Forwards(threading.local):
    """The models whose protected forwards a thread is in, one inside of the other."""

    def __init__(self) -> None:
        self.models: list = []


_forwards = _Forwards()


def _watch(patcher: Any) -> None:
    _release(patcher)
    hook = _refusing(weakref.ref(patcher))
    handles = [module.register_forward_pre_hook(hook) for module in _entrances(patcher.model.diffusion_model)]
    setattr(patcher, HANDLES, weakref.finalize(patcher, _take_off, handles))


def _release(patcher: Any) -> None:
    """Takes off this patcher's own hooks alone: ComfyUI tells some clones that they are loaded that never were.

    When a clone is dropped, its parent becomes ComfyUI's loaded model, and ComfyUI does not tell the parent. So a
    guarded parent watches from now on. Where another clone is loaded instead, `_in_force` lets that clone run.
    """
    vars(patcher).pop(HANDLES, lambda: None)()
    parent = getattr(patcher, "parent", None)
    if parent is not None and parent.injections.get(WRAPPER_KEY) and HANDLES not in vars(parent):
        _watch(parent)


def _take_off(handles: list) -> None:
    for handle in handles:
        handle.remove()


def _entrances(network: Any) -> list[torch.nn.Module]:
    """The network, a layer that every forward runs, its blocks and the layers that make their queries, as they are
    while loaded.

    Hooks on the layers catch code that copies a block's forward. Hooks on the blocks and the network catch calls of a
    compiled module: hooks on it run outside of its graph, hooks inside of it do not run.
    """
    layout = layout_of(network)
    found = [network, way(network, layout.always) if layout else None]
    for part in parts(network):
        found += [part.block, part.queries]
    return [module for module in found if isinstance(module, torch.nn.Module)]


def _refusing(owner: weakref.ref) -> Callable:
    def refused() -> bool:
        patcher = owner()
        if patcher is None or any(model is patcher.model for model in _forwards.models):
            return False
        return torch._C._current_graph_task_id() == NO_BACKWARD and _in_force(patcher)  # checkpoints are computed again

    # torch asks it once, while it traces a graph. No graph holds on to a model, and a refused graph is not made
    refused_in_graph = torch.compiler.assume_constant_result(refused)

    def hook(module: torch.nn.Module, args: tuple) -> None:
        if refused_in_graph() if torch.compiler.is_compiling() else refused():
            raise RuntimeError(
                f"SafeRoPE: {_caller()} runs the network of a protected model outside of a protected forward, so this "
                "picture would not be protected. Expected: every pass goes through ComfyUI's own sampling, with the "
                "model_options that SafeRoPE Apply's model brings. Sample with KSampler or SamplerCustomAdvanced, or "
                "remove the node whose extra pass this is."
            )

    return hook


def _in_force(patcher: Any) -> bool:
    """Whether no other clone was loaded since. A clone whose loading failed is told to watch, but not to stop."""
    loaded = (entry.model for entry in comfy.model_management.current_loaded_models)
    latest = next((each for each in loaded if each is not None and each.is_clone(patcher)), patcher)
    return latest is patcher


def _caller() -> str:
    """The function that runs the network: the nearest one that belongs neither to ComfyUI's sampling, nor to torch,
    nor to us."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        if module.split(".")[0] not in HOSTS and not module.startswith(str(__package__)):
            return f"{frame.f_code.co_name}() in {module}"
        frame = frame.f_back
    return "another node"
