"""Looking at prompts, and listening that fails closed: on the tiny world inside a real ComfyUI."""

from __future__ import annotations

import importlib

import pytest
import torch

pytestmark = pytest.mark.host
TEXTS = ("a red [star] in the center", "a blue [star] , left , navy wall"), ("a red heart", "a blue ring , left")


@pytest.fixture(scope="module")
def gather(pack):
    return importlib.import_module(f"{pack.__name__}.nodes.host.gather")


@pytest.fixture(scope="module")
def prompts(pack):
    return importlib.import_module(f"{pack.__name__}.nodes.host.prompts")


@pytest.fixture(scope="module")
def tiny(node_classes):
    return node_classes["SafeRoPE_TinyWorld"].execute().result


@pytest.fixture
def node(node_classes, tiny):
    """node(model) runs the node on two unsafe and two safe prompts."""

    def run(model=tiny[0], **settings):
        with torch.inference_mode():
            unsafe, safe = ("\n".join(texts) for texts in TEXTS)
            return node_classes["SafeRoPE_CalibrateConcept"].execute(model, tiny[1], "Star", unsafe, safe, **settings)

    return run


def test_both_sides_start_from_the_same_noises(gather, prompts, tiny):
    chosen = [prompts.Prompt("unsafe", "a star", (2, 6)), *[prompts.Prompt("benign", text) for text in TEXTS[1]]]
    with torch.inference_mode():
        looks = gather.looks_of(tiny[1], chosen, rounds=3, seed=10)
    assert [look.seed for look in looks if look.side == "unsafe"] == [10, 11, 12]
    assert [look.seed for look in looks if look.side == "benign"] == [10, 12, 14, 11, 13, 15], "prompt by prompt"
    assert [len(some) for some in gather.batches(looks, 4)] == [3, 4, 2], "sides are never mixed"
    assert looks[0].subject.nonzero().tolist() == [[0, 1]] and looks[0].used.sum() == 3
    again = gather.seeded_noise([11, 10], (2, 3))
    assert torch.equal(again[0], gather.seeded_noise([11], (2, 3))[0]) and not torch.equal(*again)


def test_what_is_kept_fits_into_memory(gather, core):
    """As many as SAMPLE_BYTES hold and not one fewer, at most RESERVOIR."""
    assert gather.capacity(core.Geometry(2, 4, 2, 128)) == gather.RESERVOIR == 4096
    each = 4 * 2 * 57 * 24 * 128 * 2  # kinds, queries and keys, blocks, heads, numbers, bytes of bf16
    kept = gather.capacity(core.FLUX1)
    assert each * kept <= gather.SAMPLE_BYTES < each * (kept + 1)
    assert kept == 261, "of 700 MiB"


def test_progress_counts_to_its_end(node, comfy):
    import comfy.utils

    seen = []
    comfy.utils.set_progress_bar_global_hook(lambda value, total, *_, **__: seen.append((value, total)))
    try:
        node(timesteps="1, 0.8", rounds=2)
    finally:
        comfy.utils.set_progress_bar_global_hook(None)
    total = 4 * (1 + 2 * 3)  # four prompts: encoded, then two noises each at 1, 0.9 and 0.8
    assert seen[-1] == (total, total) and [value for value, _ in seen] == sorted(value for value, _ in seen)


def test_it_can_be_cancelled(gather, prompts, tiny, pack, monkeypatch):
    import comfy.model_management as management

    calls = []

    def tell(count):
        calls.append(count)
        management.interrupt_current_processing(True)

    network = importlib.import_module(f"{pack.__name__}.nodes.host.network")
    with torch.inference_mode(), pytest.raises(management.InterruptProcessingException):
        looks = gather.looks_of(tiny[1], prompts.read_prompts(TEXTS[0][0], "unsafe"), 1, 0)
        gather.gather(tiny[0], network.flux_geometry(tiny[0]), looks, (12, 12), 1, (1.0, 0.5), 3.5, tell)
    assert calls == [1]
    assert not management.processing_interrupted(), "the exception takes the flag down"


def test_a_replaced_block_is_noticed(node, tiny):
    model = tiny[0].clone()
    model.set_model_patch_replace(lambda args, more: {"img": args["img"], "txt": args["txt"]}, "dit", "double_block", 1)
    with pytest.raises(RuntimeError, match="heard queries and keys, before RoPE, of 5 of the model's 6 blocks"):
        node(model)


def test_sampling_that_is_left_out_is_noticed(node, tiny):
    from comfy.patcher_extension import WrappersMP

    model = tiny[0].clone()
    model.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, "skips", lambda executor, noise, *_, **__: noise)
    with pytest.raises(RuntimeError, match="asked at 0 of the 3 times at which it was to be heard"):
        node(model)


def test_listening_changes_nothing_and_leaves_nothing(node, tiny, sample_tiny):
    before = sample_tiny(tiny[0])
    patches = str(tiny[0].model_options)
    node()
    assert str(tiny[0].model_options) == patches
    assert torch.equal(sample_tiny(tiny[0]), before)


@pytest.fixture
def sample_tiny(comfy):
    import comfy.sample

    def run(model):
        text = [[torch.ones(1, 24, 64), {"pooled_output": torch.ones(1, 64)}]]
        noise = torch.randn(1, 16, 12, 12, generator=torch.Generator().manual_seed(0))
        with torch.inference_mode():
            return comfy.sample.sample(
                model, noise, 2, 1.0, "euler", "simple", text, text, torch.zeros_like(noise), disable_pbar=True
            )

    return run


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"timesteps": "0.5, 1"}, "timesteps: expected falling numbers"),
        ({"timesteps": "nan"}, "timesteps: expected"),
        ({"timesteps": "one"}, "timesteps: expected"),
        ({"angle": float("nan")}, "angle is nan, expected a number from 0 to 3.14"),
        ({"rank": 1}, "rank is 1"),
        ({"turned": "v"}, "turned is 'v', expected one of k, q, qk"),
    ],
)
def test_settings_out_of_range_are_refused(node, settings, message):
    with pytest.raises(ValueError, match=message):
        node(**settings)


def test_no_head_stops_with_the_numbers(node):
    with pytest.raises(ValueError, match=r"no head of flux: .* tells the concept apart; heads by Δ: .*largest"):
        node(cut=1.0, quantile=0.5)
