"""Training on a tiny random model: repeatable, touching generators only, and the same rotation that
the file will do."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from saferope_core import (
    Protection,
    critical_heads,
    fixed_generators,
    load_concepts,
    planes,
    save_concepts,
)
from saferope_training.flux.attach import attached
from saferope_training.flux.identity import fingerprint
from saferope_training.flux.models import Text, encode, noise, velocity
from saferope_training.making import batch, extract, heads, material, recipe, train
from saferope_training.making.batch import PRESERVE, UNLEARN
from saferope_training.making.rotation import TrainableRotation
from saferope_training.making.state import Log, State
from saferope_training.prompts import side
from saferope_training.prompts.instead import with_instead

PHASES = (UNLEARN, PRESERVE)


@pytest.fixture
def critical(model, records, settings):
    statistics = extract.extract(model, records, (1.0, 0.5), capacity=500, seed=0)
    s = settings
    table = heads.table_of(statistics, s, model.geometry)
    return critical_heads(table, model.geometry), table.discrimination


@pytest.fixture
def seen(model, records, tmp_path):
    material.make_latents(model, records, (1.0, 0.9, 0.8), 0, tmp_path / "latents.safetensors")
    return material.load_material(model, records, (1.0, 0.9, 0.8), tmp_path / "latents.safetensors")


@pytest.fixture
def in_fp32(monkeypatch):
    """No bf16, on whatever CPU: sums that are added up in another order then agree to `ROUNDING`."""
    monkeypatch.setattr("saferope_training.flux.models._faster_in_fp32", lambda *_: True)


@pytest.fixture
def open_heads(critical):
    """The heads with gates of 0: every token turns, by an angle that has no jump for rounding to decide about."""
    return replace(critical[0], gate={name: torch.zeros_like(gate) for name, gate in critical[0].gate.items()})


@pytest.fixture
def gradients(model, open_heads, seen, settings, monkeypatch, in_fp32):
    """A function: loss, error and gradients, as one vector, of a share (index, count) of a batch."""

    def of(index=0, count=1, phase=UNLEARN, **changes):
        for name, value in {"index": index, "count": count}.items():
            monkeypatch.setattr(train.processes, name, lambda value=value: value)
        monkeypatch.setattr(train.processes, "total", lambda x: x)
        chosen = replace(settings, **changes)
        rotation = train.initial_rotation(open_heads, model, chosen)
        told = torch.tensor(train._gradients(model, rotation, batch.draw(seen, chosen, 0, phase), seen, chosen))
        return torch.cat([told, *(weight.grad.flatten() for weight in rotation.weights().values())])

    return of


# Of a gradient's length, in float32: some 20 products one after the other, forwards and back, each of at most 256 terms
# and so off by at most 256 u: 20 * 256 * 6e-8
ROUNDING = 3e-4


def apart(a, b):
    return ((a - b).norm() / b.norm()).item()


def concept_of(model, critical, generators, settings):
    return recipe.concept_of(model, *critical, generators, settings, record={})


def test_same_seed_same_generators_bit_for_bit(model, critical, seen, settings):
    first, again, other = (train.train(model, critical[0], seen, replace(settings, seed=seed)) for seed in (0, 0, 1))
    for a, b, c in zip(first, again, other, strict=True):
        assert torch.equal(a, b)
        assert not torch.equal(a, c)


def test_generators_learn_and_nothing_else_does(model, critical, seen, settings):
    before = fingerprint(model.transformer)
    untrained = train.train(model, critical[0], seen, replace(settings, learning_rate=0.0))
    trained = train.train(model, critical[0], seen, settings)
    assert fingerprint(model.transformer) == before
    assert all(not torch.equal(a, b) for a, b in zip(untrained, trained, strict=True))
    assert all(parameter.grad is None for parameter in model.transformer.parameters())
    with torch.no_grad():
        next(model.transformer.parameters()).add_(1e-3)
    assert fingerprint(model.transformer) != before, "negative control: the fingerprint sees a change"


def test_generators_are_skew_and_images_of_double_blocks_at_rest(model, critical, seen, settings):
    text, image = train.train(model, critical[0], seen, settings)
    assert torch.equal(text, -text.mT) and torch.equal(image, -image.mT)
    single = critical[0].heads[:, 0] == 1
    assert not image[~single].any() and image[single].any()
    assert text[~single].any()


def test_log_has_alternating_phases(model, critical, seen, settings):
    log = []
    train.train(model, critical[0], seen, settings, log.append)
    assert [entry["phase"] for entry in log] == ["unlearn", "unlearn", "preserve", "preserve"]
    assert all(entry["loss"] == entry["velocity_mse"] > 0 for entry in log)
    away = []
    train.train(model, critical[0], seen, replace(settings, objective="away"), away.append)
    assert all(-1 < entry["loss"] < 0 for entry in away[:2]) and all(entry["loss"] > 0 for entry in away[2:])


def courses(model, heads, seen, settings, **changes):
    """Mean squared differences, step by step, of unlearning alone, always on the same prompts, time and noise."""
    log = []
    only = {name: value[:1].repeat(4, *[1] * (value.dim() - 1)) for name, value in vars(seen.unsafe).items()}
    other = {name: value[:1].repeat(4, *[1] * (value.dim() - 1)) for name, value in vars(seen.instead).items()}
    alike = replace(
        seen, unsafe=Text(**only), instead=Text(**other), subjects=seen.subjects[:1].repeat(4, 1), visited={}
    )
    chosen = replace(settings, steps=24, phase=24, strengths=(1.0, 1.0), blind=0.0, blind_text=0.0, **changes)
    train.train(model, heads, alike, chosen, log.append)
    return [entry["velocity_mse"] for entry in log]


def test_unlearning_goes_to_the_stand_in_or_away_from_the_concept(model, open_heads, seen, settings):
    towards, away = (courses(model, open_heads, seen, settings, objective=name) for name in ("replace", "away"))
    assert sum(towards[-4:]) < 0.9 * sum(towards[:4]), towards
    assert sum(away[-4:]) > 1.2 * sum(away[:4]), away


def test_targets_are_the_base_models_velocities_of_the_stand_in(model, seen, settings, in_fp32):
    """And half as far beyond them, where nothing stands in; of the prompts themselves when preserving or going away."""
    drawn = batch.draw(seen, replace(settings, batch=4), 0, UNLEARN)
    x = batch.latents(model, seen, drawn).noised
    stand_in, own = (velocity(model, x, drawn.times, side.pick(drawn.index)) for side in (seen.instead, seen.unsafe))

    def target(taken_out=False, drawn=drawn, x=x, **changes):
        material = replace(seen, taken_out=torch.full_like(seen.taken_out, taken_out))
        return batch.target(model, material, replace(settings, **changes), drawn, x)

    assert apart(target(), stand_in) < ROUNDING and apart(own, stand_in) > 30 * ROUNDING, "the second: control"
    assert apart(target(True, beyond=0.5), stand_in + 0.5 * (stand_in - own)) < ROUNDING
    assert apart(target(True, beyond=0.0), stand_in) < ROUNDING
    assert apart(target(True, objective="away"), own) < ROUNDING
    benign = batch.draw(seen, replace(settings, batch=4), 0, PRESERVE)
    y = batch.latents(model, seen, benign).noised
    kept = velocity(model, y, benign.times, seen.benign.pick(benign.index))
    assert apart(target(True, drawn=benign, x=y), kept) < ROUNDING


def test_taken_out_is_where_nothing_stands_in(model, records, tmp_path):
    times, path = (1.0,), tmp_path / "latents.safetensors"
    material.make_latents(model, records, times, 0, path)
    unsafe = side(records, "unsafe")
    for words, expected in ((["ring"], False), ([""], True)):
        changed = with_instead(unsafe, words * len(unsafe)) + side(records, "benign")
        assert material.load_material(model, changed, times, path).taken_out.eq(expected).all()
    bare = [replace(record, instead=None) for record in unsafe]
    edited = material.load_material(model, bare + side(records, "benign"), times, path)
    assert edited.taken_out.all() and not torch.equal(edited.instead.states, edited.unsafe.states), (
        "never an empty prompt"
    )
    assert not torch.equal(edited.instead.states[0], encode(model, [""]).states[0])


@pytest.mark.parametrize("max_angle", [math.pi, 0.5])
def test_no_plane_is_trained_past_the_bound(model, critical, seen, settings, max_angle):
    """At a rate that takes it there in a step."""
    fast = replace(settings, learning_rate=3.0, preserve_weight=0.0)
    widest = [
        max(planes(each)[0].max().item() for each in train.train(model, critical[0], seen, replace(fast, max_angle=a)))
        for a in (max_angle, 0.0)
    ]
    assert widest[0] <= max_angle * (1 + 1e-5) and widest[1] > math.pi, "control: without the bound"


def test_each_prompt_turns_at_its_own_strength(model, open_heads, settings):
    """As the file will at that strength, also where s saturates."""
    rotation = train.initial_rotation(open_heads, model, replace(settings, text_init=0.2))
    concept = concept_of(model, (open_heads, torch.zeros(3, 2)), rotation.generators(), replace(settings, acts_on="k"))
    x = torch.randn(3, 2, 9, 16, dtype=torch.float64)
    rotation.strengths = torch.tensor([0.3, 1.0, 40.0])
    ours = rotation.rotate(x, "k", "single", 0, (0, 4), (4, 9))
    for place, strength in enumerate(rotation.strengths.tolist()):
        protection = Protection([concept], model.geometry, [strength])
        theirs = protection.rotate(x, "k", "single", 0, (0, 4), (4, 9))
        torch.testing.assert_close(ours[place], theirs[place], atol=1e-5, rtol=1e-5)
        assert not torch.allclose(ours[place], theirs[(place + 1) % 3], atol=1e-3), "control"


def test_strengths_are_drawn_from_their_range(seen, settings):
    wide = replace(settings, strengths=(0.5, 1.5))
    drawn = torch.cat([batch.draw(seen, wide, step, phase).strengths for step in range(20) for phase in PHASES])
    assert 0.5 <= drawn.min() < 0.6 and 1.4 < drawn.max() <= 1.5 and len(drawn.unique()) > 30
    assert batch.draw(seen, replace(settings, strengths=(1.0, 1.0)), 0, UNLEARN).strengths.eq(1).all()


def test_closed_gates_leave_nothing_to_learn(model, critical, seen, settings):
    shut = replace(critical[0], gate={role: torch.ones_like(gate) for role, gate in critical[0].gate.items()})
    log = []
    trained = train.train(model, shut, seen, settings, log.append)
    assert all(entry["velocity_mse"] == 0 for entry in log if entry["phase"] == PRESERVE)
    with torch.no_grad():
        first = train.initial_rotation(shut, model, settings).generators()[0]
    torch.testing.assert_close(trained[0], first, atol=1e-5, rtol=1e-5)  # the bound is kept once more each step
    opened = train.train(model, critical[0], seen, settings)
    assert (opened[0] - trained[0]).abs().max() > 1e-2, "control"


@pytest.mark.parametrize("acts_on", ["qk", "k"])
def test_training_rotation_is_the_saved_concepts(model, critical, settings, tmp_path, acts_on):
    """The point of it all: what was trained is what Protection does, after a trip through the file.

    Of float64 vectors, so that both see the same ones above a gate.
    """
    generator = torch.Generator().manual_seed(3)
    widths = [critical[0].basis[name].shape[-1] for name in ("k", "image_k")]
    assert widths == [7, 4]
    weights = [torch.randn(len(critical[0].heads), width, width, generator=generator) for width in widths]
    rotation = TrainableRotation(critical[0], model.geometry, {"text": acts_on, "image": "qk"}, *weights)
    concept = concept_of(model, critical, rotation.generators(), replace(settings, acts_on=acts_on))
    save_concepts(tmp_path / "c.safetensors", [concept])
    protection = Protection(load_concepts(tmp_path / "c.safetensors"), model.geometry)

    turned = 0
    for row in range(model.geometry.blocks):
        block = ("double", row) if row < 1 else ("single", row - 1)
        spans = [((0, 9), (0, 0)), ((0, 0), (0, 9))] if block[0] == "double" else [((0, 4), (4, 9))]
        for role in "qk":
            for text, image in spans:
                x = torch.randn(2, 2, 9, 16, generator=generator, dtype=torch.float64)
                ours = rotation.rotate(x, role, *block, text, image)
                theirs = protection.rotate(x, role, *block, text, image)
                torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
                turned += int(not torch.equal(ours, x))
    assert turned == (6 if acts_on == "qk" else 5), "negative control: text of the double, all of the single blocks"


def test_velocity_under_training_rotation_is_that_under_protection(model, critical, open_heads, settings, in_fp32):
    text = encode(model, ["a red star , center"])
    x, t = noise(model, 1, torch.Generator().manual_seed(0)), torch.ones(1)
    free = train.initial_rotation(open_heads, model, settings)
    concept = concept_of(model, (open_heads, critical[1]), free.generators(), settings)
    protection = Protection([concept], model.geometry)
    results = []
    with torch.no_grad():
        for rotate in (lambda x, *_: x, free.rotate, protection.rotate):
            with attached(model.transformer, rotate):
                results.append(velocity(model, x, t, text))
    base, ours, theirs = results
    assert apart(ours, theirs) < ROUNDING and apart(ours, base) > 30 * ROUNDING


def test_spared_tokens_stay_as_they_are(model, critical):
    generator = torch.Generator().manual_seed(3)
    width = critical[0].basis["k"].shape[-1]
    weights = torch.randn(len(critical[0].heads), width, width, generator=generator)
    text = replace(critical[0], basis={role: critical[0].basis[role] for role in "qk"})
    rotation = TrainableRotation(text, model.geometry, {"text": "k", "image": "k"}, weights, 0.5)
    x = torch.randn(2, 2, 9, 16, generator=generator)
    free = rotation.rotate(x, "k", "single", 0, (0, 4), (4, 9))
    rotation.spared = torch.tensor([[False, True, False, False], [False] * 4])
    spared = rotation.rotate(x, "k", "single", 0, (0, 4), (4, 9))
    assert torch.equal(spared[0, :, 1], x[0, :, 1]) and not torch.equal(free[0, :, 1], x[0, :, 1])
    spared[0, :, 1] = free[0, :, 1]
    assert torch.equal(spared, free), "nothing else is spared"


def test_the_rotation_follows_its_weights(model, critical):
    """What it finds of its generators once, it finds anew where an optimiser or a saved state has changed them."""
    width, count = critical[0].basis["k"].shape[-1], len(critical[0].heads)
    text = replace(critical[0], basis={role: critical[0].basis[role] for role in "qk"})
    weights = torch.randn(count, width, width, generator=torch.Generator().manual_seed(3)).requires_grad_()

    def rotation(weights):
        return TrainableRotation(text, model.geometry, {"text": "k", "image": "k"}, weights, 0.5)

    x, own = torch.randn(2, 2, 9, 16), rotation(weights)
    before = own.rotate(x, "k", "single", 0, (0, 4), (4, 9))
    assert torch.equal(own.rotate(x, "k", "single", 0, (0, 4), (4, 9)), before)
    optimiser = torch.optim.SGD([weights], 1.0)
    before.square().cos().sum().backward()
    optimiser.step()
    after = own.rotate(x, "k", "single", 0, (0, 4), (4, 9))
    assert torch.equal(after, rotation(weights).rotate(x, "k", "single", 0, (0, 4), (4, 9)))
    assert not torch.equal(after, before), "control"
    with torch.no_grad():
        weights.copy_(2 * weights)
    assert not torch.equal(own.rotate(x, "k", "single", 0, (0, 4), (4, 9)), after)


def test_shared_generators_are_the_texts_scaled(model, critical, seen, settings):
    chosen = replace(settings, sharing="shared", image_scale=0.25, image_rank=0)
    alike = replace(critical[0], basis={role: critical[0].basis[role] for role in "qk"})
    text, image = train.train(model, alike, seen, chosen)
    single = (critical[0].heads[:, 0] == 1)[:, None, None]
    torch.testing.assert_close(image, torch.where(single, 0.25 * text, 0.0))


def test_blind_prompts_spare_their_subject(model, critical, seen, settings, monkeypatch):
    drawn, real = [], train.draw
    monkeypatch.setattr(train, "draw", lambda *args: drawn.append(real(*args)) or drawn[-1])
    train.train(model, critical[0], seen, replace(settings, blind=1.0, blind_text=0.0))
    for each in drawn[:2]:
        assert torch.equal(each.spared, seen.subjects[each.index]) and each.spared.any(1).all()
    assert all(each.spared is None for each in drawn[2:]), "benign prompts have no subject"
    drawn.clear()
    train.train(model, critical[0], seen, replace(settings, blind=0.0, blind_text=0.0))
    assert not any(each.spared.any() for each in drawn[:2])
    drawn.clear()
    train.train(model, critical[0], seen, replace(settings, blind=0.0, blind_text=1.0))
    assert all(each.spared.all() for each in drawn[:2])


@pytest.mark.parametrize("phase", PHASES)
def test_parts_and_shares_of_a_batch_add_up(gradients, phase):
    """Accumulation, and processes that share a batch: the same losses and gradients, up to the order of summation."""
    whole = gradients(phase=phase)
    for passes in (1, 3):
        assert apart(gradients(phase=phase, passes_of=passes), whole) < ROUNDING
    for count in (2, 3):
        shares = [gradients(index, count, phase, passes_of=1) for index in range(count)]
        assert apart(sum(shares), whole) < ROUNDING
        assert apart(count * shares[0], whole) > 30 * ROUNDING, "negative control: all do the same share"


def test_checkpointing_changes_memory_alone(model, critical, seen, settings, gradients):
    plain = gradients()
    train.train(model, critical[0], seen, replace(settings, checkpointing=True, steps=1))
    assert model.transformer.is_gradient_checkpointing
    assert apart(gradients(), plain) < ROUNDING


class Killed(BaseException):
    pass


@pytest.mark.parametrize("at", [0, 1, 2, 3])
def test_a_run_that_was_cut_off_ends_the_same(model, critical, seen, settings, tmp_path, at):
    expected = train.train(model, critical[0], seen, settings)

    def die(entry):
        if entry["step"] == at:
            raise Killed

    state = State(tmp_path / "state.safetensors", "inputs")
    with pytest.raises(Killed):
        train.train(model, critical[0], seen, settings, die, state)
    assert state.finished() == at
    steps = []
    resumed = train.train(model, critical[0], seen, settings, lambda entry: steps.append(entry["step"]), state)
    assert steps == list(range(at, 4))
    assert all(torch.equal(a, b) for a, b in zip(expected, resumed, strict=True)), "bit for bit"
    assert State(state.path, "others").finished() == 0, "a state of other inputs is no state"


@pytest.mark.parametrize("damage", ["a bit of the numbers", "a digit of the step", "cut off", "empty"])
def test_a_damaged_state_is_told_and_training_starts_again(model, critical, seen, settings, tmp_path, damage):
    state = State(tmp_path / "state.safetensors", "inputs")
    expected = train.train(model, critical[0], seen, settings, state=state)
    assert state.finished() == 4, "control: before it is damaged"
    data = bytearray(state.path.read_bytes())
    if damage == "a bit of the numbers":
        data[-5] ^= 1
    elif damage == "a digit of the step":
        data[data.index(b'"step":"4"') + 8] = ord("3")
    state.path.write_bytes({"cut off": data[:100], "empty": b""}.get(damage, data))
    steps = []
    with pytest.warns(UserWarning, match="state.safetensors: got a damaged training state, .* starts again"):
        again = train.train(model, critical[0], seen, settings, lambda entry: steps.append(entry["step"]), state)
    assert steps == list(range(4))
    assert all(torch.equal(a, b) for a, b in zip(expected, again, strict=True)), "to the same end"
    assert state.finished() == 4


@pytest.mark.parametrize("phase", ["unlearn", "preserve"])
def test_divergence_stops_and_keeps_the_last_good_state(model, critical, seen, settings, tmp_path, phase):
    state = State(tmp_path / "state.safetensors", "inputs")
    if phase == "unlearn":
        seen.unsafe.states.fill_(float("nan"))
    else:
        seen.latents.fill_(float("inf"))
    finished = 0 if phase == "unlearn" else 2
    with pytest.raises(train.Diverged, match=rf"diverged at step {finished + 1}: .*not finite.*lower --learning-rate"):
        train.train(model, critical[0], seen, settings, state=state)
    assert state.finished() == finished


def test_log_drops_what_is_done_again(tmp_path):
    log = Log(tmp_path / "log.jsonl", 0)
    for step in range(3):
        log.add({"step": step})
    assert Log(tmp_path / "log.jsonl", 2).entries == [{"step": 0}, {"step": 1}]
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 2


def test_a_fit_unlearns_from_where_it_starts(model, critical, seen, settings):
    """A few steps, no preserving: so the benign side may be empty."""
    heads = critical[0]
    start, log = fixed_generators(heads, 2.1), []
    bare = replace(seen, benign=seen.benign.pick(slice(0)), latents=torch.empty(0))
    fitted = train.fit(model, heads, bare, replace(settings, fit=3), start, log.append)
    assert [entry["phase"] for entry in log] == [UNLEARN] * 3
    still = train.fit(model, heads, bare, replace(settings, fit=0), start)
    for one, two, three in zip(fitted, still, start, strict=True):
        torch.testing.assert_close(two, three, atol=1e-5, rtol=0)
        assert (one - three).abs().max() > 0.05, "control: it moves"
