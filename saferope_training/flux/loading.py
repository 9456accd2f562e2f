"""Finds a model by its name and loads it for training: embedded, folder or hub id of any pipeline that is known, or a
single file of FLUX.1.

FLUX.1-dev and FLUX.1-schnell are told apart by the transformer's own configuration: dev has a guidance embedding. Of
other families the folder's index says whether they are distilled, of Z-Image the shift of its scheduler.
"""

from __future__ import annotations

import json
import math
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .attach import LAYOUTS, geometry_from, geometry_of
from .checkpoint import SUFFIXES, read_shapes, read_weights, require_names, require_none, transformer_config
from .encoders import EncoderSource
from .folder import (
    DISTILLED,
    INDEX,
    KINDS,
    LAYERS,
    PIPELINE,
    TRANSFORMER,
    fetch,
    first_line,
    kind_of,
    load_part,
    paints_tiny_world,
    parts_of,
    read_json,
    require_parts,
    told,
    transformer_of,
)
from .models import GUIDANCE, TINYWORLD, Model, from_pipeline
from .pipelines import asked_of, tokenizer_of
from .plausible import require_plausible
from .quantise import in_place, is_torchao, quantisation_config, require_library, require_quantised

RESOLUTION = 512  # pixels: statistics and rotations do not depend on resolution, time and memory do
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")
_PATCH = 16  # pixels per image token and side: eightfold VAE, 2 x 2 packing


@dataclass(frozen=True)
class Defaults:
    """The defaults of a kind of model: tokens of text, sampling steps, guidance."""

    text_length: int
    steps: int
    guidance: float


DEV = Defaults(512, 28, GUIDANCE)  # diffusers' FluxPipeline's
SCHNELL = Defaults(256, 4, 0.0)  # its model card's
FLUX2_DEV = Defaults(512, 50, 4.0)  # diffusers' Flux2Pipeline's
# Of other families, and where they are distilled: diffusers' pipelines' (0.42.1) and model cards'
OTHERS = {
    "chroma": (Defaults(512, 35, 5.0), Defaults(512, 8, 1.0)),
    "flux2": (Defaults(512, 50, 4.0), Defaults(512, 4, 1.0)),
    "ovis-image": (Defaults(256, 50, 5.0),) * 2,
    "qwen-image": (Defaults(512, 50, 4.0), Defaults(512, 8, 1.0)),
    "krea2": (Defaults(512, 28, 4.5), Defaults(512, 8, 0.0)),
    "z-image": (Defaults(512, 50, 4.0), Defaults(512, 8, 0.0)),
}
TURBO_SHIFT = 3.0  # of the scheduler in Z-Image-Turbo's folder; in that of the model that it was distilled from it is 6


def load_model(
    name: str,
    device: str = "cpu",
    quantise: str | None = None,
    encoders: str | None = None,
    resolution: int | None = None,
) -> Model:
    """A frozen model: `tinyworld`, a diffusers folder, a hub id, or a single file of FLUX.1 with `encoders`.

    `encoders` is a diffusers folder or hub id too. `quantise` is one of `quantise.KINDS`. `resolution` is in pixels, a
    multiple of 16; left out, it is RESOLUTION, or the tiny world's where the folder paints that. Text encoders of
    folders are loaded at first use, see encoders.py. ValueError or OSError, one line, where there is no such model or
    its pipeline is not one of folder.KINDS.
    """
    if name == TINYWORLD:
        return _tiny_world(device, quantise, encoders, resolution)
    resolution = resolution or _own_resolution(name)
    if resolution % _PATCH:
        raise ValueError(f"resolution: got {resolution}, expected a multiple of {_PATCH} pixels")
    dtype = torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16
    path = Path(name)
    if path.is_file():
        if encoders is None:
            raise ValueError(
                f"model {name!r}: got a single file, which holds the transformer alone; name the rest with --encoders "
                "(a diffusers FLUX.1 folder or hub id)"
            )
        rest = find_folder(encoders, transformer=False)
        if kind_of(rest) != PIPELINE:
            raise ValueError(
                f"encoders {encoders!r}: got a {kind_of(rest)}, expected a {PIPELINE}: of other families "
                "a whole folder is read, and no single file"
            )
        transformer = _from_file(path, quantise, device, dtype)
    else:
        if encoders is not None:
            raise ValueError(f"encoders {encoders!r}: got a whole model {name!r} beside them; leave them out")
        rest = find_folder(name, transformer=True)
        transformer = _from_folder(rest, name, quantise, device, dtype)
    if quantise not in ("nf4", "int8"):  # which lie on the GPU already
        transformer = transformer.to(device)
    require_plausible(transformer, name)
    if quantise:
        require_quantised(transformer, quantise, name)
    return _assemble(name, rest, transformer, resolution)


def is_here(name: str) -> bool:
    """Whether the name needs no request to the hub: its path exists here, or it is no hub id."""
    return Path(name).exists() or not _HUB_ID.fullmatch(name)


def find_folder(name: str, transformer: bool) -> Path:
    """The local folder of a diffusers pipeline, found good: `name` itself, or the hub's.

    `transformer`: whether its transformer is wanted too. OSError where the hub cannot be asked, ValueError else.
    """
    folder = Path(name)
    if not is_here(name):
        folder = fetch(name, transformer)
    if not (folder / INDEX).is_file():
        raise ValueError(
            f"model {name!r}: got no folder with a {INDEX}, expected `{TINYWORLD}`, a diffusers folder "
            f"({', '.join(KINDS)}), a single file ({', '.join(SUFFIXES)}) or a hub id such as "
            "black-forest-labs/FLUX.1-dev"
        )
    require_parts(folder, name, transformer)
    return folder


def config_of(name: str, encoders: str | None = None) -> dict:
    """The configuration of the transformer alone; loads no weight. Errors as in `load_model`."""
    if Path(name).is_file():
        return transformer_config(read_shapes(Path(name)), name)
    from tinyworld import model

    folder = model.WEIGHTS if name == TINYWORLD else find_folder(name, transformer=True)
    return _folder_config(folder, name)


class Outline(NamedTuple):
    """T5 tokens, image tokens a side, and the bytes on disk of text encoders, of their largest layer (bf16), and of
    the VAE."""

    text: int
    side: int
    encoders: int
    layer: int
    decoder: int


def outline(name: str, encoders: str | None, resolution: int | None, config: dict) -> Outline:
    """The outline of a model, from its files' headers and sizes. Loads nothing."""
    if name == TINYWORLD:
        from tinyworld import model, render

        whole = _bytes_of(model.WEIGHTS, ["text_encoder", "text_encoder_2"])
        return Outline(model.TEXT_LENGTH, render.SIZE // _PATCH, whole, whole, 0)
    folder = find_folder(encoders or name, transformer=False)
    text, parts = defaults_of(config, folder).text_length, parts_of(folder, "text_encoder")
    side = (resolution or _own_resolution(name)) // _PATCH
    return Outline(text, side, _bytes_of(folder, parts), _largest(folder, parts), _bytes_of(folder, ["vae"]))


def _own_resolution(name: str) -> int:
    from tinyworld import render

    return render.SIZE if paints_tiny_world(Path(name)) else RESOLUTION


def _bytes_of(folder: Path, parts: list[str]) -> int:
    return sum(path.stat().st_size for part in parts for path in (folder / part).glob("*.safetensors"))


def _largest(folder: Path, parts: list[str]) -> int:
    """Bytes in bf16 of the largest tensor of the text encoders, from their files' headers."""
    from safetensors import safe_open

    sizes = [0]
    for path in (path for part in parts for path in (folder / part).glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            sizes += [2 * math.prod(file.get_slice(name).get_shape()) for name in file.keys()]
    return max(sizes)


def defaults_of(config: Any, folder: Path) -> Defaults:
    """FLUX.1-dev's where a FLUX.1 transformer embeds guidance, else FLUX.1-schnell's; the family's own elsewhere."""
    family = geometry_from(config).family
    if family == "flux2" and config["guidance_embeds"]:
        return FLUX2_DEV
    if family not in OTHERS:
        return DEV if config["guidance_embeds"] else SCHNELL
    plain, distilled = OTHERS[family]
    said = told(folder, DISTILLED)
    if said is None and family == "z-image":
        said = read_json(folder / "scheduler" / "scheduler_config.json", str(folder)).get("shift") == TURBO_SHIFT
    return distilled if said else plain


def made_of(config: Any) -> Any:
    """A transformer of this configuration, of its class or FLUX.1's. Weights are random, or on the meta device."""
    import diffusers

    name = config.get("_class_name", TRANSFORMER)
    assert name in LAYOUTS, name
    return getattr(diffusers, name).from_config(config)


def _tiny_world(device: str, quantise: str | None, encoders: str | None, resolution: int | None) -> Model:
    from tinyworld import model, render

    if encoders is not None or resolution not in (None, render.SIZE):
        raise ValueError(f"model {TINYWORLD!r}: has its own encoders and {render.SIZE} pixels; leave both out")
    pipe = model.load_pipeline()
    if quantise is not None:
        dtype = torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16
        pipe.transformer = _from_folder(model.WEIGHTS, TINYWORLD, quantise, device, dtype)
    pipe.to(device)
    return from_pipeline(TINYWORLD, pipe, model.TEXT_LENGTH, render.SIZE // 8, model.GUIDANCE, model.STEPS)


def _assemble(name: str, folder: Path, transformer: Any, resolution: int) -> Model:
    """The pipeline around a loaded transformer; the text encoders wait until they are asked for."""
    import diffusers

    kind = getattr(diffusers, kind_of(folder))
    known = {each: told(folder, each) for each in (DISTILLED, LAYERS) if each in signature(kind.__init__).parameters}
    with _readable(name):
        pipe = kind(
            **{part: load_part(folder, part) for part in parts_of(folder, "scheduler", "tokenizer")},
            **dict.fromkeys(parts_of(folder, "text_encoder")),
            vae=load_part(folder, "vae", use_safetensors=True),
            transformer=transformer,
            **{each: value for each, value in known.items() if value is not None},
        )
    pipe.set_progress_bar_config(disable=True)
    require_plausible(pipe.vae, f"{name}, vae")
    pipe.vae.to(transformer.device)
    found = defaults_of({**transformer.config, "_class_name": type(transformer).__name__}, folder)
    length = min(found.text_length, tokenizer_of(pipe).model_max_length)
    length -= length % (asked_of(geometry_of(transformer).family).pads_to or 1)
    source = EncoderSource(folder, transformer.dtype)
    side = resolution // 8
    return from_pipeline(name, pipe, length, side, found.guidance, found.steps, source)


def _from_folder(folder: Path, name: str, quantise: str | None, device: str, dtype: torch.dtype) -> Any:
    import diffusers

    kind = getattr(diffusers, _folder_config(folder, name)["_class_name"])
    config = quantisation_config(quantise, device, dtype) if quantise else None
    with _readable(name):
        transformer, report = kind.from_pretrained(
            folder,
            subfolder="transformer",
            torch_dtype=dtype,
            quantization_config=config,
            use_safetensors=True,
            output_loading_info=True,
        )
    require_none(name, report["missing_keys"])
    return transformer


def _folder_config(folder: Path, name: str) -> dict:
    config = read_json(folder / "transformer" / "config.json", name)
    wanted = transformer_of(kind_of(folder)) if (folder / INDEX).is_file() else TRANSFORMER  # ours has no index
    if config.get("_class_name") != wanted:
        raise ValueError(f"model {name!r}: got a transformer {config.get('_class_name')!r:.80}, expected {wanted!r}")
    return config


def _from_file(path: Path, quantise: str | None, device: str, dtype: torch.dtype) -> Any:
    """The transformer of a .safetensors or .gguf file; its configuration comes from the file, never from the hub."""
    from diffusers import FluxTransformer2DModel, GGUFQuantizationConfig

    config, weights = None, None
    if path.suffix == ".gguf":
        require_library("gguf", f"model {str(path)!r}")
        if quantise:
            raise ValueError(f"quantisation {quantise!r}: got a .gguf file, which is quantised already; leave it out")
        config, weights = GGUFQuantizationConfig(compute_dtype=dtype), str(path)
    elif quantise:
        config = quantisation_config(quantise, device, dtype)
    shapes = read_shapes(path)
    geometry = transformer_config(shapes, str(path))
    require_names(geometry, shapes, str(path))
    with tempfile.TemporaryDirectory() as folder, _readable(str(path)):
        Path(folder, "config.json").write_text(json.dumps({"_class_name": TRANSFORMER, **geometry}))
        transformer = FluxTransformer2DModel.from_single_file(
            weights or read_weights(path, dtype),
            config=folder,
            torch_dtype=dtype,
            quantization_config=None if is_torchao(quantise) else config,
        )
        if quantise and is_torchao(quantise):
            in_place(transformer, quantise)
    require_none(str(path), [key for key, value in transformer.named_parameters() if value.is_meta])
    return transformer


@contextmanager
def _readable(name: str) -> Iterator[None]:
    """Tells diffusers' errors about weights as a ValueError of one line."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, ValueError, RuntimeError, LookupError, SafetensorError) as error:
        raise ValueError(f"model {name!r}: cannot be loaded ({first_line(error)}); fetch it again") from error
