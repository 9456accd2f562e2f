"""Pieces and words of the text stream, from ComfyUI's own tokenizers."""

import importlib
from itertools import pairwise
from types import SimpleNamespace

import pytest

pytestmark = pytest.mark.host


@pytest.fixture(scope="module")
def words(pack):
    return importlib.import_module(f"{pack.__name__}.nodes.host.words")


@pytest.fixture(scope="module")
def tiny(node_classes):
    return node_classes["SafeRoPE_TinyWorld"].execute()[1]


def clip_of(tokenizer):
    """ComfyUI's CLIP without its encoders: nothing here encodes."""
    import comfy.sd

    clip = comfy.sd.CLIP(no_init=True)
    clip.tokenizer, clip.tokenizer_options = tokenizer, {}
    return clip


@pytest.fixture(scope="module")
def flux(comfy):
    from comfy.text_encoders.flux import FluxTokenizer

    return clip_of(FluxTokenizer())


@pytest.fixture(scope="module", params=["flux", "single"])
def t5(request, comfy, flux):
    if request.param == "flux":
        return flux
    from comfy.text_encoders.pixart_t5 import PixArtTokenizer

    return clip_of(PixArtTokenizer())


def test_pieces_are_t5s(words, t5):
    pieces = words.pieces(t5, "a red star, on the beach")
    assert pieces[:9] == [
        "\u2581",
        "a",
        "\u2581red",
        "\u2581star",
        ",",
        "\u2581on",
        "\u2581the",
        "\u2581beach",
        words.END,
    ]
    assert set(pieces[9:]) <= {words.PADDING}


def test_padding_is_flux_padding(words, flux):
    assert len(words.pieces(flux, "a red star")) == 256
    assert words.pieces(flux, "") == [words.END, *[""] * 255]


def test_weights_are_taken_out(words, t5, tiny):
    for clip in (t5, tiny):
        plain = words.words(words.pieces(clip, "a red star on the beach"))
        assert words.words(words.pieces(clip, "a red (star:1.2) on the beach")) == plain
        assert words.words(words.pieces(clip, "a (red star) on the beach")) == plain
        assert words.words(words.pieces(clip, "a red circle on the beach")) != plain


def test_words_are_grouped(words, t5):
    text = "Zappy's well-known café: (don't) stop \U0001f600!"
    pieces = words.pieces(t5, text)
    found = words.words(pieces)
    assert [word for word, *_ in found][:5] == ["Zappy's", "well-known", "café", "don't", "stop"]
    assert found[0] == ("Zappy's", 0, 4) and pieces[:4] == ["\u2581Za", "ppy", "'", "s"]
    assert all("".join(pieces[a:b]).replace("\u2581", "") == word for word, a, b in found)
    assert all(b <= first for (_, _, b), (_, first, _) in pairwise(found))


def test_the_tiny_worlds_words_are_its_tokens(words, tiny):
    pieces = words.pieces(tiny, "a Red, star")
    assert pieces == ["a", "red", ",", "star", words.END, *[""] * 19]
    assert words.words(pieces) == [("a", 0, 1), ("red", 1, 2), ("star", 3, 4)]


def test_empty_text_has_no_words(words, tiny, flux):
    for clip in (tiny, flux):
        assert words.words(words.pieces(clip, "")) == []


def test_marked_words_are_located(words, t5, tiny):
    text = "a red starfish, on the beach"
    span = text.index("starfish"), text.index("starfish") + 8
    for clip in (t5, tiny):
        first, last = words.located(clip, text, span)
        assert words.words(words.pieces(clip, text))[2][1:] == (first, last)
    text = "unbelievablestars here"
    first, last = words.located(t5, text, (12, 17))
    assert "star" in "".join(words.pieces(t5, text)[first:last])


@pytest.mark.parametrize(
    ("text", "word"), [("a (red:1.2) star", "star"), (" ".join(["red"] * 30 + ["star"]), "star"), ("a   b", "  ")]
)
def test_what_cannot_be_located_is_refused(words, tiny, text, word):
    place = text.index(word)
    with pytest.raises(ValueError, match="were not found in the text stream"):
        words.located(tiny, text, (place, place + len(word)))


def test_a_clip_without_t5_is_refused(words, comfy):
    from comfy.sdxl_clip import SDXLTokenizer

    with pytest.raises(ValueError, match="text streams g, l, none of T5"):
        words.pieces(clip_of(SDXLTokenizer()), "a star")
    with pytest.raises(ValueError, match="none of T5"):
        words.pieces(SimpleNamespace(tokenize=lambda text: []), "a star")


def test_embeddings_stand_in_the_stream(words, flux, tmp_path):
    """A textual inversion of two vectors takes two tokens, each a word of its own."""
    import torch
    from comfy.text_encoders.flux import FluxTokenizer
    from safetensors.torch import save_file

    save_file({"t5xxl": torch.zeros(2, 4096), "clip_l": torch.zeros(2, 768)}, tmp_path / "mine.safetensors")
    clip = clip_of(FluxTokenizer(embedding_directory=[str(tmp_path)]))
    pieces = words.pieces(clip, "a star embedding:mine here")
    assert pieces.count(words.EMBEDDING) == 2
    assert [word for word, *_ in words.words(pieces)] == ["a", "star", *[words.EMBEDDING] * 2, "here"]
