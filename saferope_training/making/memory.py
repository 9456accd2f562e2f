"""Counts a run's memory before anything is loaded, from the model's own shapes. It warns, and refuses nothing.

Activations are not estimated. The transformer is built from fake tensors, which have shapes and no data, and runs once.
The bytes that autograd keeps for the backward pass are added up for one block of either kind, then multiplied.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from math import isqrt
from pathlib import Path
from types import SimpleNamespace

import psutil
import torch
from torch import Tensor, nn

from saferope_core import BLOCK_TYPES, COLLECTED, ROLES, Geometry, gated, latent_risk_score, rotate_by_generator

from ..flux import loading
from ..flux.attach import geometry_from, sites, with_blocks
from ..flux.encoders import MADE, lends
from ..flux.models import ENCODE_TOKENS, Model, Text
from ..flux.pipelines import asked_of
from ..flux.quantise import require_kind
from ..settings import Settings
from .extract import BATCH
from .heads import for_family, ranks_of
from .preview import EACH

# bits per weight of a linear layer; NF4 has a scale per 64 weights, quantised to 8 bits, and one per 256 such scales
BITS = {"nf4": 4 + 8 / 64 + 32 / (64 * 256), "int8": 8, "torchao-int8": 8, "torchao-float8": 8}
WORKSPACE = 0.1  # of the rest: kernels' scratch space and fragmentation
GIB = 2**30
DECODED = 4 * 256  # channels: the widest map of FLUX.1's VAE at full size, before, within and after a residual block
EMBEDDING, LISTENING, TRAINING, PAINTING = "embedding prompts", "listening to heads", "training", "painting"  # phases
_PATCH = 16  # pixels of an image token
_WIDTH = 28  # R + S of the rotation that is counted: the defaults'
WAYS_OUT = "Try --quantise, --checkpointing, fewer --passes-of or a smaller --resolution"


@dataclass(frozen=True)
class Plan:
    """Bytes of the device by their use. `encoders` while prompts are embedded, `gathering` while heads are listened to,
    `activations` while training."""

    weights: int
    encoders: int
    decoder: int
    activations: int
    generators: int
    gathering: int = 0  # while heads are listened to: a forward pass, and the sums
    preview: int = 0  # while a preview is painted: a forward pass and the decoding of a picture, beside the generators

    @property
    def peak(self) -> int:
        """Bytes of the largest phase, workspace included."""
        return max(self.phases().values())

    def phases(self) -> dict[str, int]:
        """Bytes at most while each phase runs, workspace included."""
        last = TRAINING if self.generators else PAINTING
        parts = {EMBEDDING: self.encoders, LISTENING: self.gathering}
        parts[last] = max(self.activations, self.preview) + self.generators
        return {name: int((self.weights + self.decoder + part) * (1 + WORKSPACE)) for name, part in parts.items()}

    def lines(self) -> list[str]:
        """The plan as a small table, in GiB."""
        rows = [
            ("transformer, frozen", self.weights),
            ("text encoders, a layer at a time, and their activations", self.encoders),
            ("VAE", self.decoder),
            ("listening to heads: a pass without gradients, and sums", self.gathering),
            ("activations of a training pass", self.activations),
            ("previews: a pass without gradients, and a picture decoded", self.preview),
            ("generators, their gradients and AdamW's moments", self.generators),
            ("at most at one time, with workspace", self.peak),
        ]
        return [f"{size / GIB:8.2f} GiB  {name}" for name, size in rows]


def transformer_bytes(config: dict, quantise: str | None, dtype: torch.dtype) -> int:
    """Bytes of the frozen weights. Linear layers are held in the bits of `quantise`, all others in `dtype`."""
    with torch.device("meta"):
        model = loading.made_of(config)
    linear = sum(module.weight.numel() for module in model.modules() if isinstance(module, nn.Linear))
    rest = sum(parameter.numel() for parameter in model.parameters()) - linear
    if quantise:
        require_kind(quantise)
    full = 8 * dtype.itemsize
    return int((linear * (BITS[quantise] if quantise else full) + rest * full) / 8)


def activation_bytes(
    config: dict, text: int, image: int, batch: int, checkpointing: bool, dtype: torch.dtype = torch.float32
) -> int:
    """Bytes that autograd keeps for the backward pass of `batch` prompts of `text` and `image` tokens, in bf16.

    It runs under autocast. `dtype` is the weights': of fp32 weights autocast keeps bf16 copies. With checkpointing: the
    inputs of every block, and all of the one block that is being recomputed.
    """
    geometry = geometry_from(config)
    doubles, singles = geometry.double_blocks, geometry.single_blocks
    tokens = text, image, batch
    one = _kept(config, 1, 1, *tokens, dtype)
    double, single = _kept(config, 2, 1, *tokens, dtype) - one, _kept(config, 1, 2, *tokens, dtype) - one
    around = max(0, one - double - single)
    if not checkpointing:
        return around + doubles * double + singles * single
    width = geometry.heads * geometry.head_dim
    inputs = dtype.itemsize * batch * (text + image) * width
    return around + (doubles + singles) * inputs + max(double, single)


def gathering_bytes(config: dict, text: int, image: int, batch: int, dtype: torch.dtype) -> int:
    """Bytes while the heads' vectors are collected: one block's activations for `batch` prompts, and the Gram sums.

    The bytes that autograd would keep of a block stand for its activations.
    """
    geometry = geometry_from(config)
    sums = len(ROLES) * (len(COLLECTED) + 1) * _heads(geometry) * geometry.head_dim**2
    return _block_bytes(config, text, image, batch, dtype) + torch.float64.itemsize * sums


def embedding_bytes(whole: int, layer: int, text: int, lent: bool) -> int:
    """Bytes while prompts are embedded: the encoders, or of lent ones a layer, and T5's activations for a batch."""
    return (layer if lent else whole) + MADE * max(text, ENCODE_TOKENS)


def _block_bytes(config: dict, text: int, image: int, batch: int, dtype: torch.dtype) -> int:
    """Bytes of one block's activations, of the larger of both kinds."""
    tokens = text, image, batch
    one = _kept(config, 1, 1, *tokens, dtype)
    return max(_kept(config, 2, 1, *tokens, dtype), _kept(config, 1, 2, *tokens, dtype)) - one


def _heads(geometry: Geometry) -> int:
    return geometry.heads * (geometry.double_blocks + geometry.single_blocks)


def generator_bytes(heads: int, widths: tuple[int, ...]) -> int:
    """Weights, gradients and two moments, fp32, of so many heads' generators."""
    return 4 * 4 * heads * sum(width * width for width in widths)


def preview_bytes(config: dict, text: int, image: int, batch: int, dtype: torch.dtype) -> int:
    """Bytes while a preview is painted: the larger of one block's activations for `batch` prompts and a decoding.

    A decoding is DECODED channels for every pixel of one picture; a patch is _PATCH pixels wide.
    """
    return max(_block_bytes(config, text, image, batch, dtype), DECODED * image * _PATCH**2 * dtype.itemsize)


def plan_for(settings: Settings, device: str, training: bool, previews: bool = False) -> Plan:
    """The plan of a run, from the model's configuration and the sizes of its files; no weight is loaded.

    `previews`: training paints them. Every head is taken to be critical. ValueError or OSError where there is no such
    model.
    """
    config = loading.config_of(settings.model, settings.encoders)
    sizes = loading.outline(settings.model, settings.encoders, settings.resolution, config)
    return plan_of(settings, config, sizes, device, training, previews)


def plan_of(
    settings: Settings, config: dict, sizes: loading.Outline, device: str, training: bool, previews: bool
) -> Plan:
    """`plan_for`, from a transformer's configuration and its `loading.outline`."""
    text, side = sizes.text, sizes.side
    dtype = torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16
    shape = config, text, side * side, settings.passes_of or settings.batch, settings.checkpointing, dtype
    geometry = geometry_from(config)
    ranks = ranks_of(for_family(settings, geometry.family))
    widths = ranks.risk + ranks.outside, ranks.image_risk + ranks.outside
    heads = _heads(geometry)
    file = Path(settings.model)
    return Plan(
        # GGUF stays as it is in the file
        file.stat().st_size if file.suffix == ".gguf" else transformer_bytes(config, settings.quantise, dtype),
        embedding_bytes(sizes.encoders, sizes.layer, text, lends(torch.device(device))),
        sizes.decoder,
        activation_bytes(*shape) if training else 0,
        generator_bytes(heads, widths) if training else 0,
        gathering_bytes(config, text, side * side, settings.passes_of or BATCH, dtype),
        preview_bytes(config, text, side * side, settings.passes_of or 2 * EACH, dtype) if previews else 0,
    )


def available(device: str) -> int:
    """Free bytes of a GPU, or of this machine's memory."""
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available  # with memory that the system gives up when asked, such as cached files


def doubt(plan: Plan, device: str) -> str | None:
    """A warning with ways out where the plan needs more than is free now, else None.

    It is no error: the count was never compared with real weights, and other programs may give memory back.
    """
    free = available(device)
    if plan.peak <= free:
        return None
    return (
        f"memory: got {free / GIB:.1f} GiB free on {device}, expected {plan.peak / GIB:.1f} by a count that was not "
        f"measured on real weights; it may run out. {WAYS_OUT}"
    )


@contextmanager
def running_out(plan: Plan, device: str) -> Iterator[None]:
    """Raises a ValueError with the plan and ways out where a GPU or this machine runs out of memory."""
    try:
        yield
    except (RuntimeError, MemoryError, ValueError) as error:
        if not (_ran_out(error) or _ran_out(error.__cause__)):  # a loader tells of it in a ValueError
            raise
        table = "\n".join(plan.lines())
        raise ValueError(
            f"memory: ran out on {device}, expected room for this plan; finished work is kept. {WAYS_OUT}\n{table}"
        ) from error


def _ran_out(error: BaseException | None) -> bool:
    """torch raises its own error on a GPU, and for a CPU a RuntimeError that only its allocator's name tells apart."""
    return isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError)) or "DefaultCPUAllocator" in str(error)


@contextmanager
def counting(weights: set[int]) -> Iterator[list[int]]:
    """Adds up in `[0]` the bytes that autograd keeps: each storage once, storages of `weights` never."""
    total, seen = [0], set(weights)

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in seen:
            seen.add(storage._cdata)
            kept.append(storage)  # alive, so that its identity is not given to another
            total[0] += storage.nbytes()
        return tensor

    kept: list = []
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield total


def storages(model: nn.Module) -> set[int]:
    """Identities of the storages that hold a model's weights."""
    return {parameter.untyped_storage()._cdata for parameter in model.parameters()}


@contextmanager
def _default(dtype: torch.dtype) -> Iterator[None]:
    """New tensors are of this dtype: fake modules cannot be cast."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _kept(config: dict, doubles: int, singles: int, *tokens: int | torch.dtype) -> int:
    """Bytes that autograd keeps of these blocks, for text and image tokens, a batch and a dtype of the weights."""
    return _kept_of(json.dumps(with_blocks(dict(config), doubles, singles), sort_keys=True), *tokens)


@cache
def _kept_of(described: str, text: int, image: int, batch: int, dtype: torch.dtype) -> int:
    from torch._subclasses.fake_tensor import FakeTensorMode

    config = json.loads(described)
    geometry, side = geometry_from(config), isqrt(image)
    row = asked_of(geometry.family)
    pooled = torch.ones(batch, row.pooled_width(config, text))  # real: prompts are as long as it says
    with FakeTensorMode(allow_non_fake_inputs=True):
        with _default(dtype):
            model = loading.made_of(config).requires_grad_(False).eval()
        for site in sites(model):
            if site.stream != "image" or BLOCK_TYPES[geometry.image_blocks] == site.block_type:  # else at rest
                site.module.register_forward_hook(_turned)
        prompts = Text(torch.empty(batch, text, *row.states(config)), pooled)
        latents, asked = torch.empty(batch, side**2, row.channels(config)), SimpleNamespace(transformer=model)
        with torch.autocast("cpu", torch.bfloat16), counting(storages(model)) as total:
            row.called(Model("", asked, geometry, text, 2 * side), latents, torch.empty(batch), prompts)
    return total[0]


def _turned(_module: nn.Module, _args: tuple, output: Tensor) -> Tensor:
    """A hook that turns every vector of every head, as training does."""
    x = output.transpose(1, 2)
    heads, width = x.shape[1], x.shape[3]  # of keys fewer heads, where they are grouped
    basis = torch.zeros(heads, width, min(width, _WIDTH))
    generator = torch.zeros(heads, *2 * [basis.shape[-1]], requires_grad=True)
    eigen = torch.zeros(generator.shape[:2]), torch.zeros_like(generator, dtype=torch.complex64)
    scale = gated(latent_risk_score(x, basis), torch.zeros(heads))
    return rotate_by_generator(x, basis, generator, scale, eigen).transpose(1, 2).contiguous()
