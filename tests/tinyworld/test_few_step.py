"""The few-step variant starts as its teacher, stands where its teacher passes, and learns the straight way between."""

from __future__ import annotations

import random

import pytest
import torch

from tinyworld import few_step
from tinyworld.model import STEPS, encode, load_pipeline, start_noise

TEXTS = ["a red star in the center on a white background", "a blue ring , left , black wall"]


@pytest.fixture(scope="module")
def pipe():
    return load_pipeline()


@pytest.fixture(scope="module")
def states(pipe):
    return few_step.teacher_states(pipe, TEXTS, [1, 2], lambda count: None)


def ask(pipe, net, x, t, guidance=None):
    hidden, pooled = encode(pipe, TEXTS)
    ids = pipe._prepare_latent_image_ids(1, 6, 6, "cpu", torch.float32)
    more = {} if guidance is None else {"guidance": torch.full((len(x),), guidance)}
    fixed = {"encoder_hidden_states": hidden, "pooled_projections": pooled, "img_ids": ids, "return_dict": False}
    with torch.no_grad():
        return net(hidden_states=x, timestep=t, txt_ids=torch.zeros(24, 3), **fixed, **more)[0]


def test_without_an_embedding_it_is_the_teacher_at_one_guidance(pipe):
    student = few_step.without_guidance(pipe.transformer)
    assert not student.config.guidance_embeds
    x, t = torch.randn(2, 36, 64, generator=torch.Generator().manual_seed(0)), torch.tensor([0.9, 0.3])
    same = (ask(pipe, student, x, t) - ask(pipe, pipe.transformer, x, t, few_step.GUIDANCE)).abs().max()
    other = (ask(pipe, student, x, t) - ask(pipe, pipe.transformer, x, t, 1.0)).abs().max()
    assert same < 1e-4 and other > 1e-2


def test_states_are_the_teachers_at_the_students_times(pipe, states):
    at = few_step.times(pipe)
    assert at[0] == 1 and at[-1] == 0 and len(at) == few_step.FEW + 1
    pipe.scheduler.set_timesteps(sigmas=[1 - step / STEPS for step in range(STEPS)], mu=1.15)
    assert torch.allclose(at, pipe.scheduler.sigmas[:: STEPS // few_step.FEW])
    noise = start_noise([1, 2])
    assert states.shape == (few_step.FEW + 1, 2, 36, 64)
    assert torch.equal(states[0], pipe._pack_latents(noise, *noise.shape))


def test_loss_is_zero_for_the_straight_way_alone(pipe, states):
    loss, at = few_step.loss_of(pipe, states, TEXTS), few_step.times(pipe)

    def net(hidden_states, timestep, **_):
        """Knows the answer: looks up which state it was given."""
        found = torch.cdist(hidden_states.flatten(1), states.flatten(0, 1).flatten(1)).argmin(1)
        step, which = found // 2, found % 2
        assert torch.allclose(at[step], timestep)
        return (((states[step + 1, which] - hidden_states) / (at[step + 1] - at[step])[:, None, None]),)

    assert loss(net, random.Random(0)) < 1e-6
    assert loss(lambda hidden_states, **_: (torch.zeros_like(hidden_states),), random.Random(0)) > 0.1
