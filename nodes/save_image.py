"""Saves a picture with ComfyUI's metadata and signed content credentials that say how it was protected."""

from __future__ import annotations

import io as streams
import json
from pathlib import Path
from typing import Any

import comfyui_version
import folder_paths
import numpy
from comfy.cli_args import args
from comfy_api.latest import io
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from ..saferope_core import __version__
from ..saferope_core.concept.files import write_bytes
from ..saferope_credentials import configured, signed
from .host.history import require_protected, runs_of
from .host.recorder import Recorder, RecorderType
from .inputs import require_range

FORMATS = {"PNG": "png", "JPEG": "jpeg", "WEBP": "webp"}
FULL, PART = "full protection", "in part"
MODEL_TAG = 0x0110  # of EXIF: from it downwards ComfyUI keeps prompt and workflow in a WEBP
LONGEST_EXIF = 65_000  # bytes: a JPEG keeps EXIF in one segment of 64 KB
MOST = 16  # recorders


class SaveImage(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SafeRoPE_SaveImage",
            display_name="SafeRoPE Save Image",
            category="SafeRoPE",
            description="Decodes the sampler's latent and saves the picture with signed content credentials (C2PA) "
            "that hold a receipt of the protection. Saves nothing that was not protected. Needs c2pa-python and a key: "
            "saferope keys init.",
            search_aliases=["c2pa", "content credentials", "sign", "provenance", "save image", "saferope"],
            inputs=[
                io.Latent.Input("latent", tooltip="The sampler's output, unchanged. It selects the run."),
                io.Vae.Input("vae", tooltip="Decodes the latent here, so that the receipt belongs to this picture."),
                io.Autogrow.Input(
                    "recorders",
                    template=io.Autogrow.TemplatePrefix(
                        RecorderType.Input("recorder"), prefix="recorder", min=1, max=MOST
                    ),
                    tooltip="From every SafeRoPE Apply whose model drew the picture.",
                ),
                io.String.Input("filename_prefix", default="SafeRoPE", tooltip="As in ComfyUI's Save Image."),
                io.Combo.Input("format", options=list(FORMATS), default="PNG", tooltip="The file's format."),
                io.Combo.Input(
                    "require",
                    options=[FULL, PART],
                    default=FULL,
                    tooltip="Full protection: all steps, blocks, streams and prompts, each concept at strength 1 or "
                    "more. In part: something turned. The receipt names the rest.",
                ),
                io.Int.Input(
                    "quality", default=95, min=1, max=100, optional=True, tooltip="1 to 100, for JPEG and WEBP."
                ),
                io.Boolean.Input(
                    "workflow_digest",
                    default=True,
                    optional=True,
                    tooltip="Sign the SHA-256 of the workflow that ran, too.",
                ),
            ],
            outputs=[io.Image.Output("image", tooltip="The decoded pictures.")],
            hidden=[io.Hidden.prompt, io.Hidden.extra_pnginfo],
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls,
        latent: dict[str, Any],
        vae: Any,
        recorders: dict[str, Recorder],
        filename_prefix: str,
        format: str,
        require: str,
        quality: int = 95,
        workflow_digest: bool = True,
    ) -> io.NodeOutput:
        require_range("quality", quality, 1, 100)
        if format not in FORMATS or require not in (FULL, PART):
            raise ValueError(f"format and require are {format!r:.40} and {require!r:.40}. Check the linked nodes.")
        runs = runs_of(list(recorders.values()), latent["samples"])
        require_protected(runs, require == FULL)
        config = configured()
        told = [[receipt.as_json() for receipt in run] for run in runs]
        images = vae.decode(latent["samples"])
        images = images.reshape(-1, *images.shape[-3:])  # of videos, every frame
        metadata = {} if args.disable_metadata else {"prompt": cls.hidden.prompt, **(cls.hidden.extra_pnginfo or {})}
        digested = cls.hidden.prompt if workflow_digest else None
        folder, name, counter, subfolder, _ = folder_paths.get_save_image_path(
            filename_prefix, folder_paths.get_output_directory(), images.shape[2], images.shape[1]
        )
        kind, saved = FORMATS[format], []
        for number, image in enumerate(images):
            file = f"{name.replace('%batch_num%', str(number))}_{counter + number:05}_.{kind}"
            plain = encoded(image, kind, quality, metadata)
            versions = (__version__, comfyui_version.__version__)
            write_bytes(Path(folder) / file, signed(plain, kind, file, told, versions, config, digested))
            saved.append({"filename": file, "subfolder": subfolder, "type": "output"})
        return io.NodeOutput(images, ui={"images": saved})


def encoded(image: Tensor, kind: str, quality: int, metadata: dict[str, Any]) -> bytes:
    """One picture [h, w, 3] in [0, 1] as the bytes of a file, with ComfyUI's metadata where the format has room."""
    pixels = Image.fromarray((image.float().cpu().clamp(0, 1) * 255).numpy().astype(numpy.uint8))
    texts = {key: json.dumps(value) for key, value in metadata.items() if value is not None}
    out = streams.BytesIO()
    if kind == "png":
        chunks = PngInfo()
        for key, text in texts.items():
            chunks.add_text(key, text)
        pixels.save(out, "PNG", pnginfo=chunks, compress_level=4)
        return out.getvalue()
    exif = pixels.getexif()
    for tag, (key, text) in zip(range(MODEL_TAG, 0, -1), texts.items(), strict=False):
        exif[tag] = f"{key}:{text}"
    if kind == "jpeg" and len(exif.tobytes()) > LONGEST_EXIF:
        exif = Image.Exif()
    pixels.save(out, kind.upper(), quality=quality, exif=exif)
    return out.getvalue()
