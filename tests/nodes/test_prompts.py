"""Prompts of Calibrate Concept: their brackets, and what is refused before anything is encoded or sampled."""

from __future__ import annotations

import importlib

import pytest
import torch

from .test_words import clip_of

pytestmark = pytest.mark.host
UNSAFE, SAFE = "a red [star] in the center\na blue [star] , left", "a red heart\na blue ring , left"
STARS, EMOJI = "\u661f\u661f", "\U0001f31f"
FULL = "red " * 23  # with T5's end all 24 tokens of the tiny world


@pytest.fixture(scope="module")
def prompts(pack):
    return importlib.import_module(f"{pack.__name__}.nodes.host.prompts")


@pytest.fixture(scope="module")
def t5(comfy):
    from comfy.text_encoders.flux import FluxTokenizer

    return clip_of(FluxTokenizer())


@pytest.fixture(scope="module")
def unpadded(comfy):
    """T5 without padding."""
    from comfy.text_encoders.pixart_t5 import PixArtTokenizer

    return clip_of(PixArtTokenizer())


def test_marked_words_are_read(prompts):
    first, second, third = prompts.read_prompts(
        "\n  a red [night star] here \r\n\r\nstar: [x]\na [ star ] .\n", "unsafe"
    )
    assert first.text == "a red night star here" and first.text[slice(*first.word)] == "night star"
    assert second.text == "star: x" and second.text[slice(*second.word)] == "x"
    assert third.text == "a  star  ." and third.text[slice(*third.word)] == "star"
    assert prompts.read_prompts("a (red:1.2) ring", "benign") == [prompts.Prompt("benign", "a (red:1.2) ring")]


@pytest.mark.parametrize("mark", "\v\f\x1c\x1d\x1e\x85\u2028\u2029")
def test_only_a_newline_ends_a_prompt(prompts, mark):
    text = f"a red{mark}big [star]\na [star]"
    assert [prompt.text for prompt in prompts.read_prompts(text, "unsafe")] == [f"a red{mark}big star", "a star"]


@pytest.mark.parametrize(
    ("line", "side", "told"),
    [
        ("a star", "unsafe", "has 0 words in brackets. Expected one, such as"),
        ("a [red] [star]", "unsafe", "has 2 words in brackets"),
        ("a [] red [star]", "unsafe", "has brackets with nothing in them. Expected one"),
        ("a [ ] red [star]", "unsafe", "has brackets with nothing in them"),
        ("a [[star]]", "unsafe", "has a bracket within brackets"),
        ("a [red [star]", "unsafe", "has a bracket within brackets"),
        ("a [star", "unsafe", r"has a \[ without its \]"),
        ("a star]", "unsafe", r"has a \] without its \["),
        ("a ]star[", "unsafe", r"has a \] without its \["),
        ("a [ring]", "benign", "has 1 words in brackets. Expected none"),
        ("a [ring", "benign", r"has a \[ without its \]. Expected none"),
    ],
)
def test_brackets_that_mark_no_word_are_told(prompts, line, side, told):
    good = "a [star]" if side == "unsafe" else "a ring"
    with pytest.raises(ValueError, match=f"{side} prompts, line 3: .* {told}"):
        prompts.read_prompts(f"{good}\n\n{line}\n", side)


def test_no_prompt_is_told(prompts):
    with pytest.raises(ValueError, match=r"no unsafe prompts\. Expected a dozen or more.*choose a preset"):
        prompts.read_prompts(" \n", "unsafe")


def enough(prompts, core, clip, unsafe, safe=SAFE, looks=3, rank=6):
    """What the check before the first forward says."""
    both = prompts.read_prompts(unsafe, "unsafe") + prompts.read_prompts(safe, "benign")
    return prompts.require_enough(clip, both, looks, core.Ranks(rank, 5, 5, 8, 8), 128)


@pytest.mark.parametrize(
    ("marked", "shown"),
    [
        (STARS, STARS),
        (f"red {STARS}", STARS),
        (EMOJI, EMOJI),
        ("\u041f\u0438\u043a\u0430\u0447\u0443", "\u041f', '\u0447"),
        ("na\u00efve art", "\u00ef"),
        ("star\u2605", "\u2605"),
    ],
)
def test_concepts_of_unknown_words_are_refused(prompts, core, t5, marked, shown):
    """By FLUX's own T5: Chinese, an emoji, some of a Cyrillic word's letters, one letter of a Latin one."""
    with pytest.raises(ValueError, match=f"does not know '{shown}' of the concept's word '{marked}'"):
        enough(prompts, core, t5, f"{UNSAFE}\na [{marked}] here")


@pytest.mark.parametrize(
    "marked", ["star", "night star", "caf\u00e9", "Pok\u00e9mon", "Stra\u00dfe", "3d-render", "\u0438"]
)
def test_concepts_of_known_words_are_taken(prompts, core, t5, marked):
    assert enough(prompts, core, t5, f"{UNSAFE}\na [{marked}] here") == []


def test_other_unknown_words_are_returned(prompts, core, t5):
    found = enough(
        prompts, core, t5, f"{UNSAFE}\na {STARS} [star] , {EMOJI}", f"{SAFE}\n(na\u00efve:1.2) art , {EMOJI}"
    )
    assert found == [STARS, EMOJI, "(na\u00efve:1.2)"]


@pytest.mark.parametrize(
    ("unsafe", "safe", "looks", "rank", "told"),
    [
        ("a [star]", SAFE, 3, 6, "seen 3 times, expected at least 6, its rank"),
        (UNSAFE, SAFE, 1, 3, "seen 2 times, expected at least 3"),
        (UNSAFE, SAFE, 99, 120, "got 138 dimensions for text tokens"),
    ],
)
def test_prompts_that_say_too_little_are_refused(prompts, core, t5, unsafe, safe, looks, rank, told):
    assert enough(prompts, core, t5, unsafe, safe, 6, 6) == [], "control"
    with pytest.raises(ValueError, match=told):
        enough(prompts, core, t5, unsafe, safe, looks, rank)


def test_prompts_without_padding_are_refused(prompts, core, t5, unpadded):
    with pytest.raises(
        ValueError, match="unsafe prompts: got none that leaves padding behind it, expected one at least"
    ):
        enough(prompts, core, unpadded, UNSAFE)
    long = " , very" * 300  # T5 in FLUX is padded to 256 tokens
    with pytest.raises(ValueError, match="benign prompts: got none that leaves padding"):
        enough(prompts, core, t5, UNSAFE, f"a heart{long}")
    assert enough(prompts, core, t5, UNSAFE, f"a heart{long}\na heart") == [], "one is enough"


def test_an_embedding_before_the_word_is_named(prompts, core, comfy, tmp_path):
    from comfy.text_encoders.flux import FluxTokenizer
    from safetensors.torch import save_file

    save_file({"t5xxl": torch.zeros(2, 4096), "clip_l": torch.zeros(2, 768)}, tmp_path / "mine.safetensors")
    clip = clip_of(FluxTokenizer(embedding_directory=[str(tmp_path)]))
    assert enough(prompts, core, clip, f"{UNSAFE}\na [star] embedding:mine here", f"{SAFE}\nembedding:mine") == []
    for line in (
        "embedding:mine a [star]",
        "a red embedding:mine [star]",
        "a [embedding:mine]",
        "a [red embedding:mine]",
    ):
        with pytest.raises(ValueError, match="the embedding 'embedding:mine' stands in or before"):
            enough(prompts, core, clip, f"{UNSAFE}\n{line}")


class Asked(Exception):
    """The CLIP or the model was asked for something."""


@pytest.fixture
def started(node_classes, pack, comfy, monkeypatch):
    """started(...) runs the node; Asked where nothing was found wrong before the first encoding."""
    import comfy.sd

    def asked(*_, **__):
        raise Asked

    model, clip, _ = node_classes["SafeRoPE_TinyWorld"].execute().result
    monkeypatch.setattr(comfy.sd.CLIP, "encode_from_tokens_scheduled", asked)
    monkeypatch.setattr(importlib.import_module(f"{pack.__name__}.nodes.calibrate"), "gather", asked)

    def run(unsafe=UNSAFE, safe=SAFE, name="Star", **settings):
        return node_classes["SafeRoPE_CalibrateConcept"].execute(model, clip, name, unsafe, safe, **settings)

    return run


def test_good_prompts_are_looked_at(started):
    """The control."""
    with pytest.raises(Asked):
        started()


@pytest.mark.parametrize(
    ("inputs", "told"),
    [
        ({"unsafe": f"{UNSAFE}\na [moon]"}, "does not know 'moon'"),
        ({"unsafe": f"{UNSAFE}\n{FULL}[star]"}, "tokens of 'star' were not found in the text stream"),
        ({"unsafe": f"[star] {FULL[4:]}\n" * 2}, "unsafe prompts: got none that leaves padding"),
        ({"safe": FULL}, "benign prompts: got none that leaves padding"),
        ({"safe": FULL * 2}, "benign prompts: got none that leaves padding"),
        ({"unsafe": "a [star]"}, "seen 3 times, expected at least 6"),
        ({"name": " "}, "name is empty"),
        ({"name": "a\x1b[31mb"}, "name: holds control characters"),
        ({"name": "x" * 201}, "expected small letters|at most 200 characters"),
    ],
)
def test_what_can_be_known_is_refused_first(started, inputs, told):
    with pytest.raises(ValueError, match=told):
        started(**inputs)


def test_the_report_tells_of_unknown_words(node_classes):
    model, clip, _ = node_classes["SafeRoPE_TinyWorld"].execute().result
    with torch.inference_mode():
        run = node_classes["SafeRoPE_CalibrateConcept"].execute
        for moon in ("", " moon sun moon"):
            report = run(model, clip, "Star", UNSAFE + moon, SAFE + moon, timesteps="1", rounds=3).result[1]
            told = "does not know 2 of the prompts' words, and takes them all for the same one: 'moon', 'sun'"
            assert report.endswith(told) == bool(moon)
