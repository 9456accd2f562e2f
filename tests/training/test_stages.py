"""What makes a stage's products stale: every setting, every part of the model, every file that is read."""

from __future__ import annotations

import json
import random
import shutil
from dataclasses import fields, replace
from pathlib import Path

import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from saferope_core import Geometry
from saferope_training.flux.identity import facts, fingerprint, identity
from saferope_training.flux.loading import load_model
from saferope_training.making import extract, heads, material
from saferope_training.making.recipe import CRITICAL, LATENTS, STATISTICS, Recipe
from saferope_training.prompts import tiny_world_prompts, write_prompts
from saferope_training.settings import DECIDE_NOTHING, MODEL, Settings
from saferope_training.stages import RECORD, Workplace
from tinyworld import model as tiny

FEW = {"unsafe_prompts": 6, "benign_prompts": 8, "steps": 2, "batch": 2, "phase": 1, "reservoir": 256}
FEW |= {"unlearn_at": (1.0,), "timesteps": (1.0,)}
BEFORE_TRAIN = {"extract", "latents"}
STAGES = ("prompts", "extract", "heads", "latents", "train", "calibrate")
# A value for every setting that is another than in `base`; a new setting needs one too
CHANGED = {
    "concept": "zappy", "seed": 1, "subjects": ("red",), "similarity_model": "x", "similarity": 0.5, "images": "x",
    "unsafe_prompts": 5, "benign_prompts": 7, "timesteps": (1.0, 0.9), "reservoir": 128, "rank": 5, "padding_rank": 4,
    "words_rank": 4, "image_rank": 0, "reach": 7, "basis": "contrastive", "threshold": 0.6, "cut": 0.4, "gate": "fixed",
    "quantile": 0.9, "acts_on": "qk", "acts_on_image": "k", "angle": 2.0, "generator": "random", "blind": 0.25,
    "instead": ("ring",), "objective": "away", "strengths": (1.0, 1.5), "max_angle": 1.0, "blind_text": 0.2,
    "beyond": 1.0, "fit": 3, "relative_rank": 3, "relative_padding": 2, "harden": 1, "category": "x",
    "image_scale": 0.1, "steps": 3, "phase": 2, "batch": 3, "passes_of": 1, "checkpointing": True, "learning_rate": 0.1,
    "unlearn_at": (1.0, 0.9), "unlearn_scale": 2.0, "preserve_weight": 2.0, "text_init": 0.5, "image_init": 0.5,
    "regulariser": "flow", "sharing": "shared", "quantise": "torchao-int8", "resolution": 112,
}  # fmt: skip
# What the model that they load decides. The VAE comes with the encoders' folder, in which it is the same.
OF_THE_MODEL = {
    "model": {"extract", "heads", "latents", "train", "calibrate"},
    "quantise": {"extract", "heads", "latents", "train", "calibrate"},
    "encoders": {"extract", "latents", "train", "calibrate"},
    "resolution": {"extract", "latents", "train", "calibrate"},
}


def spoilt(source: Path, target: Path, part: str) -> Path:
    """A copy of a file or folder of weights with the first matrix of one file a little larger."""
    copy = shutil.copytree if source.is_dir() else shutil.copy
    file = Path(copy(source, target)) / part
    tensors = load_file(file)
    name = min(name for name, tensor in tensors.items() if tensor.ndim == 2)
    save_file(tensors | {name: tensors[name] * 1.01}, file, {"format": "pt"})
    return target


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The tiny world as a single file and a folder of encoders, and of each another one; prompts; other prompts."""
    root = tmp_path_factory.mktemp("files")
    tiny.load_pipeline().save_pretrained(root / "encoders")
    shutil.copy(tiny.WEIGHTS / "transformer" / "diffusion_pytorch_model.safetensors", root / "model.safetensors")
    spoilt(root / "model.safetensors", root / "model2.safetensors", "")
    spoilt(root / "encoders", root / "encoders2", "text_encoder_2/model.safetensors")
    for number, name in enumerate(("prompts.jsonl", "prompts2.jsonl")):
        write_prompts(root / name, tiny_world_prompts("star", unsafe=6, benign=8, seed=number))
    return root


@pytest.fixture(scope="module")
def base(files):
    named = {"model": "model.safetensors", "encoders": "encoders", "unsafe": "prompts.jsonl", "benign": "prompts.jsonl"}
    return Settings(**FEW, **{name: str(files / file) for name, file in named.items()}, resolution=96)


def loaded(settings: Settings):
    return load_model(settings.model, "cpu", settings.quantise, settings.encoders, settings.resolution)


@pytest.fixture(scope="module")
def finished(base, tmp_path_factory):
    out = tmp_path_factory.mktemp("finished") / "star"
    recipe = Recipe(loaded(base), base, out)
    recipe.train(), recipe.calibrate()
    return out


@pytest.fixture
def folder(finished, tmp_path):
    return Path(shutil.copytree(finished, tmp_path / "star"))


def again(settings: Settings, out: Path, capsys) -> dict[str, str]:
    """Trains in the folder; the stages that were made again, and why."""
    capsys.readouterr()
    Recipe(loaded(settings), settings, out).train()
    lines = [line.partition(": made again, since ") for line in capsys.readouterr().err.splitlines()]
    return {stage: reason for stage, found, reason in lines if found}


def test_another_resolution_in_the_same_folder(base, folder, capsys):
    """It kept the old statistics and ended in a RuntimeError of shapes."""
    assert again(base, folder, capsys) == {}, "control: the same command does nothing"
    told = again(replace(base, resolution=112), folder, capsys)
    assert told["extract"] == told["latents"] == "latent_side was 12 and is 14"
    assert list(told) == ["extract", "heads", "latents", "train"]
    record = json.loads((folder / RECORD).read_text())
    for stage in ("extract", "latents", "train"):
        assert record[stage]["made_from"]["weights"]["latent_side"] == 14


def test_other_encoders_in_the_same_folder(base, files, folder, capsys):
    told = again(replace(base, encoders=str(files / "encoders2")), folder, capsys)
    assert told["extract"] == told["latents"] == "encoders changed"
    assert list(told) == ["extract", "heads", "latents", "train"]


def inputs(settings: Settings, model, out: Path) -> dict[str, dict]:
    """What every stage would be made from, with the files that lie in the folder."""
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Workplace, "changes", lambda *_: None)
        patch.setattr(Workplace, "stage", lambda place, name, sources, _products, _make, facts=None, **_: found.update(
            {name: place.inputs(name, sources, facts)}
        ))  # fmt: skip
        recipe = Recipe(model, settings, out)
        recipe.train(), recipe.calibrate()
    return found


@pytest.fixture(scope="module")
def walk(base, files, finished):
    """A function: the stages that a setting decides by itself, not by what another stage makes of it."""
    model = loaded(base)
    before = inputs(base, model, finished)
    assert tuple(before) == STAGES
    others = {"model": "model2.safetensors", "encoders": "encoders2"}
    others |= {"unsafe": "prompts2.jsonl", "benign": "prompts2.jsonl"}

    def decided(name: str) -> set[str]:
        other = str(files / others[name]) if name in others else CHANGED[name]
        needs = {"sharing": {"image_rank": 0}, "gate": {"relative_rank": 0}, "similarity_model": {"unsafe": None}}.get(
            name, {}
        )
        first = inputs(replace(base, **needs), model, finished) if needs else before
        settings = replace(base, **{name: other}, **needs)
        now = inputs(settings, loaded(settings) if name in OF_THE_MODEL else model, finished)
        return {stage for stage in STAGES if now[stage] != first[stage]}

    return decided


@pytest.mark.parametrize("entry", fields(Settings), ids=lambda entry: entry.name)
def test_every_setting_decides_its_stages_or_is_named_as_one_that_decides_nothing(walk, entry):
    stages = entry.metadata["stages"]
    expected = (
        OF_THE_MODEL[entry.name] if MODEL in stages else set(stages) & set(STAGES)
    )  # harden: how many more rounds
    assert walk(entry.name) == (set() if entry.name in DECIDE_NOTHING else expected)


def test_settings_that_decide_nothing_are_those_of_time_and_memory():
    assert DECIDE_NOTHING == ("passes_of", "checkpointing")


class Watched(Settings):
    """Settings that note which of them are read."""

    read: set[str] | None = None

    def __getattribute__(self, name: str):
        if Watched.read is not None and not name.startswith("_"):
            Watched.read.add(name)
        return super().__getattribute__(name)


@pytest.fixture
def watched(monkeypatch):
    """Stage -> the settings that were read while its products were made."""
    read, stage = {}, Workplace.stage

    def noting(place, name, sources, products, make, facts=None, goes_on=False):
        def noted(report):
            Watched.read = read.setdefault(name, set())
            try:
                make(report)
            finally:
                Watched.read = None

        stage(place, name, sources, products, noted, facts, goes_on)

    monkeypatch.setattr(Workplace, "stage", noting)
    return read


# Read by name, and an input by what is found under it: a preset's prompts (`origins`); besides, whether a file's
# description says "of the tiny world"
BY_NAME = {"prompts": {"model"}, "train": {"model"}, "calibrate": {"model"}}


def test_no_stage_reads_a_setting_that_is_none_of_its_inputs(model, settings, watched, tmp_path):
    """Watched while every stage runs in all forms: `threshold` was read by two stages that did not depend on it."""
    plain = {entry.name: getattr(settings, entry.name) for entry in fields(Settings)}
    plain |= {"unsafe_prompts": 6, "benign_prompts": 6, "steps": 2, "phase": 1}
    plain |= {"fit": 1}
    forms = ({}, {"sharing": "shared", "image_rank": 0}, {"regulariser": "flow"}, {"generator": "random"}, {"fit": 0})
    for number, form in enumerate((*forms, {"objective": "away"}, {"gate": "calibrated"}, {"basis": "contrastive"})):
        recipe = Recipe(model, Watched(**plain | form), tmp_path / str(number))
        recipe.train(), recipe.calibrate()
    Recipe(None, Watched(**plain | {"concept": "gore", "model": "x"}), tmp_path / "preset").prompts()
    decide = {stage: {e.name for e in fields(Settings) if stage in e.metadata["stages"]} for stage in STAGES}
    names = {entry.name for entry in fields(Settings)}
    assert {stage: (read & names) - decide[stage] - BY_NAME.get(stage, set()) for stage, read in watched.items()} == {
        stage: set() for stage in STAGES
    }
    assert "threshold" in watched["train"] and "angle" in watched["calibrate"], "control: reading is noted"


def test_training_that_ran_out_of_memory_goes_on_with_less(model, settings, tmp_path):
    settings, steps = replace(settings, unsafe_prompts=6, benign_prompts=6, steps=4), []

    def full(entry: dict) -> None:
        if entry["step"] == 2:
            raise MemoryError

    with pytest.raises(MemoryError):
        Recipe(model, settings, tmp_path).train(full)
    less = replace(settings, passes_of=1, checkpointing=True)
    Recipe(model, less, tmp_path).train(lambda entry: steps.append(entry["step"]))
    assert steps == [2, 3]


def test_pictures_are_inputs_of_the_latents(base, tmp_path, capsys):
    records = tiny_world_prompts("star", unsafe=6, benign=8, seed=0)
    pixels = random.Random(0)
    for number in range(8):
        Image.frombytes("RGB", (16, 16), pixels.randbytes(768)).save(tmp_path / f"{number}.png")
    pictures = [None] * 6 + [str(tmp_path / f"{number}.png") for number in range(8)]
    records = [replace(r, scene=None, image=picture) for r, picture in zip(records, pictures, strict=True)]
    write_prompts(tmp_path / "p.jsonl", records)
    settings = replace(base, unsafe=str(tmp_path / "p.jsonl"), benign=str(tmp_path / "p.jsonl"))
    assert again(settings, tmp_path / "out", capsys) == {}
    shutil.copy(tmp_path / "1.png", tmp_path / "0.png")
    told = again(settings, tmp_path / "out", capsys)
    assert told == {"latents": "pictures changed", "train": "latents.safetensors changed"}
    (tmp_path / "0.png").unlink()
    with pytest.raises(ValueError, match=r"0\.png: cannot be read"):
        again(settings, tmp_path / "out", capsys)


def test_a_preset_is_an_input_of_its_prompts(tmp_path, capsys, monkeypatch):
    """As another version of the package has it."""
    settings, presets = Settings(concept="gore", model="x", **FEW), tmp_path / "presets"
    Recipe(None, settings, tmp_path / "out").prompts()
    from saferope_core import presets as shipped

    shutil.copytree(shipped.FOLDER, presets)
    text = (presets / "gore.json").read_text()
    first = json.loads(text)["modifiers"][0]
    (presets / "gore.json").write_text(text.replace(json.dumps(first), json.dumps(f"{first} indeed")))
    monkeypatch.setattr(shipped, "FOLDER", presets)
    capsys.readouterr()
    Recipe(None, settings, tmp_path / "out").prompts()
    assert "prompts: made again, since gore changed" in capsys.readouterr().err
    (tmp_path / "out" / RECORD).write_text(json.dumps({"prompts": {"inputs": "0" * 64}}))
    for again in (True, False):
        Recipe(None, settings, tmp_path / "out").prompts()
        assert ("prompts: made again, since an earlier version" in capsys.readouterr().err) is again


def test_pictures_and_fits_know_the_encoders_and_the_resolution(base, files, model):
    """Of a folder or file; keys of the embedded model stay as they were."""
    others = [
        {},
        {"encoders": str(files / "encoders2")},
        {"resolution": 112},
        {"model": str(files / "model2.safetensors")},
    ]
    found = [identity(loaded(replace(base, **other))) for other in others]
    assert len(set(found)) == 4 and identity(loaded(base)) == found[0]
    assert identity(model) == fingerprint(model.transformer)


def test_using_a_model_changes_none_of_its_facts(model, settings, tmp_path):
    """A tokenizer keeps how it was last called."""
    before = facts(model)
    Recipe(model, replace(settings, unsafe_prompts=6, benign_prompts=6, steps=1), tmp_path).train()
    assert facts(model) == before
    model.pipe.tokenizer_2.add_tokens(["moon"])
    assert facts(model)["encoders"] != before["encoders"], "control: another word is seen"


@pytest.mark.parametrize("product", [STATISTICS, CRITICAL, LATENTS])
def test_products_that_do_not_fit_the_model_are_told(finished, base, product):
    """No stage hands on such a one; a caller from Python may."""
    model, records = loaded(base), tiny_world_prompts("star", unsafe=6, benign=8, seed=0)
    right, wrong = model.geometry, Geometry(2, 4, 4, 64)
    read = {
        STATISTICS: lambda fits: extract.load_statistics(finished / product, right if fits else wrong),
        CRITICAL: lambda fits: heads.load_critical(finished / product, right if fits else wrong),
        LATENTS: lambda fits: material.load_material(
            model if fits else replace(model, latent_side=14), records, (1.0,), finished / product
        ),
    }[product]
    read(True)
    with pytest.raises(ValueError, match=rf"{product}: got .*, expected .*; delete it, and it is made again"):
        read(False)
