"""Code of other packs that takes part in a sampling run. A receipt cannot know its effect.

ComfyUI's own code, torch's and ours is known. Other code may hang on the model, the guider, the sampler or the network,
or replace ComfyUI's own functions. It is named by its module.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import Any

import comfy.k_diffusion.sampling
import comfy.ldm.common_dit
import comfy.ldm.flux.math
import comfy.ldm.modules.attention
import comfy.model_base
import comfy.sample
import comfy.samplers
import torch

from .network import changes_in_place

KNOWN = {"comfy", "comfy_extras", "comfy_api", "comfy_execution", "nodes", "execution", "latent_preview", "torch"}
KNOWN |= {"numpy", "tqdm", "einops", "torchsde", "scipy", "", *sys.stdlib_module_names} - {"__main__"}
OURS = str(__package__).rsplit(".", 2)[0] + "."
KNOWN |= {"xformers", "sageattention", "sageattn3", "flash_attn"}  # ComfyUI's own attention takes them if installed
SHARED = (
    *(comfy.samplers, comfy.sample, comfy.k_diffusion.sampling),
    *(comfy.ldm.flux.math, comfy.ldm.common_dit, comfy.ldm.modules.attention),
)
CLASSES = (comfy.samplers.CFGGuider, comfy.samplers.KSAMPLER, comfy.model_base.BaseModel)
DEEPEST = 8  # of nested dicts and lists in model_options


def strangers(guider: Any, sampler: Any, arguments: Iterable[Any], options: Iterable[dict]) -> list[str]:
    """Modules of other packs. arguments: of the sampling, such as its callback. options: transformer_options of its
    forwards.
    """
    patcher = guider.model_patcher
    things = [guider, sampler, *vars(guider).values(), *vars(sampler).values(), *arguments, *options]
    things += [getattr(patcher, name, {}) for name in ("model_options", "object_patches", "wrappers", "callbacks")]
    things += [getattr(patcher, name, {}) for name in ("injections", "attachments", "additional_models")]
    holders = (*SHARED, *CLASSES, *_written(patcher.model.diffusion_model))
    things += [value for holder in holders for value in vars(holder).values() if hasattr(value, "__globals__")]
    found = {home for thing in things for each in _leaves(thing) if _strange(home := home_of(each))}
    return sorted(found) + [told.split(": ")[0] for told in changes_in_place(patcher.model.diffusion_model)]


def hooked(options: dict) -> dict:
    """The part of transformer_options that may change a forward."""
    return {key: options[key] for key in ("patches", "patches_replace", "wrappers", "callbacks") if key in options} | {
        "override": options.get("optimized_attention_override")
    }


def _written(network: torch.nn.Module) -> set[Any]:
    """ComfyUI's classes that a network is made of, and the modules that they are written in."""
    classes = {base for kind in {type(each) for each in network.modules()} for base in kind.__mro__}
    own = {each for each in classes if each.__module__.startswith("comfy.ldm.")}
    return own | {sys.modules[each.__module__] for each in own if each.__module__ in sys.modules}


def home_of(thing: Any) -> str:
    """The module that a function was written in, or that the class of an object is from."""
    inner = getattr(thing, "func", getattr(thing, "__func__", thing))  # of a partial, of a method
    named = getattr(inner, "__globals__", {}).get("__name__")
    return named or (inner.__module__ if isinstance(inner, type) else type(inner).__module__) or ""


def _strange(home: str) -> bool:
    return home.split(".")[0] not in KNOWN and not f"{home}.".startswith(OURS)


def _leaves(value: Any, depth: int = DEEPEST) -> Iterator[Any]:
    """The values in nested dicts, lists, tuples and sets, without tensors."""
    if isinstance(value, (dict, list, tuple, set)) and depth:
        for each in value.values() if isinstance(value, dict) else value:
            yield from _leaves(each, depth - 1)
    elif not isinstance(value, torch.Tensor):
        yield value
