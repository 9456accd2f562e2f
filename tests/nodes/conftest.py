"""What the node tests share: a FLUX of random weights inside a real ComfyUI, concepts that fit it,
one way to sample."""

import asyncio
import copy
import importlib

import pytest
import torch

from tests.support import concepts as flat
from tests.support.layouts import CPU, Reference, latent
from tests.support.signing import keys, sampled, save, star, world  # noqa: F401  (fixtures)

RANK = 4
ANGLE = 10  # random vectors have an LRS of about RANK / 128: turn them visibly
STEPS = 4
TEXT, SIDE = 5, 8  # tokens of text; latent rows and columns, four of each to an image token


@pytest.fixture(scope="session")
def core(pack):
    """The pack's own copy of the core: its classes are not those of an installed `saferope_core`."""
    return importlib.import_module(f"{pack.__name__}.saferope_core")


@pytest.fixture(scope="session")
def node_classes(pack):
    """The pack's nodes by their ids, as ComfyUI asks for them; its folders are registered."""
    nodes = importlib.import_module(f"{pack.__name__}.nodes")

    async def load():
        extension = await nodes.comfy_entrypoint()
        await extension.on_load()
        return await extension.get_node_list()

    return {node.GET_SCHEMA().node_id: node for node in asyncio.run(load())}


@pytest.fixture
def compiled(comfy):
    """As ComfyUI's TorchCompileModel, which drops the guards on what it hands to blocks; backend eager. No graph of
    another test is there.
    """
    torch._dynamo.reset()
    from comfy_api.torch_helpers import set_torch_compile_wrapper
    from comfy_extras.nodes_torch_compile import skip_torch_compile_dict

    def node(model, fullgraph=True):
        clone = model.clone()
        options = {"guard_filter_fn": skip_torch_compile_dict}
        set_torch_compile_wrapper(clone, backend="eager", options=options, fullgraph=fullgraph)
        return clone

    return node


@pytest.fixture(scope="module", autouse=True)
def _no_models_of_the_last_file(comfy):
    """ComfyUI takes a model for leaked whose node's output is gone, and collects garbage at every later sampling for
    it.

    Errors keep such models beyond their tests: without this, those of test_calibrate.py took eight times as long.
    """
    import comfy.model_management

    yield
    comfy.model_management.unload_all_models()
    comfy.model_management.current_loaded_models.clear()


@pytest.fixture(scope="session")
def tiny(core):
    """The geometry of `flux`. ComfyUI knows FLUX by axes of 16, 56 and 56: heads of 128."""
    return core.Geometry(2, 2, 2, 128)


@pytest.fixture(scope="session")
def make_concept(core, tiny):
    """make_concept(geometry, slug, seed): random planes in the first head of every block; gates open, every token
    turns.
    """

    def make(geometry=tiny, slug="star", seed=0, **changes):
        torch.manual_seed(seed)
        rows = [(0, i) for i in range(geometry.double_blocks)] + [(1, i) for i in range(geometry.single_blocks)]
        heads = torch.tensor([(kind, index, 0) for kind, index in rows], dtype=torch.int32)
        bases = torch.linalg.qr(torch.randn(2, len(heads), geometry.head_dim, RANK))[0]
        generators = [core.skew(ANGLE * torch.randn(len(heads), RANK, RANK)) for _ in range(2)]
        fields = {
            "slug": slug,
            "name": slug,
            "description": "random",
            "geometry": geometry,
            "heads": heads,
            "basis_q": bases[0],
            "basis_k": bases[1],
            "generator_text": generators[0],
            "generator_image": generators[1],
            "discrimination": torch.zeros(geometry.blocks, geometry.heads),
            "threshold": 0.0,
        }
        return flat.concept_of(core, **fields | changes)

    return make


@pytest.fixture(scope="session")
def concept(make_concept):
    return make_concept()


@pytest.fixture(scope="session")
def make_flux(comfy, tiny):
    """make_flux(geometry, seed, ...) -> a FLUX ModelPatcher of random weights, as ComfyUI's loaders make it.

    dtype: of the weights, computed with in `cast`; operations: the classes of its layers; `config`: more of FluxParams,
    `family`: "Flux" or "Flux2".
    """
    import comfy.model_base
    import comfy.model_patcher
    import comfy.ops
    import comfy.supported_models

    def make(geometry=tiny, seed=0, dtype=torch.float32, cast=None, operations=None, family="Flux", **config):
        config = getattr(comfy.supported_models, family)(_params(geometry) | config)
        config.set_inference_dtype(dtype, cast)
        config.custom_operations = operations or comfy.ops.manual_cast
        model = getattr(comfy.model_base, family)(config, device=torch.device("cpu"))
        torch.manual_seed(seed)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                value = torch.empty(parameter.shape)
                torch.nn.init.ones_(value) if "norm" in name else torch.nn.init.normal_(value, std=0.06)
                parameter.copy_(value)
        cpu = torch.device("cpu")
        return comfy.model_patcher.ModelPatcher(model, load_device=cpu, offload_device=cpu)

    return make


def _params(geometry):
    return {
        "image_model": "flux",
        "in_channels": 16,
        "out_channels": 16,
        "vec_in_dim": 16,
        "context_in_dim": 32,
        "hidden_size": geometry.heads * geometry.head_dim,
        "mlp_ratio": 1.0,
        "num_heads": geometry.heads,
        "depth": geometry.double_blocks,
        "depth_single_blocks": geometry.single_blocks,
        "axes_dim": [16, 56, 56],
        "theta": 10000,
        "patch_size": 2,
        "qkv_bias": True,
        "guidance_embed": True,
        "txt_ids_dims": [],
    }


@pytest.fixture(scope="session")
def flux(make_flux):
    """A FLUX ModelPatcher of random weights."""
    return make_flux()


@pytest.fixture(scope="session")
def apply(node_classes):
    """apply(model, [concept], strength, ...) -> the protected model."""
    node = node_classes["SafeRoPE_Apply"]
    return lambda *args, **kwargs: node.execute(*args, **kwargs)[0]


@pytest.fixture(scope="session")
def plain(flux, sample):
    """What the unprotected model samples."""
    return sample(flux)


@pytest.fixture(scope="session")
def sample(comfy):
    """sample(model) -> latents [1, 16, 8, 8] after a few Euler steps from fixed noise, text and pooled vector."""
    import comfy.samplers

    def run(model, steps=STEPS, cfg=1.0, text=TEXT):
        random = torch.Generator().manual_seed(1)

        def conditioning():
            hidden, pooled = (torch.randn(shape, generator=random) for shape in ((1, text, 32), (1, 16)))
            return [[hidden, {"pooled_output": pooled}]]

        noise = torch.randn(1, 16, SIDE, SIDE, generator=random)
        sampler = comfy.samplers.KSampler(
            model, steps, torch.device("cpu"), "euler", "simple", model_options=model.model_options
        )
        with torch.inference_mode():
            return sampler.sample(
                noise, conditioning(), conditioning(), cfg=cfg, latent_image=torch.zeros_like(noise), disable_pbar=True
            )

    return run


@pytest.fixture
def run(comfy):
    """run(model, positive, negative, noise, ...) -> latents of two steps."""
    import comfy.samplers

    def sample(model, positive, negative=None, noise=None, cfg=1.0, steps=2, denoise=1.0, start=None, mask=None):
        noise = latent() if noise is None else noise
        start = torch.zeros_like(noise) if start is None else start
        sampler = comfy.samplers.KSampler(
            model, steps, CPU, "euler", "simple", denoise=denoise, model_options=model.model_options
        )
        arguments = {"cfg": cfg, "latent_image": start, "denoise_mask": mask, "disable_pbar": True}
        with torch.inference_mode():
            return sampler.sample(noise, copy.copy(positive), copy.copy(negative or positive), **arguments)

    return sample


@pytest.fixture
def check(apply, core, run, concept):
    """check(model, texts, positive, ...) -> the reference: protected equals it, and differs from the unprotected."""

    def compare(model, texts, *args, node=lambda model: model, concept=concept, geometry=None, exact=True, **kwargs):
        reference = Reference(core.Protection([concept], geometry or concept.geometry), texts)
        expected = model.clone()
        expected.set_model_attn1_patch(reference)
        expected, protected = (run(node(each), *args, **kwargs) for each in (expected, apply(model, [concept], 1.0)))
        torch.testing.assert_close(protected, expected, **({"rtol": 0, "atol": 0} if exact else {}))
        plain = run(node(model), *args, **kwargs)
        assert expected.isfinite().all()
        assert (expected - plain).norm() > 1e-3 * plain.norm(), "nothing to tell them apart by"
        return reference

    return compare
