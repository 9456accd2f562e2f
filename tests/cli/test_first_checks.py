"""All that can be known of a command is told before a model is loaded; documented commands pass."""

from __future__ import annotations

import json
import math
import re
import shlex
import shutil
import subprocess
from dataclasses import replace

import pyarrow
import pytest
import torch
from pyarrow import parquet
from typer.testing import CliRunner

from saferope import cli
from saferope.commands import dry
from saferope_benchmark.suites.contenders import settings_for
from saferope_core import Geometry, load_concepts, save_concepts
from saferope_training import processes
from saferope_training.flux import folder as hub
from saferope_training.flux import loading, quantise
from saferope_training.making import checks, estimate, memory, pace
from saferope_training.making.recipe import CONFIG, PROMPT_FILE, STATISTICS, Recipe
from saferope_training.settings import HEADS, RECIPES, Settings, settings_of
from tests.cli.test_docs import PAGES, ROOT, commands
from tests.support import concepts as flat
from tests.training.test_loading import DEV_CONFIG

DEV, SCHNELL = "black-forest-labs/FLUX.1-dev", "black-forest-labs/FLUX.1-schnell"
GPU = 24 * memory.GIB
FLUX = Geometry(19, 38, 24, 128)
PICTURE = b"P6 1 1 255 abc"  # a PPM of one pixel: pictures are known by their contents
OUTLINE = loading.Outline(512, 32, 9 * memory.GIB, memory.GIB // 4, memory.GIB // 6)


class Loaded(Exception):
    """A model was asked for."""


@pytest.fixture
def at_rest(monkeypatch, tmp_path):
    """A function that runs a command in an empty folder, in which to ask for a model raises Loaded."""

    def load_model(*_):
        raise Loaded

    monkeypatch.setattr(loading, "load_model", load_model)
    monkeypatch.chdir(tmp_path)
    return lambda *words: CliRunner().invoke(cli.app, list(words))


WRONG = {
    "train Heart": "expected small letters, digits and hyphens",
    "train star --device cuda:99": "device 'cuda:99': got none here",
    "train star --device warp": "device 'warp': got none here",
    "train star --device meta": "device 'meta': got none here (a device without memory)",
    "calibrate star --device cuda:99": "name one with --device",
    "train star --learning-rate nan": "'learning_rate': got nan, expected finite numbers",
    "train star --strengths 1,inf": "'strengths': got (1.0, inf), expected finite numbers",
    "train star --learning-rate -1": "'learning_rate': got -1.0, expected at least 0",
    "train star --rank 1000": "got 1022 dimensions for text tokens, expected at most a head's 128; lower them",
    "train star --recipe papper": "--recipe: got 'papper', expected one of default, paper",
    "train star --seed -1": "'seed': got -1, expected a number from 0",
    "train star --resolution 500": "'resolution': got 500, expected a multiple of 16",
    "train star --similarity 2": "'similarity': got 2.0, expected a cosine",
    "train star --quantise nf5": "quantisation: got 'nf5', expected one of",
    "train star --quantise nf4": "got device 'cpu', expected a GPU",
    "train star --subjects pentagram": "'subjects': got ('pentagram',), expected none without --unsafe FILE",
    "train star --images pictures": "'images': got 'pictures', expected none without --benign FILE",
    "train star --similarity-model x": "'similarity_model': got 'x', expected none but with a preset",
    "train heart": "concept 'heart' is not in the tiny world",
    f"train heart --model {DEV}": "got no prompts for it, expected a file (--unsafe) or one of the presets",
    "train star --unsafe none.txt": "none.txt: got no such file or folder",
    f"train nudity --model {DEV} --unsafe-prompts 1000000": "got 1000000, expected at most",
}


@pytest.mark.parametrize("words", WRONG)
def test_mistakes_are_told_before_anything_starts(at_rest, words):
    result = at_rest(*shlex.split(words), "--out", "x")
    told = " ".join(result.output.split())
    assert result.exit_code == 2 and WRONG[words] in told, (told, result.exception)
    assert "transformer, frozen" not in told, "not even planned"
    dry = at_rest(*shlex.split(words), "--out", "x", "--dry-run")
    assert dry.exit_code == 2 and WRONG[words] in " ".join(dry.output.split()), dry.output


@pytest.mark.parametrize("what", ["train", "calibrate"])
def test_the_papers_recipe_leaves_given_options_alone(at_rest, monkeypatch, what):
    found = []
    monkeypatch.setattr(dry, "making", lambda settings, *_, **__: found.append(settings))
    for words in (
        [],
        ["--recipe", "default"],
        ["--recipe", "paper"],
        ["--recipe", "paper", "--rank", "7", "--gate", "fixed"],
    ):
        result = at_rest(what, "star", "--out", "x", "--dry-run", *words)
        assert result.exit_code == 0, (result.output, result.exception)
    plain, default, paper, wider = found
    own = {name: value for name, value in RECIPES["paper"].items() if name in settings_of(HEADS, what)}
    assert own.keys() > {"rank", "gate", "objective"}
    assert paper == replace(plain, **own) and wider == replace(plain, **own | {"rank": 7})
    assert plain == default != paper, "negative control"


def test_a_command_without_mistakes_asks_for_the_model(at_rest):
    assert isinstance(at_rest("train", "star", "--out", "x").exception, Loaded)


@pytest.mark.parametrize("kind, library", [("nf4", "bitsandbytes"), ("torchao-int8", "torchao")])
def test_missing_libraries_are_told_first(at_rest, monkeypatch, kind, library):
    monkeypatch.setattr(processes, "require_device", lambda name: None)
    asked = ["train", "star", "--out", "x", "--device", "cuda", "--quantise", kind]
    with monkeypatch.context() as patch:
        patch.setattr(quantise, "find_spec", lambda name: None if name == library else 1)
        told = at_rest(*asked)
    assert told.exit_code == 2 and f"pip install {library}" in told.output
    checks.require_settings(Settings(quantise=kind), "cuda")  # negative control: both are installed here


def test_every_number_of_the_settings_is_finite():
    for name, value in vars(Settings()).items():
        if isinstance(value, float):
            with pytest.raises(ValueError, match=f"'{name}': got nan, expected finite"):
                replace(Settings(), **{name: math.nan})


def test_no_command_replaces_what_a_training_rests_on(model, settings, tmp_path):
    few = replace(settings, unsafe_prompts=6, benign_prompts=6, steps=2)
    trained = Recipe(model, few, tmp_path).train()
    names = (PROMPT_FILE, STATISTICS, CONFIG, trained.name)
    before = {name: (tmp_path / name).read_bytes() for name in names}
    for other in (replace(few, benign_prompts=5), replace(few, timesteps=(1.0,)), replace(few, rank=2)):
        for stage in ("heads", "calibrate"):
            with pytest.raises(ValueError, match=r"than training had here \(.* was .* and is .*\), expected the same"):
                getattr(Recipe(model, other, tmp_path), stage)()
    Recipe(model, replace(few, acts_on="qk", fit=0), tmp_path).calibrate()
    assert {name: (tmp_path / name).read_bytes() for name in names} == before
    assert json.loads((tmp_path / "star.fixed.json").read_text())["settings"]["acts_on"] == "qk"
    Recipe(model, replace(few, benign_prompts=5), tmp_path).train()  # training itself may
    assert (tmp_path / PROMPT_FILE).read_bytes() != before[PROMPT_FILE], "negative control"


@pytest.fixture
def real(at_rest, monkeypatch, tmp_path):
    """FLUX.1's real sizes and a GPU of 24 GB, as `at_rest` sees them; the files that the pages name."""
    for name in ("captions_val2017.json", "captions.json"):
        images = [{"id": n, "file_name": f"{n}.jpg"} for n in range(1000)]
        captions = [{"image_id": n, "caption": f"a quiet street, number {n}"} for n in range(1000)]
        (tmp_path / name).write_text(json.dumps({"images": images, "annotations": captions}))
    pairs = [{"unsafe_prompt": f"a nude {n}", "safe_prompt": f"a robe {n}", "subcategory": "Nudity"} for n in range(20)]
    parquet.write_table(pyarrow.Table.from_pylist(pairs), tmp_path / "SafeSteer_train.parquet")
    for folder in ("val2017", "folder"):
        (tmp_path / folder).mkdir()
        for n in range(1000):
            (tmp_path / folder / f"{n}.jpg").write_bytes(PICTURE)
    config = {DEV: DEV_CONFIG, SCHNELL: {**DEV_CONFIG, "guidance_embeds": False}}
    monkeypatch.setattr(loading, "config_of", lambda name, encoders: config[name])
    monkeypatch.setattr(loading, "outline", lambda *_: OUTLINE)
    monkeypatch.setattr(processes, "require_device", lambda name: None)
    monkeypatch.setattr(memory, "available", lambda device: GPU)
    monkeypatch.setattr(estimate, "shape_of", lambda s: estimate.Shape(config[s.model], loading.outline()))
    monkeypatch.setattr(estimate, "free_of", lambda out: (64 * memory.GIB, 200 * memory.GIB))
    return at_rest


FLUX_COMMANDS = [
    words
    for page in PAGES
    for words in commands(page.read_text(encoding="utf-8"))
    if words[0] in ("train", "calibrate", "extract", "heads", "evaluate") and (DEV in words or SCHNELL in words)
]


@pytest.fixture
def of_flux(tmp_path):
    """Concept files of FLUX.1's geometry and prompts, where the pages' commands look for them."""
    (star,) = load_concepts(ROOT / "tinyworld" / "concepts" / "star.safetensors")
    concept = flat.changed(star, geometry=FLUX, discrimination=torch.zeros(FLUX.blocks, FLUX.heads))
    for words in FLUX_COMMANDS:
        if words[1].endswith(".safetensors"):
            (tmp_path / words[1]).parent.mkdir(parents=True, exist_ok=True)
            save_concepts(tmp_path / words[1], [concept])
    for name in ("unsafe.txt", "other_words.txt", "benign.txt"):
        (tmp_path / name).write_text("a red star\n")
    for name in ("i2p.csv", "i2p_benchmark.csv"):
        (tmp_path / name).write_text("prompt,sd_seed,nudity_percentage\na nude,7,10.0\n")
    (tmp_path / "judge.py").write_text("def shows(pictures):\n    return [0.0] * len(pictures)\n")


def files_in(folder):
    return {path: path.read_bytes() if path.is_file() else b"" for path in folder.rglob("*")}


@pytest.mark.usefixtures("of_flux")
@pytest.mark.parametrize("words", FLUX_COMMANDS, ids=lambda words: "_".join(words[:4]))
def test_commands_for_flux_pass_every_check_and_fit_their_card(real, monkeypatch, words, tmp_path):
    """The pages say 24 GB, and 40 GB for pictures in bf16."""
    before, small = files_in(tmp_path), "--quantise" in words
    monkeypatch.setattr(memory, "available", lambda device: GPU if small else 40 * memory.GIB)
    dry = real(*words, "--dry-run")
    assert dry.exit_code == 0 and files_in(tmp_path) == before, (dry.output, dry.exception)
    assert estimate.UNKNOWN in dry.output and "it fits on this machine now" in dry.output, dry.output
    monkeypatch.setattr(memory, "available", lambda device: GPU)
    assert small or "DOES NOT FIT: cuda" in real(*words, "--dry-run").output, "negative control"
    result = real(*words)
    assert isinstance(result.exception, Loaded), result.output
    assert "it may run out" not in result.output, result.output
    if words[0] == "train":
        whole = [word for word in words if word not in ("--quantise", "nf4")]
        assert "it may run out" in real(*whole).output, "negative control: in bf16 it does not fit"


def test_the_ablations_of_a_real_model_fit_a_card(real, monkeypatch):
    """Batches of 24 prompts at once kept hundreds of GiB."""
    from types import SimpleNamespace

    chosen = settings_for(SimpleNamespace(tiny=False, name=DEV), "nudity")
    plan = memory.plan_for(replace(chosen, quantise="nf4"), "cuda", training=True)
    assert plan.peak < GPU
    at_once = memory.plan_for(replace(chosen, quantise="nf4", passes_of=0, checkpointing=False), "cuda", training=True)
    assert at_once.peak > 5 * GPU, "negative control"


FIRST_HOUR = (ROOT / "docs" / "first-hour.md").read_text(encoding="utf-8")
FLUX_TOO = shlex.split(f"--model {DEV} --device cuda --quantise nf4 --checkpointing --passes-of 1")


@pytest.fixture
def first_hour(tmp_path):
    """The four files that the page's own shell writes, and a concept file to evaluate."""
    (script,) = re.findall(r"```bash\n(.*?)```", FIRST_HOUR, re.S)
    subprocess.run(["bash", "-euc", script], cwd=tmp_path, check=True)
    (tmp_path / "heart").mkdir()
    shutil.copy(ROOT / "tinyworld" / "concepts" / "star.safetensors", tmp_path / "heart" / "heart.safetensors")


@pytest.mark.usefixtures("first_hour")
@pytest.mark.parametrize("words", list(commands(FIRST_HOUR)), ids=lambda words: words[0])
def test_the_first_hour_passes_every_check_as_it_stands(at_rest, words):
    result = at_rest(*words)
    if words[0] == "prompts":
        assert result.exit_code == 0 and "prompts: heart/prompts.jsonl" in result.output, result.output
        wrong = [word.replace("hearts", "").replace("heart", "sun") if word == "heart" else word for word in words]
        assert at_rest(*wrong).exit_code == 2, "negative control: no prompt has a sun in it"
    else:
        assert isinstance(result.exception, Loaded), (result.output, result.exception)


@pytest.mark.usefixtures("first_hour")
@pytest.mark.parametrize("words", [words for words in commands(FIRST_HOUR) if words[0] in ("calibrate", "train")])
def test_the_first_hour_fits_a_card_with_what_it_says_to_add(real, words):
    result = real(*words, *FLUX_TOO)
    assert isinstance(result.exception, Loaded), (result.output, result.exception)
    assert "it may run out" not in result.output, result.output


def test_a_dry_run_fetches_nothing(at_rest, monkeypatch, tmp_path):
    """Of FLUX.1-dev the sizes are known before it is here; of others nothing is made up."""
    monkeypatch.setattr(hub, "fetch", lambda *_: pytest.fail("fetched"))
    monkeypatch.setattr(loading, "fetch", lambda *_: pytest.fail("fetched"))
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: None)
    words = ["train", "nudity", "--out", "x", "--checkpointing", "--passes-of", "1", "--dry-run", "--model"]
    known = at_rest(*words, DEV)
    assert known.exit_code == 0 and "31.42 GiB  to download" in known.output, known.output
    assert list(tmp_path.iterdir()) == []
    other = at_rest(*words, "someone/else")
    assert other.exit_code == 2 and "its sizes are not known; fetch it first" in " ".join(other.output.split())


@pytest.mark.parametrize(("pixels", "operations"), [(512, 21.47e12), (1024, 74.33e12)])
def test_a_dry_run_counts_the_least_time_of_named_cards(at_rest, monkeypatch, pixels, operations):
    """A forward pass of FLUX.1-dev is 57 x 2 (12 L h² + 2 L² h) operations, L = 512 + 1,024 or 4,096, h = 3,072."""
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: None)
    words = ["extract", "nudity", "--out", "x", "--dry-run", "--model", DEV, "--resolution", str(pixels)]
    passes, shape = 288 * 6, estimate._known(Settings(model=DEV, resolution=pixels), DEV)
    lines = dry.least_time([estimate.Work("extract", 288, 6)], shape)
    assert all(line in at_rest(*words).output for line in lines)
    assert f"4090 class: at least {pace.in_words(passes * operations / 165e12)}, counted" in lines
    assert "at least" not in at_rest("extract", "star", "--out", "x", "--dry-run").output, "negative control"


def test_a_dry_run_reads_every_picture(real, tmp_path):
    words = ["train", "nudity", "--out", "x", "--model", DEV, "--benign", "captions.json", "--images", "folder"]
    for path in (tmp_path / "folder").iterdir():
        path.write_bytes(b"")
    broken = real(*words, "--dry-run")
    assert broken.exit_code == 2 and ".jpg: cannot be read" in " ".join(broken.output.split()), broken.output


def test_what_is_known_of_flux_is_flux():
    shape = estimate._known(Settings(model=DEV), DEV)
    assert {name: shape.config[name] for name in DEV_CONFIG} == DEV_CONFIG
    assert abs(memory.transformer_bytes(shape.config, None, torch.bfloat16) / estimate.TRANSFORMER - 1) < 0.01


def test_time_is_told_from_measured_passes_alone(at_rest, tmp_path):
    words = ["train", "star", "--out", "x", "--no-verdict", "--preview-every", "0"]
    assert at_rest(*words, "--dry-run").output.count(estimate.UNKNOWN) == 3
    settings = Settings(concept="star")
    (tmp_path / "x").mkdir()
    taken = {"seconds": 0.6, **pace.measured_with(settings, "cpu")}
    (tmp_path / "x" / pace.FILE).write_text(json.dumps({"extract": taken}))
    told = at_rest(*words, "--dry-run").output
    assert f"extract: {pace.in_words(0.6 * 288)}, an estimate" in told
    # six passes of a prompt took 0.6 s; a step is 24 prompts, each worth four passes
    assert f"train: {pace.in_words(180 * 24 * 4 * 0.1)}, an estimate" in told and estimate.UNKNOWN not in told
    assert estimate.UNKNOWN in at_rest(*words, "--batch", "12", "--dry-run").output, "negative control"
    assert pace.in_words(61 * 60) == "1 h 01 min" and pace.in_words(59) == "59 s" and pace.in_words(121) == "3 min"


def test_passes_are_measured_and_products_are_no_larger_than_told(model, settings, tmp_path):
    few = replace(settings, unsafe_prompts=6, benign_prompts=6, steps=3, reservoir=8)
    recipe = Recipe(model, few, tmp_path)
    recipe.train()
    found = pace.seconds_of(tmp_path, few, "cpu")
    assert set(found) == {"extract", "latents", "train"} and all(taken > 0 for taken in found.values())
    assert pace.seconds_of(tmp_path, few, "cuda") == {}, "negative control: another device"
    side = model.latent_side // 2
    shape = estimate.Shape(dict(model.transformer.config), loading.Outline(model.text_length, side, 0, 0, 0))
    told = estimate.disk_of(estimate.Task(few, recipe.prompts(), "train"), shape)
    sizes = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    assert sizes[STATISTICS] == pytest.approx(told["statistics"], rel=0.05)
    assert sizes["latents.safetensors"] == pytest.approx(told["latents"], rel=0.05)
    both = sizes["heads.safetensors"] + sizes["star.safetensors"]
    assert told["heads and concept file"] * 0.9 < both < told["heads and concept file"] + 8192, "names, gates, and Δ"
    assert sizes["train_state.safetensors"] <= told["training's state, best state and previews"]


def test_commands_of_one_folder_share_their_prompts():
    """Those that name the same --out have the same settings of the first stages."""
    shared: dict[str, set] = {}
    for words in FLUX_COMMANDS:
        if words[0] in ("train", "calibrate", "heads"):
            out = words[words.index("--out") + 1]
            named = [re.sub("^--", "", word) for word in words]
            chosen = {name: words[named.index(name) + 1] for name in ("benign", "images") if name in named}
            shared.setdefault(out, set()).add(tuple(sorted(chosen.items())))
    assert shared and all(len(kinds) == 1 for kinds in shared.values()), shared
