"""`--dry-run`: every check of a command, and its memory, disk and time. Nothing is loaded, fetched or written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from saferope_training.console import say
from saferope_training.settings import CALIBRATE, PROMPTS, TRAIN, Settings

if TYPE_CHECKING:
    from saferope_training.making.estimate import Shape, Task, Work

WEIGHTS = 12  # of a block for each token, in squares of the width: FLUX.1's, the least of all families
LEFT = "left to the run: whether the text encoder knows the prompts' words, and whether the weights are sound"


def making(settings: Settings, out: Path, device: str, goal: str, every: int = 0, pictures: int = 0) -> None:
    """The dry run of a command that makes statistics or a concept file. Raises the errors that the command would raise
    before it loads.
    """
    from saferope_training.making import checks, estimate, material
    from saferope_training.making.recipe import prompt_inputs, require_unchanged
    from saferope_training.prompts import BENIGN, UNSAFE, side
    from saferope_training.prompts.doubts import doubts
    from saferope_training.prompts.sources import prompts_for
    from saferope_training.stages import Workplace

    checks.require_settings(settings, device)
    if goal != TRAIN:
        require_unchanged(Workplace(out, settings), PROMPTS, *prompt_inputs(settings))
    records = prompts_for(settings)
    own = {UNSAFE: settings.unsafe, BENIGN: settings.benign}
    notes = [f"warning: prompts: {each}" for each in doubts(records, [name for name, file in own.items() if file])]
    shape = estimate.shape_of(settings)
    if goal == TRAIN:
        material.require_pictures(records, 16 * shape.sizes.side)
    notes += ["hardening: its rounds are not counted"] if settings.harden else []
    say(f"prompts: {len(side(records, UNSAFE))} unsafe, {len(side(records, BENIGN))} benign")
    training = goal == TRAIN or (goal == CALIBRATE and settings.fits)
    tell(estimate.Task(settings, records, goal, every, pictures), shape, out, device, training, notes)


def tell(task: Task, shape: Shape, out: Path, device: str, training: bool, notes: Sequence[str] = ()) -> None:
    """Prints the tables of a task: memory by phase, RAM, disk and time, and all that does not fit on this machine."""
    from saferope_training.flux.models import TINYWORLD
    from saferope_training.making import estimate, memory

    paints = bool(task.every or not task.goal)
    plan = memory.plan_of(task.settings, shape.config, shape.sizes, device, training, paints)
    plan = plan if task.goal or training else replace(plan, gathering=0)
    disk, ram = estimate.disk_of(task, shape), estimate.ram_of(task, shape, plan, device)
    phases = plan.phases()
    for name, runs in ((memory.LISTENING, task.goal or training), (memory.PAINTING, paints)):
        phases = phases if runs else {other: size for other, size in phases.items() if other != name}
    lines = [f"memory of {device}, counted and not measured on real weights:", *_sizes(phases)]
    lines += ["RAM:", *_sizes({"at most": ram}), f"disk, in {out}:", *_sizes(disk)]
    lines += _sizes({"to download, into the hub's cache": shape.download} if shape.download else {})
    time = estimate.time_lines(estimate.work_of(task), out, task.settings, device)
    cards = least_time(estimate.work_of(task), shape) if task.settings.model != TINYWORLD else []
    lines += ["time:", *(f"  {line}" for line in (*time, *cards)), *notes, LEFT]
    free_ram, free_disk = estimate.free_of(out)
    room = {device: (memory.available(device), plan.peak), "RAM": (free_ram, ram)}
    room["disk"] = free_disk, sum(disk.values())
    lacking = [
        f"DOES NOT FIT: {where}: got {free / memory.GIB:.1f} GiB free, expected {need / memory.GIB:.1f}"
        for where, (free, need) in room.items()
        if need > free
    ]
    lacking += [memory.WAYS_OUT] if plan.peak > room[device][0] else []
    say("\n".join([*lines, *(lacking or ["it fits on this machine now"]), "dry run: nothing was loaded or written"]))


def least_time(work: Sequence[Work], shape: Shape) -> list[str]:
    """A line a class of cards: the time of all forward and backward passes at the card's full rate.

    Counted as `saferope bench --count` counts a step. Loading, encoding prompts and quantised weights come on top.
    """
    from saferope_benchmark.costs.counting import CARDS, Model
    from saferope_training.flux.attach import geometry_from
    from saferope_training.making.pace import in_words

    at = geometry_from(shape.config)
    blocks = at.double_blocks, at.single_blocks
    model = Model(*blocks, at.heads, WEIGHTS, shape.sizes.text, shape.sizes.side**2, at.head_dim)
    operations = 2 * model.products * sum(each.units * each.passes for each in work)
    return [f"{name}: at least {in_words(operations / card.rate)}, counted" for name, card in CARDS.items()]


def _sizes(parts: Mapping[str, int]) -> list[str]:
    from saferope_training.making.memory import GIB

    return [f"{size / GIB:8.2f} GiB  {name}" for name, size in parts.items()]
