"""Training's laws, as test_train states them for FLUX.1's layout, where query heads share keys; and where all blocks
are double."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from saferope_core import ROLES, Protection
from saferope_core.concept.geometry import SINGLE
from saferope_training.flux.models import from_pipeline
from saferope_training.making import heads, train
from saferope_training.settings import PAPER, Settings
from tests.support.pipelines import SIDE, make_pipeline
from tests.training.test_train import (  # noqa: F401
    concept_of,
    critical,
    gradients,
    in_fp32,
    open_heads,
    seen,
    test_checkpointing_changes_memory_alone,
    test_generators_learn_and_nothing_else_does,
    test_same_seed_same_generators_bit_for_bit,
    test_unlearning_goes_to_the_stand_in_or_away_from_the_concept,
    test_velocity_under_training_rotation_is_that_under_protection,
)

LONG = 40  # tokens: Qwen's words are pieces of the tiny world's


@pytest.fixture(params=["krea2"])
def model(request):
    """Its velocities have a variance of about 1, as those of trained networks: training stops where they leave that."""
    pipe = make_pipeline(request.param)
    for name, weight in pipe.transformer.named_parameters():
        if name.startswith(("final_layer.linear", "proj_out")):
            weight.data *= 0.2
    return from_pipeline("random", pipe, LONG, SIDE)


def test_a_shared_key_head_learns_from_one_generator(model, critical, open_heads, settings):  # noqa: F811
    """Of the two query heads of a key head the first turns it: training and the file agree whose generator it is."""
    heads, group = open_heads.heads, model.geometry.group
    assert group == 2 and len(heads) == model.geometry.blocks * model.geometry.heads
    rotation = train.initial_rotation(open_heads, model, settings)
    concept = concept_of(model, (open_heads, critical[1]), rotation.generators(), settings)
    protection, where = Protection([concept], model.geometry), ("single", 0, (0, 4), (4, 6))
    here, first = heads[:, 1] == 0, heads[:, 2] % group == 0
    for role in ROLES:
        count = model.geometry.heads // (group if role == "k" else 1)
        x = torch.randn(2, count, 6, model.geometry.head_dim, generator=torch.Generator().manual_seed(1))
        ours, theirs = rotation.rotate(x, role, *where), protection.rotate(x, role, *where)
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
        assert not torch.allclose(theirs, x, atol=1e-2), "negative control"
        (learns,) = torch.autograd.grad(ours[..., 0].sum(), rotation.text)
        assert torch.equal(learns.flatten(1).any(1), here & (first | (role == "q"))), role


@pytest.mark.parametrize("model", ["qwen-image"], indirect=True)
def test_image_tokens_turn_in_double_blocks_where_there_are_no_others(model, open_heads, seen, settings):  # noqa: F811
    text, image = train.train(model, open_heads, seen, settings)
    resting = replace(open_heads, image_blocks=SINGLE)
    before = train.train(model, open_heads, seen, replace(settings, learning_rate=0.0))
    for learned, first in zip((text, image), before, strict=True):
        assert not torch.equal(learned, first)
    assert not train.train(model, resting, seen, settings)[1].any(), "control: a model with single blocks"


@pytest.mark.parametrize("model", ["qwen-image"], indirect=True)
def test_image_tokens_of_double_blocks_turn_as_the_concept_says(model, critical, open_heads, settings):  # noqa: F811
    rotation = train.initial_rotation(open_heads, model, settings)
    concept = concept_of(model, (open_heads, critical[1]), rotation.generators(), settings)
    protection = Protection([concept], model.geometry)
    for role in ROLES:
        x = torch.randn(2, model.geometry.heads, 6, model.geometry.head_dim, generator=torch.Generator().manual_seed(1))
        where = (role, "double", 0, (0, 0), (0, 6))
        ours, theirs = rotation.rotate(x, *where), protection.rotate(x, *where)
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
        assert not torch.allclose(theirs, x, atol=1e-2), "negative control"


def test_a_family_decides_where_risk_is_measured_unless_told():
    plain = Settings()
    for family, template in (
        ("flux", False),
        ("chroma", False),
        ("sd3", False),
        ("qwen-image", True),
        ("z-image", True),
    ):
        found = heads.for_family(plain, family)
        assert (found.quantile, found.relative_padding) == ((0.995, 4) if template else (0.999, 0)), family
        assert replace(found, quantile=None, relative_padding=None) == plain
    told = replace(plain, quantile=0.5, relative_padding=1)
    assert heads.for_family(told, "qwen-image") == told
    paper = replace(plain, **PAPER)
    assert heads.ranks_of(heads.for_family(paper, "qwen-image")).relative_padding == 0
    with pytest.raises(ValueError, match="'relative_padding': got 2, expected 0 where relative_rank is 0"):
        replace(paper, relative_padding=2)
