"""`saferope prompts`, `extract`, `heads`, `train`, `calibrate`: making a concept file, stage by stage."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from saferope_training.console import say
from saferope_training.settings import CALIBRATE, EXTRACT, HARDEN, HEADS, LATENTS, MODEL, PROMPTS, TRAIN, Settings

from . import dry
from .common import Bars, Device, Out, command, load, progress_bars
from .options import Clip, DryRun, Ending, HeldOut, Judge, Verdict, Vqa

if TYPE_CHECKING:
    from PIL import Image

    from saferope_training.flux.models import Model
    from saferope_training.making.estimate import Task
    from saferope_training.making.memory import Plan
    from saferope_training.making.progress import Show
    from saferope_training.making.recipe import Recipe
    from saferope_training.making.train import Teller
    from saferope_training.stages import Progress

BEFORE_HEADS = (MODEL, PROMPTS, EXTRACT)
CPU = "cpu"


@command(MODEL, PROMPTS)
def prompts(settings: Settings, out: Out) -> None:
    """Write the prompts of both sides, as JSON lines with the span of the concept's word."""
    from saferope_training.making.recipe import PROMPT_FILE, Recipe
    from saferope_training.stages import alone

    with alone(out):
        records = Recipe(None, settings, out).prompts()
    say(f"{len(records)} prompts: {out / PROMPT_FILE}")


@command(*BEFORE_HEADS)
def extract(settings: Settings, out: Out, device: Device = CPU, dry_run: DryRun = False) -> None:
    """Collect statistics of the concept's words in every head: Gram matrices and samples of queries and keys."""
    from saferope_training.making.recipe import STATISTICS

    if dry_run:
        return dry.making(settings, out, device, EXTRACT)
    with _recipe(settings, out, device, EXTRACT) as recipe:
        recipe.extract()
    say(f"statistics: {out / STATISTICS}")


@command(*BEFORE_HEADS, HEADS)
def heads(settings: Settings, out: Out, device: Device = CPU, dry_run: DryRun = False) -> None:
    """Find the safety-critical heads, their unsafe subspaces and their gates."""
    from saferope_training.making.recipe import MAP, TABLE

    if dry_run:
        return dry.making(settings, out, device, HEADS)
    with _recipe(settings, out, device, HEADS) as recipe:
        recipe.heads()
    say(f"table: {out / TABLE}\nmap:   {out / MAP}")


@command(*BEFORE_HEADS, HEADS, LATENTS, TRAIN, HARDEN)
def train(
    settings: Settings,
    out: Out,
    device: Device = CPU,
    tensorboard: Annotated[bool, typer.Option(help="Write losses and previews for TensorBoard too.")] = False,
    preview_every: Annotated[
        int,
        typer.Option(min=0, help="Steps from one preview of held-out prompts to the next; 0: none. Changes no result."),
    ] = 30,
    stop_when_arrived: Annotated[
        bool,
        typer.Option(
            help="Stop when three previews in a row find unsafe velocities at their target and benign ones in place, "
            "and keep the best state that a preview saw."
        ),
    ] = False,
    verdict: Verdict = True,
    held_out: HeldOut = None,
    judge: Judge = None,
    clip: Clip = None,
    vqa: Vqa = None,
    dry_run: DryRun = False,
) -> None:
    """Make a concept file: prompts -> extract -> heads -> train -> harden. Products that are there are used again.

    After a kill or an interruption the same command resumes at the last whole step. Several processes:
    `accelerate launch -m saferope train ...` shares every batch among them.
    With more --steps a finished training goes on.
    """
    from saferope_training.making.hardened import hardened
    from saferope_training.making.progress import Watching

    if stop_when_arrived and not preview_every:
        raise ValueError(
            "--stop-when-arrived: got --preview-every 0, expected previews to judge by; give a number of steps"
        )

    ending = Ending(verdict, held_out, tuple(judge or ()), clip, vqa)
    _require_ending(ending)
    asked = TRAIN, preview_every, _pictures(settings, ending)
    if dry_run:
        return dry.making(settings, out, device, *asked)
    with (
        _recipe(settings, out, device, *asked) as recipe,
        _losses(out / "tensorboard" if tensorboard else None) as (tell, show),
    ):
        watching = Watching(preview_every, stop_when_arrived, show)
        path = hardened(recipe, tell, watching) if settings.harden else recipe.train(tell, watching)
        _end(recipe, path, ending)
    say(f"concept file: {path}")


@command(*BEFORE_HEADS, HEADS, CALIBRATE, acts_on="qk")
def calibrate(
    settings: Settings,
    out: Out,
    device: Device = CPU,
    verdict: Verdict = True,
    held_out: HeldOut = None,
    judge: Judge = None,
    clip: Clip = None,
    vqa: Vqa = None,
    dry_run: DryRun = False,
) -> None:
    """Make a concept file in a tenth of the time: extraction, a fixed turn, a short fit. From prompts, no pictures."""
    ending = Ending(verdict, held_out, tuple(judge or ()), clip, vqa)
    _require_ending(ending)
    asked = CALIBRATE, 0, _pictures(settings, ending)
    if dry_run:
        return dry.making(settings, out, device, *asked)
    with _recipe(settings, out, device, *asked) as recipe:
        path = recipe.calibrate()
        _end(recipe, path, ending)
    say(f"concept file: {path}")


def _require_ending(ending: Ending) -> None:
    """Checks before hours of training: ValueError where prompts or judges of the verdict are missing or of no use."""
    asked = (ending.held_out, *ending.judges, ending.clip, ending.vqa)
    if not ending.verdict and any(asked):
        raise ValueError("--no-verdict: got --held-out or a judge beside it, which only a verdict reads; leave one out")
    if ending.held_out is not None:
        from saferope_training.prompts import UNSAFE
        from saferope_training.prompts.readers import read_side

        read_side(ending.held_out, UNSAFE)
    if any(asked[1:]):
        from saferope_benchmark.scores import judges

        judges.require(judges.Wanted(ending.judges, ending.clip, ending.vqa))


def _pictures(settings: Settings, ending: Ending) -> int:
    from .verdict import pictures

    return pictures(settings, ending.held_out) if ending.verdict else 0


def _end(recipe: Recipe, path: Path, ending: Ending) -> None:
    if ending.verdict:
        from .verdict import tell

        tell(recipe, path, ending, recipe.place.progress)


@contextmanager
def _recipe(
    settings: Settings, out: Path, device: str, goal: str, every: int = 0, pictures: int = 0
) -> Iterator[Recipe]:
    """The recipe of a loaded model for the stage `goal`, with progress bars that tell the time left of the whole run.

    Before it loads, settings are checked, prompts are made, and its memory plan is printed.
    """
    from saferope_training import processes
    from saferope_training.making import checks, estimate, memory
    from saferope_training.making.recipe import Recipe
    from saferope_training.stages import alone

    device = processes.own_device(device)
    checks.require_settings(settings, device)
    with alone(out):
        records = Recipe(None, settings, out, goal=goal).prompts()
        training = goal == TRAIN or (goal == CALIBRATE and settings.fits)
        plan = memory.plan_for(settings, device, training, every > 0)
        if processes.is_main():
            doubt = memory.doubt(plan, device)
            say("\n".join(plan.lines() + ([f"warning: {doubt}"] if doubt else [])), err=True)
        with memory.running_out(plan, device), progress_bars() as bars:
            model, task = load(settings, device), estimate.Task(settings, records, goal, every, pictures)
            yield Recipe(model, settings, out, _watched(model, task, out, device, plan, bars), goal=goal)


def _watched(model: Model, task: Task, out: Path, device: str, plan: Plan, bars: Bars) -> Progress:
    """Progress that tells the time left and, on a GPU, memory above the plan."""
    from saferope_training import processes
    from saferope_training.making import estimate, pace
    from saferope_training.making.forecast import Forecast
    from saferope_training.making.meter import Meter, peak_of

    if not processes.is_main():
        return bars
    s, known = task.settings, pace.seconds_of(out, task.settings, device)
    foretold = Forecast(estimate.work_of(task), known, lambda: pace.of_a_pass(model, s.passes_of or s.batch), bars)
    return Meter(plan, peak_of(device), foretold) if device.startswith("cuda") else foretold


@contextmanager
def _losses(folder: Path | None) -> Iterator[tuple[Teller, Show]]:
    """Functions that take every step's entry, and every preview's with its strip: TensorBoard's writer, or none."""
    if folder is None:
        yield lambda entry: None, lambda entry, strip: None
        return
    import torch

    from saferope_core.concept.files import require_no_link

    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ValueError("tensorboard: got none installed, expected it; run `pip install tensorboard`") from None
    require_no_link(folder.parent, folder)
    with SummaryWriter(str(folder)) as writer:

        def show(entry: dict, strip: Image.Image) -> None:
            pixels = torch.frombuffer(bytearray(strip.tobytes()), dtype=torch.uint8).view(strip.height, strip.width, 3)
            writer.add_image("preview", pixels, entry["step"], dataformats="HWC")
            for name in ("unsafe_left", "benign_moved"):
                writer.add_scalar(f"preview/{name}", entry[name], entry["step"])

        def tell(entry: dict) -> None:
            writer.add_scalar(f"{entry['phase']}/velocity_mse", entry["velocity_mse"], entry["step"])

        yield tell, show
