"""Shared by the subcommands: options made from Settings, progress bars, mistakes told in a sentence. No torch."""

from __future__ import annotations

import functools
import inspect
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import Field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Protocol, get_type_hints

import typer

from saferope_training.console import plain, say
from saferope_training.settings import DEFAULT, HEADS, MODEL, RECIPES, Settings, settings_of

if TYPE_CHECKING:
    from rich.progress import TaskID

    from saferope_core import Concept
    from saferope_training.flux.models import Model

USER_ERROR = 2  # exit code: a mistake that the user can mend. Typer has the same for unknown options.
LONGEST = 4000  # characters of an error that are told; ours have a few hundred
INTERRUPTED = 130  # 128 + SIGINT, as shells have it
CLOSED_PIPE = 141  # 128 + SIGPIPE
_BAR = 20  # letters of a bar: with the words behind it a line is 80

Out = Annotated[Path, typer.Option(help="Folder for every stage's product; a later call resumes there.")]
Device = Annotated[str, typer.Option(help="Where the model runs: cpu, cuda, cuda:1.")]
ConceptFiles = Annotated[
    list[str] | None,
    typer.Option("--concept", help="Concept file, or FILE:STRENGTH (0 off, 1 as trained). May be repeated."),
]


Recipe = Annotated[
    str, typer.Option(help="`paper`: the form and numbers of the paper, for every setting that you do not give.")
]


class Bars(Protocol):
    """Shows how far a stage is."""

    def __call__(self, stage: str, done: int, total: int, words: str = "", /) -> None: ...


def command(*stages: str, **defaults: Any) -> Callable[[Callable], Callable]:
    """A decorator: settings that decide the stages become options of the function. A mistake ends it with one line.

    Defaults are the defaults of Settings unless given here. ValueError and OSError are mistakes and exit with
    USER_ERROR.
    """

    def decorate(function: Callable) -> Callable:
        names = settings_of(*stages)

        @functools.wraps(function)
        def run(**given: Any) -> Any:
            with told():
                if names:
                    recipe = _recipe(given.pop("recipe", DEFAULT), given.pop("context", None))
                    given["settings"] = Settings(**{name: given.pop(name) for name in names} | recipe)
                return function(**given)

        # not get_type_hints: on Python 3.10 it hides the options' names and help behind an Optional
        own = inspect.signature(function, eval_str=True).parameters.values()
        parameters = [p.replace(kind=p.KEYWORD_ONLY) for p in own if p.name != "settings"]
        kinds = get_type_hints(Settings) if names else {}
        parameters += [
            _parameter(entry, kinds[entry.name], defaults) for entry in fields(Settings) if entry.name in names
        ]
        if HEADS in stages:
            extra = {"recipe": (DEFAULT, Recipe), "context": (inspect.Parameter.empty, typer.Context)}
            parameters += [
                inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind)
                for name, (default, kind) in extra.items()
            ]
        parameters.sort(key=lambda p: p.name != "concept")  # the one positional argument comes first
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # Typer reads it
        run.__annotations__ = {p.name: p.annotation for p in parameters}
        return run

    return decorate


def _recipe(name: str, context: typer.Context | None) -> dict[str, Any]:
    """A recipe's values for the settings of the running command that no option gives. ValueError for another name."""
    if name not in RECIPES:
        raise ValueError(f"--recipe: got {name!r}, expected one of {', '.join(RECIPES)}")
    sources = {} if context is None else {each: context.get_parameter_source(each) for each in context.params}
    free = {each for each, source in sources.items() if source is not None and source.name != "COMMANDLINE"}
    return {setting: value for setting, value in RECIPES[name].items() if setting in free}


def _parameter(entry: Field, hint: type, defaults: dict) -> inspect.Parameter:
    """A setting as a keyword-only parameter that Typer makes an option of; the concept is an argument."""
    details = entry.metadata
    default = defaults.get(entry.name, entry.default)
    if entry.name == "concept":
        kind, default = typer.Argument(help=details["help"]), inspect.Parameter.empty
    elif isinstance(default, tuple):
        of = float if hint == tuple[float, ...] else str
        shown = ",".join(f"{value:g}" for value in default) or "none"
        kind = typer.Option(parser=_list_of(of), help=details["help"], metavar="A,B,...", show_default=shown)
        hint = tuple
    else:
        kind = typer.Option(help=details["help"])
    panel = "Model" if MODEL in details["stages"] else f"Stage {details['stages'][0]}"
    if entry.name != "concept":
        kind.rich_help_panel = panel
    return inspect.Parameter(
        entry.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[hint, kind]
    )


def _list_of(kind: type) -> Callable:
    def parse(text: str | tuple) -> tuple:
        if isinstance(text, tuple):
            return text
        try:
            return tuple(kind(part.strip()) for part in text.split(",") if part.strip())
        except ValueError:
            raise typer.BadParameter(f"got {text!r}, expected numbers with commas between") from None

    return parse


@contextmanager
def told() -> Iterator[None]:
    """Tells in a line, without a traceback, the mistakes that a user can mend."""
    try:
        yield
    except BrokenPipeError:  # `saferope inspect FILE | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(CLOSED_PIPE) from None
    except (ValueError, OSError) as error:
        say(f"saferope: {_indented(error)}", err=True)
        raise typer.Exit(USER_ERROR) from error
    except KeyboardInterrupt:
        say("saferope: interrupted; finished work is kept, and the same command resumes it", err=True)
        raise typer.Exit(INTERRUPTED) from None


def _indented(error: Exception) -> str:
    """The error's words, cut at a limit. They may come from a file: indented, they cannot pass for a line of ours."""
    told = str(error)
    if isinstance(error, FileNotFoundError) and error.errno and error.filename:
        told = f"{error.filename}: got no such file or folder; check the path"
    return (told if len(told) <= LONGEST else f"{told[: LONGEST - 4]} ...").replace("\n", "\n    ")


@contextmanager
def progress_bars() -> Iterator[Bars]:
    """Progress bars on stderr: a function of stage, done and total, and of words behind the bar."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("{task.description:>9}", markup=False),
        BarColumn(_BAR),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[words]}", markup=False),
    )
    tasks: dict[str, TaskID] = {}
    with Progress(*columns, console=Console(stderr=True)) as bars:

        def show(stage: str, done: int, total: int, words: str = "") -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(plain(stage), words="")
            bars.update(tasks[stage], completed=done, total=total, words="" if done == total else words)

        yield show


def load(settings: Settings, device: str) -> Model:
    """The model that the settings name."""
    from saferope_training import processes
    from saferope_training.flux.loading import load_model

    processes.require_device(device)
    return load_model(settings.model, device, settings.quantise, settings.encoders, settings.resolution)


def read_concepts(names: list[str]) -> tuple[list[Concept], list[float]]:
    """Concepts and strengths of FILE or FILE:STRENGTH arguments; a file's concepts share its strength."""
    from saferope_core import load_concepts

    concepts: list[Concept] = []
    strengths: list[float] = []
    for name in names:
        path, _, strength = name.rpartition(":")
        if not path or Path(name).exists():
            path, strength = name, "1"
        try:
            factor = float(strength)
        except ValueError:
            raise ValueError(f"concept {name!r}: got strength {strength!r}, expected FILE or FILE:NUMBER") from None
        found = load_concepts(path)
        concepts += found
        strengths += [factor] * len(found)
    return concepts, strengths
