"""The sampling runs that a picture comes from, by the receipts of the recorders at hand."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ...saferope_core import Receipt, failures, omissions
from .recorder import Recorder, digest_of

MOST_RUNS = 64


def runs_of(recorders: Sequence[Recorder], samples: Tensor) -> list[list[Receipt]]:
    """Receipts of the run that a latent came out of, of the run before it, and so on to an empty latent.

    Raises ValueError where no receipt covers one of these runs.
    """
    key = digest_of(samples)
    runs: list[list[Receipt]] = []
    while key:
        found = [receipt for each in recorders if (receipt := each.receipt(key)) is not None]
        starts = {receipt.start for receipt in found}
        if len(starts) != 1 or len(runs) == MOST_RUNS:
            raise ValueError(_uncovered(recorders, first=not runs))
        runs.append(found)
        key = starts.pop()
    return runs


def require_protected(runs: Sequence[Sequence[Receipt]], full: bool) -> None:
    """Raise ValueError unless every run was protected; `full`: over all of it."""
    for place, run in enumerate(runs):
        which = "The last sampling run" if place == 0 else f"The sampling run {place} before the last"
        if wrong := failures(run):
            raise ValueError(f"{which} does not count as protected: {'; '.join(wrong)}. The picture was not saved.")
        if full and (left := omissions(run)):
            raise ValueError(
                f"{which} was protected in part: {'; '.join(left)}. Expected whole protection. Change the settings of "
                "SafeRoPE Apply, or set require to 'in part'. The picture was not saved."
            )


def _uncovered(recorders: Sequence[Recorder], first: bool) -> str:
    idle = [each.off for each in recorders if each.off]
    why = f" One SafeRoPE Apply says: {idle[0]}." if idle else ""
    if first:
        return (
            f"No receipt covers this latent: it did not come out of a sampler with one of these protected models.{why} "
            "Connect the sampler's own latent output, before any other node changes it, and the recorders of all "
            "SafeRoPE Apply nodes whose models its samplers use."
        )
    return (
        f"The sampler began with a latent that no receipt covers: a picture, or another sampler's output that is not "
        f"protected, or was changed on the way.{why} SafeRoPE signs only runs that it saw from the empty latent on. "
        "Connect the recorders of all samplers, or save with another node."
    )
