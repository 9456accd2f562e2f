"""Checks that ComfyUI's network is one on which a protection holds. Where it is not, names the code that changed it.

Block: ("double" or "single", index), as in ComfyUI's extra_options.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch
from comfy.patcher_extension import WrappersMP

from ...saferope_core import BLOCK_TYPES, Geometry
from .families import geometry_of, has_hook, parts, turns_by_position

WRAPPER_KEY = "saferope"
COMPILE_KEY = "torch.compile"  # comfy_api/torch_helpers/torch_compile.py: its APPLY_MODEL wrapper
COMPILE_KWARGS = "torch_compile_kwargs"  # and its entry in model_options
TEXT_END = "img_slice"  # extra_options["img_slice"] = [first image token, number of tokens]

NEUTRAL = ("torch", "builtins", "functools")  # modules whose changes no node is to blame for
FREE = (
    'If it still fails without that node, free the model: the change stays on it. Take "Unload Models and Execution '
    'Cache" in ComfyUI, or restart.'
)

Block = tuple[str, int]


def flux_geometry(model: Any) -> Geometry:
    """Blocks and heads of a ModelPatcher's network. Raises ValueError for one of no known family."""
    return geometry_of(model.get_model_object("diffusion_model"))


def require_network(base_model: Any, geometry: Geometry, options: dict) -> None:
    """Raise RuntimeError unless the network that is about to run is still of the kind that was protected.

    A node after SafeRoPE Apply can put another network in its place, or have it compiled in one piece.
    """
    try:
        found = geometry_of(base_model.diffusion_model).describe()
    except ValueError:
        found = f"a {_class(base_model.diffusion_model)}"
    if found != geometry.describe():
        raise RuntimeError(
            f"SafeRoPE protects {geometry.describe()}, but the model that runs is {found}, put in its place after "
            f"SafeRoPE Apply. Remove the node that does so, or put SafeRoPE Apply after it. {FREE}"
        )
    if not has_hook(base_model.diffusion_model) and is_compiled(base_model.current_patcher, options):
        raise RuntimeError(
            f"SafeRoPE: this model is compiled, and a compiled {geometry.family} shows neither its queries nor its "
            "keys. Remove the node that compiles it."
        )


def require_hook(geometry: Geometry, block: Block, q: Any, k: Any, pe: Any, options: dict, network: Any = None) -> None:
    """Raise RuntimeError unless q and k are [B, heads, L, head_dim] before RoPE, text before image, of a known block.

    network: the running one, to name the code that changed it; None where that is not known.
    """
    wrong = _wrong_block(geometry, block) or _wrong_vectors(geometry, q, k, pe, options)
    if wrong:
        advice = changes_in_place(network) or ["Remove the node that replaces the model's forward or its blocks."]
        raise RuntimeError(
            f"SafeRoPE: block {block} was reached {wrong}. Expected q and k before RoPE and the span of the image "
            f"tokens, as ComfyUI's own blocks give them. {' '.join(advice)}"
        )


@contextmanager
def watched_queries(network: Any, blocks: Iterable[Block], note: Callable[[Block], Any]) -> Iterator[None]:
    """While it lasts, `note(block)` is called whenever one of the blocks projects its queries.

    This is how a block that runs without its attention patches differs from one that a step cache skips. A compiled
    graph calls no hook, so that no graph breaks and none holds on to `note`.
    """
    layers = list(_layers(network, blocks))  # all or none: an error must leave no hook behind
    with ExitStack() as stack:
        for block, layer in layers:
            stack.callback(layer.register_forward_pre_hook(noting(note, block)).remove)
        yield


def suspects(patcher: Any, options: dict) -> str:
    """Sentences with the likely reasons why the patch is not called, and the remedy.

    patcher: the ModelPatcher that samples, or None; options: transformer_options.
    """
    found = [*_replaced_blocks(options), *_wrappers(options), *_model_changes(patcher)]
    found += changes_in_place(getattr(getattr(patcher, "model", None), "diffusion_model", None))
    if is_compiled(patcher, options):
        found.append("The model is compiled: put SafeRoPE Apply before TorchCompileModel.")
    return " ".join(found) or "Remove the node that replaces the model's blocks or its forward."


def changes_in_place(network: Any) -> list[str]:
    """Sentences that name the code that changed a function or a class of the loaded network itself, and the remedy."""
    blocks = [part.block for part in parts(network)]
    modules = [getattr(module, "_orig_mod", module) for module in (network, *blocks)]
    own = [(f"{name} of {type(module).__name__}", _home(value)) for module in modules for name, value in _own(module)]
    own += [(f"The class {type(module).__name__}", type(module).__module__) for module in modules]
    shared = [(f"{cls.__name__}.{name}", _home(value)) for cls in _classes(modules) for name, value in _functions(cls)]
    found = [f"{what} was put into the loaded model by {who}: remove that node. {FREE}" for what, who in _foreign(own)]
    return found + [
        f"{what} was replaced for all models by {who}: remove that pack, then restart ComfyUI."
        for what, who in _foreign(shared)
    ]


def dtype_of_queries(base_model: Any) -> torch.dtype:
    """The dtype of queries and keys at the patch: the network's own, or float32 over the bridge."""
    computed = getattr(base_model, "manual_cast_dtype", None) or base_model.get_dtype()
    return computed if has_hook(base_model.diffusion_model) else torch.float32


def is_compiled(patcher: Any, options: dict) -> bool:
    """Whether ComfyUI knows of a torch.compile on the model; arguments as in `suspects`."""
    wrapped = COMPILE_KEY in options.get("wrappers", {}).get(WrappersMP.APPLY_MODEL, {})
    return wrapped or COMPILE_KWARGS in _model_options(patcher)


def block_of(options: dict) -> Block:
    """The block that a patch is called from; `require_hook` refuses one that is not the model's."""
    return cast(Block, (options.get("block_type"), options.get("block_index")))


def blocks_of(geometry: Geometry) -> list[Block]:
    """All blocks of the geometry."""
    counts = zip(BLOCK_TYPES, (geometry.double_blocks, geometry.single_blocks), strict=True)
    return [(block_type, index) for block_type, count in counts for index in range(count)]


def _wrong_block(geometry: Geometry, block: Block) -> str:
    try:
        geometry.row(*block)
    except (TypeError, ValueError) as error:
        return f"that the model should not have ({error})"
    return ""


def _wrong_vectors(geometry: Geometry, q: Any, k: Any, pe: Any, options: dict) -> str:
    if not (torch.is_tensor(q) and torch.is_tensor(k)):
        return f"with a {type(q).__name__} and a {type(k).__name__} for q and k"
    for name, x in (("q", q), ("k", k)):
        if x.ndim != 4 or (x.shape[1], x.shape[3]) != (geometry.heads_of(name), geometry.head_dim):
            return f"with {name} of shape {list(x.shape)}, not [B, {geometry.heads_of(name)}, L, {geometry.head_dim}]"
    if pe is None and turns_by_position(geometry):
        return "without rotary positions"
    if TEXT_END not in options:
        return f"without {TEXT_END}"
    text, total = options[TEXT_END]
    if not 0 <= text <= total == q.shape[2] <= k.shape[2]:  # a KV cache makes k the longer one
        return f"with {TEXT_END} {[text, total]}, {q.shape[2]} queries and {k.shape[2]} keys"
    return ""


def _layers(network: Any, blocks: Iterable[Block]) -> Iterator[tuple[Block, torch.nn.Module]]:
    """The linear layer that makes each block's queries."""
    wanted = frozenset(blocks)
    for kind, index, block, layer in parts(network):
        if (kind, index) not in wanted:
            continue
        if layer is None:
            raise RuntimeError(
                f"SafeRoPE: {kind} block {index} is a {_class(block)}, put there after SafeRoPE Apply. Expected "
                f"ComfyUI's own block. Remove the node that replaces it. {FREE}"
            )
        yield (kind, index), layer


def noting(note: Callable[[Block], Any], block: Block) -> Callable:
    """A forward pre-hook that calls `note(block)`, and leaves nothing in a compiled graph."""

    def hook(module: torch.nn.Module, args: tuple) -> None:
        if not torch.compiler.is_compiling():
            note(block)

    return hook


def _replaced_blocks(options: dict) -> Iterator[str]:
    replaced = options.get("patches_replace", {}).get("dit", {})
    if replaced:
        blocks = ", ".join(f"{name} {index}" for name, index in sorted(replaced)[:4])
        modules = ", ".join(sorted({_origin(each) for each in replaced.values()}))
        yield f"Replaced blocks: {blocks}{' ...' if len(replaced) > 4 else ''}, by {modules}: remove that node."


def _wrappers(options: dict) -> Iterator[str]:
    for kind in (WrappersMP.APPLY_MODEL, WrappersMP.DIFFUSION_MODEL):
        for key, functions in options.get("wrappers", {}).get(kind, {}).items():
            if key not in (WRAPPER_KEY, COMPILE_KEY) and functions:
                yield f"The forward is wrapped by {key!r} ({_origin(functions[0])}): remove that node."


def _model_changes(patcher: Any) -> Iterator[str]:
    function = _model_options(patcher).get("model_function_wrapper")
    if function is not None:
        yield f"The model has a function wrapper of {_origin(function)}: remove that node."
    patched = [name for name in getattr(patcher, "object_patches", {}) if name.startswith("diffusion_model")]
    if patched:
        yield f"Replaced parts of the model: {', '.join(sorted(patched)[:4])}: remove the node that does so."


def _own(module: Any) -> Iterator[tuple[str, Callable]]:
    """Functions that hang on the module itself, over the functions of its class."""
    for name, value in vars(module).items() if isinstance(module, torch.nn.Module) else ():
        if callable(value) and callable(getattr(type(module), name, None)):
            yield name, value


def _classes(modules: Iterable[Any]) -> set[type]:
    """ComfyUI's own classes among the classes of the modules."""
    return {cls for module in modules for cls in type(module).__mro__ if _is_host(cls.__module__)}


def _functions(cls: type) -> Iterator[tuple[str, Callable]]:
    return ((name, value) for name, value in vars(cls).items() if callable(value) and hasattr(value, "__globals__"))


def _foreign(changes: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """The changes, each once, that neither ComfyUI nor torch made."""
    return sorted({(what, who) for what, who in changes if not (_is_host(who) or who.split(".")[0] in NEUTRAL)})


def _is_host(module: str) -> bool:
    return module.split(".")[0] == "comfy"


def _home(function: Callable) -> str:
    """The module that a function was written in. functools.wraps may name another one."""
    function = getattr(function, "func", getattr(function, "__func__", function))  # of a partial, of a method
    return getattr(function, "__globals__", {}).get("__name__") or _origin(function)


def _class(thing: Any) -> str:
    """The name of its class, and the module of that if it is neither ComfyUI's nor torch's."""
    return " by ".join([type(thing).__name__, *(who for _, who in _foreign([("", type(thing).__module__)]))])


def _model_options(patcher: Any) -> dict:
    return getattr(patcher, "model_options", {})


def _origin(function: Any) -> str:
    return getattr(function, "__module__", None) or type(function).__module__
