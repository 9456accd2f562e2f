"""A concept out of prompts inside a real ComfyUI: the trainer's statistics, and pictures that lose the concept."""

from __future__ import annotations

import importlib
from contextlib import nullcontext

import pytest
import torch

from tinyworld import detector, world

pytestmark = pytest.mark.host
UNSAFE, SAFE = 12, 24
TIMES = (1.0, 0.8, 0.5)
PICTURES, STEPS = 16, 8


@pytest.fixture(scope="module")
def gather(pack):
    return importlib.import_module(f"{pack.__name__}.nodes.host.gather")


@pytest.fixture(scope="module")
def tiny(node_classes):
    """The tiny world's model, CLIP and VAE."""
    return node_classes["SafeRoPE_TinyWorld"].execute().result


@pytest.fixture(scope="module")
def prompts():
    """Unsafe and safe prompts as people write them into the node."""
    unsafe = [
        f"{p.text[: p.subject[0]]}[{p.text[slice(*p.subject)]}]{p.text[p.subject[1] :]}"
        for p in world.unsafe_prompts("star", UNSAFE, 0)
    ]
    return "\n".join(unsafe), "\n".join(p.text for p in world.benign_prompts("star", SAFE, 0))


@pytest.fixture(scope="module")
def run(node_classes, tiny, prompts):
    """run(angle=...) -> (concept list, report, head map), as ComfyUI runs nodes."""
    node = node_classes["SafeRoPE_CalibrateConcept"]

    def calibrate(unsafe=prompts[0], safe=prompts[1], clip=tiny[1], **settings):
        with torch.inference_mode():
            return node.execute(tiny[0], clip, "Star", unsafe, safe, **settings).result

    return calibrate


@pytest.fixture(scope="module")
def made(run):
    return run()


@pytest.fixture(scope="module")
def paint(comfy, tiny, apply):
    """paint(prompts, concepts) -> pictures [n, 3, 96, 96] in [-1, 1], from the same noises whatever protects."""
    import comfy.sample

    def pictures(chosen, concepts=()):
        model, clip, vae = tiny
        with torch.inference_mode():
            texts = [clip.encode_from_tokens_scheduled(clip.tokenize(prompt.text))[0] for prompt in chosen]
            text = [
                [torch.cat([t for t, _ in texts]), {"pooled_output": torch.cat([e["pooled_output"] for _, e in texts])}]
            ]
            noise = torch.randn(len(chosen), 16, 12, 12, generator=torch.Generator().manual_seed(1))
            model = apply(model, list(concepts), 1.0)
            latents = comfy.sample.sample(
                model, noise, STEPS, 1.0, "euler", "simple", text, text, torch.zeros_like(noise), disable_pbar=True
            )
            return vae.decode(latents).movedim(-1, 1) * 2 - 1

    return pictures


@pytest.fixture(scope="module")
def theirs():
    """The trainer's statistics in full precision, as ComfyUI runs the tiny world, and
    its noises in ComfyUI's layout."""
    from saferope_training.flux.models import from_pipeline, seeded_noise
    from saferope_training.making import extract
    from saferope_training.prompts import PromptRecord
    from tinyworld.model import GUIDANCE, TEXT_LENGTH, load_pipeline
    from tinyworld.model import STEPS as ALL_STEPS

    pipe = load_pipeline()
    model = from_pipeline("tinyworld", pipe, TEXT_LENGTH, 12, GUIDANCE, ALL_STEPS)
    records = [PromptRecord("unsafe", p.text, p.subject) for p in world.unsafe_prompts("star", UNSAFE, 0)]
    records += [PromptRecord("benign", p.text) for p in world.benign_prompts("star", SAFE, 0)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("saferope_training.flux.models.torch.autocast", lambda *_, **__: nullcontext())
        statistics = extract.extract(model, records, TIMES, 4096, seed=0)
    return statistics, lambda seeds, shape: pipe._unpack_latents(
        seeded_noise(model, seeds), 96, 96, pipe.vae_scale_factor
    )


@pytest.fixture(scope="module")
def ours(pack, gather, core, tiny, prompts, theirs, made):
    """The node's statistics of the same prompts and noises."""
    read = importlib.import_module(f"{pack.__name__}.nodes.host.prompts").read_prompts
    both = read(prompts[0], core.UNSAFE) + read(prompts[1], core.BENIGN)
    with pytest.MonkeyPatch.context() as patch, torch.inference_mode():
        patch.setattr(gather, "seeded_noise", theirs[1])
        looks = gather.looks_of(tiny[1], both, rounds=1, seed=0)
        return gather.gather(tiny[0], made[0][0].geometry, looks, (12, 12), 7, TIMES, 3.5, lambda count: None)


def apart(a, b):
    """The largest relative difference of two sets of Gram matrices [blocks, H, D, D]."""
    return ((a - b).flatten(2).norm(dim=2) / b.flatten(2).norm(dim=2)).max().item()


def test_statistics_are_the_trainers(ours, theirs):
    assert ours.vectors.keys() == theirs[0].vectors.keys()
    for each, vectors in theirs[0].vectors.items():
        for role in "qk":
            assert apart(ours.vectors[each].gram[role], vectors.gram[role]) < 1e-4, (each, role)
            assert ours.vectors[each].sample[role].shape == vectors.sample[role].shape
    for role in "qk":
        assert apart(ours.met[role], theirs[0].met[role]) < 1e-4
    assert apart(ours.met["q"], theirs[0].met["k"]) > 0.1, "negative control"


def test_bases_are_the_trainers(ours, theirs, core):
    """Principal angles: cosines near 1."""
    ranks = core.Ranks(6, 5, 5, 8, 8)
    mine, other = (core.read_heads(each, ranks, "svd", 0.7, 0.5, "calibrated", 0.998) for each in (ours, theirs[0]))
    assert torch.equal(mine.critical, other.critical) and mine.critical.any()
    for name, basis in mine.basis.items():
        assert torch.linalg.svdvals(basis.mT @ other.basis[name]).min() > 0.999, name
        torch.testing.assert_close(mine.gate[name], other.gate[name], atol=1e-3, rtol=0)
    assert torch.linalg.svdvals(mine.basis["q"].mT @ other.basis["k"]).min() < 0.9, (
        "negative control: keys lie elsewhere"
    )


def shown(pictures):
    return detector.shows(detector.load_detector(), pictures, "star").float().mean().item()


def test_stars_go_and_the_rest_stays(run, made, paint):
    """Prompts that nothing was made from. Turned by an angle of 0, it is refused; made from benign
    prompts, nothing is suppressed."""
    (concept,), report, heads, *_ = made
    assert (concept.name, concept.slug, concept.mode, concept.text.acts_on) == ("Star", "star", "fixed", "qk")
    assert f"Star: {len(concept.heads)} of 12 heads tell it apart" in report
    assert heads.shape[0] == 1 and heads.shape[-1] == 3 and 0 <= heads.min() < heads.max() <= 1
    stars, others = (
        world.unsafe_prompts("star", PICTURES, 9, test=True),
        world.benign_prompts("star", PICTURES, 9, test=True),
    )
    bare = paint(stars)
    assert shown(bare) > 0.9
    assert shown(paint(stars, [concept])) <= 0.6, "0.44 when written, with a dozen prompts"
    plain, kept = paint(others), paint(others, [concept])
    assert (kept - plain).abs().mean() * 127.5 < 2, "grey levels of 255"
    seen = [detector.read(detector.load_detector(), pictures).words["shape"] for pictures in (plain, kept)]
    assert sum(a == b for a, b in zip(*seen, strict=True)) >= PICTURES - 1

    ((still,), *_) = run(angle=0.0)
    with pytest.raises(ValueError, match="has no effect"):  # negative control: the angle turns
        paint(stars, [still])
    marked = "\n".join(
        f"{p.text[:i]}[{p.text[i:j]}]{p.text[j:]}" for p in others[:UNSAFE] for i, j in [_first_word(p.text)]
    )
    ((wrong,), *_) = run(unsafe=marked, cut=0.0)
    assert shown(paint(stars, [wrong])) > 0.7, "negative control: the prompts decide what goes"


def _first_word(text):
    """The first word of five letters or more."""
    word = next(word for word in text.split() if len(word) > 4)
    return text.index(word), text.index(word) + len(word)


def test_the_record_repeats_it(made, core, tmp_path):
    (concept,) = made[0]
    record = concept.training
    assert record["settings"]["unsafe_prompts"] == UNSAFE and record["settings"]["latent_size"] == [12, 12]
    assert (
        set(record["versions"]) == {"comfyui", "python", "torch", "transformers"}
        and len(record["prompts_sha256"]) == 64
    )
    core.save_concepts(tmp_path / "star.safetensors", [concept])
    (back,) = core.load_concepts(tmp_path / "star.safetensors")
    assert torch.equal(back.text.basis.q, concept.text.basis.q) and back.training == record


def test_latents_give_size_and_batch(run, made):
    """A batch of 5 gives the same concept as a batch of 24, up to the kernels' last bits; a seed gives another."""
    ((small,), report, *_) = run(latent={"samples": torch.zeros(5, 16, 12, 12)})
    (concept,) = made[0]
    assert torch.equal(small.heads, concept.heads)
    assert torch.linalg.svdvals(small.text.basis.k.mT @ concept.text.basis.k).min() > 0.999
    ((other,), report, *_) = run(latent={"samples": torch.zeros(9, 4, 10, 8)}, seed=1, timesteps="1")
    assert "latents of 8 x 10" in report and other.training["settings"]["latent_size"] == [10, 8]
    assert not torch.equal(other.text.basis.k, concept.text.basis.k)


@pytest.fixture(scope="module")
def bundled(pack):
    return importlib.import_module(f"{pack.__name__}.nodes.host.presets")


@pytest.fixture(scope="module")
def read(pack):
    return importlib.import_module(f"{pack.__name__}.nodes.host.prompts").read_prompts


def test_every_preset_has_prompts_that_the_node_reads(bundled, read):
    """A dozen or more unsafe ones, twice as many safe ones, all different; the word's own are in none of the safe."""
    for preset in bundled.CHOICES[1:]:
        for style in ("short", "long"):
            unsafe, safe = bundled.preset_prompts(preset, style, "Jane Doe")
            texts = [each.text for each in read("\n".join(unsafe), "unsafe") + read("\n".join(safe), "benign")]
            assert (len(unsafe), len(safe), len(set(texts))) == (24, 48, 72), (preset, style)
            words = {line[line.index("[") + 1 : line.index("]")] for line in unsafe}
            assert not [line for line in safe for word in words if f" {word} " in f" {line} ".replace(",", " ")]
    assert bundled.preset_prompts("your own", "short", "") == ([], [])


def test_long_prompts_say_more_and_the_same_on_both_sides(bundled):
    short, long = (bundled.preset_prompts("gore", style, "") for style in ("short", "long"))
    for few, many in zip(short[0] + short[1], long[0] + long[1], strict=True):
        assert many.startswith(few) and len(many.split()) > len(few.split()) + 10
    ends = [{line[len(few) :] for few, line in zip(*pair, strict=True)} for pair in zip(short, long, strict=True)]
    assert ends[0] == ends[1] and len(ends[0]) > 3


def test_a_likeness_takes_the_name_that_is_given(bundled):
    unsafe, safe = bundled.preset_prompts("a person's likeness", "short", "Jane [Q] Doe")
    assert all("[Jane Q Doe]" in line for line in unsafe) and not any("Jane" in line for line in safe)
    with pytest.raises(ValueError, match="name holds no person"):
        bundled.preset_prompts("a person's likeness", "short", "")


@pytest.mark.parametrize("wrong", [("moon", "short"), ("gore", "longer")])
def test_unknown_presets_and_styles_are_refused(bundled, wrong):
    with pytest.raises(ValueError, match="expected one of"):
        bundled.preset_prompts(*wrong, "")


def test_a_preset_makes_a_concept_without_a_prompt_written(node_classes, tiny, paint):
    """As a stranger does it: model, CLIP, preset. Own lines come on top."""
    node, stars = node_classes["SafeRoPE_CalibrateConcept"], world.unsafe_prompts("star", PICTURES, 7, test=True)
    with torch.inference_mode():
        made, report, _, prompts, _ = node.execute(*tiny[:2], "My concept", "", "", preset="tiny world: star").result
        more = node.execute(*tiny[:2], "Mine", "a red [star]", "", preset="tiny world: star", timesteps="1").result
    assert made[0].name == "tiny world: star" and "24 unsafe and 48 safe prompts" in report and "are few" not in report
    assert prompts.count("[") == 24 and more[3].startswith("a red [star]\n") and "25 unsafe" in more[1]
    assert more[0][0].name == "Mine"
    assert shown(paint(stars)) > 0.9
    assert shown(paint(stars, made)) <= 0.7, "0.56 when written"


def test_a_strip_shows_prompts_before_and_after(node_classes, tiny, prompts, pack, monkeypatch):
    """Two unsafe prompts and a safe one, with every step counted; without a VAE there is none, and that is said."""
    module = importlib.import_module(f"{pack.__name__}.nodes.host.before_after")
    drawn, counted = [], []
    monkeypatch.setattr(module, "draw_strip", lambda *parts: drawn.append(parts) or torch.zeros(1, 1, 1, 3))
    monkeypatch.setattr(f"{pack.__name__}.nodes.calibrate.Countdown.step", lambda self, count: counted.append(count))
    node = node_classes["SafeRoPE_CalibrateConcept"]
    with torch.inference_mode():
        *_, strip = node.execute(tiny[0], tiny[1], "Star", *prompts, vae=tiny[2]).result
        *_, none = node.execute(tiny[0], tiny[1], "Star", *prompts).result
    ((texts, before, after),) = drawn
    first = [side.split("\n") for side in prompts]
    assert texts == [line.replace("[", "").replace("]", "") for line in (*first[0][:2], first[1][0])]
    assert not any(torch.equal(*pair) for pair in zip(before[:2], after[:2], strict=True)) and strip.shape[3] == 3
    assert {picture.shape for picture in (*before, *after)} == {(96, 96, 3)}
    forwards = len(importlib.import_module(f"{pack.__name__}.saferope_core").schedule(TIMES))
    assert sum(counted) == 2 * (UNSAFE + SAFE) * (1 + forwards) + module.PAINTINGS
    assert "Connect vae" in none.message


def test_minutes_left_are_told_when_they_are_known(pack, monkeypatch):
    module = importlib.import_module(f"{pack.__name__}.nodes.host.countdown")
    said, clock = [], iter([0.0, 1.0, 30.0, 31.0, 60.0, 600.0])
    monkeypatch.setattr(module, "passing", said.append)
    count = module.Countdown(100, lambda: next(clock))
    for step in (1, 9, 0, 10, 80):
        count.step(step)
    count.end()
    assert said == ["10 %, about 4 minutes left", "20 %, about 4 minutes left", "done"]
    assert [module.left(seconds) for seconds in (5, 70, 3600)] == [
        "less than a minute",
        "about a minute",
        "about 60 minutes",
    ]


def test_too_few_prompts_are_told_of(run):
    _, report, *_ = run("a red [star] in the center on a white background\na photo of a blue [star] , left , navy wall")
    assert "2 unsafe and 24 safe prompts are few" in report and "are few" not in run()[1]
