"""A pipeline as a folder: found here or fetched, and checked before use. It may be a stranger's.

A folder can name code in several places:

- `model_index.json` names a module for each part. diffusers imports it, up to 0.37 even from the folder itself.
- The parts' own JSON files may name Python files, attention kernels of the hub, other weights or quantisers.
- An index of shards may name pickles.

So this file has a table of classes for each part, and loads the part by its class alone.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

from .scaled import is_scale

INDEX, PIPELINE, TRANSFORMER = "model_index.json", "FluxPipeline", "FluxTransformer2DModel"
Parts = dict[str, dict[tuple[str, str], str]]  # part -> (library, class) in the index -> the class that loads it
TOKENIZERS = {  # transformers 5 writes TokenizersBackend, which 4 calls PreTrainedTokenizerFast
    ("transformers", "PreTrainedTokenizerFast"): "PreTrainedTokenizerFast",
    ("transformers", "TokenizersBackend"): "PreTrainedTokenizerFast",
}
_CODEC = ("tinyworld.model", "AutoencoderDCT")


def _parts(transformer: str, vae: str, encoders: tuple[str, ...], words: tuple[str, ...]) -> Parts:
    """The table of a pipeline: classes of its parts, and of each encoder and its tokenizer ("CLIP", ...)."""
    found: Parts = {
        "scheduler": _named("diffusers", "FlowMatchEulerDiscreteScheduler"),
        "vae": {**_named("diffusers", vae), _CODEC: _CODEC[1]},
    }
    for number, encoder in enumerate(encoders):
        found[f"text_encoder{_nth(number)}"] = _named("transformers", encoder)
    for number, kind in enumerate(words):
        names = _named("transformers", f"{kind}Tokenizer", f"{kind}TokenizerFast")
        found[f"tokenizer{_nth(number)}"] = {**names, **TOKENIZERS}
    return {**found, "transformer": _named("diffusers", transformer)}


def _named(library: str, *classes: str) -> dict[tuple[str, str], str]:
    return {(library, name): name for name in classes}


def _nth(number: int) -> str:
    return f"_{number + 1}" if number else ""


# model_index.json's class -> its parts, as diffusers 0.42.1's pipelines save them
KINDS: dict[str, Parts] = {
    PIPELINE: _parts(TRANSFORMER, "AutoencoderKL", ("CLIPTextModel", "T5EncoderModel"), ("CLIP", "T5")),
    "ChromaPipeline": _parts("ChromaTransformer2DModel", "AutoencoderKL", ("T5EncoderModel",), ("T5",)),
    "Flux2KleinPipeline": _parts("Flux2Transformer2DModel", "AutoencoderKLFlux2", ("Qwen3ForCausalLM",), ("Qwen2",)),
    "Flux2Pipeline": {
        **_parts("Flux2Transformer2DModel", "AutoencoderKLFlux2", ("Mistral3ForConditionalGeneration",), ()),
        "tokenizer": _named("transformers", "PixtralProcessor"),
    },
    "OvisImagePipeline": _parts("OvisImageTransformer2DModel", "AutoencoderKL", ("Qwen3Model",), ("Qwen2",)),
    "QwenImagePipeline": _parts(
        "QwenImageTransformer2DModel", "AutoencoderKLQwenImage", ("Qwen2_5_VLForConditionalGeneration",), ("Qwen2",)
    ),
    "Krea2Pipeline": _parts("Krea2Transformer2DModel", "AutoencoderKLQwenImage", ("Qwen3VLModel",), ("Qwen2",)),
    "ZImagePipeline": _parts("ZImageTransformer2DModel", "AutoencoderKL", ("Qwen3Model",), ("Qwen2",)),
}
# Other entries of an index; Krea 2 names the encoder's layers that are read
DISTILLED, LAYERS = "is_distilled", "text_encoder_select_layers"
NOT_LOADED = ("image_encoder", "feature_extractor")  # IP-Adapters need them, text-to-image does not
_FETCHED = ("*.json", "*.safetensors", "*.txt", "*.model")  # of a part: neither code nor pickles
_VARIANTS = ["*.fp16*", "*.bf16*"]  # copies of the same weights, which nothing here loads
_NO_CONFIG = ("tokenizer.json", "vocab.json")  # words and merges: large, and read by tokenizers alone
# The one quantiser that needs no other code than its package: others fetch kernels, or import code that a folder names
_BITSANDBYTES = ("bitsandbytes", "bitsandbytes_4bit", "bitsandbytes_8bit")


def require_parts(folder: Path, name: str, transformer: bool = True) -> None:
    """ValueError unless every part is there, of a known class, in safetensors, and names no code.

    `transformer`: the transformer is wanted too. Reads JSON and headers of weights; imports and loads nothing.
    """
    for part in _require_index(folder, name, transformer):
        if not (folder / part).is_dir():
            raise ValueError(f"model {name!r}: got no folder {part!r} in it, expected one; fetch the whole model")
        _require_part(folder / part, name)


def load_part(folder: Path, part: str, **choices: Any) -> Any:
    """One part of a folder that `require_parts` found good, by the class that the table has for it."""
    index = read_json(folder / INDEX, str(folder))
    said = index[part]
    kind = getattr(import_module(said[0]), KINDS[index["_class_name"]][part][tuple(said)])
    return kind.from_pretrained(folder, subfolder=part, **choices)


def kind_of(folder: Path) -> str:
    """The pipeline's class, as the index of a folder that `require_parts` found good names it: one of KINDS."""
    return str(read_json(folder / INDEX, str(folder))["_class_name"])


def transformer_of(kind: str) -> str:
    """The class of a pipeline's transformer."""
    (name,) = KINDS[kind]["transformer"].values()
    return name


def parts_of(folder: Path, *beginnings: str) -> list[str]:
    """A good folder's parts whose names have one of these beginnings, in the table's order."""
    return [part for part in KINDS[kind_of(folder)] if part.startswith(beginnings)]


def paints_tiny_world(folder: Path) -> bool:
    """Whether it is a folder here whose autoencoder is the tiny world's."""
    return (folder / INDEX).is_file() and told(folder, "vae") == list(_CODEC)


def told(folder: Path, name: str) -> Any:
    """The index's value for a name, such as DISTILLED or LAYERS; None where it has none."""
    return read_json(folder / INDEX, str(folder)).get(name)


def fetch(name: str, transformer: bool) -> Path:
    """The hub's copy of a pipeline in its cache, fetched unless there. Neither code nor pickles are fetched.

    OSError, one line, where it cannot be had; ValueError where the index names unknown classes.
    """
    from huggingface_hub import hf_hub_download, snapshot_download

    try:
        index = hf_hub_download(name, INDEX)
        wanted = patterns(transformer, _require_index(Path(index).parent, name, transformer))
        return Path(
            snapshot_download(name, allow_patterns=wanted["allow_patterns"], ignore_patterns=wanted["ignore_patterns"])
        )
    except OSError as error:
        raise OSError(
            f"model {name!r}: got no such folder here, nothing in the hub's cache, and the hub did not give it "
            f"({first_line(error)}); go online, check the id, log in with `hf auth login` and accept its licence, or "
            "name a folder"
        ) from error


def patterns(transformer: bool, parts: Iterable[str] = KINDS[PIPELINE]) -> dict[str, list[str]]:
    """Patterns for huggingface_hub: files of a repository to fetch, and exceptions among them."""
    wanted = [INDEX, *(f"{part}/{ending}" for part in _wanted(parts, transformer) for ending in _FETCHED)]
    return {"allow_patterns": wanted, "ignore_patterns": _VARIANTS}


def require_no_code(config: object, where: str) -> None:
    """ValueError where a library's JSON names code, or something that leads to code, at any depth.

    Attention kernels of the hub are programs, and weights under another name may be pickles.
    """
    for key, value in _entries(config):
        if key == "auto_map" and value:
            raise _names_code(where, key, value, "no Python files of its own")
        if key.endswith("_implementation") and any("/" in name for name in _strings(value)):
            raise _names_code(where, key, value, "eager or sdpa")
        if key == "transformers_weights" and value:
            raise _names_code(where, key, value, "weights under their usual names")


def read_json(path: Path, name: str) -> dict:
    """A JSON object. ValueError, one line, where it is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"model {name!r}: {path.name} is not readable JSON ({error}); fetch it again") from error
    if not isinstance(found, dict):
        raise ValueError(f"model {name!r}: {path.name} is not readable JSON (no object); fetch it again")
    return found


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _wanted(parts: Iterable[str], transformer: bool) -> list[str]:
    return [part for part in parts if transformer or part != "transformer"]


def _require_index(folder: Path, name: str, transformer: bool) -> list[str]:
    """The names of the wanted parts. ValueError for an index with an unknown class."""
    index = read_json(folder / INDEX, name)
    kind = index.get("_class_name")
    if not isinstance(kind, str) or kind not in KINDS:
        raise ValueError(
            f"model {name!r}: got a {kind!r:.80}, expected one of {', '.join(KINDS)}; name a model of these"
        )
    parts = KINDS[kind]
    wanted = _wanted(parts, transformer)
    others = {part for part, value in index.items() if isinstance(value, list) and value != [None, None]}
    if _layers(index.get(LAYERS)):
        others.discard(LAYERS)
    for part in sorted({*wanted, *others} - {*NOT_LOADED, *(parts.keys() - wanted)}):
        value, known = index.get(part), parts.get(part, {})
        if not (isinstance(value, list) and all(isinstance(each, str) for each in value) and tuple(value) in known):
            classes = " or ".join(".".join(pair) for pair in known) or "no such part"
            raise ValueError(
                f"model {name!r}: {INDEX} names {value!r:.80} as its {part!r:.40}, expected {classes}: a class of "
                "another name could be the folder's own code; name a model as diffusers saves it"
            )
    return wanted


def _layers(value: object) -> bool:
    return isinstance(value, list) and all(type(each) is int for each in value)


def _require_part(part: Path, name: str) -> None:
    where = f"model {name!r}: {part.name}"
    if (part / "adapter_config.json").exists():
        raise ValueError(f"{where}: got an adapter, which may name any other model, expected whole weights; merge it")
    for path in sorted(part.glob("*.json")):
        if path.name.endswith(".index.json"):
            _require_shards(read_json(path, name), f"{where}/{path.name}")
        elif path.name not in _NO_CONFIG:
            _require_config(read_json(path, name), f"{where}/{path.name}")
    for path in sorted(part.glob("*.safetensors")):
        scales = [key for key in _names(path) if is_scale(key)]
        if scales:
            raise ValueError(
                f"{where}/{path.name}: got scaled weights ({scales[0]!r:.80} ...), whose scales diffusers and "
                "transformers drop in a folder, expected weights without; name the scaled file itself as the model, "
                "or a folder without"
            )


def _require_config(config: dict, where: str) -> None:
    require_no_code(config, where)
    method = config.get("quantization_config")
    if method and _quantiser(method) not in _BITSANDBYTES:
        raise _names_code(where, "quantization_config", method, "full weights, or bitsandbytes'")


def _require_shards(index: dict, where: str) -> None:
    shards = index.get("weight_map")
    for shard in shards.values() if isinstance(shards, dict) else [shards]:
        if not (isinstance(shard, str) and shard.endswith(".safetensors") and Path(shard).name == shard):
            raise ValueError(
                f"{where}: got a part of the weights in {shard!r:.80}, expected a .safetensors file beside it; other "
                "files may be pickles, which can run code: fetch the model in safetensors"
            )


def _names(path: Path) -> list[str]:
    """The names of all tensors; empty for a broken file, which its loader then refuses."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            return list(file.keys())
    except (OSError, SafetensorError):
        return []


def _names_code(where: str, key: str, value: object, wanted: str) -> ValueError:
    return ValueError(
        f"{where}: got {key} = {value!r:.80}, which can lead to code of others, expected {wanted}; take it out, or "
        "name another model"
    )


def _entries(config: object) -> Iterator[tuple[str, object]]:
    """Every key and value of nested objects and lists, without recursion: a stranger chooses the depth."""
    waiting = [config]
    while waiting:
        here = waiting.pop()
        if isinstance(here, dict):
            yield from here.items()
            waiting += here.values()
        elif isinstance(here, list):
            waiting += here


def _strings(value: object) -> list[str]:
    return [each for each in (value, *(inner for _, inner in _entries(value))) if isinstance(each, str)]


def _quantiser(config: object) -> object:
    if not isinstance(config, dict):
        return config
    if config.get("load_in_8bit") or config.get("load_in_4bit"):  # before the method was written down
        return config.get("quant_method", "bitsandbytes")
    return config.get("quant_method")
