"""Keeps the risk in a protected model, one record for each sampling run, and finds the record of a latent again."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import comfy.model_management
import comfy.samplers
import torch
from comfy.patcher_extension import WrappersMP, get_all_wrappers
from comfy_api.latest import io
from torch import Tensor

from ...saferope_core import Geometry, Reading, Receipt, Run

RecorderType = io.Custom("SAFEROPE_RECORDER")  # Recorder

POSITIVE = 0  # in an entry (kind, conditioning): ComfyUI's number for the positive prompt of its usual guiders
USUAL = {
    "positive",
    "negative",
}  # the conditionings' names in CFGGuider and BasicGuider; other guiders number them in another way
HOST = ("comfy", "comfy_extras")  # packages of ComfyUI's own: its wrappers keep the order
KEPT = 64  # runs; ComfyUI may keep as many samplers' outputs, and each record is some hundred kilobytes


@dataclass(frozen=True)
class Record:
    """The readings of one run: readings[concept] holds one for each conditioning, positive ones first.

    Where no gate of a concept was asked about the prompt, its risk is None. That is not a risk of 0.
    """

    names: tuple[str, ...]
    readings: tuple[tuple[Reading, ...], ...]
    usual: bool  # the guider is ComfyUI's usual one, so that it is known which conditionings are positive

    def judged(self, concept: int) -> list[Reading]:
        """The readings that count as the prompt: the positive ones, or all where that is not known."""
        return [each for each in self.readings[concept] if not self.usual or each.entry[0] == POSITIVE]

    def risk(self, concept: int) -> float | None:
        """The concept's highest risk of any picture, in [0, 1]; None unless it was measured of all that counts."""
        scores = [each.score for each in self.judged(concept)]
        if not scores or any(score is None for score in scores):
            return None
        return max(score.max().item() for score in scores)

    @property
    def unmeasured(self) -> tuple[str, ...]:
        """The names of the concepts without a risk."""
        return tuple(name for number, name in enumerate(self.names) if self.risk(number) is None)

    @property
    def score(self) -> float | None:
        """The highest risk of any concept and picture, in [0, 1]; None unless every concept has one."""
        risks = [self.risk(number) for number in range(len(self.names))]
        known = [risk for risk in risks if risk is not None]
        return max(known) if known and len(known) == len(risks) else None

    @property
    def measured(self) -> bool:
        """A gate of any concept was asked of any token, in one step at least."""
        found = (each for readings in self.readings for each in readings)
        return any(each.text is not None or each.image is not None for each in found)


class Recorder:
    """One protected model's records, by the latents that came out of the runs; the newest KEPT of them.

    `names`: the protection's concepts in their order, then concepts that are not measured. `off`: a sentence that says
    why nothing is recorded, or None.
    """

    def __init__(self, names: Sequence[str], geometry: Geometry, off: str | None = None) -> None:
        self.names, self.geometry, self.off = tuple(names), geometry, off
        self._records: OrderedDict[str, Record | None] = OrderedDict()
        self._receipts: OrderedDict[str, Receipt | None] = OrderedDict()
        self._lock = threading.Lock()

    def keep(self, run: Run | None, samples: Tensor, guider: Any, receipt: Receipt | None = None) -> None:
        """Reads a run that is over and files it, with its receipt, under the latent that it sampled."""
        record, key = None if run is None else self._read(run, guider), digest_of(samples)
        with self._lock:
            for kept, value in ((self._records, record), (self._receipts, receipt)):
                kept[key] = value  # type: ignore[index]
                while len(kept) > KEPT:
                    kept.popitem(last=False)

    def receipt(self, digest: str) -> Receipt | None:
        """The receipt of the run that a latent of this `digest_of` came out of; None where there is none."""
        with self._lock:
            return self._receipts.get(digest)

    def _read(self, run: Run, guider: Any) -> Record:
        found = (run.readings(number) for number in range(len(self.names)))
        readings = tuple(tuple(sorted(each, key=lambda reading: reading.entry[0])) for each in found)
        return Record(self.names, readings, usual=_conditionings(guider) <= USUAL)

    def of(self, samples: Tensor) -> Record:
        """The record of the run that these samples came out of. Raises ValueError where there is none."""
        with self._lock:
            record = self._records.get(digest_of(samples))
        if record is None:
            raise ValueError(
                f"This latent did not come out of a sampler with this protected model (of {len(self._records)} "
                "recorded runs). Connect the sampler's own latent output, before any other node changes it, and the "
                "recorder of the SafeRoPE Apply whose model that sampler uses."
            )
        return record


def require_usual(guider: Any) -> None:
    """Raise RuntimeError unless POSITIVE is this guider's number for its positive prompt, and for no other.

    A number is a place in the list that CFGGuider hands over in `predict_noise`. A guider with a method of its own, or
    a function of another pack in its place, may have any order. guider: None where a node calls the model by itself.
    """
    others = ["a node that calls the model by itself"] if guider is None else _others(guider)
    if others or not _conditionings(guider) <= USUAL:
        who = others[0] if others else type(guider).__name__
        raise RuntimeError(
            f"SafeRoPE Apply is set to conditionings = positive only, but this model is run by {who}, which may number "
            f"its prompts in another way ({', '.join(sorted(_conditionings(guider)))}): the positive one could go "
            "unprotected. Expected KSampler, CFG Guider or Basic Guider. Use one of them, or set conditionings to all."
        )


def _others(guider: Any) -> list[str]:
    """Code that decides about the order of the prompts in place of ComfyUI's CFGGuider."""
    usual, options = comfy.samplers.CFGGuider, guider.model_options
    for name in ("outer_predict_noise", "predict_noise"):
        if getattr(getattr(guider, name, None), "__func__", None) is not getattr(usual, name, None):
            return [type(guider).__name__]
    found = [options.get("sampler_calc_cond_batch_function")]
    for kind in (WrappersMP.PREDICT_NOISE, WrappersMP.CALC_COND_BATCH):
        found += get_all_wrappers(kind, options, is_model_options=True)
    homes = [getattr(each, "__module__", None) or type(each).__module__ for each in found if each is not None]
    return [f"a function of {home}" for home in homes if home.split(".")[0] not in HOST]


def _conditionings(guider: Any) -> set[str]:
    return set(getattr(guider, "original_conds", ("unknown",)))


def digest_of(samples: Tensor) -> str:
    """Identity of a latent: its shape and numbers, as samplers hand them over."""
    told = getattr(comfy.model_management, "intermediate_dtype", None)  # ComfyUI 0.17 hands it over as sampled
    plain = samples.detach().to("cpu", told() if told else torch.float32).float().contiguous()
    return hashlib.sha256(repr(tuple(plain.shape)).encode() + plain.numpy().tobytes()).hexdigest()
