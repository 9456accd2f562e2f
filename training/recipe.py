"""From a concept's name to its file, four stages: prompts -> extract -> heads -> train."""

from __future__ import annotations

import json
import platform
import random
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from saferope_core import Concept, save_concepts

from . import extract, heads, pictures, prompts, train
from .attach import ROLES
from .models import Model, Text, encode, encode_pictures, fingerprint, noise
from .settings import Settings
from .stages import Progress, Workplace, file_sha256

PROMPTS, STATISTICS, TABLE, MAP = "prompts.jsonl", "statistics.safetensors", "heads.csv", "head_map.png"
HEADS, LOG, CURVE, CONFIG = "heads.safetensors", "log.jsonl", "losses.png", "config.json"
_BATCH = 48  # prompts sampled at once
_REPORTED = 20  # losses of this many last steps are averaged for the file's record


def make_concept(
    model: Model, settings: Settings, out: Path, progress: Progress = lambda stage, done, total: None
) -> Path:
    """Runs the stages whose inputs changed and returns the concept file, `<out>/<slug>.safetensors`.

    Beside it lie every stage's product and `config.json`, the resolved settings with the versions they ran with.
    """
    out.mkdir(parents=True, exist_ok=True)
    place = Workplace(out, settings, fingerprint(model.transformer), progress)
    config = {"settings": asdict(settings), "model_sha256": place.weights, "versions": versions()}
    (out / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    _prompts(place)
    records = prompts.read_prompts(out / PROMPTS)
    _extract(place, model, records)
    _heads(place, model)
    return _train(place, model, records, config)


def versions() -> dict[str, str]:
    """What ran: Python and the libraries that decide numbers."""
    import diffusers
    import transformers

    libraries = {module.__name__: module.__version__ for module in (torch, diffusers, transformers)}
    return {"python": platform.python_version(), **libraries}


def _prompts(place: Workplace) -> None:
    s = place.settings

    def make(report) -> None:
        records = prompts.tiny_world_prompts(s.concept, s.unsafe_prompts, s.benign_prompts, s.seed)
        prompts.write_prompts(place.out / PROMPTS, records)

    place.stage("prompts", ("concept", "unsafe_prompts", "benign_prompts", "seed"), (), (PROMPTS,), make)


def _extract(place: Workplace, model: Model, records: Sequence[prompts.PromptRecord]) -> None:
    s = place.settings

    def make(report) -> None:
        statistics = extract.extract(model, records, s.timesteps, s.reservoir, s.seed, report)
        extract.save_statistics(place.out / STATISTICS, statistics)

    place.stage("extract", ("timesteps", "reservoir", "seed"), (PROMPTS,), (STATISTICS,), make)


def _heads(place: Workplace, model: Model) -> None:
    s, out = place.settings, place.out

    def make(report) -> None:
        statistics = extract.load_statistics(out / STATISTICS)
        table = heads.read_heads(statistics, s.rank, s.basis, s.threshold, s.cut, s.gate, s.quantile)
        heads.write_table(out / TABLE, table, model.geometry)
        title = f"{s.concept}: {int(table.critical.sum())} of {table.critical.numel()} heads are safety-critical"
        pictures.head_map(out / MAP, table.discrimination, model.geometry, s.cut, title)
        save_critical(out / HEADS, heads.critical_heads(table, model.geometry), table.discrimination)

    depends = ("concept", "rank", "basis", "threshold", "cut", "gate", "quantile")
    place.stage("heads", depends, (STATISTICS,), (HEADS, TABLE, MAP), make)


def _train(place: Workplace, model: Model, records: Sequence[prompts.PromptRecord], config: dict) -> Path:
    s, out = place.settings, place.out
    path = out / f"{s.concept}.safetensors"

    def make(report) -> None:
        critical, delta = load_critical(out / HEADS)
        log: list[dict] = []
        with (out / LOG).open("w", encoding="utf-8") as file:

            def note(entry: dict) -> None:
                log.append(entry)
                file.write(json.dumps(entry) + "\n")
                report(len(log), s.steps)

            generators = train.train(model, critical, material(model, records, s.unlearn_at, s.seed), s, note)
        pictures.loss_curve(out / CURVE, log)
        record = {**config, "prompts_sha256": file_sha256(out / PROMPTS), "final": final_errors(log)}
        save_concepts(path, [concept_of(model, critical, delta, generators, s, record)])

    depends = (
        "acts_on",
        "steps",
        "phase",
        "batch",
        "learning_rate",
        "unlearn_at",
        "unlearn_scale",
        "preserve_weight",
        "text_init",
        "image_init",
        "regulariser",
        "seed",
    )
    place.stage("train", depends, (PROMPTS, HEADS), (path.name, LOG, CURVE), make)
    return path


def material(
    model: Model, records: Sequence[prompts.PromptRecord], times: Sequence[float], seed: int
) -> train.Material:
    """Encodes the prompts once, samples the unsafe ones down to the times, draws the benign scenes."""
    from tinyworld.render import render
    from tinyworld.world import Scene

    unsafe, benign = (prompts.side(records, name) for name in (prompts.UNSAFE, prompts.BENIGN))
    rng = random.Random(seed)
    drawn = torch.stack([render(Scene(**record.scene), rng) for record in benign])
    wanted, harmless = (encode(model, [record.text for record in part]) for part in (unsafe, benign))
    return train.Material(wanted, _visited(model, wanted, times, seed), harmless, encode_pictures(model, drawn))


def _visited(model: Model, text: Text, times: Sequence[float], seed: int) -> dict[float, Tensor]:
    """The base model's latents [n, L, C] of every text at each of the times below 1."""
    generator, parts = torch.Generator().manual_seed(seed), []
    for index in torch.arange(len(text.states)).split(_BATCH):
        start = noise(model, len(index), generator)
        parts.append(extract.walk(model, text.pick(index), start, times))
    return {t: torch.cat([part[t] for part in parts]) for t in times if t < 1}


def concept_of(
    model: Model,
    critical: heads.CriticalHeads,
    discrimination: Tensor,
    generators: tuple[Tensor, Tensor],
    settings: Settings,
    record: dict,
) -> Concept:
    """The concept of these heads, bases, gates and trained generators (text, image)."""
    text, image = generators
    return Concept(
        slug=settings.concept,
        name=settings.concept.capitalize(),
        description=f"{settings.concept} of the tiny world" if settings.model == "tinyworld" else settings.concept,
        geometry=model.geometry,
        heads=critical.heads,
        basis_q=critical.basis["q"],
        basis_k=critical.basis["k"],
        generator_text=text,
        generator_image=image,
        discrimination=discrimination,
        threshold=settings.threshold,
        gate_q=critical.gate["q"],
        gate_k=critical.gate["k"],
        acts_on=settings.acts_on,
        training=record,
        singular_values=critical.singular_values,
    )


def save_critical(path: Path, critical: heads.CriticalHeads, discrimination: Tensor) -> None:
    """Writes the safety-critical heads and Δ of all heads as safetensors."""
    tensors = {"heads": critical.heads, "discrimination": discrimination, "singular_values": critical.singular_values}
    for role in ROLES:
        tensors |= {f"basis_{role}": critical.basis[role], f"gate_{role}": critical.gate[role]}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)


def load_critical(path: Path) -> tuple[heads.CriticalHeads, Tensor]:
    """Reads what `save_critical` wrote."""
    tensors = load_file(path)
    basis, gate = ({role: tensors[f"{kind}_{role}"] for role in ROLES} for kind in ("basis", "gate"))
    return heads.CriticalHeads(tensors["heads"], basis, gate, tensors["singular_values"]), tensors["discrimination"]


def final_errors(log: Sequence[dict]) -> dict[str, float]:
    """Mean squared velocity change over the last steps of either phase."""
    result = {}
    for phase in (train.UNLEARN, train.PRESERVE):
        errors = [entry["velocity_mse"] for entry in log if entry["phase"] == phase][-_REPORTED:]
        if errors:
            result[phase] = sum(errors) / len(errors)
    return result
