"""Risk Map and Risk Probe inside a real ComfyUI, on the tiny world and its star."""

import importlib
import re

import pytest
import torch

from tests.support import concepts as flat

pytestmark = pytest.mark.host

CLEAR = 0.8  # of the pairs of head and step that look at the star's word, at least so many find it risky
STAR, CIRCLE = (f"a red {shape} in the center on a white background" for shape in ("star", "circle"))
STEPS = 4
SHEET = 250  # pixels: lower is a sheet that stands in the place of a picture


@pytest.fixture(scope="module")
def world(node_classes):
    return node_classes["SafeRoPE_TinyWorld"].execute().args


@pytest.fixture(scope="module")
def star(node_classes):
    return node_classes["SafeRoPE_LoadConcept"].execute("star.safetensors")[0]


@pytest.fixture(scope="module")
def swirl(node_classes):
    return node_classes["SafeRoPE_LoadConcept"].execute("swirl.safetensors")[0]


@pytest.fixture(scope="module")
def encode(world):
    return lambda text: world[1].encode_from_tokens_scheduled(world[1].tokenize(text))


@pytest.fixture(scope="module")
def sampled(comfy, encode):
    """sampled(model, text, ...) -> the LATENT of ComfyUI's own KSampler; `text` may be a conditioning, too."""
    import nodes

    def run(model, text, seed=3, cfg=1.0, negative="", batch=1, side=12):
        empty = {"samples": torch.zeros(batch, 16, side, side)}
        positive = encode(text) if isinstance(text, str) else text
        with torch.inference_mode():
            return nodes.common_ksampler(model, seed, STEPS, cfg, "euler", "simple", positive, encode(negative), empty)[
                0
            ]

    return run


@pytest.fixture
def hidden(node_classes):
    """A node class as the executor prepares it: with hidden inputs, which saving previews reads."""

    def prepare(name):
        from comfy_api.latest import io

        node = node_classes[f"SafeRoPE_{name}"]
        return node.PREPARE_CLASS_CLONE({"hidden_inputs": {io.Hidden.prompt: None, io.Hidden.extra_pnginfo: None}})

    return prepare


@pytest.fixture
def show(hidden):
    return lambda *args, **kwargs: hidden("RiskMap").execute(*args, **kwargs)


@pytest.fixture
def ask(hidden, world, star, encode):
    def run(text, flag_above=0.4, if_flagged="report", concept=star, **kwargs):
        latent = {"samples": torch.zeros(1, 16, 12, 12)}
        positive = encode(text) if isinstance(text, str) else text
        return hidden("RiskProbe").execute(world[0], concept, positive, flag_above, if_flagged, latent=latent, **kwargs)

    return run


def protected(node_classes, world, star, **settings):
    return node_classes["SafeRoPE_Apply"].execute(world[0], star, 1.0, **settings).args


def test_a_map_tells_the_risky_word_from_the_others(node_classes, world, star, sampled, show):
    model, recorder = protected(node_classes, world, star)
    risky, report, *pictures = show(recorder, sampled(model, STAR), clip=world[1], text=STAR).args
    safe, other, *_ = show(recorder, sampled(model, CIRCLE), clip=world[1], text=CIRCLE).args
    assert risky > CLEAR and safe < 0.3
    assert f"riskiest words: star {risky:.2f}, " in report and "not above 0.4" in other
    assert all(picture.ndim == 4 and picture.shape[3] == 3 for picture in pictures) and len(pictures) == 5


def test_what_is_shown_is_kept_in_previews(node_classes, world, star, sampled, show):
    model, recorder = protected(node_classes, world, star)
    shown = show(recorder, sampled(model, STAR), clip=world[1], text=STAR).ui
    assert len(shown["images"]) == 1 and "Star: risk" in shown["text"][0]


def test_recording_changes_no_picture(node_classes, world, star, sampled):
    """Nor does a model that is only watched."""
    with_record, without = (protected(node_classes, world, star, record=on)[0] for on in (True, False))
    assert torch.equal(sampled(with_record, STAR)["samples"], sampled(without, STAR)["samples"])
    assert not torch.equal(sampled(without, STAR)["samples"], sampled(world[0], STAR)["samples"])


def test_two_samplers_behind_one_apply_do_not_mix(node_classes, world, star, sampled, show):
    model, recorder = protected(node_classes, world, star)
    first, second = sampled(model, STAR), sampled(model, CIRCLE, seed=4)
    assert show(recorder, first).args[0] > CLEAR > 0.3 > show(recorder, second).args[0]
    again = sampled(model, STAR)
    assert torch.equal(again["samples"], first["samples"])
    assert show(recorder, again).args[0] == show(recorder, first).args[0]


def test_a_latent_of_another_model_is_refused(node_classes, world, star, sampled, show):
    _, recorder = protected(node_classes, world, star)
    with pytest.raises(ValueError, match=r"did not come out of a sampler .*Connect the sampler's own latent"):
        show(recorder, sampled(world[0], STAR))


@pytest.mark.parametrize(
    ("strength", "settings", "why"),
    [
        (0.0, {}, "the strength is 0"),
        (1.0, {"record": False}, "record is off"),
        (1.0, {"start_percent": 0.5, "end_percent": 0.5}, "start_percent and end_percent are both 0.5"),
        (1.0, {"blocks": "d0", "streams": "image"}, "no concept has anything to turn"),
    ],
)
def test_what_nobody_recorded_is_shown_as_not_measured(
    node_classes, world, star, sampled, show, strength, settings, why
):
    """A dial at 0 fails no job; and the risk has no value, so that nothing can take it for harmless."""
    model, recorder = node_classes["SafeRoPE_Apply"].execute(world[0], star, strength, **settings).args
    risk, report, *pictures = show(recorder, sampled(model, STAR)).args
    assert why in blocked(risk) and report.startswith("not measured: ") and why in report and "risk 0" not in report
    assert len(pictures) == 5 and all(each.shape[1] < SHEET for each in pictures)


def test_a_run_in_which_no_gate_was_asked_is_refused(node_classes, world, star, sampled, show):
    model, recorder = protected(node_classes, world, star, gate="fixed", threshold=1.0)
    with pytest.raises(ValueError, match="or all gates are 1"):
        show(recorder, sampled(model, STAR))


def test_the_probes_seed_stays(node_classes):
    options = node_classes["SafeRoPE_RiskProbe"].INPUT_TYPES()["optional"]["seed"][1]
    assert options["control_after_generate"] == "fixed"


def blocked(value):
    """What ComfyUI says to nodes that take an output without a value; None where it has one."""
    from comfy_execution.graph_utils import ExecutionBlocker

    return value.message if isinstance(value, ExecutionBlocker) else None


def still(concept, stream):
    """It turns no tokens of a stream."""
    name = f"generator_{stream}"
    return flat.changed(concept, **{name: torch.zeros_like(flat.field(concept, name))})


def test_image_tokens_alone_are_no_risk_of_the_prompt(node_classes, world, star, sampled, show):
    """It said: risk 0.00, not above 0.4."""
    model, recorder = protected(node_classes, world, star, streams="image")
    risk, report, *pictures = show(recorder, sampled(model, STAR), clip=world[1], text=STAR).args
    assert re.search(r"risk to compare: that of Star was not measured .*no text tokens", blocked(risk))
    assert report.startswith("Star: risk not measured (") and "risk 0.00" not in report and "riskiest" not in report
    assert float(re.search(r"image tokens: \S+ on average, (\S+) at most", report)[1]) > 0
    model, recorder = protected(node_classes, world, star, streams="text")
    risk, report, *others = show(recorder, sampled(model, STAR), clip=world[1], text=STAR).args
    assert (
        risk > CLEAR and report.startswith(f"Star: risk {risk:.2f}, above") and "image tokens: not measured" in report
    ), "control"
    sheets = [tuple(each.shape[1] < SHEET for each in pair) for pair in zip(pictures[:4], others[:4], strict=True)]
    assert sheets == [(True, False), (False, True), (True, False), (False, False)], "words, patches, heads, steps"


def test_who_was_not_asked_is_not_measured_beside_who_was(node_classes, world, star, swirl, sampled, show):
    """Switched off, or left out by the choice of streams: star's risk is known, the highest of both is not."""
    for other, settings in ((flat.changed(swirl[0], strength=0.0), {}), (still(swirl[0], "text"), {"streams": "text"})):
        model, recorder = protected(node_classes, world, [*star, other], **settings)
        risk, report, *pictures = show(recorder, sampled(model, STAR)).args
        assert "that of Swirl was not measured" in blocked(risk)
        assert re.search(r"Star: risk \S+, above", report) and "Swirl: risk not measured" in report
        assert [len(each) for each in pictures] == [2, 2, 2, 2, 1]
    model, recorder = protected(node_classes, world, [*star, *swirl])
    risk, report, *_ = show(recorder, sampled(model, STAR)).args
    assert risk > CLEAR and re.search(r"Swirl: risk 0\.\d+, not above", report), "control"


def test_steps_at_rest_dilute_no_risk(node_classes, world, star, sampled, show):
    """They counted as steps without risk."""
    model, recorder = protected(node_classes, world, star, end_percent=0.4)
    latent = sampled(model, STAR)
    (reading,) = recorder.of(latent["samples"]).readings[0]
    rested = reading.text.isnan().all(-1)[:, 0].tolist()
    assert rested == sorted(rested) and len(set(rested)) == 2, "measured first, then at rest"
    assert show(recorder, latent).args[0] > CLEAR


def ranged(conditioning, start, end):
    import nodes

    return nodes.ConditioningSetTimestepRange().set_range(conditioning, start, end)[0]


def test_a_prompt_in_two_parts_is_measured_whole_or_not(node_classes, world, star, encode, sampled, show):
    """The part that names the star comes where the protection rests."""
    positive = ranged(encode(CIRCLE), 0.0, 0.4) + ranged(encode(STAR), 0.4, 1.0)
    model, recorder = protected(node_classes, world, star, end_percent=0.4)
    risk, report, *_ = show(recorder, sampled(model, positive)).args
    assert blocked(risk) and re.search(
        r"Star: risk not measured in 1 of 2 prompts, up to 0\.\d\d in the others", report
    )
    model, recorder = protected(node_classes, world, star)
    assert show(recorder, sampled(model, positive)).args[0] > 0.4, "control"


def test_another_prompt_than_the_sampled_one_is_noticed_where_it_can_be(node_classes, world, star, sampled, show, pack):
    model, recorder = protected(node_classes, world, star)
    record = recorder.of(sampled(model, STAR)["samples"])
    risk = importlib.import_module(f"{pack.__name__}.nodes.host.risk")
    with pytest.raises(ValueError, match="text has 24 tokens, the prompt that was sampled had 10"):
        risk.named_words(record.readings[0][0].tokens[0, :10], world[1], STAR)
    rest = torch.cat([record.readings[0][0].tokens[0], torch.tensor([0.7, 0.2])])
    assert risk.named_words(rest, world[1], STAR)[-1] == ("(other tokens)", pytest.approx(0.7))


def test_negative_prompts_are_shown_but_not_counted(node_classes, world, star, sampled, show):
    model, recorder = protected(node_classes, world, star)
    risk, report, *_ = show(recorder, sampled(model, CIRCLE, cfg=2.0, negative=STAR)).args
    negative = float(re.search(r"negative prompt: risk (\S+), not counted", report)[1])
    assert risk < 0.3 and negative > 0.4
    risk, report, *_ = show(recorder, sampled(model, STAR, cfg=2.0, negative=CIRCLE)).args
    assert risk > CLEAR


def test_every_picture_of_a_batch_has_its_map(node_classes, world, star, sampled, show):
    model, recorder = protected(node_classes, world, star)
    latent = sampled(model, STAR, batch=3, side=16)
    image = world[2].decode(latent["samples"])
    plain, over = show(recorder, latent).args[3], show(recorder, latent, image=image).args[3]
    assert plain.shape[0] == over.shape[0] == 3 and not torch.equal(plain, over)
    (reading,) = recorder.of(latent["samples"]).readings[0]
    assert reading.grid == (8, 8) and reading.patches.shape == (3, 64)


def test_compiled_models_are_recorded(node_classes, world, star, sampled, show):
    from comfy_extras.nodes_torch_compile import TorchCompileModel

    torch._dynamo.reset()
    model, recorder = protected(node_classes, world, star)
    compiled = TorchCompileModel.execute(model, "eager")[0]
    first, second = sampled(compiled, STAR), sampled(compiled, CIRCLE)
    assert show(recorder, first).args[0] > CLEAR > 0.3 > show(recorder, second).args[0]
    torch._dynamo.reset()


def test_a_probe_flags_the_concept_and_passes_the_rest(ask):
    risk, flagged, report, words, heads, card = ask(STAR).args
    assert risk > CLEAR and flagged is True and "above 0.4" in report and words.ndim == heads.ndim == 4
    assert card.shape[0] == 1 and card.shape[2] == 700
    risk, flagged, *_ = ask(CIRCLE).args
    assert risk < 0.3 and flagged is False


def test_a_probe_can_refuse(ask):
    with pytest.raises(ValueError, match=r"This prompt was refused: its risk is 1\.00, above 0\.4"):
        ask(STAR, if_flagged="stop with an error")
    assert ask(CIRCLE, if_flagged="stop with an error").args[1] is False
    assert ask(STAR, flag_above=1.0, if_flagged="stop with an error").args[1] is False


@pytest.mark.parametrize("text", [STAR, CIRCLE])
@pytest.mark.parametrize("idle", ["switched off", "no text", "gates of 1"])
def test_a_probe_lets_nothing_pass_that_it_did_not_measure(ask, star, swirl, text, idle):
    """It said of the star's own prompt: risk 0.00, not above 0.4."""
    ones = dict.fromkeys(("gate_q", "gate_k"), torch.ones(len(star[0].heads)))
    off = {
        "switched off": flat.changed(star[0], strength=0.0),
        "no text": still(star[0], "text"),
        "gates of 1": flat.changed(star[0], **ones),
    }[idle]
    both = [*swirl, off]
    with pytest.raises(
        ValueError, match=r"the risk of Star was not measured.* Set its strength above 0(.|\n)*Swirl: risk 0\."
    ):
        ask(text, concept=both, if_flagged="stop with an error")
    risk, flagged, report, words, heads, _ = ask(text, concept=both).args
    assert flagged is True and "Star: risk not measured" in report and "Star: risk 0" not in report
    assert "that of Star was not measured" in blocked(risk) and len(words) == len(heads) == 2
    on = ask(text, concept=[*swirl, *star]).args
    assert on[1] is (text == STAR) and (on[0] > 0.4) is (text == STAR), "control: measured, it decides"


@pytest.mark.parametrize(
    "late",
    [
        {"start_percent": 0.5, "end_percent": 1.0},
        {"clip_start_percent": 0.5, "clip_end_percent": 1.0},
        {"default": True},
    ],
)
def test_a_probe_measures_what_later_steps_would_ask_for(ask, encode, late):
    """One pass of the first step never saw that part of the prompt. A default acts where the others' steps are over."""
    for text, flagged in ((STAR, True), (CIRCLE, False)):
        later = [[states, more | late] for states, more in encode(text)]
        assert ask(ranged(encode(CIRCLE), 0.0, 0.5) + later).args[1] is flagged


def test_a_probe_needs_one_pass_and_no_size(hidden, world, star, encode, monkeypatch):
    calls = []
    network = world[0].model.diffusion_model
    forward = type(network)._forward
    monkeypatch.setattr(type(network), "_forward", lambda *a, **k: calls.append(a[1].shape) or forward(*a, **k))
    assert hidden("RiskProbe").execute(world[0], star, encode(STAR), 0.4, "report").args[1] is True
    assert calls == [(1, 16, 64, 64)]
    calls.clear()
    assert hidden("RiskProbe").execute(world[0], star, encode(STAR), 0.4, "report", steps=3).args[1] is True
    assert len(calls) == 3


def test_probing_leaves_the_model_alone(ask, world, sampled):
    before = sampled(world[0], STAR)["samples"]
    ask(STAR)
    assert torch.equal(sampled(world[0], STAR)["samples"], before)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"flag_above": float("nan")}, "flag_above is nan"),
        ({"flag_above": 1.5}, "flag_above is 1.5"),
        ({"steps": 9}, "steps is 9"),
        ({"if_flagged": "hide"}, "if_flagged is 'hide'"),
    ],
)
def test_odd_settings_of_a_probe_are_refused(ask, settings, message):
    with pytest.raises(ValueError, match=message):
        ask(STAR, **settings)


def test_long_prompts_have_pictures_of_bounded_size(pack):
    pictures = importlib.import_module(f"{pack.__name__}.nodes.draw.risk_pictures")
    short, long = (pictures.word_bars(["word"] * n, [0.5] * n, "t") for n in (3, 2000))
    assert short.shape[1] < long.shape[1] < 2000 and short.shape[2] == long.shape[2] == 700
    assert pictures.word_bars([], [], "t").shape[0] == 1
    assert not torch.equal(pictures.patch_map(torch.eye(4), "t"), pictures.patch_map(torch.eye(4).flip(0), "t"))
    assert pictures.course({"a": [0.1]}, [1.0], "t").shape[3] == 3


def test_a_latent_is_known_again_by_a_host_that_names_no_type_of_intermediates(pack, comfy, monkeypatch):
    """ComfyUI 0.17, the oldest that is supported, hands latents over in the type they were sampled in."""
    digest = importlib.import_module(f"{pack.__name__}.nodes.host.recorder").digest_of
    monkeypatch.delattr(comfy.model_management, "intermediate_dtype", raising=False)
    latent = torch.randn(1, 4, 2, 2)
    assert digest(latent) == digest(latent.clone()) != digest(latent + 1e-3)
    assert digest(latent.bfloat16()) == digest(latent.bfloat16().float())
