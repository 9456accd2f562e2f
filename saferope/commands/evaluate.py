"""`saferope evaluate`: the same prompts and seeds under every method, as tables and pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from saferope_training.console import say
from saferope_training.settings import MODEL, SUITES, Settings

from .common import Device, command, load, progress_bars

_FILE_SIZES = (64, 128)
_BATCH, _FLUX_BATCH = 32, 4  # prompts painted together
_SUITE, _METRICS = "Suite", "Metrics of suite paper-flux"


def _suite(help: str, *names: str) -> Any:
    return typer.Option(*names, help=help, rich_help_panel=_SUITE)


def _weights(help: str, *names: str) -> Any:
    return typer.Option(*names, help=help, rich_help_panel=_METRICS)


@command(MODEL)
def evaluate(
    settings: Settings,
    file: Annotated[Path | None, typer.Argument(help="A concept file, for the tiny world; or name a --suite.")] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for tables and pictures; the concept file's own, or `evaluation`, if left out."),
    ] = None,
    device: Device = "cpu",
    strength: Annotated[float, typer.Option(help="0 off, 1 as trained; of the concept file.")] = 1.0,
    unsafe: Annotated[
        int | None,
        typer.Option(
            "--unsafe-count",
            "--unsafe",
            help="Pictures that ask for the concept (64; a suite's own); in the tiny world as many of held-out words.",
        ),
    ] = None,
    benign: Annotated[
        int | None,
        typer.Option(
            "--benign-count",
            "--benign",
            help="Benign pictures (128; a suite's own); in the tiny world half as many of near neighbours.",
        ),
    ] = None,
    batch: Annotated[int | None, typer.Option(help=f"Prompts painted together; {_BATCH}, FLUX {_FLUX_BATCH}.")] = None,
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
) -> None:
    """Measure methods beside the unprotected model, paired by prompt and seed. Writes Markdown, CSV, JSON and pictures.

    A concept file alone gives its table beside it. A suite compares concept files with baselines.
    Several processes share the pictures: `accelerate launch -m saferope evaluate ...` on GPUs, on CPUs `python -m
    torch.distributed.run --nproc_per_node 2 -m ...`.
    """
    if (file is None) == (suite is None):
        raise ValueError(
            "evaluate: got " + ("neither" if file is None else "both") + ", expected a concept file or --suite"
        )
    if suite is None:
        assert file is not None
        _file(settings, file, out or file.parent, device, strength, unsafe, benign)
        return
    from saferope_benchmark.evaluation.compare import compare
    from saferope_benchmark.suites import is_tiny, prepared
    from saferope_benchmark.suites.questions import paper_metrics
    from saferope_training import processes

    device, out = processes.own_device(device), out or Path("evaluation")
    chosen: dict[str, Any] = {"only": names(only), "chosen_baselines": names(baselines), "search": search}
    with progress_bars() as progress:
        model = load(settings, device)
        tiny = is_tiny(suite, model)
        if not tiny:
            chosen |= {"i2p": i2p, "captions": captions, "images": pictures}
            chosen["metrics"] = paper_metrics(clip, vqa, inception, lpips, device)
        comparison = prepared(
            suite, model, out, concepts=concepts, counts=(unsafe, benign), progress=progress, **chosen
        )
        compare(model, comparison, out, batch or (_BATCH if tiny else _FLUX_BATCH), progress)
    if processes.is_main():
        say((out / "evaluation.md").read_text(encoding="utf-8"))


def _file(
    settings: Settings, file: Path, out: Path, device: str, strength: float, unsafe: int | None, benign: int | None
) -> None:
    from saferope_benchmark.evaluation.file_report import evaluate_file, markdown, write_reports
    from saferope_benchmark.prompt_sets import Sizes
    from saferope_core import load_concepts, strength_notes
    from saferope_training import processes

    concepts = load_concepts(file)
    notes = strength_notes(concepts, [each.strength * strength for each in concepts])
    for note in notes if processes.is_main() else []:
        say(f"saferope: {note}", err=True)
    unsafe, benign = _or(unsafe, _FILE_SIZES[0]), _or(benign, _FILE_SIZES[1])
    with progress_bars() as progress:
        sizes = Sizes(unsafe, unsafe, benign // 2, benign)
        model = load(settings, processes.own_device(device))
        reports = evaluate_file(model, file, out, strength, sizes, progress=progress)
        write_reports(out, reports, file)
    if processes.is_main():
        for report in reports:
            say(markdown(report))


def names(text: str | None) -> tuple[str, ...] | None:
    """Names with commas between; `none` is none of them, and None all."""
    if text is None:
        return None
    return () if text == "none" else tuple(part.strip() for part in text.split(",") if part.strip())


def _or(given: int | None, own: int) -> int:
    return own if given is None else given
