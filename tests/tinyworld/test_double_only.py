"""The second tiny model: Qwen-Image's own template word by word, and a folder that training takes as the tiny world."""

from __future__ import annotations

import argparse

import pytest
import torch
from rich.progress import Progress
from typer.testing import CliRunner

from dev import measure
from saferope import cli
from saferope_core import load_concepts
from saferope_training.flux.loading import load_model
from saferope_training.flux.models import text_tokens
from saferope_training.prompts.sources import prompts_for
from saferope_training.settings import Settings
from tinyworld import double_only, flow, world
from tinyworld.model import TEXT_LENGTH, load_pipeline


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Made by the command's own stages, a few steps each."""
    path = tmp_path_factory.mktemp("double_only")
    arguments = argparse.Namespace(steps=2, distillation_steps=2, work=path, device="cpu")
    pipe = double_only.make_pipeline()
    scenes = flow.Scenes(load_pipeline(), 8, 0, lambda: None)
    before = {name: value.clone() for name, value in pipe.transformer.state_dict().items()}
    reader = pipe.text_encoder.get_input_embeddings().weight.clone()
    with Progress(disable=True) as bar:
        double_only.train(pipe, scenes, arguments, bar)
    after = pipe.transformer.state_dict()
    assert any(not torch.equal(after[name], value) for name, value in before.items())
    assert not torch.equal(pipe.text_encoder.get_input_embeddings().weight, reader), "the reader learns too"
    double_only.save(pipe, path / "model")
    return path / "model"


def test_every_caption_fits_with_its_template():
    pipe = double_only.make_pipeline()
    words, cut = pipe.tokenizer, pipe.prompt_template_encode_start_idx
    texts = [prompt.text for prompt in world.training_captions(200, 0)]
    ids = words([pipe.prompt_template_encode.format(text) for text in texts])["input_ids"]
    assert len(words(pipe.prompt_template_encode.split("{}")[0])["input_ids"]) == cut
    assert max(map(len, ids)) <= cut + TEXT_LENGTH
    assert not any(words.unk_token_id in row for row in ids)
    assert words.unk_token_id in words("a xylophone")["input_ids"], "negative control"


def test_its_folder_is_the_tiny_world_to_the_trainer(folder):
    model = load_model(str(folder))
    assert model.latent_side == 12
    assert model.tiny and model.guidance == 1 and model.text_length == TEXT_LENGTH
    geometry = model.geometry
    assert (geometry.family, geometry.double_blocks, geometry.single_blocks) == ("qwen-image", 4, 0)
    own, embedded = (prompts_for(Settings(concept="star", model=name)) for name in (str(folder), "tinyworld"))
    assert own == embedded
    with pytest.raises(ValueError, match="got no prompts for it"):
        prompts_for(Settings(concept="xylophone", model=str(folder)))
    kinds = text_tokens(model, [own[0].text], [own[0].subject])
    assert kinds["subject"].sum() == 1


FEW = "--steps 2 --phase 1 --batch 4 --unsafe-prompts 8 --benign-prompts 8 --cut=-1 --no-verdict".split()


@pytest.mark.parametrize("slug", world.CONCEPTS)
def test_every_concept_is_trained_and_evaluated_in_it(folder, tmp_path, slug, monkeypatch):
    """By the commands that `dev.measure double-only` runs, less prompts and steps: its figures are all there."""
    fewer = {"train": FEW, "evaluate": ["--unsafe", "2", "--benign", "2"]}

    def run(command):
        asked = [*command[len(measure.SAFEROPE) :], *fewer[command[3]]]
        result = CliRunner().invoke(cli.app, asked)
        assert result.exit_code == 0, result.output

    monkeypatch.setattr(measure, "run", run)
    monkeypatch.setattr(measure, "ROOT", tmp_path)
    monkeypatch.setattr(measure, "_git", lambda *_: "")
    monkeypatch.setattr(measure, "DOUBLE_ONLY", folder.parent)
    found = measure.double_only([slug])[f"double-only/{slug}"]["rows"]
    assert len(found) == len(measure.DEMO_ROWS)
    assert {f"{slug} shown", f"{slug} shown, held-out words"} < found.keys()
    (concept,) = load_concepts(tmp_path / measure.DOUBLE_ONLY / slug / f"{slug}.safetensors")
    assert concept.text.generator.any(), "it turns something"
