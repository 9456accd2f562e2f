"""`saferope evaluate`: the same prompts and seeds under every method, as tables and pictures."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from saferope_training.console import say
from saferope_training.settings import MODEL, SUITES, Settings

from .common import Device, command, load, progress_bars

if TYPE_CHECKING:
    from saferope_benchmark.evaluation.own import Prompts

_FILE_SIZES = (64, 128)
_BATCH, _FLUX_BATCH = 32, 4  # prompts painted together
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
        typer.Option(help="Folder for tables and pictures; the concept file's own, or `evaluation`, if left out."),
    ] = None,
    device: Device = "cpu",
    strength: Annotated[float, typer.Option(help="0 off, 1 as trained; of the concept file.")] = 1.0,
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
        _prompts(
            'Who says whether a picture shows the concept: nudenet, opennsfw, clip, vqa, detector, or "python '
            'FILE.py:FUNCTION", from PIL pictures to a probability each. Repeatable; those that fit if left out.'
        ),
    ] = None,
    words: Annotated[str | None, _prompts("The concept in words, for clip and vqa; its name if left out.")] = None,
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

    A concept file alone gives its table beside it: in the tiny world by prompts of its own, on any model by your files
    (--unsafe, --benign). A suite compares concept files with baselines. The same command resumes a killed run.
    Several processes share the pictures: `accelerate launch -m saferope evaluate ...` on GPUs, on CPUs `python -m
    torch.distributed.run --nproc_per_node 2 -m ...`.
    """
    if (file is None) == (suite is None):
        raise ValueError(
            "evaluate: got " + ("neither" if file is None else "both") + ", expected a concept file or --suite"
        )
    prompts = _prompt_files(unsafe, held_out, benign, neighbours, unsafe_count, benign_count)
    given = any((prompts.unsafe, prompts.held_out, prompts.benign, prompts.neighbours))
    if not given and (judge or words):
        raise ValueError(
            "evaluate: got --judge or --words without prompts, expected files, --unsafe FILE --benign FILE"
        )
    counts = prompts.unsafe_count, prompts.benign_count
    if suite is None:
        assert file is not None
        if not given:
            _file(settings, file, out or file.parent, device, strength, *counts)
            return
        _own(
            settings,
            file,
            out or file.parent,
            device,
            strength,
            prompts,
            tuple(judge or ()),
            words,
            batch,
            clip,
            vqa,
            lpips,
        )
        return
    if given:
        raise ValueError(
            "evaluate: got files of prompts beside --suite, expected one of the two; name a concept file instead"
        )
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
        comparison = prepared(suite, model, out, concepts=concepts, counts=counts, progress=progress, **chosen)
        compare(model, comparison, out, batch or (_BATCH if tiny else _FLUX_BATCH), progress)
    if processes.is_main():
        say((out / "evaluation.md").read_text(encoding="utf-8"))


def _prompt_files(
    unsafe: str | None,
    held_out: Path | None,
    benign: str | None,
    neighbours: Path | None,
    unsafe_count: int | None,
    benign_count: int | None,
) -> Prompts:
    """The files, and counts; --unsafe and --benign may be either."""
    from saferope_benchmark.evaluation.own import Prompts

    files, counts = [], []
    for name, value, count in (("unsafe", unsafe, unsafe_count), ("benign", benign, benign_count)):
        number = int(value) if value is not None and value.isdecimal() else None
        if number is not None and count is not None:
            raise ValueError(f"--{name}: got a count, and --{name}-count, expected one of them")
        files.append(Path(value) if value is not None and number is None else None)
        counts.append(count if number is None else number)
    if min(count for count in (*counts, 0) if count is not None) < 0:
        raise ValueError(f"counts: got {counts}, expected numbers of at least 0")
    return Prompts(files[0], held_out, files[1], neighbours, counts[0], counts[1])


def _own(
    settings: Settings,
    file: Path,
    out: Path,
    device: str,
    strength: float,
    prompts: Prompts,
    names: tuple[str, ...],
    words: str | None,
    batch: int | None,
    clip: str | None,
    vqa: str | None,
    lpips: Path | None,
) -> None:
    """Your prompts on any model. All settings are checked before it loads."""
    from saferope_benchmark.evaluation.file_report import markdown, write_reports
    from saferope_benchmark.evaluation.own import concept_of, evaluate_own
    from saferope_benchmark.scores import judges
    from saferope_benchmark.scores.distance import lpips_distance
    from saferope_training import processes
    from saferope_training.flux import loading
    from saferope_training.making import checks

    device = processes.own_device(device)
    concept, spoken = concept_of(file)
    sets = prompts.sets(concept, words or spoken)
    wanted = judges.Wanted(names, clip, vqa, device)
    judges.require(wanted)
    checks.require_model(settings, device)
    if loading.is_here(settings.model):
        _require_fit(file, loading.config_of(settings.model, settings.encoders))
    if batch is not None and batch < 1:
        raise ValueError(f"--batch: got {batch}, expected at least 1")
    if processes.is_main():
        say(f"{2 * sum(len(asked.asks) for asked in sets)} pictures, half of them protected", err=True)
    with progress_bars() as progress:
        model = load(settings, device)
        many = batch or (_BATCH if model.tiny else _FLUX_BATCH)
        extra = [lpips_distance(lpips, device)] if lpips else []
        report = evaluate_own(model, file, out, sets, wanted, strength, many, extra, progress)
        write_reports(out, [report], file)
    if processes.is_main():
        say(markdown(report))


def _require_fit(file: Path, config: dict) -> None:
    """ValueError where the file's concepts were made for another geometry than this FLUX.1 transformer's."""
    from saferope_core import Geometry, load_concepts

    names = ("num_layers", "num_single_layers", "num_attention_heads", "attention_head_dim")
    if all(name in config for name in names):
        geometry = Geometry(*(config[name] for name in names))
        for concept in load_concepts(file):
            geometry.require(concept.geometry, f"{file}, concept {concept.slug!r}")


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
