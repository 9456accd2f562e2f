"""Listens to a FLUX.1 of full size and random, tied weights (2 GB), reads its heads and writes them all to a file.

    python -m dev.full_size             # as Calibrate does in ComfyUI
    python -m dev.full_size --trainer   # as `saferope extract` does

Tells bytes that PyTorch allocates over the model, CPU seconds, and bytes of the file. Minutes on two cores.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

import torch

from saferope_benchmark.costs.peak import peak_of
from saferope_core import (
    BENIGN,
    UNSAFE,
    Concept,
    Gathering,
    Ranks,
    critical_heads,
    fixed_generators,
    read_heads,
    save_concepts,
    token_kinds,
)
from saferope_training.flux.attach import geometry_of, listening, positioned
from tests.support.full_size import diffusers_flux, weights

GIB, TEXT, SIDE, PROMPTS = 2**30, 16, 4, 2
CAPACITY = {
    True: 260,
    False: 4096,
}  # vectors that Calibrate keeps of each kind at this size (`nodes.host.gather`); the trainer's


def main() -> None:
    """One time of a few prompts on each side."""
    small, flux = "--trainer" not in sys.argv, diffusers_flux()
    geometry = geometry_of(flux)
    gathering = Gathering(geometry, CAPACITY[small], small=small)
    given = {side: _prompts() for side in (UNSAFE, BENIGN)}
    rope = positioned(None, flux.pos_embed(given[UNSAFE]["img_ids"]))
    found: list = []

    def listen() -> None:
        used = (torch.arange(TEXT) < TEXT // 2).expand(PROMPTS, -1)
        for side in (UNSAFE, BENIGN):
            subject = used & (torch.arange(TEXT) == 1) & (side == UNSAFE)
            visit = gathering.visit(side, token_kinds(used, subject), SIDE**2, list(range(PROMPTS)))
            visit.at_time()
            with listening(flux, lambda x, *where: visit.listen(x, rope(x, *where[-2:]), *where)):  # noqa: B023
                flux(**given[side], return_dict=False)
        found.append(gathering.statistics())

    with torch.no_grad():
        peak = peak_of(listen) + sum(each.nbytes for each in _held(gathering))
        start = time.process_time()
        table = read_heads(found[0], Ranks(6, 5, 5, 8, 8), "svd", 0.7, -1.0, "calibrated", 0.99)
        seconds, heads = time.process_time() - start, critical_heads(table, geometry)
        concept = Concept(
            slug="full",
            name="Full",
            description="random",
            geometry=geometry,
            discrimination=table.discrimination,
            threshold=0.7,
            mode="fixed",
            training={},
            **heads.fields(fixed_generators(heads, 2.1), "qk", "qk"),
        )
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "full.safetensors"
            save_concepts(file, [concept], torch.float16)  # as Save Concept does
            size = file.stat().st_size
    sys.stdout.write(
        f"model {weights(flux) / GIB:.2f} GiB; over it {peak / GIB:.2f} GiB at most while it is listened to; "
        f"heads read in {seconds:.1f} s of CPU; {len(concept.heads)} heads in a file of {size / 1e6:.1f} MB, float16\n"
    )


def _prompts() -> dict[str, torch.Tensor]:
    """Random inputs of the model, for prompts of one side."""
    return {
        "hidden_states": torch.randn(PROMPTS, SIDE**2, 64),
        "encoder_hidden_states": torch.randn(PROMPTS, TEXT, 4096),
        "pooled_projections": torch.randn(PROMPTS, 768),
        "timestep": torch.ones(PROMPTS),
        "guidance": torch.full((PROMPTS,), 3.5),
        "img_ids": torch.cartesian_prod(torch.zeros(1), *2 * [torch.arange(float(SIDE))]),
        "txt_ids": torch.zeros(TEXT, 3),
    }


def _held(gathering: Gathering) -> list[torch.Tensor]:
    """The sums, which are there before anything is heard."""
    sums = [*gathering.met.values(), *(each for own in gathering.collectors.values() for each in own.grams.values())]
    return [each.held if hasattr(each, "held") else each.gram for each in sums]


if __name__ == "__main__":
    torch.set_num_threads(2)
    main()
