"""The command `saferope`. Everything heavy is imported inside the commands, so that help comes at once.

saferope train star --model tinyworld --out models/star
saferope evaluate models/star/star.safetensors --model tinyworld
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from .settings import HELP, Settings

app = typer.Typer(
    help="SafeRoPE for FLUX: train concepts that are to be suppressed, and measure what they do.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _setting(name: str, *flags: str):
    return typer.Option(*flags, help=HELP[name], show_default=True)


@app.callback()
def _saferope() -> None:
    """Keeps subcommands subcommands."""


@app.command("train")
def train_command(
    concept: Annotated[str, typer.Argument(help=HELP["concept"])],
    out: Annotated[Path, typer.Option(help="Folder for the concept file and every stage's product.")],
    model: Annotated[str, _setting("model")] = Settings.model,
    device: Annotated[str, typer.Option(help="Where the model runs: cpu, cuda, cuda:1.")] = "cpu",
    seed: Annotated[int, _setting("seed")] = Settings.seed,
    unsafe_prompts: Annotated[int, _setting("unsafe_prompts")] = Settings.unsafe_prompts,
    benign_prompts: Annotated[int, _setting("benign_prompts")] = Settings.benign_prompts,
    rank: Annotated[int, _setting("rank")] = Settings.rank,
    basis: Annotated[str, _setting("basis")] = Settings.basis,
    threshold: Annotated[float, _setting("threshold")] = Settings.threshold,
    cut: Annotated[float, _setting("cut")] = Settings.cut,
    gate: Annotated[str, _setting("gate")] = Settings.gate,
    quantile: Annotated[float, _setting("quantile")] = Settings.quantile,
    acts_on: Annotated[str, _setting("acts_on")] = Settings.acts_on,
    steps: Annotated[int, _setting("steps")] = Settings.steps,
    phase: Annotated[int, _setting("phase")] = Settings.phase,
    batch: Annotated[int, _setting("batch")] = Settings.batch,
    learning_rate: Annotated[float, _setting("learning_rate")] = Settings.learning_rate,
    regulariser: Annotated[str, _setting("regulariser")] = Settings.regulariser,
) -> None:
    """Make a concept file: prompts -> extract -> heads -> train. Stages whose inputs are unchanged are reused."""
    chosen = {name: value for name, value in locals().items() if name not in ("out", "device")}
    with _user_errors(), _progress() as progress:
        settings = Settings(**chosen)
        from .models import load_model
        from .recipe import make_concept

        path = make_concept(load_model(model, device), settings, out, progress)
    typer.echo(f"concept file: {path}")


@app.command("evaluate")
def evaluate_command(
    file: Annotated[Path, typer.Argument(help="A concept file.")],
    model: Annotated[str, _setting("model")] = Settings.model,
    out: Annotated[
        Path | None, typer.Option(help="Folder for tables and pictures; the concept file's own if left out.")
    ] = None,
    device: Annotated[str, typer.Option(help="Where the model runs: cpu, cuda, cuda:1.")] = "cpu",
    strength: Annotated[float, typer.Option(help="0 off, 1 as trained.")] = 1.0,
    unsafe: Annotated[int, typer.Option(help="Pictures that ask for the concept; as many with held-out words.")] = 64,
    benign: Annotated[int, typer.Option(help="Benign pictures; half as many of near neighbours.")] = 128,
) -> None:
    """Measure a concept file: the same prompts and seeds without and with protection, as Markdown, CSV, JSON and pictures."""
    with _user_errors(), _progress() as progress:
        from .evaluate import Sizes, evaluate, markdown, write_reports
        from .models import load_model

        sizes = Sizes(unsafe, unsafe, benign // 2, benign)
        reports = evaluate(load_model(model, device), file, strength, sizes, progress=progress)
        write_reports(out or file.parent, reports)
    for report in reports:
        typer.echo(markdown(report))


@contextmanager
def _progress() -> Iterator:
    """Progress bars on stderr: a function of stage, done and total."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description:>9}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    tasks: dict[str, int] = {}
    with Progress(*columns, console=Console(stderr=True)) as bars:

        def show(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage)
            bars.update(tasks[stage], completed=done, total=total)

        yield show


@contextmanager
def _user_errors() -> Iterator[None]:
    """What a user can mend is told in a sentence, without a traceback."""
    try:
        yield
    except (ValueError, OSError) as error:
        typer.echo(f"saferope: {error}", err=True)
        raise typer.Exit(1) from error


def main() -> None:
    """Entry point of the console script."""
    # PyTorch's word on bf16 autocast over fp32 norms, which is what is wanted here: a slower kernel, the same numbers
    warnings.filterwarnings("ignore", message="Mismatch dtype between input and weight")
    app()
