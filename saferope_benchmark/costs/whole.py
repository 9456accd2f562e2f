"""The cost on a GPU of a whole step of FLUX.1-dev in diffusers, with protection and without, and of making a concept.
Weights are random.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from statistics import median

import torch

from saferope_core import Geometry, Protection
from saferope_training.flux.attach import attached, geometry_of

from .making import Flux, all_heads, extraction_rows, flux_of, steps
from .rotation import TRAINED, Size, concept_of
from .timing import Row, in_turns, ratio, spread, wait

BLOCKS = (19, 38)  # double and single, of FLUX.1-dev
LEARNING = 512  # pixels of a side while a concept is made
THIRD = "a third of the heads"
CASES: dict[str, dict] = {THIRD: {"critical": 1 / 3}, "all heads": {}, "all heads, 3 concepts": {"concepts": 3}}
TARGETS = {THIRD: 1.01}
PEAK = 0.01  # extra peak of a step, as a share of the peak without


def protection_of(size: Size, geometry: Geometry) -> Protection:
    """Random concepts in the first `critical` of the heads of every block; the roles that turn are the paper's."""
    most = max(1, round(size.critical * size.heads))
    heads = torch.tensor([each for each in all_heads(geometry) if each[2] < most])
    concepts = [concept_of(size, number, heads, geometry) for number in range(size.concepts)]
    acting = [
        replace(each, text=replace(each.text, acts_on="k"), image=replace(each.image, acts_on="qk"))
        for each in concepts
    ]
    return Protection(acting, geometry)


def rows(size: Size, repeats: int, blocks: tuple[int, int] = BLOCKS, device: str = "cuda") -> Iterator[Row]:
    """A step at `size`, then the steps of making a concept at LEARNING pixels."""
    size = replace(size, **TRAINED)
    yield from step_rows(size, repeats, blocks, device)
    yield from making_rows(replace(size, resolution=min(size.resolution, LEARNING)), repeats, blocks, device)


def step_rows(size: Size, repeats: int, blocks: tuple[int, int], device: str) -> Iterator[Row]:
    """Time of a step, and what protection adds to its time and to its peak of memory."""
    flux = flux_of(size, blocks, device)
    geometry = geometry_of(flux.transformer)
    forms: dict[str, Callable] = {"": partial(step, flux, None)}
    for name, changes in CASES.items():
        forms[name] = partial(step, flux, protection_of(replace(size, **changes), geometry))
    with torch.inference_mode():
        taken = in_turns(forms, repeats)
        peaks = {name: peak_on(device, form) for name, form in forms.items()}
    what = f"whole step of FLUX.1-dev in diffusers, {size.resolution} x {size.resolution}"
    yield Row(what, 1e3 * median(taken[""]), "ms", spread=1e3 * spread(taken[""]))
    for name in CASES:
        value, width = ratio(taken[name], taken[""])
        yield Row(f"protected / unprotected, {name}", value, "x", TARGETS.get(name), spread=width)
    for name in CASES:
        extra = peaks[name] - peaks[""]
        yield Row(f"extra peak / peak, {name}", extra / peaks[""], "x", PEAK, note=f"{extra / 2**20:.0f} MiB")


def making_rows(size: Size, repeats: int, blocks: tuple[int, int], device: str) -> Iterator[Row]:
    """Listening to all heads, and a training step of all of them with checkpointing, one prompt each."""
    flux = flux_of(size, blocks, device)
    weights = sum(parameter.nbytes for parameter in flux.transformer.parameters())
    yield from extraction_rows(flux, size, repeats)
    flux.transformer.enable_gradient_checkpointing()
    learn, least = steps(flux, size)
    peak = peak_on(device, learn) - weights
    taken = in_turns({"step": learn, "least": least}, repeats)
    note = f"FLUX.1-dev, {size.resolution} x {size.resolution}, checkpointed"
    yield Row(f"training step ({note})", 1e3 * median(taken["step"]), "ms", spread=1e3 * spread(taken["step"]))
    value, width = ratio(taken["step"], taken["least"])
    yield Row("training step / two forward passes and one backward", value, "x", 1.1, spread=width)
    yield Row("peak of a training step, less the transformer's weights", peak / 1e6, "MB")


def step(flux: Flux, guard: Protection | None) -> None:
    """One step of the model."""
    if guard is None:
        flux.velocity()
    else:
        with attached(flux.transformer, partial(guard.rotate, own=True)):
            flux.velocity()


def peak_on(device: str, run: Callable[[], object]) -> int:
    """Most bytes on the GPU while `run` runs, with all that was there before; 0 on a CPU."""
    if device == "cpu":
        return 0
    torch.cuda.reset_peak_memory_stats()
    run()
    wait()
    return torch.cuda.max_memory_allocated()
