"""The node that protects a model: what it changes, what it leaves alone, what it refuses."""

import pytest
import torch

from tests.support import concepts as flat

pytestmark = pytest.mark.host

STEPS = 4


def test_changes_the_picture_but_not_the_input_model(apply, flux, sample, plain, concept):
    before = str(flux.model_options)
    protected = sample(apply(flux, [concept], 1.0))
    assert (protected - plain).abs().max() > 1e-2
    assert str(flux.model_options) == before
    assert torch.equal(sample(flux), plain)


def test_strength_zero_is_the_unpatched_model_bit_for_bit(apply, flux, sample, plain, concept):
    assert torch.equal(sample(apply(flux, [concept], 0.0)), plain)


def test_closed_gate_is_the_unpatched_model_bit_for_bit(apply, flux, sample, plain, concept):
    assert torch.equal(sample(apply(flux, [concept], 1.0, gate="fixed", threshold=1.0)), plain)
    assert not torch.equal(sample(apply(flux, [concept], 1.0, gate="fixed", threshold=0.0)), plain)


def test_threshold_is_read_only_with_a_fixed_gate(apply, flux, sample, concept):
    calibrated = sample(apply(flux, [concept], 1.0))
    assert torch.equal(sample(apply(flux, [concept], 1.0, threshold=1.0)), calibrated)


def test_strength_grows_the_change(apply, flux, sample, plain, concept):
    weak, strong = (sample(apply(flux, [concept], strength)) - plain for strength in (0.05, 0.5))
    assert 0 < weak.norm() < strong.norm()


def test_two_nodes_stack(apply, flux, sample, concept, make_concept):
    other = make_concept(slug="heart", seed=1)
    one = apply(flux, [concept], 1.0)
    both = sample(apply(one, [other], 1.0))
    assert not torch.equal(both, sample(one))
    assert not torch.equal(both, sample(apply(flux, [other], 1.0)))


@pytest.mark.parametrize("percent", [0.0, 0.5, 1.0])
def test_an_empty_range_of_steps_changes_nothing(apply, flux, sample, plain, concept, percent):
    assert torch.equal(sample(apply(flux, [concept], 1.0, start_percent=percent, end_percent=percent)), plain)


def test_start_and_end_percent_choose_the_steps(apply, flux, sample, tiny, concept, monkeypatch):
    acted = []
    protection = type(apply(flux, [concept], 1.0).model_options["transformer_options"]["patches"]["attn1_patch"][0])
    rotate = protection._rotate

    def noted(self, x, role, block, *rest):
        acted.append((role, block))
        return rotate(self, x, role, block, *rest)

    monkeypatch.setattr(protection, "_rotate", noted)
    per_step = 2 * tiny.blocks

    def steps(**window):
        acted.clear()
        sample(apply(flux, [concept], 1.0, **window), steps=STEPS)
        return len(acted) / per_step

    assert steps() == STEPS
    # euler, simple: sigmas of the steps lie at 0, 25, 50 and 75 % of the model's schedule
    assert [steps(start_percent=0.0, end_percent=e) for e in (0.2, 0.3, 0.6, 0.8)] == [1, 2, 3, 4]
    assert steps(start_percent=0.2, end_percent=0.6) == 2
    assert steps(start_percent=0.5, end_percent=1.0) + steps(start_percent=0.0, end_percent=0.5) == STEPS


def test_a_shift_set_by_a_later_node_moves_the_steps(apply, comfy, flux, sample, concept):
    """ModelSamplingFlux after SafeRoPE Apply: percentages follow the sampler's own schedule."""
    import comfy.model_sampling

    class Shifted(comfy.model_sampling.ModelSamplingFlux, comfy.model_sampling.CONST):
        pass

    def shifted(model):
        sampling = Shifted(model.model.model_config)
        sampling.set_parameters(shift=3.0)
        clone = model.clone()
        clone.add_object_patch("model_sampling", sampling)
        return clone

    first_half = {"start_percent": 0.0, "end_percent": 0.5}
    before = sample(apply(shifted(flux), [concept], 1.0, **first_half))
    after = sample(shifted(apply(flux, [concept], 1.0, **first_half)))
    assert torch.equal(before, after)
    assert not torch.equal(after, sample(apply(flux, [concept], 1.0, **first_half)))


def test_guidance_with_a_negative_prompt_is_protected_too(apply, flux, sample, concept):
    assert not torch.equal(sample(apply(flux, [concept], 1.0), cfg=3.0), sample(flux, cfg=3.0))


@pytest.mark.parametrize("name", ["strength", "threshold", "start_percent", "end_percent"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -0.1, 2.1])
def test_values_out_of_range_are_refused(apply, flux, concept, name, value):
    with pytest.raises(ValueError, match=rf"{name} is .*expected a number from .*Check the linked node"):
        apply(flux, [concept], **{"strength": 1.0, name: value})


def test_a_range_that_ends_before_it_starts_is_refused(apply, flux, concept):
    with pytest.raises(ValueError, match=r"end_percent is 0\.2, expected a number from 0.8 to 1"):
        apply(flux, [concept], 1.0, start_percent=0.8, end_percent=0.2)


def test_an_unknown_gate_is_refused(apply, flux, concept):
    with pytest.raises(ValueError, match="gate is 'open', expected 'as calibrated' or 'fixed'"):
        apply(flux, [concept], 1.0, gate="open")


def test_a_concept_of_another_geometry_is_refused_even_at_strength_zero(apply, core, flux, make_concept):
    foreign = make_concept(core.Geometry(2, 2, 4, 128))
    with pytest.raises(ValueError, match=r"2 single blocks x 4 heads.*the model is flux: 2 double .* x 2 heads"):
        apply(flux, [foreign], 0.0)


def test_a_model_that_is_no_flux_is_refused(apply, flux, concept):
    other = flux.clone()
    other.add_object_patch("diffusion_model", torch.nn.Identity())
    with pytest.raises(ValueError, match=r"got a Identity model, whose attention .*FLUX\.1 .*Krea 2; Z-Image"):
        apply(other, [concept], 1.0)


@pytest.mark.parametrize("selection", [{"blocks": "d0"}, {"blocks": "s0-1"}, {"streams": "text"}, {"streams": "image"}])
def test_a_selection_protects_in_part(apply, flux, sample, plain, concept, selection):
    part, whole = sample(apply(flux, [concept], 1.0, **selection)), sample(apply(flux, [concept], 1.0))
    assert not torch.equal(part, plain) and not torch.equal(part, whole)


def test_all_blocks_are_all(apply, flux, sample, concept):
    assert torch.equal(sample(apply(flux, [concept], 1.0, blocks="d0-1, S0-1")), sample(apply(flux, [concept], 1.0)))


def test_halves_stacked_are_the_whole(apply, flux, sample, concept):
    halves = apply(apply(flux, [concept], 1.0, blocks="d0-1"), [concept], 1.0, blocks="s0-1")
    torch.testing.assert_close(sample(halves), sample(apply(flux, [concept], 1.0)))


def test_nothing_selected_is_the_unpatched_model_bit_for_bit(apply, flux, sample, plain, make_concept):
    """Its heads are all in double blocks."""
    whole = make_concept()
    fields = ("heads", "basis_q", "basis_k", "generator_text", "generator_image")
    concept = make_concept(**{name: flat.field(whole, name)[:2] for name in fields})
    model = apply(flux, [concept], 1.0, blocks="s0-1")
    assert "attn1_patch" not in model.model_options["transformer_options"].get("patches", {})
    assert torch.equal(sample(model), plain)
    assert not torch.equal(sample(apply(flux, [concept], 1.0, blocks="d0")), plain), "negative control"


@pytest.mark.parametrize("blocks", ["d2", "s0-2", "x1", "d1-0", "d", "d0;s1", "d-1", "d0-1-2", "d00000"])
def test_blocks_that_are_none_are_refused(apply, flux, concept, blocks):
    with pytest.raises(ValueError, match="blocks: got"):
        apply(flux, [concept], 1.0, blocks=blocks)


def test_odd_streams_and_conditionings_are_refused(apply, flux, concept):
    with pytest.raises(ValueError, match="streams: got 'none'"):
        apply(flux, [concept], 1.0, streams="none")
    with pytest.raises(ValueError, match="conditionings is 'some'"):
        apply(flux, [concept], 1.0, conditionings="some")


def test_negative_prompts_can_be_left_alone(apply, flux, sample, concept):
    """Positive only is the positive row's protected velocity with the negative row's plain one."""
    plain, whole, part = (
        sample(model, steps=1, cfg=3.0)
        for model in (flux, apply(flux, [concept], 1.0), apply(flux, [concept], 1.0, conditionings="positive only"))
    )
    assert not torch.equal(part, plain) and not torch.equal(part, whole)
    # without CFG there is no negative row
    alone = apply(flux, [concept], 1.0, conditionings="positive only")
    assert torch.equal(sample(alone), sample(apply(flux, [concept], 1.0)))
