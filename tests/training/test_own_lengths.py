"""Z-Image's prompts, each of a length of its own: a batch of several lengths is as each prompt alone, to the real
pipeline, to what listens, to what turns and to what is learned."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

import saferope_core
from saferope import protect
from saferope_core import BENIGN, ROLES, WORDS, CriticalHeads, Forward, Gathering, Protection, Run
from saferope_training.flux.attach import _TextLength, attached, listening, positioned
from saferope_training.flux.loading import load_model
from saferope_training.flux.models import encode, seeded_noise, text_tokens, velocity
from saferope_training.flux.pipelines import asked
from saferope_training.flux.tokens import own_states, packed, unpacked
from saferope_training.making.rotation import TrainableRotation
from tests.support import concepts as flat
from tests.support.pipelines import SIDE, make_model, make_pipeline

SHORT = "a red star , center"
LONG = "a red star , center , and a blue circle to the left of it , and a green ring to the right of it , on black"
TEXTS, TIME = [SHORT, LONG], 0.7
# Of a vector's length: fp32 through four blocks of some ten products each, of at most 96 terms, 4 * 10 * 96 * 6e-8; and
# a time that is rounded to 6e-8 is a thousand times as large within, 6e-5
CLOSE = 3e-4


def apart(a, b):
    return ((a - b).norm() / b.norm()).item()


@pytest.fixture
def model():
    return make_model("z-image")


@pytest.fixture
def text(model):
    return encode(model, TEXTS)


@pytest.fixture
def concept(model):
    return flat.in_all_heads(saferope_core, model.geometry)


def asked_for(model, text, at=slice(None)):
    """Velocities of prompts from noises of their own places."""
    x = seeded_noise(model, [0, 1])[at]
    return velocity(model, x, torch.full((len(x),), TIME), text.pick(at), autocast=False)


def each_alone(model, text):
    return torch.cat([asked_for(model, text, slice(at, at + 1)) for at in range(len(TEXTS))])


def test_lengths_differ(model, text):
    """32 and 64 tokens with padding: else nothing here could fail."""
    lengths = [len(each) for each in own_states(text)]
    assert 0 < lengths[0] <= 32 < lengths[1] <= model.text_length == 64
    used = text_tokens(model, TEXTS, [None, None])
    assert used[WORDS].sum(1).tolist() != [0, 0] and not used[WORDS][0, 32:].any()


@pytest.mark.parametrize("place", range(len(TEXTS)))
def test_velocities_are_the_pipelines_own(model, text, place):
    """What the whole of diffusers' pipeline asks its transformer, prompt by prompt, and what it makes of the answer."""
    given, steps = [], []
    hook = model.transformer.register_forward_hook(lambda _module, args, found: given.append((args, found[0])))
    own = model.pipe.scheduler.step
    model.pipe.scheduler.step = lambda v, *rest, **more: (steps.append(v), own(v, *rest, **more))[1]
    start = unpacked(seeded_noise(model, [place]), SIDE // 2)
    model.pipe(
        prompt=[TEXTS[place]],
        latents=start,
        guidance_scale=0.0,
        num_inference_steps=2,
        max_sequence_length=model.text_length,
        height=8 * SIDE,
        width=8 * SIDE,
        output_type="latent",
    )
    hook.remove()
    for (pictures, t, states), velocities in zip((args for args, _ in given), steps, strict=True):
        x = seeded_noise(model, [0, 1])
        x[place] = packed(torch.stack(pictures)[:, :, 0])[0]
        with torch.no_grad():
            ours = velocity(model, x, (1 - t).expand(2), text, autocast=False)
            wrong = replace(text, pooled=torch.ones_like(text.pooled))
            longer = velocity(model, x, (1 - t).expand(2), wrong, autocast=False)
        theirs = packed(velocities)[0]
        assert apart(own_states(text)[place], states[0]) < CLOSE and apart(ours[place], theirs) < CLOSE
        assert apart(longer[place], theirs) > 100 * CLOSE, "negative control: another length"


@torch.no_grad()
def test_a_batch_turns_as_each_alone(model, text, concept):
    rotate = Protection([concept], model.geometry).rotate
    plain = asked_for(model, text)
    with attached(model.transformer, rotate):
        together, alone = asked_for(model, text), each_alone(model, text)
    for ours, own, before in zip(together, alone, plain, strict=True):
        assert apart(ours, own) < CLOSE and apart(before, own) > 100 * CLOSE
    with protect(model.pipe, concept):
        assert apart(asked_for(model, text), alone) < CLOSE
    assert torch.equal(asked_for(model, text), plain), "the hooks are off"


def heard(model, text, at=slice(None)):
    """What is shown of every block and role, and the text's span."""
    found = {}
    with torch.no_grad(), listening(model.transformer, lambda x, *where: found.update({where[:3]: (x, where[3])})):
        asked_for(model, text, at)
    return found


@pytest.mark.parametrize("blank", [True, False])
def test_behind_a_shorter_prompt_nothing_is_shown(model, text, monkeypatch, blank):
    if not blank:
        monkeypatch.setattr(_TextLength, "shown", lambda self, x: x)
    together, short = heard(model, text), heard(model, text, slice(0, 1))
    for where, (x, span) in together.items():
        alone, own = short[where]
        assert span == (32, 96) and own == (32, 64)
        assert apart(x[:1, :, :64], alone) < CLOSE
        # zeros that the network puts there are no zeros behind its first block
        assert x[0, :, 64:].any() == (not blank and where[2] > 0), "negative control"
        assert x[1].norm(dim=-1).min() > 0


def gathered(model, places, turned=None):
    """Statistics of some of the prompts in one batch, each with the noise of its own place."""
    texts = [TEXTS[place] for place in places]
    text, seeds = encode(model, texts), [3 + place for place in places]
    gathering = Gathering(model.geometry, 0)
    visit = gathering.visit(BENIGN, text_tokens(model, texts, [None] * len(texts)), len(model.image_ids), seeds)
    rope = positioned(*asked(model).turns(model, turned or text))
    visit.at_time()
    x = seeded_noise(model, seeds)
    with torch.no_grad(), listening(model.transformer, lambda x, *at: visit.listen(x, rope(x, *at[-2:]), *at)):
        velocity(model, x, torch.full((len(x),), TIME), text, autocast=False)
    found = gathering.statistics()
    return [found.met["q"], found.met["k"], found.vectors[BENIGN, WORDS].gram["q"]]


def test_a_batch_is_listened_to_as_each_alone(model):
    together, *alone = (gathered(model, places) for places in ([0, 1], [0], [1]))
    for whole, *parts in zip(together, *alone, strict=True):
        assert apart(whole, sum(parts)) < CLOSE
    mixed = gathered(model, [0, 1], encode(model, TEXTS[::-1]))
    assert apart(mixed[0], together[0]) > 10 * CLOSE, "negative control: pictures at the other's place"


@pytest.mark.parametrize("blank", [True, False])
@torch.no_grad()
def test_risk_is_told_of_tokens_alone(model, text, concept, monkeypatch, blank):
    if not blank:
        monkeypatch.setattr(_TextLength, "shown", lambda self, x: x)
    forward, run = Forward(range(2), 1.0, (SIDE // 2, SIDE // 2)), Run(model.geometry)
    protection = Protection([concept], model.geometry)
    with attached(model.transformer, lambda *given: protection.rotate(*given, forward)):
        asked_for(model, text)
    run.add(forward)
    short, long = (reading.tokens[0] for reading in run.readings(0))
    assert short[:32].all() and long.all() and len(short) == 64
    assert short[32:].any() == (not blank), "negative control"


def test_a_batch_teaches_as_each_alone(model, text, concept):
    """Gradients of a rotation whose gates are open, spared tokens among them; none is lost in what is no token."""
    count, width = len(concept.heads), concept.text.basis.k.shape[-1]
    spared = torch.rand(2, model.text_length, generator=torch.Generator().manual_seed(0)) < 0.3

    def learned(at):
        torch.manual_seed(1)
        weight = torch.randn(count, width, width).requires_grad_()
        basis = {role: getattr(concept.text.basis, role) for role in ROLES}
        heads = CriticalHeads(concept.heads, basis, dict.fromkeys(ROLES, torch.zeros(count)), torch.empty(0))
        rotation = TrainableRotation(heads, model.geometry, {"text": "qk", "image": "qk"}, weight, 1.0)
        rotation.spared = spared[at]
        with attached(model.transformer, rotation.rotate):
            asked_for(model, text, at).square().sum().backward()
        return weight.grad

    together, alone = learned(slice(None)), learned(slice(0, 1)) + learned(slice(1, 2))
    assert together.isfinite().all() and together.any()
    assert apart(together, alone) < 10 * CLOSE  # the way back is as long again, and longer within the rotation
    spared = ~spared
    assert apart(learned(slice(None)), alone) > 100 * CLOSE, "negative control"


def test_what_has_other_spans_is_refused(model, text):
    pictures = [torch.randn(4, 1, 8, 8), torch.randn(4, 1, 16, 16)]
    states = own_states(text)
    with torch.no_grad(), listening(model.transformer, lambda *_: None):
        model.transformer([pictures[0]] * 2, torch.full((2,), TIME), states)
        with pytest.raises(RuntimeError, match="got pictures of several sizes, or reference pictures"):
            model.transformer(pictures, torch.full((2,), TIME), states)
        references = [[each, each] for each in pictures[:1]]
        with pytest.raises(RuntimeError, match="expected pictures of one size and no references"):
            model.transformer(
                references,
                torch.full((1,), TIME),
                [[states[0], states[0]]],
                siglip_feats=[None],
                image_noise_mask=[[0, 1]],
            )


@pytest.mark.parametrize(("shift", "said", "few"), [(6.0, None, False), (3.0, None, True), (3.0, False, False)])
def test_the_schedulers_shift_tells_turbo(tmp_path, shift, said, few):
    pipe = make_pipeline("z-image")
    pipe.scheduler.register_to_config(shift=shift, use_dynamic_shifting=False)
    pipe.save_pretrained(tmp_path / "model")
    index = tmp_path / "model" / "model_index.json"
    if said is not None:
        index.write_text(json.dumps(json.loads(index.read_text()) | {"is_distilled": said}))
    model = load_model(str(tmp_path / "model"), resolution=8 * SIDE)
    assert (model.steps, model.guidance) == ((8, 0.0) if few else (50, 4.0))
