"""Previews: they change nothing, they measure what they say, and a longer training goes on."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from saferope_core import critical_heads, load_concepts
from saferope_training.making import extract, heads, material, preview, progress, train
from saferope_training.making.preview import Preview, held_out
from saferope_training.making.progress import ARRIVED, HELD, PATIENCE, Watch, Watching
from saferope_training.making.recipe import Recipe
from saferope_training.making.state import Log, State
from saferope_training.prompts import BENIGN, UNSAFE


class Killed(BaseException):
    pass


@pytest.fixture
def critical(model, records, settings):
    statistics = extract.extract(model, records, (1.0, 0.5), capacity=500, seed=0)
    s = settings
    table = heads.table_of(statistics, s, model.geometry)
    return critical_heads(table, model.geometry)


@pytest.fixture
def seen(model, records, tmp_path):
    material.make_latents(model, records, (1.0, 0.9, 0.8), 0, tmp_path / "latents.safetensors")
    return material.load_material(model, records, (1.0, 0.9, 0.8), tmp_path / "latents.safetensors")


@pytest.fixture
def watch_of(model, records, settings, tmp_path, monkeypatch):
    """A watch over previews, painted in two steps."""
    monkeypatch.setattr(preview, "STEPS", 2)

    def make(every=2, stop=False, done=0, show=lambda entry, strip: None):
        log = progress.previews_until(tmp_path / "previews.jsonl", done)
        steps = Log(tmp_path / "log.jsonl", done)
        return Watch(Preview(model, records, settings), Watching(every, stop, show), tmp_path, log, steps, "inputs")

    return make


def same(one, other) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_previews_change_no_bit_even_of_a_trainer_that_draws_from_torch(
    model, critical, seen, settings, watch_of, monkeypatch
):
    real = train.draw

    def from_torch(material, settings, step, phase):
        return real(material, replace(settings, seed=int(torch.randint(1000, ()))), step, phase)

    class Drawing:
        def after(self, step, rotation):
            torch.rand(1)

        def over(self):
            return False

    def trained(watch):
        torch.manual_seed(0)
        return train.train(model, critical, seen, settings, watch=watch)

    plain = trained(None)
    assert same(trained(watch_of()), plain)
    monkeypatch.setattr(train, "draw", from_torch)
    plain = trained(None)
    assert same(trained(watch_of(every=1)), plain)
    assert not same(trained(Drawing()), plain), "control: a preview that draws from the trainer's generator"


def test_a_reading_is_one_untrained_and_zero_at_the_target(model, records, critical, settings, monkeypatch):
    monkeypatch.setattr(preview, "STEPS", 1)
    still = train.initial_rotation(critical, model, replace(settings, text_init=0.0, image_init=0.0))
    look = Preview(model, records, settings)
    reading, before, after = look.look(still)
    assert reading.unsafe_left == pytest.approx(1, abs=1e-3) and reading.benign_moved == pytest.approx(0, abs=1e-5)
    assert torch.allclose(before, after, atol=1e-3) and before.shape == (2 * preview.EACH, 3, 96, 96)
    own, _, pictures = look._base
    look._base = own, own, pictures  # as if the concept's own were the target
    assert look.look(still)[0].unsafe_left < 1e-3
    turned = train.initial_rotation(critical, model, settings)
    reading, _, after = Preview(model, records, settings).look(turned)
    assert reading.benign_moved > 1e-5 and not torch.allclose(before, after, atol=1e-3), "control: it turns"


def test_held_out_prompts_are_none_of_training(records, settings, tmp_path):
    chosen = held_out(records, settings)
    assert [record.side for record in chosen] == preview.EACH * [UNSAFE] + preview.EACH * [BENIGN]
    assert not {record.text for record in chosen} & {record.text for record in records}
    lines = ["a dog on grass", "a puppy in snow", "a hound at sea"]
    (tmp_path / "own.txt").write_text("\n".join(lines))
    (tmp_path / "harmless.txt").write_text("a house\na tree")
    own = replace(
        settings, concept="dog", unsafe=str(tmp_path / "own.txt"), benign=str(tmp_path / "harmless.txt"),
        subjects=("dog", "puppy", "hound"),
    )  # fmt: skip
    trained = preview.prompts_for(own)
    chosen = held_out(trained, own)
    new = [record for record in chosen if record.side == UNSAFE][:3]
    assert [record.text for record in new] == ["a hound on grass", "a dog in snow", "a puppy at sea"]
    assert all(record.text[slice(*record.subject)] in own.subjects for record in new), "subjects marked"
    assert [record.text for record in chosen if record.side == BENIGN] == ["a house", "a tree"], "no others are there"


@pytest.mark.parametrize("lefts, stops", [([0.9, 0.05, 0.05], False), ([0.05, 0.04, 0.06], True)])
def test_it_stops_only_where_previews_in_a_row_say_so(watch_of, lefts, stops):
    watch = watch_of(stop=True)
    for number, left in enumerate(lefts):
        assert not watch.over()
        watch.log.add({"step": number + 1, "unsafe_left": left, "benign_moved": 0.0})
    assert watch.over() == stops and PATIENCE == 3
    watch.watching = Watching(2, False)
    assert not watch.over(), "control: not unless asked"
    watch.watching = Watching(2, True)
    watch.log.entries[-1]["benign_moved"] = 2 * HELD
    assert not watch.over(), "control: benign velocities moved"


@pytest.mark.parametrize("at", [1, 2, 3])
def test_the_best_state_is_kept_also_over_a_kill(model, critical, seen, settings, watch_of, tmp_path, monkeypatch, at):
    steps = [0.5, 0.2, 0.8, 0.9]
    readings = iter([*steps[:at], *steps[at - 1 :]])  # the step of the kill is done again
    real = Preview.look
    monkeypatch.setattr(
        Preview, "look", lambda self, rotation: (preview.Reading(next(readings), 0.0), *real(self, rotation)[1:])
    )
    states = {}

    class Also(Watch):
        def after(self, step, rotation):
            super().after(step, rotation)
            states[step] = [each.clone() for each in rotation.generators()]
            if step == at and len(states) == at:
                states[0] = []
                raise Killed

    state = State(tmp_path / "state.safetensors", "inputs")
    first = watch_of(every=1, stop=True)
    with pytest.raises(Killed), torch.no_grad():
        with torch.enable_grad():
            train.train(model, critical, seen, settings, state=state, watch=Also(**vars(first)))
    again = watch_of(every=1, stop=True, done=state.finished())
    last = train.train(model, critical, seen, settings, state=state, watch=Also(**vars(again)))
    step, kept = again.best()
    assert ARRIVED < 0.2 and [entry["step"] for entry in again.log.entries] == [1, 2, 3, 4]
    assert step == 2 and same(kept, states[2]) and not same(kept, last), "control: the last is another"
    again.inputs = "others"
    assert again.best() is None


def test_more_steps_go_on_and_differ_by_the_learning_rate_alone(model, critical, seen, settings, tmp_path, monkeypatch):
    """4, then 6 steps. Rates fall with the steps asked for: with a rate that does not fall it is 6 straight."""

    def run(steps, state=None):
        done = []
        made = train.train(model, critical, seen, replace(settings, steps=steps), done.append, state)
        return made, [entry["step"] for entry in done]

    differ = []
    for rate in (1.0, train.FINAL_RATE):
        monkeypatch.setattr(train, "FINAL_RATE", rate)
        state = State(tmp_path / f"{rate}.safetensors", "inputs")
        run(4, state)
        assert state.courses(6) == {"0": 4, "4": 6}
        longer, steps = run(6, state)
        assert steps == [4, 5]
        differ.append(not same(longer, run(6)[0]))
        assert state.courses(6) == {"0": 4, "4": 6} and State(state.path, "inputs").finished(6) == 6
        assert run(4, state)[1] == [0, 1, 2, 3], "fewer: it starts again"
        assert state.courses(4) == {"0": 4}
    assert differ == [False, True]


def test_a_finished_recipe_goes_on_and_says_so(model, records, settings, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(preview, "STEPS", 2)
    shown = []
    few = replace(settings, unsafe_prompts=8, benign_prompts=8, timesteps=(1.0,), reservoir=200)
    watching = Watching(2, False, lambda entry, strip: shown.append((entry["step"], strip.size)))
    first = Recipe(model, few, tmp_path).train(watching=watching)
    plain = Recipe(model, few, tmp_path / "plain").train()
    mine, other = (load_concepts(path)[0] for path in (first, plain))
    assert torch.equal(mine.text.generator, other.text.generator), "previews leave the generators as they are"
    assert torch.equal(mine.image.generator, other.image.generator)
    assert mine.training == other.training
    assert "courses" not in load_concepts(first)[0].training
    Recipe(model, replace(few, steps=6), tmp_path).train(watching=watching)
    told = capsys.readouterr().err
    assert "train: resumes at step 4 of 6" in told
    assert "train: resumes, since steps was 4 and is 6" in told and "made again" not in told
    assert [step for step, _ in shown] == [2, 4, 6] and len({size for _, size in shown}) == 1
    assert load_concepts(first)[0].training["courses"] == {"0": 4, "4": 6}
    assert {path.name for path in tmp_path.glob("p*.png")} == {
        "progress.png", "preview-00002.png", "preview-00004.png", "preview-00006.png",
    }  # fmt: skip
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 6
