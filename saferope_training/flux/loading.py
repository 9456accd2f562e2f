"""Finds a FLUX.1 model by its name and loads it for training: embedded, folder, hub id or single file.

FLUX.1-dev and FLUX.1-schnell are told apart by the transformer's own configuration: dev has a guidance embedding.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from .checkpoint import SUFFIXES, read_shapes, read_weights, require_names, require_none, transformer_config
from .encoders import EncoderSource
from .folder import INDEX, TRANSFORMER, fetch, first_line, load_part, read_json, require_parts
from .models import GUIDANCE, TINYWORLD, Model, from_pipeline
from .plausible import require_plausible
from .quantise import in_place, is_torchao, quantisation_config, require_library, require_quantised

if TYPE_CHECKING:
    from diffusers import FluxTransformer2DModel

RESOLUTION = 512  # pixels: statistics and rotations do not depend on resolution, time and memory do
_ENCODERS = ("text_encoder", "text_encoder_2")
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")
_PATCH = 16  # pixels per image token and side: eightfold VAE, 2 x 2 packing


@dataclass(frozen=True)
class Defaults:
    """What a kind of FLUX.1 is run with: T5 tokens, sampling steps, embedded guidance."""

    text_length: int
    steps: int
    guidance: float


DEV = Defaults(512, 28, GUIDANCE)  # diffusers' FluxPipeline's
SCHNELL = Defaults(256, 4, 0.0)  # its model card's


def load_model(
    name: str,
    device: str = "cpu",
    quantise: str | None = None,
    encoders: str | None = None,
    resolution: int | None = None,
) -> Model:
    """A frozen FLUX: `tinyworld`, a diffusers folder, a hub id, or a single file with `encoders`.

    `encoders` is a diffusers folder or hub id too. `quantise` is one of `quantise.KINDS`; `resolution` in pixels, a
    multiple of 16, RESOLUTION unless told. Text encoders of folders are loaded when first asked for, see `encoders`.
    ValueError or OSError, one line, where there is no such model or it is not a FLUX.1.
    """
    if name == TINYWORLD:
        return _tiny_world(device, quantise, encoders, resolution)
    resolution = resolution or RESOLUTION
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
        rest, transformer = find_folder(encoders, transformer=False), _from_file(path, quantise, device, dtype)
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
    """Whether the hub need not be asked for a model of this name: it is here, or nowhere."""
    return Path(name).exists() or not _HUB_ID.fullmatch(name)


def find_folder(name: str, transformer: bool) -> Path:
    """The local folder of a diffusers FLUX.1 pipeline, found good: `name` itself, or the hub's.

    `transformer`: whether its transformer is wanted too. OSError where the hub cannot be asked, ValueError else.
    """
    folder = Path(name)
    if not is_here(name):
        folder = fetch(name, transformer)
    if not (folder / INDEX).is_file():
        raise ValueError(
            f"model {name!r}: got no folder with a {INDEX}, expected `{TINYWORLD}`, a diffusers FLUX.1 folder, "
            f"a single file ({', '.join(SUFFIXES)}) or a hub id such as black-forest-labs/FLUX.1-dev"
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


def outline(name: str, encoders: str | None, resolution: int | None, config: dict) -> tuple[int, int, int, int]:
    """T5 tokens, image tokens a side, and the bytes of text encoders and VAE on disk; nothing is loaded."""
    if name == TINYWORLD:
        from tinyworld import model, render

        return model.TEXT_LENGTH, render.SIZE // _PATCH, _bytes_of(model.WEIGHTS, _ENCODERS), 0
    folder = find_folder(encoders or name, transformer=False)
    text = defaults_for(config["guidance_embeds"]).text_length
    return text, (resolution or RESOLUTION) // _PATCH, _bytes_of(folder, _ENCODERS), _bytes_of(folder, ("vae",))


def _bytes_of(folder: Path, parts: tuple[str, ...]) -> int:
    return sum(path.stat().st_size for part in parts for path in (folder / part).glob("*.safetensors"))


def defaults_for(guidance_embeds: bool) -> Defaults:
    """FLUX.1-dev's where the transformer embeds guidance, else FLUX.1-schnell's."""
    return DEV if guidance_embeds else SCHNELL


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


def _assemble(name: str, folder: Path, transformer: FluxTransformer2DModel, resolution: int) -> Model:
    """The pipeline around a loaded transformer; the text encoders wait until they are asked for."""
    from diffusers import FluxPipeline

    with _readable(name):
        pipe = FluxPipeline(
            scheduler=load_part(folder, "scheduler"),
            vae=load_part(folder, "vae", use_safetensors=True),
            text_encoder=None,
            tokenizer=load_part(folder, "tokenizer"),
            text_encoder_2=None,
            tokenizer_2=load_part(folder, "tokenizer_2"),
            transformer=transformer,
        )
    pipe.set_progress_bar_config(disable=True)
    require_plausible(pipe.vae, f"{name}, vae")
    pipe.vae.to(transformer.device)
    found = defaults_for(transformer.config.guidance_embeds)
    length = min(found.text_length, pipe.tokenizer_2.model_max_length)
    source = EncoderSource(folder, transformer.dtype)
    side = resolution // 8
    return from_pipeline(name, pipe, length, side, found.guidance, found.steps, source)


def _from_folder(
    folder: Path, name: str, quantise: str | None, device: str, dtype: torch.dtype
) -> FluxTransformer2DModel:
    from diffusers import FluxTransformer2DModel

    _folder_config(folder, name)
    config = quantisation_config(quantise, device, dtype) if quantise else None
    with _readable(name):
        transformer, report = FluxTransformer2DModel.from_pretrained(
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
    if config.get("_class_name") != TRANSFORMER:
        raise ValueError(
            f"model {name!r}: got a transformer {config.get('_class_name')!r:.80}, expected {TRANSFORMER!r}"
        )
    return config


def _from_file(path: Path, quantise: str | None, device: str, dtype: torch.dtype) -> FluxTransformer2DModel:
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
    """What diffusers finds wrong with weights, in one line."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, ValueError, RuntimeError, LookupError, SafetensorError) as error:
        raise ValueError(f"model {name!r}: cannot be loaded ({first_line(error)}); fetch it again") from error
