"""The example workflows for real FLUX.1, with the files, names and settings of ComfyUI's own templates."""

from __future__ import annotations

from typing import NamedTuple

from .graph import BLUE, GREEN, PURPLE, YELLOW, Graph, Node, group
from .parts import Prompt, painted, prompt

SIDE, SEED = 1024, 7
DEV_GUIDANCE, KONTEXT_GUIDANCE = 3.5, 2.5  # FLUX.1-dev's default; the one of ComfyUI's template for Kontext
DEV_STEPS, SCHNELL_STEPS = 20, 4
CONCEPT = "nudity.safetensors"  # as `saferope train nudity` calls it
PHOTO = "example.png"  # lies in every ComfyUI's input folder
LIGHTHOUSE = "a lighthouse on a cliff at dawn, thin fog over the sea, a woman in a yellow coat looking out, photograph"
FOR_KONTEXT = (
    "Kontext has the blocks and heads of FLUX.1-dev, so a concept file made for FLUX.1-dev is taken (`saferope train`, see the "
    "workflow for FLUX.1-dev). How well it works on edits has not been measured."
)
HUB = "https://huggingface.co/"


class File(NamedTuple):
    """A file of weights: where the model lies on the hub, and in which folder of models/ ComfyUI looks for it."""

    folder: str
    source: str

    @property
    def name(self) -> str:
        return self.source.rpartition("/")[2]


DEV = File("diffusion_models", "Comfy-Org/flux1-dev/resolve/main/flux1-dev.safetensors")
SCHNELL = File("diffusion_models", "Comfy-Org/flux1-schnell/resolve/main/flux1-schnell.safetensors")
KONTEXT = File(
    "diffusion_models",
    "Comfy-Org/flux1-kontext-dev_ComfyUI/resolve/main/split_files/diffusion_models/flux1-dev-kontext_fp8_scaled.safetensors",
)
CLIP_L = File("text_encoders", "comfyanonymous/flux_text_encoders/resolve/main/clip_l.safetensors")
T5_FP16 = File("text_encoders", "comfyanonymous/flux_text_encoders/resolve/main/t5xxl_fp16.safetensors")
T5_FP8 = File("text_encoders", "comfyanonymous/flux_text_encoders/resolve/main/t5xxl_fp8_e4m3fn_scaled.safetensors")
VAE = File("vae", "Comfy-Org/Lumina_Image_2.0_Repackaged/resolve/main/split_files/vae/ae.safetensors")
KNOWN_FILES = {  # by the input that names them: what a workflow may ask for though it is not there
    "unet_name": {DEV.name, SCHNELL.name, KONTEXT.name},
    "clip_name1": {CLIP_L.name},
    "clip_name2": {T5_FP16.name, T5_FP8.name},
    "vae_name": {VAE.name},
    "image": {PHOTO},
    "concept": {CONCEPT},
}


class Loaders(NamedTuple):
    unet: Node
    clip: Node
    vae: Node


def dev(info: dict) -> Graph:
    graph = Graph(info, "SafeRoPE FLUX.1-dev")
    loaders = loaded(graph, DEV, T5_FP16)
    given = prompt(graph, loaders.clip["CLIP"], LIGHTHOUSE, SIDE)
    guidance = graph.add("FluxGuidance", conditioning=given.positive, guidance=DEV_GUIDANCE)
    given = given._replace(positive=guidance["CONDITIONING"], nodes=[given.nodes[0], guidance, *given.nodes[1:]])
    note = graph.note(
        read_me("FLUX.1-dev", (DEV, CLIP_L, T5_FP16, VAE), trained("black-forest-labs/FLUX.1-dev")), (600, 290)
    )
    return finished(graph, loaders, given, DEV_STEPS, note)


def schnell(info: dict) -> Graph:
    graph = Graph(info, "SafeRoPE FLUX.1-schnell")
    loaders = loaded(graph, SCHNELL, T5_FP16)
    given = prompt(graph, loaders.clip["CLIP"], LIGHTHOUSE, SIDE)
    files = (SCHNELL, CLIP_L, T5_FP16, VAE)
    note = graph.note(
        read_me("FLUX.1-schnell: four steps", files, trained("black-forest-labs/FLUX.1-schnell")), (600, 290)
    )
    return finished(graph, loaders, given, SCHNELL_STEPS, note)


def kontext(info: dict) -> Graph:
    graph = Graph(info, "SafeRoPE FLUX.1 Kontext edit")
    loaders = loaded(graph, KONTEXT, T5_FP8)
    photo = graph.add("LoadImage", "Picture to edit", (300, 330), image=PHOTO)
    scaled = graph.add("FluxKontextImageScale", "A size that Kontext knows", image=photo["IMAGE"])
    latent = graph.add("VAEEncode", pixels=scaled["IMAGE"], vae=loaders.vae["VAE"])["LATENT"]
    encode = {"clip": loaders.clip["CLIP"], "text": "Turn it into a watercolour painting, keep the composition."}
    text = graph.add("CLIPTextEncode", "What to change", (320, 150), "prompt", **encode)
    nothing = graph.add("ConditioningZeroOut", "No negative prompt (cfg 1)", conditioning=text["CONDITIONING"])
    seen = graph.add("ReferenceLatent", "Look at the picture", conditioning=text["CONDITIONING"], latent=latent)
    guidance = graph.add("FluxGuidance", conditioning=seen["CONDITIONING"], guidance=KONTEXT_GUIDANCE)
    nodes = [text, seen, guidance, nothing]
    given = Prompt(guidance["CONDITIONING"], nothing["CONDITIONING"], latent, nodes)
    files = (KONTEXT, CLIP_L, T5_FP8, VAE)
    note = graph.note(read_me("FLUX.1 Kontext: edit a picture", files, FOR_KONTEXT), (600, 290))
    return finished(graph, loaders, given, DEV_STEPS, note, [photo, scaled, graph.nodes[latent.node - 1]])


def loaded(graph: Graph, unet: File, t5: File) -> Loaders:
    names = {"clip_name1": CLIP_L.name, "clip_name2": t5.name, "type": "flux", "device": "default"}
    unet_node = graph.add("UNETLoader", unet_name=unet.name, weight_dtype="default")
    clip, vae = graph.add("DualCLIPLoader", **names), graph.add("VAELoader", vae_name=VAE.name)
    for node, files in ((unet_node, [unet]), (clip, [CLIP_L, t5]), (vae, [VAE])):
        node.data["properties"]["models"] = [
            {"name": each.name, "url": HUB + each.source, "directory": each.folder} for each in files
        ]
    return Loaders(unet_node, clip, vae)


def finished(
    graph: Graph, loaders: Loaders, given: Prompt, steps: int, note: Node, photo: list[Node] | None = None
) -> Graph:
    """Concept, protection, sampler, saved picture, and everything in its place."""
    concept = graph.add("SafeRoPE_LoadConcept", "What to suppress", concept=CONCEPT)
    safe = graph.add("SafeRoPE_Apply", "Protect the model", model=loaders.unet["MODEL"], concept=concept["concept"])
    made = painted(graph, safe["model"], loaders.vae["VAE"], given, SEED, steps)
    saved = graph.add("SaveImage", "Protected picture", (420, 480), images=made.image, filename_prefix="SafeRoPE")
    numbers = iter(range(1, 9))
    columns = [[group(f"{next(numbers)} Model", BLUE, list(loaders))]]
    columns += [[group(f"{next(numbers)} Picture", YELLOW, photo)]] if photo else []
    columns += [[group(f"{next(numbers)} Prompt", YELLOW, given.nodes)]]
    columns += [[group(f"{next(numbers)} Safety", PURPLE, [concept, safe])]]
    columns += [[group(f"{next(numbers)} Paint", GREEN, made.nodes, [saved])]]
    graph.arrange(columns, note)
    return graph


def read_me(title: str, files: tuple[File, ...], concept: str) -> str:
    """Which files go where, and where the concept file comes from."""
    places = "\n".join(f"- `models/{each.folder}/` [{each.name}]({HUB}{each.source})" for each in files)
    return (
        f"# SafeRoPE with {title}\n\nComfyUI's usual nodes for this model, and two more: **SafeRoPE Load Concept** and "
        f"**SafeRoPE Apply** between the model's loader and the sampler.\n\n{places}\n- `models/saferope/` {CONCEPT}, "
        f"or any other concept file for this model\n\n{concept} A file that does not fit the model is refused."
    )


def trained(model: str) -> str:
    """How a concept file for a model is made."""
    return (
        "A concept file is made from prompts alone, by this pack's trainer: "
        f"`saferope train nudity --model {model} --device cuda --quantise nf4 --checkpointing --out my_concepts/nudity`."
    )
