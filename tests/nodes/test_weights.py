"""Right whatever the weights are: LoRAs, outside of memory, fp8, dequantised in use. The reference is that
of layouts."""

import pytest
import torch

from tests.support.layouts import TEXT, prompt

pytestmark = pytest.mark.host


def lora(flux):
    """A small LoRA file's tensors on one layer of each kind of block."""
    tensors = {}
    for name in ("double_blocks.0.img_attn.qkv", "single_blocks.1.linear1"):
        layer = flux.model.diffusion_model.get_submodule(name)
        tensors[f"diffusion_model.{name}.lora_down.weight"] = torch.randn(2, layer.in_features) * 0.1
        tensors[f"diffusion_model.{name}.lora_up.weight"] = torch.randn(layer.out_features, 2) * 0.1
    return tensors


@pytest.fixture
def with_lora(comfy, flux):
    import comfy.sd

    tensors = lora(flux)
    return lambda model: comfy.sd.load_lora_for_models(model, None, tensors, 1.0, 0.0)[0]


@pytest.mark.parametrize("order", ["LoRA first", "Apply first"])
def test_loras(check, flux, run, with_lora, order):
    before = run(flux, prompt())
    assert not torch.allclose(run(with_lora(flux), prompt()), before, atol=1e-2), "the LoRA was to do something"
    if order == "LoRA first":
        check(with_lora(flux), {TEXT + 16: TEXT}, prompt())
    else:
        check(flux, {TEXT + 16: TEXT}, prompt(), node=with_lora)
    assert torch.equal(run(flux, prompt()), before), "weights are back"


def test_weights_left_outside_of_memory(check, comfy, make_flux, with_lora, monkeypatch):
    """Low VRAM: layers cast their weights, and add the LoRA's, each time they run. Forced, since a CPU has but one."""
    import comfy.model_patcher

    load, partial = comfy.model_patcher.ModelPatcher.load, []

    def little(self, device_to=None, lowvram_model_memory=0, force_patch_weights=False, full_load=False):
        load(self, device_to, 1, force_patch_weights, full_load=False)
        partial.append(self.model.model_lowvram)

    monkeypatch.setattr(comfy.model_patcher.ModelPatcher, "load", little)
    model = with_lora(make_flux())
    check(model, {TEXT + 16: TEXT}, prompt())
    assert any(partial)
    assert model.model.diffusion_model.single_blocks[1].linear1.weight_function


DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("cast", DTYPES)
def test_fp8_weights(check, make_flux, cast):
    """Queries come in the dtype that is computed with, whatever the weights are stored in."""
    model = make_flux(dtype=torch.float8_e4m3fn, cast=cast)
    assert model.model.diffusion_model.double_blocks[0].img_attn.qkv.weight.dtype == torch.float8_e4m3fn
    reference = check(model, {TEXT + 16: TEXT}, prompt())
    assert {dtype for *_, dtype in reference.seen} == {cast}


def test_weights_that_are_dequantised_as_they_are_used(check, comfy, make_flux):
    """GGUF: another class of layers, whose weights are blocks of small integers until they run."""
    import comfy.ops

    class Quantised(comfy.ops.manual_cast):
        class Linear(comfy.ops.manual_cast.Linear):
            def quantise(self):
                scale = self.weight.detach().abs().amax(1, keepdim=True) / 127
                numbers = (self.weight.detach() / scale).round().to(torch.int8)
                self.register_buffer("scale", scale)
                self.weight = torch.nn.Parameter(numbers, requires_grad=False)

            def forward(self, x):
                return torch.nn.functional.linear(x, self.weight.to(x) * self.scale.to(x), self.bias)

    model = make_flux(operations=Quantised)
    for layer in model.model.modules():
        if isinstance(layer, Quantised.Linear):
            layer.quantise()
    check(model, {TEXT + 16: TEXT}, prompt())
