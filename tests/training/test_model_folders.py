"""A stranger's model folder runs no code of its own and has nothing unpickled, whatever version of diffusers reads it.

Every attack has a control: the same file, loaded plainly, does what it was made for.
"""

from __future__ import annotations

import ast
import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import FluxPipeline
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file

from dev.comfyui import ROOT
from saferope_benchmark.scores import Absent
from saferope_benchmark.scores.clip import clip_score
from saferope_benchmark.scores.distance import lpips_distance
from saferope_benchmark.scores.kid import inception
from saferope_benchmark.scores.vqa import vqa_score
from saferope_training.flux import folder as folders
from saferope_training.flux.loading import config_of, load_model
from saferope_training.flux.models import encode
from saferope_training.prompts.similarity import similarities
from tinyworld import model as tiny

WEIGHTS = tiny.WEIGHTS / "transformer" / "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """The tiny world as a diffusers folder."""
    path = tmp_path_factory.mktemp("good") / "model"
    tiny.load_pipeline().save_pretrained(path)
    return path


@pytest.fixture
def folder(good, tmp_path):
    """A copy to spoil; its weights are the same files, never to be written to."""

    def copy(source: str, target: str) -> None:
        (os.link if source.endswith(".safetensors") else shutil.copy)(source, target)

    return shutil.copytree(good, tmp_path / "model", copy_function=copy)


def change(path: Path, **entries) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))


def refused(name: Path, part: str = "vae") -> str:
    """What is said where the folder is a model, asked for its size, or the rest of one, unless its transformer is
    spoilt.
    """
    said = set()
    attempts = [lambda: load_model(str(name), resolution=96), lambda: config_of(str(name))]
    if part != "transformer":
        attempts.append(lambda: load_model(str(WEIGHTS), encoders=str(name), resolution=96))
    for attempt in attempts:
        with pytest.raises(ValueError) as error:
            attempt()
        said.add(str(error.value))
    (text,) = said
    assert text.isprintable() and len(text) < 600, text
    return text


def leaves(mark: Path) -> str:
    """A module that shows that it ran."""
    return (
        f"from pathlib import Path\nPath({str(mark)!r}).touch()\nfrom tinyworld.model import AutoencoderDCT as Evil\n"
    )


def test_a_folder_s_own_module_is_never_run(folder, tmp_path):
    mark = tmp_path / "ran"
    (folder / "vae" / "evil.py").write_text(leaves(mark))
    change(folder / "model_index.json", vae=["evil", "Evil"])
    assert "names ['evil', 'Evil'] as its 'vae', expected diffusers.AutoencoderKL" in refused(folder)
    assert not mark.exists()
    FluxPipeline.from_pretrained(folder, trust_remote_code=True)
    assert mark.exists(), "control: diffusers runs it where it may, and up to 0.37 in any case"


def test_an_installed_module_is_not_imported_because_a_folder_names_it(folder, tmp_path, monkeypatch):
    mark = tmp_path / "ran"
    (tmp_path / "saferope_evil.py").write_text(leaves(mark))
    monkeypatch.syspath_prepend(tmp_path)
    change(folder / "model_index.json", vae=["saferope_evil", "Evil"])
    assert "saferope_evil" in refused(folder) and not mark.exists()
    __import__("saferope_evil")
    assert mark.exists(), "control: it lay there to be imported"


def test_a_pipeline_of_its_own_is_never_run(folder, tmp_path):
    mark = tmp_path / "ran"
    (folder / "pipeline.py").write_text(leaves(mark) + "from diffusers import FluxPipeline as Mine\n")
    change(folder / "model_index.json", _class_name=["pipeline", "Mine"])
    assert "got a ['pipeline', 'Mine'], expected one of FluxPipeline, Chroma" in refused(folder) and not mark.exists()
    FluxPipeline.from_pretrained(folder, custom_pipeline=str(folder), trust_remote_code=True)
    assert mark.exists(), "control"


@pytest.mark.parametrize(
    "entry",
    [
        {"vae": ["diffusers", "AutoencoderTiny"]},
        {"vae": ["diffusers.pipelines", "AutoencoderKL"]},
        {"vae": ["transformers", "AutoencoderKL"]},
        {"vae": [None, None]},
        {"vae": "AutoencoderKL"},
        {"vae": [["diffusers"], "AutoencoderKL"]},
        {"vae": ["diffusers", "AutoencoderKL", "more"]},
        {"text_encoder": ["transformers", "AutoModel"]},
        {"tokenizer": ["transformers", "T5Tokenizer"]},
        {"scheduler": ["os", "system"]},
        {"more": ["os", "system"]},
        {"vae": ["diff\x1b[31musers", "AutoencoderKL"]},
        {"_class_name": "Flux\x1b[31mPipeline\n"},
        {"_class_name": None},
    ],
    ids=str,
)
def test_parts_that_the_table_does_not_know(folder, entry):
    change(folder / "model_index.json", **entry)
    (folder / "more").mkdir(exist_ok=True)
    assert "expected" in refused(folder)


@pytest.mark.parametrize("content", ["[]", "{", "[" * 100_000])
def test_an_index_that_is_none(folder, content):
    (folder / "model_index.json").write_text(content)
    assert "model_index.json is not readable JSON" in refused(folder)


@pytest.mark.parametrize(
    "file, entries",
    [
        ("tokenizer/tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["evil.Evil", None]}}),
        ("text_encoder_2/config.json", {"auto_map": {"AutoModel": "evil.Evil"}}),
        ("text_encoder/config.json", {"attn_implementation": "somebody/kernel"}),
        ("text_encoder/config.json", {"text_config": {"_attn_implementation": {"": "somebody/kernel"}}}),
        ("text_encoder_2/config.json", {"experts_implementation": "somebody/kernel"}),
        ("text_encoder/config.json", {"transformers_weights": "adapter_model.bin"}),
        ("text_encoder/config.json", {"quantization_config": {"quant_method": "torchao"}}),
        ("vae/config.json", {"quantization_config": {"quant_method": "nunchaku_lite"}}),
        ("vae/config.json", {"quantization_config": {"quant_method": "sdnq", "load_in_4bit": True}}),
    ],
    ids=str,
)
def test_configs_that_lead_to_code(folder, file, entries):
    change(folder / file, **entries)
    assert f"{file}: got " in refused(folder)


def test_what_is_harmless_is_let_through(folder):
    """Negative control of all refusals above."""
    change(
        folder / "model_index.json", image_encoder=["transformers", "CLIPVisionModelWithProjection"], extra=[None, None]
    )
    change(folder / "text_encoder/config.json", auto_map=None, attn_implementation="sdpa", quantization_config=None)
    change(folder / "tokenizer/tokenizer_config.json", name_or_path="somebody/kernel")
    (folder / "vae" / "evil.py").write_text("raise AssertionError")
    folders.require_parts(folder, "folder")
    encode(load_model(str(folder), resolution=96), ["a red star"])
    change(folder / "transformer/config.json", quantization_config={"quant_method": "bitsandbytes"})
    folders.require_parts(folder, "folder")


def test_a_folder_of_encoders_needs_no_transformer(folder):
    shutil.rmtree(folder / "transformer")
    change(folder / "model_index.json", transformer=[None, None])
    load_model(str(WEIGHTS), encoders=str(folder), resolution=96)
    with pytest.raises(ValueError, match=r"names \[None, None\] as its 'transformer'"):
        load_model(str(folder), resolution=96)


class Harm:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return (Path.touch, (self.mark,))


@pytest.fixture
def harm(tmp_path):
    """A pickle, and the file that it makes when it is read."""
    mark, file = tmp_path / "unpickled", tmp_path / "harm.bin"
    file.write_bytes(pickle.dumps(Harm(mark)))
    pickle.loads(file.read_bytes())
    assert mark.exists(), "control: reading it does harm"
    mark.unlink()
    return file, mark


@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder", "text_encoder_2"])
def test_pickles_in_the_place_of_weights_are_not_read(folder, harm, part):
    file, mark = harm
    (weights,) = (folder / part).glob("*.safetensors")
    name = "diffusion_pytorch_model.bin" if weights.name.startswith("diffusion") else "pytorch_model.bin"
    shutil.copy(file, folder / part / name)
    weights.unlink()
    with pytest.raises((ValueError, OSError), match="safetensors"):
        encode(load_model(str(folder), resolution=96), ["a red star"])
    assert not mark.exists()


@pytest.mark.parametrize("shard", ["harm.bin", "../harm.safetensors", "/harm.safetensors", 1, None])
@pytest.mark.parametrize("part", ["transformer", "text_encoder"])
def test_an_index_of_shards_names_safetensors_beside_it(folder, harm, part, shard):
    file, mark = harm
    (weights,) = (folder / part).glob("*.safetensors")
    index = {"metadata": {}, "weight_map": {key: shard for key in load_file(weights)}}
    weights.with_name(f"{weights.name}.index.json").write_text(json.dumps(index))
    weights.unlink()
    shutil.copy(file, folder / part / "harm.bin")
    assert "expected a .safetensors file beside it" in refused(folder, part)
    assert not mark.exists()


def test_an_adapter_is_not_followed(folder):
    (folder / "text_encoder" / "adapter_config.json").write_text('{"base_model_name_or_path": "somebody/else"}')
    assert "got an adapter" in refused(folder)


@pytest.mark.parametrize("part", ["transformer", "text_encoder_2"])
def test_scaled_weights_in_a_folder_are_refused(folder, part):
    """diffusers and transformers warn of names they do not know, and go on with weights of another size."""
    (weights,) = (folder / part).glob("*.safetensors")
    values = load_file(weights)
    first = next(key for key, value in values.items() if value.ndim == 2)
    weights.unlink()
    save_file({**values, first.replace(".weight", ".weight_scale"): torch.ones(1)}, weights, {"format": "pt"})
    assert "got scaled weights" in refused(folder, part)


@pytest.fixture
def cached(monkeypatch, tmp_path):
    """Puts a folder into the hub's cache, which is all there is of the hub."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))

    def put(path: Path) -> str:
        home = tmp_path / "cache" / "models--nobody--tiny"
        shutil.copytree(path, home / "snapshots" / "0123", dirs_exist_ok=True)
        (home / "refs").mkdir(exist_ok=True)
        (home / "refs" / "main").write_text("0123")
        return "nobody/tiny"

    return put


def test_hub_ids_are_folders_of_the_cache_and_checked_alike(cached, good, folder):
    name = cached(good)
    assert config_of(name) == config_of(str(good))
    assert load_model(name, resolution=96).geometry == load_model(str(good), resolution=96).geometry
    change(folder / "model_index.json", vae=["evil", "Evil"])
    with pytest.raises(ValueError, match=r"'nobody/tiny': model_index\.json names"):
        load_model(cached(folder), resolution=96)


def test_neither_code_nor_pickles_are_fetched():
    there = ["model_index.json", "pipeline.py", "flux1-dev.safetensors", "vae/config.json", "vae/evil.py"]
    there += ["vae/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.fp16.safetensors", "vae/a.bin"]
    there += ["tokenizer/merges.txt", "tokenizer_2/spiece.model", "transformer/config.json", "evil/config.json"]
    kept = set(filter_repo_objects(there, **folders.patterns(transformer=True)))
    assert kept == {"model_index.json", "vae/config.json", "vae/diffusion_pytorch_model.safetensors"} | set(
        there[-4:-1]
    )
    assert kept - set(filter_repo_objects(there, **folders.patterns(transformer=False))) == {"transformer/config.json"}


@pytest.mark.parametrize("score, auto", [(clip_score, "AutoTokenizer"), (vqa_score, "AutoConfig")])
def test_models_of_metrics_run_no_code_of_their_own(tmp_path, score, auto):
    import transformers

    mark = tmp_path / "ran"
    lines = (
        "from transformers import PreTrainedConfig, PreTrainedTokenizerFast\nclass Evil(PreTrainedConfig):\n    pass\n"
    )
    (tmp_path / "evil.py").write_text(f"from pathlib import Path\nPath({str(mark)!r}).touch()\n{lines}")
    named = {"auto_map": {"AutoConfig": "evil.Evil", "AutoTokenizer": ["evil.Evil", None]}, "model_type": "evil"}
    for file in ("config.json", "tokenizer_config.json"):
        (tmp_path / file).write_text(json.dumps(named))
    found = score(str(tmp_path))
    assert isinstance(found, Absent) and "auto_map" in found.why and not mark.exists()
    try:
        getattr(transformers, auto).from_pretrained(tmp_path, trust_remote_code=True)
    except (AttributeError, OSError, TypeError, ValueError):
        pass  # a config is no tokenizer; but it ran
    assert mark.exists(), "control"


def test_a_sentence_encoder_runs_no_code_of_its_own(tmp_path):
    from sentence_transformers import SentenceTransformer

    mark = tmp_path / "ran"
    (tmp_path / "evil.py").write_text(f"from pathlib import Path\nPath({str(mark)!r}).touch()\nclass Evil: pass\n")
    (tmp_path / "modules.json").write_text(json.dumps([{"idx": 0, "name": "0", "path": "", "type": "evil.Evil"}]))
    with pytest.raises(ValueError, match=r"evil\.Evil"):
        similarities(["a"], ["b"], str(tmp_path))
    assert not mark.exists()
    with pytest.raises(AttributeError):
        SentenceTransformer(str(tmp_path), device="cpu", trust_remote_code=True)
    assert mark.exists(), "control"


@pytest.mark.parametrize("metric", [lpips_distance, inception])
def test_weights_of_metrics_are_tensors_alone(harm, metric):
    file, mark = harm
    found = metric(file)
    assert isinstance(found, Absent) and "no state dict of tensors" in found.why and not mark.exists()


def careless(source: str) -> list[str]:
    """Calls that would run a stranger's code or read its pickles, if a stranger's name reached them."""
    found = []
    for call in (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)):
        name, choices = ast.unparse(call.func), {k.arg: ast.unparse(k.value) for k in call.keywords}
        owner, _, method = name.rpartition(".")
        if method in ("from_pretrained", "download") and owner.split(".")[-1].endswith("Pipeline"):
            found.append(name)  # reads model_index.json by itself
        elif (method == "from_pretrained" and owner.startswith("Auto")) or name == "SentenceTransformer":
            found += [name] if choices.get("trust_remote_code") != "False" else []
        if method == "from_pretrained" and "Model" in owner and choices.get("use_safetensors") != "True":
            found.append(name)
    return found


def test_no_call_of_the_trainer_is_careless():
    files = [
        file for room in ("saferope", "saferope_benchmark", "saferope_training") for file in (ROOT / room).rglob("*.py")
    ]
    found = {file.name: careless(file.read_text(encoding="utf-8")) for file in files}
    assert len(files) > 50 and {name: calls for name, calls in found.items() if calls} == {}
    for line in (
        "FluxPipeline.from_pretrained(x)",
        "diffusers.FluxPipeline.download(x)",
        "AutoProcessor.from_pretrained(x)",
        "AutoTokenizer.from_pretrained(x, trust_remote_code=yes)",
        "SentenceTransformer(x)",
        "CLIPModel.from_pretrained(x)",
    ):
        assert careless(line) == [line.partition("(")[0]], "negative control"
