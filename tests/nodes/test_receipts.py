"""Receipts of sampling runs inside a real ComfyUI, against a count of its own in the same run."""

import importlib
import re

import pytest
import torch

from tests.support import concepts as flat
from tests.support.layouts import latent, prompt

pytestmark = pytest.mark.host
STEPS = 2
MIDDLE = 0.03  # of random vectors about half have this risk: R / D


@pytest.fixture(scope="module")
def receipts_of(node_classes, pack, core):
    """receipts_of(recorders, samples) -> the receipts of the run that the samples came out of."""
    recorder = importlib.import_module(f"{pack.__name__}.nodes.host.recorder")

    def find(recorders, samples):
        found = (each.receipt(recorder.digest_of(samples)) for each in recorders)
        return [each for each in found if each is not None]

    return find


@pytest.fixture
def protected(node_classes):
    return lambda model, concepts, strength=1.0, **more: (
        node_classes["SafeRoPE_Apply"].execute(model, concepts, strength, **more).args
    )


class Count:
    """An attn1_patch before ours that counts, with arithmetic of its own, the vectors above a concept's gates."""

    def __init__(self, concept, margin=1e-6):
        self.concept, self.margin, self.found = concept, margin, []

    def __call__(self, q, k, v, pe=None, attn_mask=None, extra_options=None):
        block = (("double", "single").index(extra_options["block_type"]), extra_options["block_index"])
        text, kinds = extra_options["img_slice"][0], extra_options["cond_or_uncond"]
        counts = [0] * len(kinds)
        for stream, span in (("text", slice(0, text)), ("image", slice(text, None))):
            for role, x in (("q", q), ("k", k)):
                for place, (kind, index, head) in enumerate(self.concept.heads.tolist()):
                    if (kind, index) == block:
                        inner = x[:, head, span].double() @ self.concept.basis(role, stream)[place].double()
                        risk = inner.square().sum(-1) / x[:, head, span].double().square().sum(-1)
                        gate = self.concept.gate(role, stream)[place].item()
                        assert (risk - gate).abs().min() > self.margin, "choose other examples: rounding decides"
                        hits = [chunk.sum().item() for chunk in (risk > gate).chunk(len(kinds))]
                        counts = [old + new for old, new in zip(counts, hits, strict=True)]
        self.found += zip(kinds, counts, strict=True)
        return {}


def counting(model, concept):
    """A clone that counts; comfy's own code, as far as a receipt can see."""
    count, clone = Count(concept), model.clone()
    clone.set_model_attn1_patch(count)
    return clone, count


@pytest.mark.parametrize("conditionings", ["all", "positive only"])
def test_turned_vectors_are_those_of_an_independent_count(
    flux, make_concept, protected, run, receipts_of, conditionings
):
    concept = make_concept(threshold=MIDDLE)
    counted, count = counting(flux, concept)
    model, recorder = protected(counted, [concept], conditionings=conditionings)
    out = run(model, prompt(), prompt(seed=1), cfg=3.0, steps=STEPS)
    (receipt,) = receipts_of([recorder], out)
    wanted = sum(hits for kind, hits in count.found if kind == 0 or conditionings == "all")
    everything = sum(hits for _, hits in count.found)
    assert receipt.seen.turned == {"star": wanted} and 0 < wanted
    assert conditionings == "all" or wanted < everything, "negative control: both prompts have risk"


def test_a_whole_run_is_whole(flux, concept, protected, run, receipts_of, core):
    model, recorder = protected(flux, [concept])
    out = run(model, prompt(), prompt(), cfg=2.0, steps=STEPS)
    (receipt,) = receipts_of([recorder], out)
    seen, asked = receipt.seen, receipt.asked
    assert (seen.steps, seen.steps_seen, seen.steps_protected) == (STEPS, STEPS, STEPS)
    assert seen.forwards == seen.forwards_protected == STEPS and seen.forwards_skipped == 0
    assert seen.blocks == 4 and seen.conditionings == 2 and seen.others == () and receipt.start == ""
    assert asked.concepts[0].turning == asked.concepts[0].heads == 4 and asked.concepts[0].sha256 == ""
    assert core.failures([receipt]) == core.omissions([receipt]) == []
    assert core.receipt_from(receipt.as_json()) == receipt
    assert receipts_of([recorder], out + 1e-3) == [], "another latent has none"


def test_a_run_knows_what_it_began_with(flux, concept, protected, run, receipts_of):
    model, recorder = protected(flux, [concept])
    first = run(model, prompt(), steps=STEPS)
    second = run(model, prompt(), steps=STEPS, denoise=0.5, start=first)
    (one,), (two,) = (receipts_of([recorder], each) for each in (first, second))
    assert two.start == one.latent != two.latent


def test_the_file_s_digest_stays_with_the_concept(node_classes, make_concept, core):
    load = node_classes["SafeRoPE_LoadConcept"]
    star = load.execute("star.safetensors", strength=0.005)[0]
    digest = load.execute("star.safetensors")[1].split()[1]
    both = node_classes["SafeRoPE_CombineConcepts"].execute({"a": star, "b": star})[0]
    assert [each.source for each in both] == [digest, digest] and both[1].slug != both[0].slug


WAYS = {
    "strength": ({"strength": 0.5}, r"strength 0\.5"),
    "steps": ({"end_percent": 0.1}, "1 of 2 steps"),
    "blocks": ({"blocks": "d0"}, "blocks d0 alone"),
    "streams": ({"streams": "text"}, "text tokens alone"),
    "prompts": ({"conditionings": "positive only"}, "positive prompts alone"),
    "gate": ({"gate": "fixed", "threshold": 0.9}, "fixed gate of 0.9"),
}


@pytest.mark.parametrize("way", WAYS)
def test_what_is_left_out_is_told(flux, concept, protected, run, receipts_of, core, way):
    settings, words = WAYS[way]
    model, recorder = protected(flux, [concept], **settings)
    (receipt,) = receipts_of([recorder], run(model, prompt(), prompt(seed=1), cfg=2.0, steps=STEPS))
    assert core.failures([receipt]) == []
    (told, *_) = core.omissions([receipt])
    assert re.search(words, told)


def test_nothing_that_turns_is_no_protection(flux, make_concept, protected, run, receipts_of, core):
    """Neither a tiny strength, nor a gate that nothing passes, nor a range without a step."""
    for settings in (
        {"strength": 1e-9},
        {"gate": "fixed", "threshold": 0.9999},
        {"start_percent": 0.999},
    ):
        model, recorder = protected(flux, [make_concept()], **settings)
        (receipt,) = receipts_of([recorder], run(model, prompt(), steps=STEPS))
        assert core.failures([receipt]) == ["no concept turned anything in any step"]


def test_an_inverse_is_named(flux, concept, protected, run, receipts_of, core, make_concept):
    inverse = flat.changed(
        make_concept(slug="decoy"),
        generator_text=-concept.text.generator,
        generator_image=-concept.image.generator,
    )
    one, first = protected(flux, [concept])
    two, second = protected(one, [inverse])
    plain, out = run(flux, prompt(), steps=STEPS), run(two, prompt(), steps=STEPS)
    torch.testing.assert_close(out, plain, rtol=1e-3, atol=1e-3)
    for recorder in (first, second):
        found = core.failures(receipts_of([recorder], out))
        assert any("'star' is turned back by 'decoy' in 4 of its 4 heads" in each for each in found)
    assert core.failures(receipts_of([first], run(one, prompt(), steps=STEPS))) == [], "control: alone it is not"


def test_blocks_that_a_cache_leaves_out_are_told(flux, concept, protected, run, receipts_of, core):
    model, recorder = protected(flux, [concept])
    clone, calls = model.clone(), []

    def cache(args, more):
        calls.append(1)
        if len(calls) > 1:
            return {"img": args["img"], "txt": args["txt"]}
        return more["original_block"](args)

    clone.set_model_patch_replace(cache, "dit", "double_block", 0)
    (receipt,) = receipts_of([recorder], run(clone, prompt(), steps=STEPS))
    told = core.failures([receipt])
    assert "1 of 2 forwards left out protected blocks" in told[0] and "test_receipts" in told[1]


def _patch(clone):
    clone.set_model_attn1_patch(lambda q, k, v, **_: {"q": q})


def _after_cfg(clone):
    clone.set_model_sampler_post_cfg_function(lambda args: args["denoised"])


def _wrapper(clone):
    clone.set_model_unet_function_wrapper(lambda apply, args: apply(args["input"], args["timestep"], **args["c"]))


@pytest.mark.parametrize("meddle", [_patch, _after_cfg, _wrapper])
def test_code_of_others_is_named(flux, concept, protected, run, receipts_of, core, meddle):
    model, recorder = protected(flux, [concept])
    clone = model.clone()
    meddle(clone)
    (told,) = core.failures(receipts_of([recorder], run(clone, prompt(), steps=STEPS)))
    assert "code of other packs had a say" in told and "test_receipts" in told


def test_a_function_in_comfyui_s_place_is_named(flux, concept, protected, run, receipts_of, core, monkeypatch):
    import comfy.samplers

    inner = comfy.samplers.calc_cond_batch
    monkeypatch.setattr(comfy.samplers, "calc_cond_batch", lambda *args, **more: inner(*args, **more))
    model, recorder = protected(flux, [concept])
    (told,) = core.failures(receipts_of([recorder], run(model, prompt(), steps=STEPS)))
    assert "test_receipts" in told


def test_without_a_record_vectors_are_not_counted(flux, concept, protected, run, receipts_of, core):
    model, recorder = protected(flux, [concept], record=False)
    (receipt,) = receipts_of([recorder], run(model, prompt(), steps=STEPS))
    assert receipt.seen.turned is None and core.failures([receipt]) == []


@pytest.mark.parametrize(
    "spoil",
    [
        lambda data: data.update(version=2),
        lambda data: data["seen"].update(steps=-1),
        lambda data: data["seen"].update(forwards=True),
        lambda data: data["asked"].pop("blocks"),
        lambda data: data["asked"]["concepts"].append("star"),
        lambda data: data["seen"].update(others="none"),
        lambda data: data.update(more=1),
    ],
)
def test_receipts_that_are_none_are_refused(flux, concept, protected, run, receipts_of, core, spoil):
    model, recorder = protected(flux, [concept])
    data = receipts_of([recorder], run(model, prompt(), steps=1))[0].as_json()
    spoil(data)
    with pytest.raises(ValueError, match="receipt"):
        core.receipt_from(data)


def test_a_latent_of_zeros_is_no_history(flux, concept, protected, run, receipts_of):
    model, recorder = protected(flux, [concept])
    (receipt,) = receipts_of([recorder], run(model, prompt(), start=latent() * 0, steps=1))
    assert receipt.start == ""
