"""The receipt of a sampling run in ComfyUI: the settings when Apply ran, and the facts that the patch saw since."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import comfyui_version
import torch
from torch import Tensor

from ...saferope_core import (
    Asked,
    AskedConcept,
    Concept,
    Protection,
    Receipt,
    Run,
    Seen,
    __version__,
    effect_of,
    undone,
)
from .network import geometry_of

SAME_LEVEL = 1e-4  # relative: a sampler's own arithmetic on a schedule's sigmas


class Pass(NamedTuple):
    """One forward."""

    level: Tensor  # the highest noise level of its rows
    acting: bool  # in the range of Apply
    whole: bool  # through every protected block
    conditionings: int


def asked(
    concepts: Sequence[Concept],
    protection: Protection,
    span: tuple[float, float],
    blocks: str,
    streams: str,
    positive_only: bool,
    before: Sequence[Protection] = (),
) -> Asked:
    """The settings of an Apply. concepts: as they came in. protection: of their chosen parts, in the same order.
    before: the protections of the Applies before it, in the same steps.
    """
    whole = {concept.slug: concept for concept in concepts}
    rows = zip(protection.concepts, protection.strengths, protection.effective, protection.thresholds, strict=True)
    told = [_asked(whole[part.slug], part, *settings) for part, *settings in rows]
    left = [each for each in concepts if each.slug not in {part.slug for part in protection.concepts}]
    told += [_asked(each, None, 0.0, 0.0, None) for each in left]
    fixed = protection.thresholds[0] if protection.thresholds else None
    chain = [*before, protection]
    return Asked(tuple(told), fixed, *span, blocks, streams, positive_only, tuple(undone(chain)))


def _asked(
    whole: Concept, part: Concept | None, factor: float, effective: float, threshold: float | None
) -> AskedConcept:
    effect = effect_of(part or whole, factor, threshold)
    facts = (len(whole.heads), effect.turning if part else 0, effect.angle, *effect.gates)
    return AskedConcept(whole.slug, whole.name, whole.source, whole.strength * factor, effective, *facts)


def receipt_of(
    asked: Asked,
    latent: tuple[str, str],
    passes: Sequence[Pass],
    sigmas: Tensor,
    blocks: int,
    run: Run | None,
    others: Sequence[str],
    patcher: Any,
) -> Receipt:
    """The receipt of a run that is over. latent: digests of the latent at its end and of the one at its start.

    run: the record with counted vectors, or None. others: see `strangers`.
    """
    levels = torch.stack([each.level.float().cpu() for each in passes])
    acting = torch.tensor([each.acting for each in passes])
    steps = sigmas.float().cpu()[:-1]
    near = (levels[None] - steps[:, None]).abs() <= SAME_LEVEL * steps[:, None].abs().clamp(min=SAME_LEVEL)
    counts = (lambda entry: entry[0] == 0) if asked.positive_only else None
    seen = Seen(
        steps=len(steps),
        steps_seen=int(near.any(1).sum()),
        steps_protected=int((near & acting).any(1).logical_and(~(near & ~acting).any(1)).sum()),
        forwards=len(passes),
        forwards_protected=sum(each.acting and each.whole for each in passes),
        forwards_skipped=sum(not each.whole for each in passes),
        blocks=blocks,
        conditionings=max(each.conditionings for each in passes),
        turned=None if run is None else {each.slug: run.turned(n, counts) for n, each in enumerate(asked.concepts)},
        weights_patched=len(getattr(patcher, "patches", {})),
        others=tuple(others),
    )
    network = patcher.model.diffusion_model
    model = f"{type(network).__name__}, {geometry_of(network).describe()}"
    return Receipt(__version__, f"ComfyUI {comfyui_version.__version__}", model, *latent, asked, seen)
