"""A network that a node changed in place: the run is refused, the error names whose change it is and says how to be rid
of it.

The changes are constructed after public packs: PuLID sets forward_orig on the loaded network, Fluxtapoz its class, NAG
and older caches the methods of ComfyUI's own classes.
"""

import functools
import types

import pytest
import torch

pytestmark = pytest.mark.host

FREED = 'free the model.*"Unload Models and Execution Cache".*or restart'


def forward_without_options(self, *args, transformer_options=None, **kwargs):
    """FLUX's own forward, but its blocks get no transformer_options."""
    from comfy.ldm.flux.model import Flux

    return Flux.forward_orig(self, *args, transformer_options={}, **kwargs)


def forward_with_another_span(self, *args, transformer_options=None, **kwargs):
    """FLUX's own forward, but its single blocks are told of text tokens that they do not have."""
    from comfy.ldm.flux.model import Flux

    def post_input(args):
        return {**args, "img": args["img"][:, 1:], "img_ids": None}  # without positions

    patches = transformer_options["patches"] | {"post_input": [post_input]}
    return Flux.forward_orig(self, *args, transformer_options=transformer_options | {"patches": patches}, **kwargs)


def on_the_network(network):
    network.forward_orig = types.MethodType(forward_without_options, network)


def disguised(network):
    """functools.wraps makes a function say that it is ComfyUI's."""
    from comfy.ldm.flux.model import Flux

    network.forward_orig = types.MethodType(functools.wraps(Flux.forward_orig)(forward_without_options), network)


def partial(network):
    network.forward_orig = functools.partial(forward_without_options, network)


def another_class(network):
    network.__class__ = type("Inject", (type(network),), {"forward_orig": forward_without_options})


def a_block(network):
    block, other = network.single_blocks[0], network.single_blocks[1]
    other.forward = other.forward  # what ComfyUI leaves of an object patch is no change
    original = type(block).forward
    block.forward = lambda *args, transformer_options=None, **kwargs: original(block, *args, **kwargs)


def a_block_s_class(network):
    block = network.double_blocks[1]

    def forward(self, *args, transformer_options=None, **kwargs):
        return super(block.__class__, self).forward(*args, **kwargs)

    block.__class__ = type("Inject", (type(block),), {"forward": forward})


CHANGES = {
    on_the_network: "forward_orig of Flux was put into the loaded model",
    disguised: "forward_orig of Flux was put into",
    partial: "forward_orig of Flux was put into",
    another_class: "The class Inject was put into",
    a_block: "forward of SingleStreamBlock was put into",
    a_block_s_class: "The class Inject was put into",
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("apply_first", [False, True])
def test_who_changed_the_network_is_named(apply, make_flux, sample, concept, change, apply_first):
    base = make_flux()
    model = apply(base, [concept], 1.0) if apply_first else base
    change(base.model.diffusion_model)
    model = model if apply_first else apply(base, [concept], 1.0)
    with pytest.raises(RuntimeError, match=rf"{CHANGES[change]} .*by \S*test_in_place: remove that node. .*{FREED}"):
        sample(model)


def test_the_change_stays_until_the_model_is_freed(apply, make_flux, sample, plain, concept):
    """As when the node is taken out of the workflow: ComfyUI keeps the loaded model, and with it the change."""
    base = make_flux()
    on_the_network(base.model.diffusion_model)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=rf"test_in_place.*{FREED}"):
            sample(apply(base.clone(), [concept], 1.0))
    assert torch.equal(sample(base), plain), "and unprotected it paints on"
    assert not torch.allclose(sample(apply(make_flux(), [concept], 1.0)), plain, atol=1e-2)


def test_who_reaches_the_patch_in_another_way_is_named(apply, make_flux, sample, concept):
    base = make_flux()
    network = base.model.diffusion_model
    network.forward_orig = types.MethodType(forward_with_another_span, network)
    with pytest.raises(RuntimeError, match=rf"without rotary positions.*forward_orig of Flux .*test_in_place.*{FREED}"):
        sample(apply(base, [concept], 1.0))


def test_who_changed_comfyui_s_own_class_is_named(apply, comfy, make_flux, sample, concept, monkeypatch):
    from comfy.ldm.flux.layers import SingleStreamBlock

    original = SingleStreamBlock.forward

    def forward(self, *args, transformer_options=None, **kwargs):
        return original(self, *args, **kwargs)

    monkeypatch.setattr(SingleStreamBlock, "forward", forward)
    message = r"SingleStreamBlock.forward was replaced for all models by \S*test_in_place: .*restart ComfyUI"
    with pytest.raises(RuntimeError, match=message):
        sample(apply(make_flux(), [concept], 1.0))


def test_a_network_of_another_kind_is_named(apply, make_flux, sample, concept):
    class Foreign(torch.nn.Module):
        dtype = torch.float32

    base = make_flux()
    model = apply(base, [concept], 1.0)
    base.model.diffusion_model.__class__ = Foreign
    with pytest.raises(RuntimeError, match=rf"a Foreign by \S*test_in_place, .*{FREED}"):
        sample(model)
    with pytest.raises(ValueError, match=r"a Foreign by \S*test_in_place model, whose .* Expected, .*FLUX"):
        apply(base, [concept], 1.0)


def test_nobody_is_blamed_for_an_unchanged_network(pack, apply, flux, sample, concept):
    """Also while it is loaded and guarded, compiled, and after ComfyUI put another node's object patch back."""
    changes = pack.nodes.host.network.changes_in_place
    assert changes(flux.model.diffusion_model) == [] == changes(None)
    model = apply(flux, [concept], 1.0)
    model.add_object_patch(
        "diffusion_model.double_blocks.0.forward", flux.model.diffusion_model.double_blocks[0].forward
    )
    sample(model)
    assert (
        changes(flux.model.diffusion_model) == [] == changes(torch.compile(flux.model.diffusion_model, backend="eager"))
    )
    sample(flux)
    assert changes(flux.model.diffusion_model) == []
