"""Training on a tiny random model: repeatable, touching generators only, and the same rotation that the file will do."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from saferope_core import Protection, load_concepts, save_concepts
from training import extract, heads, recipe, train
from training.attach import attached
from training.models import encode, fingerprint, noise, velocity


@pytest.fixture
def critical(model, records, settings):
    statistics = extract.extract(model, records, (1.0, 0.5), capacity=500, seed=0)
    s = settings
    table = heads.read_heads(statistics, s.rank, s.basis, s.threshold, s.cut, s.gate, s.quantile)
    return heads.critical_heads(table, model.geometry), table.discrimination


@pytest.fixture
def material(model, records):
    return recipe.material(model, records, times=(1.0, 0.9, 0.8), seed=0)


def concept_of(model, critical, generators, settings):
    return recipe.concept_of(model, *critical, generators, settings, record={})


def test_same_seed_same_generators_bit_for_bit(model, critical, material, settings):
    first, again, other = (
        train.train(model, critical[0], material, replace(settings, seed=seed)) for seed in (0, 0, 1)
    )
    for a, b, c in zip(first, again, other, strict=True):
        assert torch.equal(a, b)
        assert not torch.equal(a, c)


def test_generators_learn_and_nothing_else_does(model, critical, material, settings):
    before = fingerprint(model.transformer)
    untrained = train.train(model, critical[0], material, replace(settings, learning_rate=0.0))
    trained = train.train(model, critical[0], material, settings)
    assert fingerprint(model.transformer) == before
    assert all(not torch.equal(a, b) for a, b in zip(untrained, trained, strict=True))
    assert all(parameter.grad is None for parameter in model.transformer.parameters())
    with torch.no_grad():
        next(model.transformer.parameters()).add_(1e-3)
    assert fingerprint(model.transformer) != before, "negative control: the fingerprint sees a change"


def test_generators_are_skew_and_images_of_double_blocks_at_rest(model, critical, material, settings):
    text, image = train.train(model, critical[0], material, settings)
    assert torch.equal(text, -text.mT) and torch.equal(image, -image.mT)
    single = critical[0].heads[:, 0] == 1
    assert not image[~single].any() and image[single].any()
    assert text[~single].any()


def test_log_has_alternating_phases(model, critical, material, settings):
    log = []
    train.train(model, critical[0], material, settings, log.append)
    assert [entry["phase"] for entry in log] == ["unlearn", "unlearn", "preserve", "preserve"]
    assert all(-1 < entry["loss"] < 0 for entry in log[:2]) and all(entry["loss"] > 0 for entry in log[2:])


def test_unlearning_moves_the_velocity(model, critical, material, settings):
    log = []
    train.train(model, critical[0], material, replace(settings, steps=16, phase=16), log.append)
    assert log[-1]["velocity_mse"] > 1.2 * log[0]["velocity_mse"]


def test_closed_gates_leave_nothing_to_learn(model, critical, material, settings):
    shut = replace(critical[0], gate={role: torch.ones_like(gate) for role, gate in critical[0].gate.items()})
    log = []
    train.train(model, shut, material, settings, log.append)
    assert all(entry["velocity_mse"] == 0 for entry in log)


@pytest.mark.parametrize("acts_on", ["qk", "k"])
def test_training_rotation_is_the_saved_concepts(model, critical, settings, tmp_path, acts_on):
    """The point of it all: what was trained is what Protection does, after a trip through the file."""
    generator = torch.Generator().manual_seed(3)
    weights = [torch.randn(len(critical[0].heads), settings.rank, settings.rank, generator=generator) for _ in "ti"]
    rotation = train.TrainableRotation(critical[0], model.geometry, acts_on, *weights)
    concept = concept_of(model, critical, rotation.generators(), replace(settings, acts_on=acts_on))
    save_concepts(tmp_path / "c.safetensors", [concept])
    protection = Protection(load_concepts(tmp_path / "c.safetensors"), model.geometry)

    turned = 0
    for row in range(model.geometry.blocks):
        block = ("double", row) if row < 1 else ("single", row - 1)
        spans = [((0, 9), (0, 0)), ((0, 0), (0, 9))] if block[0] == "double" else [((0, 4), (4, 9))]
        for role in "qk":
            for text, image in spans:
                x = torch.randn(2, 2, 9, 16, generator=generator)
                ours = rotation.rotate(x, role, *block, text, image)
                theirs = protection.rotate(x, role, *block, text, image)
                torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
                turned += int(not torch.equal(ours, x))
    assert turned == (6 if acts_on == "qk" else 3), "negative control: text of the double, all of the single blocks"


def test_velocity_under_training_rotation_is_that_under_protection(model, critical, material, settings):
    text = encode(model, ["a red star , center"])
    x, t = noise(model, 1, torch.Generator().manual_seed(0)), torch.ones(1)
    generators = train.train(model, critical[0], material, settings)
    concept = concept_of(model, critical, generators, settings)
    free = train.TrainableRotation(critical[0], model.geometry, "qk", *(g.triu() for g in generators))
    protection = Protection([concept], model.geometry)
    results = []
    with torch.no_grad():
        for rotate in (lambda x, *_: x, free.rotate, protection.rotate):
            with attached(model.transformer, rotate):
                results.append(velocity(model, x, t, text))
    base, ours, theirs = results
    # bf16 autocast rounds; the rotation itself must be larger than that by far
    assert (ours - theirs).abs().mean() < 0.1 * (ours - base).abs().mean()
