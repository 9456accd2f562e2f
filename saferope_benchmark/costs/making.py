"""The cost of making a concept file beside the forward passes that it needs anyway, on a FLUX of one single block."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from saferope_core import DOUBLE, SINGLE, CriticalHeads, Gathering, Geometry, token_kinds
from saferope_training.flux.attach import attached, geometry_of, listening, positioned
from saferope_training.making.losses import velocity_matching_loss
from saferope_training.making.rotation import TrainableRotation

from .rotation import WORD, Size, gate_of
from .timing import Row, in_turns, ratio

LARGEST = 256  # pixels of a side: a round takes half a minute on two cores, and larger pictures cost gathering no more
RESERVOIR = 4096  # vectors of each kind kept by block, the default of `saferope extract`


@dataclass(frozen=True)
class Flux:
    """A FLUX with random weights, its input, and its image tokens' positions [L, 3]."""

    transformer: nn.Module
    given: dict[str, Tensor]
    image_ids: Tensor

    def velocity(self) -> Tensor:
        return self.transformer(**self.given, return_dict=False)[0]


def rows(size: Size, repeats: int) -> Iterator[Row]:
    """Extraction and training at no more than LARGEST pixels a side."""
    size = replace(size, resolution=min(size.resolution, LARGEST))
    flux = flux_of(size)
    yield from extraction_rows(flux, size, repeats)
    step, least = steps(flux, size)
    taken = in_turns({"step": step, "least": least}, repeats)
    value, width = ratio(taken["step"], taken["least"])
    note = _note(size)
    yield Row("training step / two forward passes and one backward", value, "x", 1.1, spread=width, note=note)


def flux_of(size: Size, blocks: tuple[int, int] = (0, 1), device: str = "cpu") -> Flux:
    """FLUX.1-dev as diffusers has it, with `size.heads` heads, and so many double and single blocks."""
    from diffusers import FluxTransformer2DModel

    axes = (size.head_dim // 8, size.head_dim * 7 // 16, size.head_dim * 7 // 16)  # FLUX.1 has 16, 56, 56
    with torch.device("meta"):
        transformer = FluxTransformer2DModel(
            num_layers=blocks[0],
            num_single_layers=blocks[1],
            num_attention_heads=size.heads,
            attention_head_dim=size.head_dim,
            guidance_embeds=True,
            axes_dims_rope=axes,
        )
    transformer = transformer.to(size.dtype).to_empty(device=device).eval().requires_grad_(False)
    for name, parameter in transformer.named_parameters():
        norm = name.split(".")[-2].startswith("norm_")
        nn.init.ones_(parameter) if norm else nn.init.normal_(parameter, std=0.02)
    config, side, count = transformer.config, size.resolution // 16, size.batch
    shapes = {"hidden_states": (size.image, config.in_channels)}
    shapes |= {"encoder_hidden_states": (size.text, config.joint_attention_dim)}
    shapes |= {"pooled_projections": (config.pooled_projection_dim,)}
    given = {name: torch.randn(count, *shape).to(device, size.dtype) for name, shape in shapes.items()}
    ids = torch.cartesian_prod(torch.zeros(1), *[torch.arange(float(side))] * 2).to(device)
    ones = torch.ones(count, dtype=size.dtype, device=device)
    given |= {"timestep": ones, "guidance": 3.5 * ones, "txt_ids": ids.new_zeros(size.text, 3), "img_ids": ids}
    return Flux(transformer, given, ids)


def _note(size: Size) -> str:
    return f"FLUX single block, {size.resolution} x {size.resolution}"


def extraction_rows(flux: Flux, size: Size, repeats: int) -> Iterator[Row]:
    """Gathering is timed by itself, as a share of a forward pass, which varies by more than it takes."""
    gathering = Gathering(geometry_of(flux.transformer), RESERVOIR, flux.image_ids.device)
    used = torch.arange(size.text).expand(size.batch, -1) < 4 * WORD  # a prompt of some words, its subject first
    kinds = token_kinds(used, torch.arange(size.text).expand(size.batch, -1) < WORD)
    visit = gathering.visit("unsafe", kinds, size.image, range(size.batch))
    rope, heard = positioned(None, flux.transformer.pos_embed(flux.image_ids)), []
    with torch.no_grad(), listening(flux.transformer, lambda *given: heard.append(given)):
        flux.velocity()

    def gather() -> None:
        visit.at_time()
        for x, *where in heard:
            visit.listen(x, rope(x, *where[-2:]), *where)

    @torch.no_grad()
    def hooked() -> None:
        with listening(flux.transformer, lambda *_: None):
            flux.velocity()

    forms = {"plain": torch.no_grad()(flux.velocity), "hooks": hooked, "gather": torch.no_grad()(gather)}
    taken = in_turns(forms, repeats)
    least = min(taken["hooks"]) / min(taken["plain"])  # the hooks' microseconds drown in all but the fastest passes
    yield Row("extraction: forward with hooks / without, fastest of each", least, "x", 1.05, note=_note(size))
    value, width = ratio(taken["gather"], taken["plain"])
    yield Row("what gathering adds / forward", value, "x", 0.05, spread=width, note=_note(size))


def all_heads(geometry: Geometry) -> list[tuple[int, int, int]]:
    """(kind, block, head) of all heads of a model."""
    counts = ((DOUBLE, geometry.double_blocks), (SINGLE, geometry.single_blocks))
    return [(kind, block, head) for kind, count in counts for block in range(count) for head in range(geometry.heads)]


def steps(flux: Flux, size: Size) -> tuple[Callable[[], None], Callable[[], None]]:
    """A training step of all heads, and the least of any step: a forward pass without gradients, one with gradients,
    and the backward pass."""
    geometry, acts = geometry_of(flux.transformer), {"text": "qk", "image": "qk"}
    places = torch.tensor(all_heads(geometry))
    bases = torch.linalg.qr(torch.randn(len(places), size.head_dim, size.rank)).Q
    gates = torch.full((len(places),), gate_of(size.head_dim, size.rank))
    heads = CriticalHeads(places, dict.fromkeys("qk", bases), dict.fromkeys("qk", gates), torch.ones(0))
    device = flux.image_ids.device
    weights = [torch.randn(len(places), size.rank, size.rank, device=device).requires_grad_() for _ in range(2)]
    rotation = TrainableRotation(heads, geometry, acts, *weights)
    optimiser, nothing = torch.optim.AdamW(weights, 1e-6), torch.zeros((), device=device, requires_grad=True)

    def step(rotate: Callable) -> None:
        optimiser.zero_grad()
        with torch.no_grad():
            base = flux.velocity()
        with attached(flux.transformer, rotate):
            velocity_matching_loss(flux.velocity().float(), base.float()).mean().backward()
        optimiser.step()

    return lambda: step(rotation.rotate), lambda: step(lambda x, *_: x + nothing)
