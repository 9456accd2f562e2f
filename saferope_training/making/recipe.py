"""From a concept's name to its file, stage by stage: prompts -> extract -> heads -> latents -> train (or calibrate)."""

from __future__ import annotations

import functools
import json
import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saferope_core import Concept, CriticalHeads, critical_heads, save_concepts, sha256
from saferope_core.concept.files import require_no_link, sweep, write_text

from .. import plots, processes, prompts
from ..console import say
from ..flux import models
from ..flux.identity import facts
from ..flux.models import Model
from ..prompts import PromptRecord
from ..prompts.doubts import doubts
from ..prompts.instead import stand_ins
from ..prompts.sources import origins, prompts_for
from ..settings import CALIBRATE, EXTRACT, HEADS, PROMPTS, TRAIN, Settings
from ..settings import LATENTS as LATENTS_STAGE
from ..stages import Facts, Progress, Report, Workplace, alone, sha256_of
from . import checks, extract, heads, material, train
from .batch import PRESERVE, REPLACE, UNLEARN
from .pace import Pace, measured_with
from .preview import Preview
from .progress import NONE, PREVIEWS, Watch, Watching, previews_until
from .state import Log, State
from .train import Teller

PROMPT_FILE, STATISTICS, TABLE, MAP = "prompts.jsonl", "statistics.safetensors", "heads.csv", "head_map.png"
CRITICAL, LATENTS, STATE = "heads.safetensors", "latents.safetensors", "train_state.safetensors"
LOG, CURVE, CONFIG, EMBEDDINGS = "log.jsonl", "losses.png", "config.json", "embeddings"
UNLEARNING = {REPLACE: "to the stand-in's, should fall", "away": "from their own, should rise"}
_NAMED = 50  # stand-ins that the file's record names
_REPORTED = 20  # losses of this many last steps are averaged for the file's record
# The facts of a model (`flux.identity`) that decide a stage's products, beside the files that it reads. Forward passes
# need all but the VAE, also in training, which embeds the prompts itself. The versions of libraries are no input: they
# change last bits, and the record names them.
_FORWARD = ("transformer", "axes", "encoders", "text_length", "latent_side", "guidance")
FACTS = {
    EXTRACT: _FORWARD,
    HEADS: ("transformer",),  # its geometry; all else is in the statistics
    LATENTS_STAGE: (*_FORWARD, "vae"),
    TRAIN: _FORWARD,
    CALIBRATE: _FORWARD,
}


def _alone(method: Callable[..., Any]) -> Callable[..., Any]:
    """The method, with its folder locked while it runs."""

    @functools.wraps(method)
    def run(recipe: Recipe, *args: object, **kwargs: object) -> object:
        with alone(recipe.out, within=True):
            return method(recipe, *args, **kwargs)

    return run


class Recipe:
    """A folder in which a concept is made. Each method runs the stages that it needs and then its own, where inputs
    changed.

    ValueError where another process, or another Recipe of this one, is at work in the folder.

    `model` may be None for `prompts` alone. `more` prompts follow the settings'. `goal` is TRAIN where the
    stages run for training. For any other goal they raise ValueError rather than replace inputs of a training here.

    Beside a concept file lie its settings and versions (`config.json`, for calibration `<concept>.<generator>.json`),
    and `stages.json` with the inputs of each product.
    """

    def __init__(
        self,
        model: Model | None,
        settings: Settings,
        out: Path,
        progress: Progress = lambda *_: None,
        more: Sequence[PromptRecord] = (),
        goal: str = "",
    ) -> None:
        out.mkdir(parents=True, exist_ok=True)
        if model is not None and model.source is not None:
            require_no_link(out, out / EMBEDDINGS)
            model = models.with_cache(model, out / EMBEDDINGS)
        settings = settings if model is None else heads.for_family(settings, model.geometry.family)
        self._model, self.settings, self.out, self._more = model, settings, out, tuple(more)
        timed = progress if model is None else Pace(out, measured_with(settings, str(model.device)), progress)
        self.place = Workplace(out, settings, timed)
        self._goal = goal
        self.known: dict[str, Any] = facts(model) if model is not None else {}
        weights = self.known.get("transformer", "")
        self.config = {"settings": asdict(settings), "model_sha256": weights, "versions": versions()}
        with alone(out, within=True):
            if processes.is_main():
                sweep(out / EMBEDDINGS)

    @property
    def model(self) -> Model:
        """The model that all stages but the prompts need."""
        assert self._model is not None, "a Recipe without a model makes prompts alone"
        return self._model

    @_alone
    def prompts(self) -> list[PromptRecord]:
        """The prompts of both sides, in prompts.jsonl."""

        def make(report: Report) -> None:
            records = [*prompts_for(self.settings), *self._more]
            if processes.is_main():
                own = {prompts.UNSAFE: self.settings.unsafe, prompts.BENIGN: self.settings.benign}
                for doubt in doubts(records, [name for name, file in own.items() if file]):
                    say(f"warning: prompts: {doubt}", err=True)
                prompts.write_prompts(self.out / PROMPT_FILE, records)

        sources, facts = prompt_inputs(self.settings)
        more = {"more": sha256_of([asdict(record) for record in self._more])} if self._more else {}
        self._stage(PROMPTS, sources, (PROMPT_FILE,), make, {**facts, **more})
        return prompts.read_prompts(self.out / PROMPT_FILE)

    @_alone
    def extract(self, training: bool = False) -> list[PromptRecord]:
        """Statistics of every head; returns the prompts. `training`: check the pictures of training too."""
        s, records = self.settings, self.prompts()
        checks.require(self.model, records, s)
        if training and not self._has_latents(records):
            material.require_pictures(records, 8 * self.model.latent_side)

        def make(report: Report) -> None:
            statistics = extract.extract(self.model, records, s.timesteps, s.reservoir, s.seed, report, s.passes_of)
            if processes.is_main():
                extract.save_statistics(self.out / STATISTICS, statistics)

        self._stage(EXTRACT, (PROMPT_FILE,), (STATISTICS,), make, self.facts(EXTRACT))
        return records

    @_alone
    def heads(self, training: bool = False) -> list[PromptRecord]:
        """The safety-critical heads, their bases and gates, as tensors, table and map; returns the prompts."""
        records = self.extract(training)
        products, needs = (CRITICAL, TABLE, MAP), self.facts(HEADS)
        self._stage(HEADS, (STATISTICS,), products, lambda report: self._read_heads(), needs)
        return records

    def _stage(
        self,
        name: str,
        sources: Sequence[str],
        products: Sequence[str],
        make: Callable[[Report], None],
        facts: Facts,
    ) -> None:
        """A stage that training shares with other goals. ValueError where these would replace inputs of a training."""
        if self._goal != TRAIN:
            require_unchanged(self.place, name, sources, facts)
        self.place.stage(name, sources, products, make, facts)

    def _note(self, name: str) -> None:
        """Writes down the settings and versions of a file that is made."""
        if processes.is_main():
            write_text(self.out / name, json.dumps(self.config, indent=2) + "\n")

    def _read_heads(self) -> None:
        if not processes.is_main():
            return
        s, out, geometry = self.settings, self.out, self.model.geometry
        statistics = extract.load_statistics(out / STATISTICS, geometry)
        table = heads.table_of(statistics, s, geometry)
        heads.write_table(out / TABLE, table, geometry)
        title = f"{s.concept}: {int(table.critical.sum())} of {table.critical.numel()} heads are safety-critical"
        plots.head_map(out / MAP, table.discrimination, geometry, table.critical, title)
        heads.save_critical(out / CRITICAL, critical_heads(table, geometry), table.discrimination)

    @_alone
    def train(self, tell: Teller = lambda entry: None, watching: Watching = NONE) -> Path:
        """The concept file with learned generators, `<out>/<concept>.safetensors`. `tell` gets each step's entry.

        A finished training of fewer steps resumes; one of more starts again. Previews are no input: see `Watching`.
        """
        self._goal = TRAIN
        s, out, records = self.settings, self.out, self.heads(training=True)
        self._note(CONFIG)

        def make_latents(report: Report) -> None:
            material.make_latents(self.model, records, s.unlearn_at, s.seed, out / LATENTS, report, s.passes_of)

        self.place.stage(LATENTS_STAGE, (PROMPT_FILE,), (LATENTS,), make_latents, self._latents_facts(records))
        path, sources = out / f"{s.concept}.safetensors", (PROMPT_FILE, CRITICAL, LATENTS)
        needs: Facts = {**self.facts(TRAIN), **({"stops": "when arrived"} if watching.stop else {})}
        started = Workplace(out, replace(s, steps=Settings.steps))  # more steps resume from a state of fewer
        digest = sha256_of(started.inputs(TRAIN, sources, self.facts(TRAIN)))

        def make(report: Report) -> None:
            self._learn(path, records, State(out / STATE, digest), report, tell, watching)

        done = State(out / STATE, digest).finished(s.steps)
        self.place.stage(TRAIN, sources, (path.name, LOG, CURVE), make, needs, goes_on=0 < done < s.steps)
        return path

    def _learn(
        self,
        path: Path,
        records: Sequence[PromptRecord],
        state: State,
        report: Report,
        tell: Teller,
        watching: Watching,
    ) -> None:
        s, out = self.settings, self.out
        done, courses = state.finished(s.steps), state.courses(s.steps)
        report(done, s.steps)
        critical, delta = heads.load_critical(out / CRITICAL, self.model.geometry)
        seen = material.load_material(self.model, records, s.unlearn_at, out / LATENTS)
        look = Preview(self.model, records, s) if watching.every else None
        if self.model.source is not None:
            models.release_encoders(self.model)
        log, watch = Log(out / LOG, done), None
        if look is not None:
            watch = Watch(look, watching, out, previews_until(out / PREVIEWS, done), log, state.inputs)
        if done and processes.is_main():
            say(f"train: resumes at step {done} of {s.steps}", err=True)

        def note(entry: dict) -> None:
            log.add(entry)
            tell(entry)
            report(len(log.entries), s.steps)

        generators = train.train(self.model, critical, seen, s, note, state, watch=watch)
        more: dict[str, object] = {"courses": courses} if len(courses) > 1 else {}
        if watch is not None:
            watch.tell_cost()
            step, generators = watch.best() or (len(log.entries), generators)
            more |= {"kept_step": step} if watching.stop else {}
        if processes.is_main():
            plots.loss_curve(out / CURVE, log.entries, UNLEARNING[s.objective])
            record = self._record() | {"final": final_errors(log.entries), "instead": stand_ins(records)[:_NAMED]}
            save_concepts(path, [concept_of(self.model, critical, delta, generators, s, record | more)])

    @_alone
    def calibrate(self) -> Path:
        """The concept file of a fitted fixed turn, or of random ones, `<out>/<concept>.<generator>.safetensors`.

        The trained concept, whose first three stages are the same, has another name and may lie beside it.
        """
        s, out, records = self.settings, self.out, self.heads()
        path = out / f"{s.concept}.{s.generator}.safetensors"
        self._note(path.with_suffix(".json").name)

        def make(report: Report) -> None:
            critical, delta = heads.load_critical(out / CRITICAL, self.model.geometry)
            generators, mode, record = heads.untrained(critical, s), s.generator, self._record()
            if s.fits:
                generators, mode = self._fitted(critical, records, generators, report), "learned"
                record |= {"instead": stand_ins(records)[:_NAMED], "fitted": s.fit}
            concept = concept_of(self.model, critical, delta, generators, s, record, mode)
            if processes.is_main():
                save_concepts(path, [concept])

        self.place.stage(CALIBRATE, (PROMPT_FILE, CRITICAL), (path.name,), make, self.facts(CALIBRATE))
        return path

    def _fitted(
        self,
        critical: CriticalHeads,
        records: Sequence[PromptRecord],
        start: tuple[Tensor, Tensor],
        report: Report,
    ) -> tuple[Tensor, Tensor]:
        s = self.settings
        report(0, s.fit)
        seen = material.fitting_material(self.model, records, s.unlearn_at, s.seed, s.passes_of)
        if self.model.source is not None:
            models.release_encoders(self.model)
        return train.fit(self.model, critical, seen, s, start, lambda entry: report(entry["step"] + 1, s.fit))

    def facts(self, stage: str) -> Facts:
        """The model's facts that decide a stage."""
        return {name: self.known[name] for name in FACTS[stage]}

    def _latents_facts(self, records: Sequence[PromptRecord]) -> Facts:
        """The facts that decide the latents: the model's, and a digest of the benign prompts' pictures."""
        pictures = [Path(record.image) for record in records if record.image is not None]
        digests = [sha256(path) if path.is_file() else "" for path in pictures]  # gone: told where it is read
        return {**self.facts(LATENTS_STAGE), **({"pictures": sha256_of(digests)} if digests else {})}

    def _has_latents(self, records: Sequence[PromptRecord]) -> bool:
        """Whether the latents need not be made, so that no picture is read again."""
        return self.place.fresh(LATENTS_STAGE, (PROMPT_FILE,), (LATENTS,), self._latents_facts(records))

    def _record(self) -> dict[str, object]:
        return {**self.config, "prompts_sha256": sha256(self.out / PROMPT_FILE)}


def prompt_inputs(settings: Settings) -> tuple[list[str], dict[str, str]]:
    """The inputs of the prompts beside the settings: files, and digests of all other sources."""
    named = [Path(name) for name in (settings.unsafe, settings.benign) if name]
    return [str(path.absolute()) for path in named], origins(settings)


def require_unchanged(place: Workplace, name: str, sources: Sequence[str], facts: Facts) -> None:
    """ValueError where a training in this folder rests on a stage that would be made from other inputs."""
    trained = TRAIN in place.record() or (place.out / STATE).is_file()
    if changed := place.changes(name, sources, facts) if trained else None:
        raise ValueError(
            f"{place.out}: got other inputs of the {name} than training had here ({changed}), expected the same, "
            "since its prompts and statistics would be replaced; give the same options, or name another --out"
        )


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that decide numbers."""
    import diffusers
    import transformers

    libraries = {module.__name__: module.__version__ for module in (torch, diffusers, transformers)}
    return {"python": platform.python_version(), **libraries}


def concept_of(
    model: Model,
    critical: CriticalHeads,
    discrimination: Tensor,
    generators: tuple[Tensor, Tensor],
    settings: Settings,
    record: dict,
    mode: str = "learned",
) -> Concept:
    """The concept of these heads, bases, gates and generators (text, image)."""
    return Concept(
        slug=settings.concept,
        name=settings.concept.capitalize(),
        description=f"{settings.concept} of the tiny world" if model.tiny else settings.concept,
        geometry=model.geometry,
        discrimination=discrimination,
        threshold=settings.threshold,
        mode=mode,
        training=record,
        **critical.fields(generators, settings.acts_on, settings.acts_on_image),
    )


def final_errors(log: Sequence[dict]) -> dict[str, float]:
    """Mean squared velocity differences over the last steps of either phase."""
    result = {}
    for phase in (UNLEARN, PRESERVE):
        errors = [entry["velocity_mse"] for entry in log if entry["phase"] == phase][-_REPORTED:]
        if errors:
            result[phase] = sum(errors) / len(errors)
    return result
