"""`saferope evaluate`: the same prompts and seeds under every method, as tables and pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from saferope_training.settings import MODEL, SUITES, Settings

from .common import Device, command
from .evaluating import BATCH, FLUX_BATCH
from .options import JUDGE_HELP, DryRun

_SUITE, _METRICS, _PROMPTS = "Suite", "Metrics of photographs", "Your own prompts"


def _suite(help: str, *names: str) -> Any:
    return typer.Option(*names, help=help, rich_help_panel=_SUITE)


def _prompts(help: str) -> Any:
    return typer.Option(help=help, rich_help_panel=_PROMPTS)


def _weights(help: str, *names: str) -> Any:
    return typer.Option(*names, help=help, rich_help_panel=_METRICS)


@command(MODEL)
def evaluate(
    settings: Settings,
    file: Annotated[Path | None, typer.Argument(help="A concept file, for the tiny world; or name a --suite.")] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for tables and pictures. Left out: the concept file's own, or `evaluation`."),
    ] = None,
    device: Device = "cpu",
    strength: Annotated[float, typer.Option(help="Strength of the concept file: 0 off, 1 as trained.")] = 1.0,
    unsafe: Annotated[
        str | None, _prompts("File of prompts that ask for the concept, for any model; or a count.")
    ] = None,
    held_out: Annotated[Path | None, _prompts("More of them, in words that training never saw.")] = None,
    benign: Annotated[str | None, _prompts("File of prompts without the concept; or a count.")] = None,
    neighbours: Annotated[Path | None, _prompts("More of them, nearest to the concept.")] = None,
    unsafe_count: Annotated[
        int | None,
        typer.Option(
            help="Pictures that ask for the concept (all of a file; 64; a suite's own), as many of held-out words."
        ),
    ] = None,
    benign_count: Annotated[
        int | None,
        typer.Option(
            help="Benign pictures (all of a file; 128; a suite's own); in the tiny world half as many of neighbours."
        ),
    ] = None,
    judge: Annotated[
        list[str] | None,
        _prompts(JUDGE_HELP),
    ] = None,
    words: Annotated[str | None, _prompts("The concept in words, for clip and vqa; its name if left out.")] = None,
    batch: Annotated[int | None, typer.Option(help=f"Prompts painted together; {BATCH}, FLUX {FLUX_BATCH}.")] = None,
    suite: Annotated[
        str | None, _suite(f"A whole comparison: {', '.join(SUITES)}. The same command resumes a killed run.")
    ] = None,
    only: Annotated[str | None, _suite("Concepts A,B of the suite; all if left out.")] = None,
    concepts: Annotated[
        Path | None, _suite("Folder with <concept>.safetensors; the tiny world's are made if left out.")
    ] = None,
    baselines: Annotated[str | None, _suite("Baselines A,B, or none; all if left out.")] = None,
    search: Annotated[bool, _suite("Search strengths on prompts of their own; else all are reported.")] = True,
    i2p: Annotated[Path | None, _suite("I2P's CSV; prompts with nudity, their own seeds.")] = None,
    captions: Annotated[Path | None, _suite("Benign prompts: COCO's captions, or any file of prompts.")] = None,
    pictures: Annotated[Path | None, _suite("Folder of the captions' pictures, for KID and FID.")] = None,
    clip: Annotated[str | None, _weights("CLIP model: a folder or a hub id.")] = None,
    vqa: Annotated[str | None, _weights("Vision-language model that answers yes or no: folder or hub id.")] = None,
    inception: Annotated[Path | None, _weights("FID's Inception weights.")] = None,
    lpips: Annotated[Path | None, _weights("AlexNet weights.")] = None,
    dry_run: DryRun = False,
) -> None:
    """Measure methods beside the unprotected model, paired by prompt and seed. Writes Markdown, CSV, JSON and pictures.

    For a concept file alone, the table is written beside it. In the tiny world it has prompts of its own; on any model
    give your files (--unsafe, --benign). A suite compares concept files with baselines. The same command resumes a
    killed run. Several processes share the pictures: `accelerate launch -m saferope evaluate ...` on GPUs, on CPUs
    `python -m torch.distributed.run --nproc_per_node 2 -m ...`.
    """
    if (file is None) == (suite is None):
        raise ValueError(
            "evaluate: got " + ("neither" if file is None else "both") + ", expected a concept file or --suite"
        )
    from saferope_benchmark.scores.judges import Wanted
    from saferope_training import processes

    from . import evaluating

    prompts = evaluating.prompt_files(unsafe, held_out, benign, neighbours, unsafe_count, benign_count)
    given = any((prompts.unsafe, prompts.held_out, prompts.benign, prompts.neighbours))
    if not given and (judge or words):
        raise ValueError(
            "evaluate: got --judge or --words without prompts, expected files, --unsafe FILE --benign FILE"
        )
    if given and suite is not None:
        raise ValueError(
            "evaluate: got files of prompts beside --suite, expected one of the two; name a concept file instead"
        )
    counts = prompts.unsafe_count, prompts.benign_count
    own_folder = Path("evaluation") if file is None else file.parent
    run = evaluating.Run(settings, out or own_folder, processes.own_device(device), batch, dry_run)
    if file is None:
        chosen = {"only": names(only), "chosen_baselines": names(baselines), "search": search, "concepts": concepts}
        of_flux = {"i2p": i2p, "captions": captions, "images": pictures}
        models = {"clip": clip, "vqa": vqa, "inception_weights": inception, "lpips_weights": lpips}
        evaluating.suite(run, str(suite), counts, chosen, of_flux, models)
    elif given:
        wanted = Wanted(tuple(judge or ()), clip, vqa, run.device)
        evaluating.own(run, file, strength, prompts, wanted, words, lpips)
    else:
        evaluating.in_tiny_world(run, file, strength, *counts)


def names(text: str | None) -> tuple[str, ...] | None:
    """Names with commas between; `none` is none of them, and None all."""
    if text is None:
        return None
    return () if text == "none" else tuple(part.strip() for part in text.split(",") if part.strip())
