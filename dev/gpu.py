"""Measures the nodes on a GPU: a whole step in ComfyUI, plain and compiled, and pictures of the tiny world.

    python -m dev.gpu step OUT                   # on a machine with a GPU of 40 GB; a minute
    python -m dev.gpu compiled OUT               # some minutes
    python -m dev.gpu step OUT --cpu --small     # the machinery, anywhere

ComfyUI runs in this process, with a FLUX of random weights. OUT gets step.md or compiled.md with rows as of `saferope
bench`, and stars.png: pictures of the tiny world without protection, with it, and with it where there is no Triton.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from PIL import Image

from saferope_benchmark.costs import report
from saferope_benchmark.costs import rotation as costs
from saferope_benchmark.costs.timing import Row, in_turns, ratio, spread
from saferope_benchmark.costs.whole import BLOCKS, CASES, PEAK, TARGETS, THIRD, peak_on, protection_of
from saferope_core import Geometry, save_concepts

from .comfyui import ROOT, load_comfy, load_pack

SHORT, LONG = 4, 12  # steps of two sampling runs: their difference gives a step's time, the rest is the time once a run
TOKENS = 512  # of text
PROMPTS = ("a big red star on a white background", "a small blue star on a yellow background")
SEEDS = range(4)


@dataclass(frozen=True)
class Size:
    """Of the model and of the concepts in it."""

    blocks: tuple[int, int] = BLOCKS
    heads: int = 24
    pixels: int = 1024
    critical: float = 1.0
    concepts: int = 1


SMALL = Size((1, 1), 2, 64)
FEW = Size((1, 2))  # blocks of a compiled model


def nodes_of(pack: Any) -> dict[str, Any]:
    """The pack's nodes by their ids."""

    async def listed() -> list:
        extension = await pack.comfy_entrypoint()
        await extension.on_load()
        return await extension.get_node_list()

    return {node.GET_SCHEMA().node_id: node for node in asyncio.run(listed())}


def flux(size: Size, device: torch.device) -> Any:
    """A ModelPatcher of FLUX.1-dev's sizes with random weights in bf16, on the device."""
    import comfy.model_base
    import comfy.model_patcher
    import comfy.ops
    import comfy.supported_models

    sizes = {"image_model": "flux", "in_channels": 16, "out_channels": 16, "vec_in_dim": 768, "context_in_dim": 4096}
    sizes |= {"hidden_size": 128 * size.heads, "mlp_ratio": 4.0, "num_heads": size.heads, "depth": size.blocks[0]}
    sizes |= {"depth_single_blocks": size.blocks[1], "axes_dim": [16, 56, 56], "theta": 10000, "patch_size": 2}
    sizes |= {"qkv_bias": True, "guidance_embed": True, "txt_ids_dims": []}
    config = comfy.supported_models.Flux(sizes)
    config.set_inference_dtype(torch.bfloat16, None)
    config.custom_operations = comfy.ops.disable_weight_init
    model = comfy.model_base.Flux(config, device=device)
    for name, parameter in model.named_parameters():
        torch.nn.init.ones_(parameter) if "norm" in name else torch.nn.init.normal_(parameter, std=0.02)
    return comfy.model_patcher.ModelPatcher(model, load_device=device, offload_device=device)


def sample(model: Any, pixels: int, device: torch.device, steps: int) -> torch.Tensor:
    """Latents of one run, from fixed noise and text."""
    import comfy.samplers

    random = torch.Generator().manual_seed(1)
    hidden, pooled = (torch.randn(shape, generator=random) for shape in ((1, TOKENS, 4096), (1, 768)))
    noise = torch.randn(1, 16, pixels // 8, pixels // 8, generator=random)
    sampler = comfy.samplers.KSampler(model, steps, device, "euler", "simple", model_options=model.model_options)
    said = [[hidden, {"pooled_output": pooled}]]
    with torch.inference_mode():
        empty = torch.zeros_like(noise)
        return sampler.sample(noise, said, list(said), cfg=1.0, latent_image=empty, disable_pbar=True)


@contextmanager
def without_triton(pack: Any) -> Iterator[None]:
    """The nodes take the form for GPUs that have none."""
    forms = importlib.import_module(f"{pack.__name__}.saferope_core.run.forms")
    kept, forms._has_triton = forms._has_triton, lambda device: False
    try:
        yield
    finally:
        forms._has_triton = kept


def concepts_for(pack: Any, size: Size) -> list[Any]:
    """Random concepts of `saferope bench`, through a file, as the pack's own classes."""
    widths = costs.Size(heads=size.heads, critical=size.critical, concepts=size.concepts, **costs.TRAINED)
    found = protection_of(widths, Geometry(*size.blocks, size.heads, 128)).concepts
    core = importlib.import_module(f"{pack.__name__}.saferope_core")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "random.safetensors"
        save_concepts(path, list(found), torch.float16)
        return core.load_concepts(path)


def step_rows(pack: Any, size: Size, device: torch.device, repeats: int) -> Iterator[Row]:
    """Time of a step with protection over one without, protection's time once a run, and its share of the peak."""
    apply, model = nodes_of(pack)["SafeRoPE_Apply"].execute, flux(size, device)

    def guarded(**changes: Any) -> Any:
        return apply(model, concepts_for(pack, replace(size, **changes)), 1.0)[0]

    models = {"": model} | {name: guarded(**changes) for name, changes in CASES.items()}
    runs = {name: partial(sample, each, size.pixels, device) for name, each in models.items()}
    bare = partial(sample, guarded(), size.pixels, device)

    def plain(steps: int) -> None:
        with without_triton(pack):
            bare(steps)

    runs["all heads, without Triton"] = plain
    yield from rows_of(f"FLUX.1-dev in ComfyUI, {size.pixels} x {size.pixels}", runs, repeats)
    peaks = {name: peak_on(device.type, partial(run, SHORT)) for name, run in runs.items()}
    for name in list(runs)[1:]:
        extra = peaks[name] - peaks[""]
        share = extra / max(1, peaks[""])
        yield Row(f"extra peak / peak, {name}", share, "x", PEAK, note=f"{extra / 2**20:.0f} MiB")


def compiled_rows(pack: Any, size: Size, device: torch.device, repeats: int) -> Iterator[Row]:
    """The same times of a model of few blocks that TorchCompileModel has compiled: to compile all takes minutes."""
    from comfy_api.torch_helpers import set_torch_compile_wrapper
    from comfy_extras.nodes_torch_compile import skip_torch_compile_dict

    apply, model = nodes_of(pack)["SafeRoPE_Apply"].execute, flux(size, device)
    models = {"": model}
    for name, critical in ((THIRD, 1 / 3), ("all heads", 1.0)):
        models[name] = apply(model, concepts_for(pack, replace(size, critical=critical)), 1.0)[0]
    runs: dict[str, Callable] = {}
    for name, each in models.items():
        clone = each.clone()
        backend = "inductor" if device.type == "cuda" else "eager"
        options = {"guard_filter_fn": skip_torch_compile_dict}
        set_torch_compile_wrapper(clone, backend=backend, options=options, fullgraph=False)
        runs[name] = partial(sample, clone, size.pixels, device)
    what = f"{size.blocks[0]} + {size.blocks[1]} blocks in ComfyUI, compiled, {size.pixels} x {size.pixels}"
    yield from rows_of(what, runs, repeats)


def rows_of(what: str, runs: dict[str, Callable[[int], object]], repeats: int) -> Iterator[Row]:
    """`runs` sample so many steps; the first of them is the unprotected one."""
    forms = {(name, steps): partial(run, steps) for name, run in runs.items() for steps in (SHORT, LONG)}
    taken = in_turns(forms, repeats)  # type: ignore[arg-type,var-annotated]
    first, *others = runs
    step, once = {}, {}
    for name in runs:
        pairs = list(zip(taken[name, SHORT], taken[name, LONG], strict=True))
        step[name] = [(long - short) / (LONG - SHORT) for short, long in pairs]
        once[name] = [short - SHORT * each for (short, _), each in zip(pairs, step[name], strict=True)]
    yield Row(f"a step of {what}", 1e3 * median(step[first]), "ms", spread=1e3 * spread(step[first]))
    for name in others:
        value, width = ratio(step[name], step[first])
        yield Row(f"protected / unprotected, {name}", value, "x", TARGETS.get(name), spread=width)
    for name in others:
        more = [1e3 * (a - b) for a, b in zip(once[name], once[first], strict=True)]
        yield Row(f"once a run, {name}", median(more), "ms", spread=spread(more))


def stars(pack: Any, device: torch.device) -> Image.Image:
    """Rows of pictures of the tiny world: without, with the bundled star, and with it by the form without Triton."""
    import comfy.samplers

    known = nodes_of(pack)
    model, clip, vae = known["SafeRoPE_TinyWorld"].execute().args
    core = importlib.import_module(f"{pack.__name__}.saferope_core")
    guarded = known["SafeRoPE_Apply"].execute(
        model, core.load_concepts(ROOT / "tinyworld/concepts/star.safetensors"), 1.0
    )[0]

    def row(model: Any) -> torch.Tensor:
        pictures = []
        for text in PROMPTS:
            said = clip.encode_from_tokens_scheduled(clip.tokenize(text))
            for seed in SEEDS:
                noise = torch.randn(1, 16, 12, 12, generator=torch.Generator().manual_seed(seed))
                args = (model, 16, device, "euler", "simple")
                sampler = comfy.samplers.KSampler(*args, model_options=model.model_options)
                with torch.inference_mode():
                    empty = torch.zeros_like(noise)
                    out = sampler.sample(noise, said, list(said), cfg=1.0, latent_image=empty, disable_pbar=True)
                pictures.append(vae.decode(out.cpu())[0])
        return torch.cat(pictures, 1)

    rows = [row(model), row(guarded)]
    with without_triton(pack):
        rows.append(row(guarded.clone()))
    whole = torch.cat(rows).mul(255).round().to(torch.uint8).cpu().numpy()
    return Image.fromarray(whole)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("step", "compiled"))
    parser.add_argument("out", type=Path)
    parser.add_argument("--cpu", action="store_true", help="run on the CPU")
    parser.add_argument("--small", action="store_true", help="one block of each kind, and few tokens")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    device = torch.device("cpu" if options.cpu else "cuda")
    with tempfile.TemporaryDirectory() as base:
        load_comfy(Path(base), *(["--cpu"] if options.cpu else []))
        pack = load_pack()
        if options.what == "step":
            stars(pack, device).save(options.out / "stars.png")
        measured = step_rows if options.what == "step" else compiled_rows
        size = SMALL if options.small else Size() if options.what == "step" else FEW
        found = list(measured(pack, size, device, options.repeats))
    name = "a CPU" if options.cpu else torch.cuda.get_device_name()
    text = f"Measured on {name}, PyTorch {torch.__version__}.\n\n{report.table(found)}"
    (options.out / f"{options.what}.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
