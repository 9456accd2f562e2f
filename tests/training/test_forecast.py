"""The time of a whole run, corrected while it runs, and memory against the plan. Clocks are told what time it is."""

from __future__ import annotations

from dataclasses import replace

import pytest

from saferope_training.making import pace
from saferope_training.making.estimate import PICTURES, Task, Work, work_of
from saferope_training.making.forecast import Forecast, Spent, correction, expected, left_of
from saferope_training.making.memory import EMBEDDING, GIB, LISTENING, TRAINING, Plan
from saferope_training.making.meter import Meter, above
from saferope_training.making.pace import Timer, in_words
from saferope_training.making.recipe import STATE, Recipe

WORK = [Work("extract", 100, 6), Work("latents", 100, 3), Work("train", 180, 96), Work(PICTURES, 24, 16)]
PASS = 0.5  # seconds
UNITS = {each.stage: each.units for each in WORK}
TOLD = {each.stage: PASS * each.passes for each in WORK}


class Clock:
    """A clock that stands until it is moved."""

    now = 0.0

    def __call__(self):
        return self.now


def running(known=None, told=None):
    """A forecast on a clock, its words so far, and how often a pass was measured."""
    clock, words, measured = Clock(), [], []
    show = lambda stage, done, total, left: words.append(left)  # noqa: E731
    made = Forecast(WORK, known or {}, lambda: measured.append(1) or PASS, show, Timer(clock))
    return made, clock, words, measured


def works(made, clock, stage, units, seconds, first=0):
    """A stage on a machine that takes so many seconds a unit."""
    made(stage, first, units)
    for done in range(first + 1, units + 1):
        clock.now += seconds
        made(stage, done, units)
    made(stage, 1, 1)


def test_the_estimate_is_that_of_the_passes():
    assert expected(WORK, {}, PASS) == TOLD
    known = {"extract": 6.0}  # a second a pass
    assert expected(WORK, known, 99.0) == {each.stage: float(each.passes) for each in WORK}, "what is known goes first"
    assert left_of(UNITS, TOLD, {}) == {stage: UNITS[stage] * TOLD[stage] for stage in UNITS}


@pytest.mark.parametrize("factor", [0.25, 1.0, 2.0])
def test_later_stages_are_told_what_the_machine_shows(factor):
    """Twice as slow: twice the time for all that is to come, whatever was timed."""
    spent = {"extract": Spent(50, factor * 50 * TOLD["extract"]), "latents": Spent(1, factor * TOLD["latents"])}
    assert correction(TOLD, spent) == pytest.approx(factor)
    left = left_of(UNITS, TOLD, spent)
    assert left == pytest.approx({stage: factor * UNITS[stage] * TOLD[stage] for stage in UNITS})


def test_a_stage_goes_on_at_its_own_pace():
    """One that is slower than others by the estimate does not make itself slower still."""
    spent = {"extract": Spent(99, 99 * TOLD["extract"]), "latents": Spent(10, 10 * 7.0)}
    left = left_of({**UNITS, "extract": 0}, TOLD, spent)
    assert left["latents"] == pytest.approx(700) and left["extract"] == 0
    assert TOLD["train"] * 180 < left["train"] < 7.0 / TOLD["latents"] * TOLD["train"] * 180


def test_nothing_is_left_at_the_end_and_less_from_unit_to_unit(capsys):
    made, clock, words, measured = running()
    for each in WORK:
        works(made, clock, each.stage, each.units, PASS * each.passes)
    left = sum(UNITS[stage] * TOLD[stage] for stage in UNITS)
    assert words[0] == f"about {in_words(left)} left in all" and words[-1] == "" and words.count("") == 2
    told = capsys.readouterr().err
    parts = ", ".join(f"{stage} {in_words(UNITS[stage] * TOLD[stage])}" for stage in UNITS)
    assert told == f"time: about {in_words(left)}, an estimate from one measured pass: {parts}\n" and measured == [1]


def seconds_left(made):
    return sum(left_of(made._units, made._expected, made._spent).values())


def test_what_is_left_is_exact_on_a_steady_machine():
    """Three times as slow as the pass said: after the first timed unit the rest is told as it comes."""
    made, clock, *_ = running()
    works(made, clock, "extract", 100, 3 * TOLD["extract"])
    ends = clock.now + 3 * sum(UNITS[stage] * TOLD[stage] for stage in ("latents", "train", PICTURES))
    for each in WORK[1:]:
        for done in range(each.units + 1):
            made(each.stage, done, each.units)
            assert seconds_left(made) == pytest.approx(ends - clock.now)
            clock.now += 3 * TOLD[each.stage] * (done < each.units)
    assert seconds_left(made) == 0


def test_a_resumed_run_counts_what_is_left(capsys):
    made, _, words, _ = running()
    for stage in ("extract", "latents"):
        made(stage, 1, 1)  # fresh
    assert words == ["", ""] and capsys.readouterr().err == ""
    made("train", 60, 180)
    left = 120 * TOLD["train"] + 24 * TOLD[PICTURES]
    assert words[-1] == f"about {in_words(left)} left in all"
    told = capsys.readouterr().err
    assert f"time: about {in_words(left)}, " in told and "extract" not in told and "latents" not in told
    other = running()[0]
    other("train", 0, 180)
    assert seconds_left(other) > 1.4 * left, "negative control"


def test_stages_that_end_early_or_come_again_are_over(capsys):
    made, clock, *_ = running()
    made("train", 0, 180)
    made("train", 1, 1)  # it had arrived
    assert made._units["train"] == 0
    works(made, clock, "extract", 100, 1.0)
    before = seconds_left(made)
    works(made, clock, "extract", 100, 50.0)  # of a round of hardening
    made("heads", 1, 1)
    assert seconds_left(made) == before and capsys.readouterr().err.count("time:") == 1


def test_known_passes_are_not_measured_again(capsys):
    made, *_, measured = running({"extract": 0.6})
    made("extract", 0, 100)
    assert measured == [] and "an estimate from passes measured before: " in capsys.readouterr().err
    other = running({"calibrate": 0.6})
    other[0]("extract", 0, 100)
    assert other[3] == [1], "negative control: the time of no stage of this run"


def test_pictures_alone_are_left_to_their_painter(capsys):
    running()[0](PICTURES, 0, 24)
    assert capsys.readouterr().err == ""


def test_the_warm_up_is_left_out():
    clock = Clock()
    timer = Timer(clock)
    found = []
    for done, now in ((0, 0.0), (1, 100.0), (2, 103.0), (4, 109.0)):
        clock.now = now
        found.append(timer("extract", done, 4))
    assert found == [(0, 0.0), (0, 0.0), (1, 3.0), (3, 9.0)]
    clock.now = 500.0
    assert timer("extract", 1, 1) == (0, 0.0) and timer("extract", 0, 4) == (0, 0.0), "it was forgotten"


def test_a_pass_is_that_of_one_prompt(model, monkeypatch):
    asked, times = [], iter((0.0, 7.0, 10.0))
    real = pace.velocity
    monkeypatch.setattr(pace, "velocity", lambda *args: asked.append(args) or real(*args))
    clock = Clock()

    def tick():
        clock.now = next(times, clock.now + 1)
        return clock.now

    assert pace.of_a_pass(model, 4, tick) == pytest.approx((10.0 - 7.0) / 4)
    (first, second) = asked
    assert first[1].shape[0] == first[3].states.shape[0] == 4 and first[3] is second[3]


def test_a_real_run_tells_its_time(model, settings, tmp_path, capsys):
    few = replace(settings, unsafe_prompts=6, benign_prompts=6, steps=3)
    clock, words, steps = Clock(), [], []

    def run(chosen):
        records = Recipe(None, chosen, tmp_path).prompts()
        made = Forecast(work_of(Task(chosen, records, "train")), {}, lambda: PASS, show, Timer(clock))
        Recipe(model, chosen, tmp_path, made).train()
        return made, capsys.readouterr().err

    def show(stage, done, total, left):
        words.append(left)
        steps.append((stage, done, total))

    whole, told = run(few)
    assert seconds_left(whole) == 0 and words[-1] == ""
    assert [stage for stage in ("extract", "latents", "train") if f"{stage} " in told] == [
        "extract",
        "latents",
        "train",
    ]
    assert {(stage, 0) for stage in ("extract", "latents", "train")} <= {(stage, done) for stage, done, _ in steps}
    more, told = run(replace(few, steps=5))
    assert "extract " not in told and f"train {in_words(2 * work_of_train(more).passes * PASS)}" in told
    assert run(replace(few, steps=5))[1] == "", "nothing is left to tell"
    assert (tmp_path / STATE).is_file()


def work_of_train(made):
    return next(each for each in made.work if each.stage == "train")


PLAN = Plan(10 * GIB, 5 * GIB, 0, 2 * GIB, GIB, gathering=GIB)


def metered(held):
    readings, shown = iter(held), []
    return Meter(PLAN, lambda: next(readings), lambda *step: shown.append(step)), shown


def test_memory_above_the_plan_is_told_once(capsys):
    most = max(PLAN.phases().values())
    made, shown = metered([50 * GIB, most, most + GIB, 50 * GIB])  # what was held before the stage is not its own
    for done in range(4):
        made("train", done, 3)
    told = " ".join(capsys.readouterr().err.split())
    assert told.count("warning: memory: train got 17.5 GiB of the GPU, expected at most 16.5 by the plan") == 1
    assert "Try --quantise" in told and shown == [("train", done, 3) for done in range(4)]


def test_each_stage_has_its_own_phases():
    phases = PLAN.phases()
    assert above(PLAN, "extract", max(phases[EMBEDDING], phases[LISTENING])) is None
    assert above(PLAN, "extract", max(phases[EMBEDDING], phases[LISTENING]) + 1)
    large = replace(PLAN, activations=20 * GIB)
    held = large.phases()[TRAINING]
    assert above(large, "train", held) is None and above(large, "extract", held), "negative control"
    assert above(PLAN, PICTURES, 100 * GIB) is None, "no phase of the plan"
