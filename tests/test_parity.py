"""ComfyUI and diffusers give the same velocity and the same picture: one set of weights, one concept file, one noise.

Two forwards by two programs, two adapters (nodes/host/patch.py, saferope_training/flux/attach.py) around one core: what
they agree on is which vectors are turned, and when.
"""

from __future__ import annotations

import importlib
from contextlib import nullcontext

import pytest
import torch

import saferope_core
from saferope_training.flux.attach import attached, geometry_of
from tests.support import concepts as flat
from tinyworld.model import GUIDANCE, STEPS, encode, generate, load_pipeline, start_noise

pytestmark = pytest.mark.host

TEXT = "a red star in the center on a white background"
SIGMA = 0.8
RANK, ANGLE = 4, 20  # random vectors have an LRS of about RANK / 128


@pytest.fixture(scope="module")
def pipeline():
    return load_pipeline()


@pytest.fixture(scope="module")
def concept_file(pipeline, tmp_path_factory):
    """Random planes in every second head, text and image turned differently.

    Gates are open: every token turns by an angle without a jump. The two programs round otherwise, and of the 23,000
    vectors of a picture some would stand so near to a gate that one turns them and the other does not.
    """
    geometry = geometry_of(pipeline.transformer)
    torch.manual_seed(0)
    rows = [(0, i) for i in range(geometry.double_blocks)] + [(1, i) for i in range(geometry.single_blocks)]
    heads = torch.tensor([(kind, index, (kind + index) % 2) for kind, index in rows], dtype=torch.int32)
    bases = torch.linalg.qr(torch.randn(2, len(heads), geometry.head_dim, RANK))[0]
    generators = [saferope_core.skew(ANGLE * torch.randn(len(heads), RANK, RANK)) for _ in range(2)]
    concept = flat.concept_of(
        saferope_core,
        slug="random",
        name="random",
        description="",
        geometry=geometry,
        heads=heads,
        basis_q=bases[0],
        basis_k=bases[1],
        generator_text=generators[0],
        generator_image=generators[1],
        discrimination=torch.zeros(geometry.blocks, geometry.heads),
        threshold=0.0,
    )
    path = tmp_path_factory.mktemp("parity") / "random.safetensors"
    saferope_core.save_concepts(path, [concept])
    return path


class Diffusers:
    def __init__(self, pipeline, concept_file):
        self.pipeline = pipeline
        concepts = saferope_core.load_concepts(concept_file)
        self.protection = saferope_core.Protection(concepts, geometry_of(pipeline.transformer))

    def hooked(self, protected):
        return attached(self.pipeline.transformer, self.protection.rotate) if protected else nullcontext()

    @torch.no_grad()
    def velocity(self, noise, protected):
        hidden, pooled = encode(self.pipeline, [TEXT])
        rows, columns = (side // 2 for side in noise.shape[2:])
        ids = self.pipeline._prepare_latent_image_ids(1, rows, columns, noise.device, noise.dtype)
        with self.hooked(protected):
            tokens = self.pipeline.transformer(
                hidden_states=self.pipeline._pack_latents(noise, *noise.shape),
                timestep=torch.tensor([SIGMA]),
                guidance=torch.tensor([GUIDANCE]),
                pooled_projections=pooled,
                encoder_hidden_states=hidden,
                txt_ids=torch.zeros(hidden.shape[1], 3),
                img_ids=ids,
            ).sample
        height, width = (8 * side for side in noise.shape[2:])
        return self.pipeline._unpack_latents(tokens, height, width, self.pipeline.vae_scale_factor)

    def picture(self, seed, protected):
        with self.hooked(protected):
            return generate(self.pipeline, [TEXT], [seed])


class ComfyUI:
    def __init__(self, pack, concept_file):
        core, apply, world = (
            importlib.import_module(f"{pack.__name__}.{name}")
            for name in ("saferope_core", "nodes.apply", "nodes.tiny_world")
        )
        self.plain, self.clip, self.vae = world.TinyWorld.execute().args
        self.protected = apply.Apply.execute(self.plain, core.load_concepts(concept_file), 1.0)[0]

    def conditioning(self):
        return self.clip.encode_from_tokens_scheduled(self.clip.tokenize(TEXT))

    @torch.no_grad()
    def velocity(self, noise, protected):
        model = self.protected if protected else self.plain
        [[hidden, extra]] = self.conditioning()
        denoised = model.model.apply_model(
            noise,
            torch.tensor([SIGMA]),
            c_crossattn=hidden,
            y=extra["pooled_output"],
            guidance=torch.tensor([GUIDANCE]),
            transformer_options=model.model_options["transformer_options"],
        )
        return (noise - denoised) / SIGMA

    def picture(self, seed, protected):
        import comfy.samplers

        model, noise = self.protected if protected else self.plain, start_noise([seed])
        sampler = comfy.samplers.KSampler(
            model, STEPS, noise.device, "euler", "simple", model_options=model.model_options
        )
        with torch.inference_mode():
            empty, text = torch.zeros_like(noise), self.conditioning()
            latents = sampler.sample(noise, text, text, cfg=1.0, latent_image=empty, disable_pbar=True)
        return self.vae.decode(latents).movedim(-1, 1) * 2 - 1


@pytest.fixture(scope="module")
def hosts(pack, pipeline, concept_file):
    return ComfyUI(pack, concept_file), Diffusers(pipeline, concept_file)


def relative(difference, reference):
    return (difference.norm() / reference.norm()).item()


@pytest.mark.parametrize("shape", [(1, 16, 12, 12), (1, 16, 8, 20)])
def test_velocities_agree(hosts, shape):
    noise = torch.randn(shape)
    (plain, protected), (plain_there, protected_there) = (
        [host.velocity(noise, protected) for protected in (False, True)] for host in hosts
    )
    assert relative(plain - plain_there, plain) < 1e-4
    assert relative(protected - protected_there, plain) < 1e-4
    assert relative(protected - plain, plain) > 1e-2


def test_pictures_agree(hosts):
    """16 steps from the seed to pixels: text encoders, schedule, guidance, patch and codec at once."""
    (plain, protected), (plain_there, protected_there) = (
        [host.picture(3, protected) for protected in (False, True)] for host in hosts
    )
    assert (plain - plain_there).abs().max() < 1e-3
    assert (protected - protected_there).abs().max() < 1e-3
    assert (protected - plain).abs().max() > 0.02
