"""Folders of other families: loaded by the index's class, painted by their own pipelines, and taken through every
command of the trainer."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

from saferope import cli
from saferope_core import load_concepts
from saferope_training.flux import loading
from saferope_training.flux.folder import KINDS
from saferope_training.flux.loading import load_model
from saferope_training.flux.models import encode, seeded_noise
from saferope_training.flux.painting import decode_pictures, encode_pictures, paint
from saferope_training.making import memory
from tests.support.flux import answer
from tests.support.pipelines import FAMILIES, SIDE, make_model, make_pipeline

PROMPTS = ["a red star , center", "a blue circle"]
PIXELS = 8 * SIDE
MORE = {
    "z-image": " , and a green ring to the right of it , and a blue circle to the left of it , on black"
}  # 64 tokens


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def folder(family, tmp_path_factory):
    path = tmp_path_factory.mktemp(family) / "model"
    make_pipeline(family).save_pretrained(path)
    return path


def load(folder):
    return load_model(str(folder), resolution=PIXELS)


def test_every_family_of_the_table_is_tested():
    assert len(KINDS) == 1 + len(FAMILIES)


def test_a_folder_answers_as_its_pipeline(family, folder):
    loaded = load(folder)
    made = replace(make_model(family), guidance=loaded.guidance)
    assert loaded.geometry == made.geometry and loaded.text_length == made.text_length
    assert torch.equal(answer(loaded), answer(made))
    for parameter in made.transformer.parameters():
        parameter.data = parameter.data * 1.01
    assert not torch.equal(answer(loaded), answer(made)), "negative control"


def test_its_index_tells_whether_it_is_distilled(family, folder, tmp_path):
    if family in ("flux2-dev", "ovis-image"):  # none of these is
        assert load(folder).guidance == {"flux2-dev": 4.0, "ovis-image": 5.0}[family] and load(folder).steps == 50
        return
    copy = shutil.copytree(folder, tmp_path / "model")
    said = json.loads((copy / "model_index.json").read_text())
    (copy / "model_index.json").write_text(json.dumps(said | {"is_distilled": True}))
    slow, fast = load(folder), load(copy)
    assert fast.steps < slow.steps and fast.guidance < slow.guidance


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_pictures_are_the_pipelines_own(family, folder, scale):
    """Prompts as text, through the whole of diffusers' pipeline, and through ours: the same pictures."""
    model = replace(load(folder), guidance=scale)
    noise = seeded_noise(model, [0, 1])
    ours = decode_pictures(model, paint(model, encode(model, PROMPTS), noise, 2))
    square = noise.unflatten(1, (SIDE // 2, SIDE // 2))
    start = {
        "flux2": square.permute(0, 3, 1, 2),
        "z-image": square.unflatten(3, (-1, 2, 2)).permute(0, 3, 1, 4, 2, 5).reshape(2, -1, SIDE, SIDE),
    }.get(family.removesuffix("-dev"), noise)
    name = "true_cfg_scale" if family == "qwen-image" else "guidance_scale"
    guided = {} if family.startswith("flux2") else {"negative_prompt": ["", ""]}
    with torch.no_grad():
        theirs = model.pipe(
            prompt=list(PROMPTS),  # Z-Image's writes into the list that it is given
            **{name: scale},
            **guided,
            latents=start,
            num_inference_steps=2,
            height=PIXELS,
            width=PIXELS,
            max_sequence_length=model.text_length,
            output_type="pt",
        ).images
    assert (ours - (2 * theirs - 1)).abs().max() < 1e-4
    assert (ours[0] - ours[1]).abs().max() > 1e-3, "negative control"


def test_pictures_of_latents_of_pictures(folder):
    """Latents in model space are what the pipeline decodes: the way there and back is the autoencoder's own."""
    model = load(folder)
    pictures = torch.rand(2, 3, PIXELS, PIXELS, generator=torch.Generator().manual_seed(0)) * 2 - 1
    tokens, vae = encode_pictures(model, pictures), model.pipe.vae
    assert tokens.shape == seeded_noise(model, [0, 1]).shape
    pixels = pictures[:, :, None] if vae.config.get("latents_mean") else pictures
    with torch.no_grad():
        plain = vae.decode(vae.encode(pixels).latent_dist.mode()).sample.clamp(-1, 1)
    assert (decode_pictures(model, tokens) - plain.reshape(pictures.shape)).abs().max() < 1e-4


def test_the_memory_plan_counts_its_blocks(folder):
    config = loading.config_of(str(folder))
    model = load(folder)
    weights = sum(each.numel() for each in model.transformer.parameters())
    assert memory.transformer_bytes(config, None, torch.float32) == pytest.approx(4 * weights, rel=0.01)
    one, many = (memory.activation_bytes(config, 24, 4, batch, False) for batch in (1, 4))
    assert 0 < one < many
    assert memory.activation_bytes(config, 24, 4, 4, True) < many, "checkpointing keeps less"


def test_every_command(family, folder, tmp_path):
    """From prompts in files to a protected picture; a random model unlearns nothing, so only what changes is asked."""
    red = "a red star , center" + MORE.get(family, "")
    for name, texts in (("unsafe", [red, "one blue star"]), ("benign", ["a blue circle", "a ring"])):
        (tmp_path / f"{name}.txt").write_text("\n".join(texts))
    model = ["--model", str(folder), "--resolution", str(PIXELS)]
    files = ["--unsafe", str(tmp_path / "unsafe.txt"), "--benign", str(tmp_path / "benign.txt"), "--subjects", "star"]
    few = ["--unsafe-prompts", "2", "--benign-prompts", "2"]
    heads = ["--rank", "3", "--padding-rank", "1", "--words-rank", "1", "--reach", "2", "--cut=-1.0"]
    heads += ["--relative-rank", "0", "--image-rank", "2"]
    out = ["--out", str(tmp_path / "out")]

    def run(*arguments):
        result = CliRunner().invoke(cli.app, [str(each) for each in arguments])
        assert result.exit_code == 0, result.output
        return result.output

    run("heads", "star", *model, *files, *few, *heads, *out)
    learn = [
        *heads,
        "--relative-rank",
        "0",
        "--image-rank",
        "2",
        "--steps",
        "2",
        "--phase",
        "1",
        "--batch",
        "2",
        "--no-verdict",
    ]
    run("train", "star", *model, *files, *few, *out, *learn)
    (concept,) = load_concepts(tmp_path / "out" / "star.safetensors")
    assert concept.geometry == load(folder).geometry
    assert any(part.generator.any() for part in (concept.text, concept.image) if part is not None)
    run(
        "calibrate",
        "star",
        *model,
        *files,
        *few,
        *heads,
        "--out",
        str(tmp_path / "calibrated"),
        "--no-verdict",
        "--fit",
        "2",
    )
    said = ["--prompt", PROMPTS[0], "--steps", "2", "--concept", str(tmp_path / "out" / "star.safetensors")]
    run("generate", *model, *said, "--out", str(tmp_path / "pictures"))
    assert len(list((tmp_path / "pictures").rglob("*.png"))) >= 3


def test_an_unknown_class_is_named_with_what_is_supported(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "model")
    said = json.loads((copy / "model_index.json").read_text())
    (copy / "model_index.json").write_text(json.dumps(said | {"_class_name": "HiDreamImagePipeline"}))
    with pytest.raises(ValueError, match=r"got a 'HiDreamImagePipeline', expected one of FluxPipeline, Chroma.*ZImage"):
        load(copy)
