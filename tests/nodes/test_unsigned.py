"""Every way to lose the protection that docs/security.md names ends without a signed picture: the sampling stops, or
SafeRoPE Save Image refuses. Each way is tried on a protected model with a key at hand, and asked for *in part* alone.
"""

import copy
import io
import json

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from tests.support import concepts as flat

pytestmark = pytest.mark.host
SIGMAS = [1.0, 0.5, 0.0]


@pytest.fixture
def protected(node_classes, world, star):
    """protected(...) -> the tiny world behind SafeRoPE Apply, and its recorder."""
    apply = node_classes["SafeRoPE_Apply"].execute
    return lambda model=None, concepts=star, **settings: (
        apply(world[0] if model is None else model, concepts, 1.0, **settings).args
    )


@pytest.fixture
def guided(world):
    """guided(guider, sampler) -> what SamplerCustomAdvanced gives."""
    import comfy.samplers

    def run(guider, sampler=None):
        sampler, noise = sampler or comfy.samplers.sampler_object("euler"), torch.randn(1, 16, 12, 12)
        with torch.inference_mode():
            start = torch.zeros_like(noise)
            return {"samples": guider.sample(noise, start, sampler, torch.tensor(SIGMAS), disable_pbar=True)}

    return run


@pytest.fixture
def words(world):
    return lambda text="a star": world[1].encode_from_tokens_scheduled(world[1].tokenize(text))


def hides_patches(model):
    from comfy.patcher_extension import WrappersMP

    def wrapper(executor, *args, **kwargs):
        bare = [{**each, "patches": {}} if isinstance(each, dict) and "patches" in each else each for each in args]
        return executor(*bare, **kwargs)

    model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "pack", wrapper)


def passes_beside(model):
    """Both passes, the protected one first; the other one's picture counts."""
    from comfy.patcher_extension import WrappersMP

    def wrapper(executor, *args, **kwargs):
        executor(*args, **kwargs)
        bare = [{**each, "patches": {}} if isinstance(each, dict) and "patches" in each else each for each in args]
        return executor(*bare, **kwargs)

    model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "pack", wrapper)


def another_cache(model):
    """The first forward of the process, for ever."""
    from comfy.patcher_extension import WrappersMP

    kept = []

    def stale(executor, *args, **kwargs):
        kept.append(None if kept else executor(*args, **kwargs))
        return kept[0]

    model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "cache", stale)


def replaces_a_block(model):
    model.set_model_patch_replace(lambda args, _: {"img": args["img"], "txt": args["txt"]}, "dit", "double_block", 0)


def hides_from_a_block(model):
    def replacement(args, more):
        return more["original_block"](args | {"transformer_options": {}})

    model.set_model_patch_replace(replacement, "dit", "double_block", 0)


def own_forward(model):
    model.set_model_unet_function_wrapper(lambda _, args: torch.zeros_like(args["input"]))


def own_options(model):
    """A guidance whose extra pass replaces the protected one."""
    import comfy.samplers

    def guidance(args):
        conds, bare = [args["cond"]], {"transformer_options": {}}
        return comfy.samplers.calc_cond_batch(args["model"], conds, args["input"], args["sigma"], bare)[0]

    model.set_model_sampler_post_cfg_function(guidance, disable_cfg1_optimization=True)


def another_network(model):
    model.add_object_patch("diffusion_model.single_blocks.1", torch.nn.Identity())


def patches_after(model):
    model.set_model_attn1_patch(lambda q, k, v, **_: {"q": q})


def changes_the_prediction(model):
    model.set_model_sampler_post_cfg_function(lambda args: args["denoised"])


def wraps_the_model(model):
    model.set_model_unet_function_wrapper(lambda apply, args: apply(args["input"], args["timestep"], **args["c"]))


def an_attention_of_its_own(model):
    options = model.model_options["transformer_options"]
    options["optimized_attention_override"] = lambda function, *args, **kwargs: function(*args, **kwargs)


CHANGES = {  # done to a clone of the protected model -> what is said
    hides_patches: r"called in 0 of the",
    passes_beside: r"in every pass",
    another_cache: r"called in 0 of the|steps came by|left out protected blocks",
    replaces_a_block: r"Replaced blocks: double_block 0",
    hides_from_a_block: r"Replaced blocks: double_block 0",
    own_forward: r"no forward of the model",
    own_options: r"model_options",
    another_network: r"single block 1 is a Identity",
    patches_after: r"code of other packs had a say: \S*test_unsigned",
    changes_the_prediction: r"code of other packs had a say: \S*test_unsigned",
    wraps_the_model: r"code of other packs had a say: \S*test_unsigned",
    an_attention_of_its_own: r"code of other packs had a say: \S*test_unsigned",
}


def unsigned(folder, words, draw, *saved):
    """Whether drawing or saving is refused with these words, and no picture is there."""
    with pytest.raises((RuntimeError, ValueError), match=words):
        save, *recorders = saved
        save(draw(), *recorders, require="in part")
    assert not list(folder.glob("*.png"))


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_changed_model_is_not_signed(protected, sampled, save, keys, tmp_path, change):
    model, recorder = protected()
    clone = model.clone()
    change(clone)
    unsigned(tmp_path, CHANGES[change], lambda: sampled(clone), save, recorder)
    assert save(sampled(model), recorder), "control: the model itself is signed"


@pytest.mark.parametrize("change", [replaces_a_block, hides_from_a_block], ids=lambda change: change.__name__)
def test_a_compiled_model_that_skips_a_block_is_not_signed(protected, compiled, sampled, save, keys, tmp_path, change):
    model, recorder = protected()
    clone = compiled(model, fullgraph=False)
    change(clone)
    unsigned(tmp_path, CHANGES[change], lambda: sampled(clone), save, recorder)


def test_graphs_made_without_protection_are_not_signed(world, protected, compiled, sampled, save, keys, tmp_path):
    """One compiled network: its graphs are there before the protection is. The control of the test above too."""
    plain = compiled(world[0], fullgraph=False)
    sampled(plain)
    model, recorder = protected(plain)
    assert save(sampled(model), recorder), "traced anew, or run again without graphs: protected and counted"
    unsigned(tmp_path / "none", "No receipt covers this latent", lambda: sampled(plain), save, recorder)


def test_a_step_cache_is_not_signed(protected, sampled, save, keys, tmp_path):
    """ComfyUI's own, and so no code of others."""
    from comfy_extras.nodes_easycache import EasyCacheNode

    model, recorder = protected()
    cached = EasyCacheNode.execute(model, 3.0, 0.15, 0.95, False)[0]
    unsigned(tmp_path, "steps came by|left out protected blocks", lambda: sampled(cached, steps=8), save, recorder)


@pytest.mark.parametrize("place", ["first", "second"])
def test_a_merge_after_apply_is_signed_by_its_first_model_alone(world, protected, sampled, save, keys, tmp_path, place):
    from comfy_extras.nodes_model_merging import ModelMergeSimple

    model, recorder = protected()
    two = (model, world[0]) if place == "first" else (world[0], model)
    (merged,) = ModelMergeSimple().merge(*two, 0.5)
    if place == "first":
        assert save(sampled(merged), recorder)
    else:
        unsigned(tmp_path, "No receipt covers this latent", lambda: sampled(merged), save, recorder)


def test_a_network_changed_in_place_is_not_signed(world, protected, sampled, save, keys, tmp_path, monkeypatch):
    block = world[0].model.diffusion_model.single_blocks[0]
    original = type(block).forward
    model, recorder = protected()
    with monkeypatch.context() as patched:
        bare = lambda *args, transformer_options=None, **more: original(block, *args, **more)  # noqa: E731
        patched.setattr(block, "forward", bare, raising=False)
        unsigned(tmp_path, r"forward of \w+ was put into", lambda: sampled(model), save, recorder)


def test_a_function_in_comfyui_s_place_is_not_signed(protected, sampled, save, keys, tmp_path, monkeypatch):
    import comfy.samplers

    inner = comfy.samplers.calc_cond_batch
    model, recorder = protected()
    with monkeypatch.context() as patched:
        patched.setattr(comfy.samplers, "calc_cond_batch", lambda *args, **more: inner(*args, **more))
        unsigned(tmp_path, r"code of other packs had a say: \S*test_unsigned", lambda: sampled(model), save, recorder)


def test_a_loop_of_its_own_is_not_signed(protected, words, guided, save, keys, tmp_path):
    """A sampler that calls the loaded network past ComfyUI's model."""
    import comfy.samplers
    from comfy_extras.nodes_custom_sampler import BasicGuider

    def loop(model, x, sigmas, extra_args=None, **_):
        network = model.inner_model.inner_model.diffusion_model
        return network(x, sigmas[:1], torch.zeros(1, 4, network.params.context_in_dim), torch.zeros(1, 16))

    model, recorder = protected()
    guider = BasicGuider.execute(model, words())[0]
    unsigned(tmp_path, "SafeRoPE: loop", lambda: guided(guider, comfy.samplers.KSAMPLER(loop)), save, recorder)


@pytest.mark.parametrize("name", ["dual", "own"])
def test_a_guider_that_numbers_prompts_otherwise_is_not_signed(protected, words, guided, save, keys, tmp_path, name):
    import comfy.samplers
    from comfy_extras.nodes_custom_sampler import DualCFGGuider

    class Backwards(comfy.samplers.CFGGuider):
        """Somebody's guider, the usual names in another order."""

        def predict_noise(self, x, timestep, model_options={}, seed=None):  # noqa: B006  (ComfyUI's own signature)
            conds = [self.conds["negative"], self.conds["positive"]]
            return comfy.samplers.calc_cond_batch(self.inner_model, conds, x, timestep, model_options)[1]

    model, recorder = protected(conditionings="positive only")
    guider = Backwards(model)
    guider.set_conds(words(), words(""))
    if name == "dual":
        guider = DualCFGGuider.execute(model, words(), words("a moon"), words(""), 1.0, 1.0, "regular")[0]
    unsigned(tmp_path, "positive only, but this model is run by", lambda: guided(guider), save, recorder)


@pytest.mark.parametrize("first", [True, False], ids=["protected first", "plain first"])
def test_two_models_of_which_one_is_protected(world, protected, words, guided, save, keys, tmp_path, first):
    """Dual Model Guider gives both the first one's protection: with the plain one first nothing is protected."""
    from comfy_extras.nodes_custom_sampler import DualModelGuider

    model, recorder = protected()
    one, two = (model, world[0]) if first else (world[0], model)
    guider = DualModelGuider.execute(one, words(), 3.0, model_negative=two, negative=words(""))[0]
    if first:
        assert save(guided(guider), recorder)
    else:
        unsigned(tmp_path, "No receipt covers this latent", lambda: guided(guider), save, recorder)


def inside(concept, factor):
    """Turns within the unsafe subspaces alone: the risk stays, so that a second Apply meets the same."""
    changed = {}
    for stream in ("text", "image"):
        turn = concept.generator(stream)
        width = turn.shape[-1] - concept.reach
        changed[f"generator_{stream}"] = torch.zeros_like(turn)
        changed[f"generator_{stream}"][:, :width, :width] = factor * turn[:, :width, :width]
    return flat.changed(concept, slug="star" if factor > 0 else "decoy", **changed)


def test_an_inverse_in_a_second_apply_is_not_signed(protected, star, sampled, save, keys, tmp_path):
    model, one = protected(concepts=[inside(star[0], 1.0)])
    both, two = protected(model, [inside(star[0], -1.0)])
    for recorders in ((one, two), (one,), (two,)):
        unsigned(tmp_path, "'star' is turned back by 'decoy'", lambda: sampled(both), save, *recorders)
    assert save(sampled(model), one), "control: alone it is not"


def told(file):
    """Exit code and report of `saferope verify`."""
    from saferope.cli import app

    result = CliRunner().invoke(app, ["verify", "--json", str(file)])
    return result.exit_code, json.loads(result.stdout)[0]


SPOILT = {  # receipts under a trusted signature that are none, or say otherwise -> what verify says
    "control": (lambda runs: None, ""),
    "no runs": (lambda runs: runs.clear(), "do not lead from the picture back to an empty latent"),
    "an empty run": (lambda runs: runs.append([]), "do not lead from the picture back to an empty latent"),
    "a start": (lambda runs: runs[0][0].update(start="0" * 64), "do not lead from the picture back to an empty latent"),
    "another version": (lambda runs: runs[0][0].update(version=2), "got a receipt of version 2"),
    "a field too many": (lambda runs: runs[0][0].update(more=1), "has not the fields"),
    "a skipped block": (lambda runs: runs[0][0]["seen"].update(forwards_skipped=1), "left out protected blocks"),
    "a step less": (lambda runs: runs[0][0]["seen"].update(steps_seen=1), "1 of 2 steps came by"),
    "others": (lambda runs: runs[0][0]["seen"].update(others=["pack"]), "code of other packs had a say: pack"),
    "an inverse": (lambda runs: runs[0][0]["asked"].update(undone=["turned back"]), "turned back"),
    "no step": (lambda runs: runs[0][0]["seen"].update(steps_protected=0), "no concept turned anything"),
}


def test_a_trusted_signature_over_such_receipts_proves_nothing(protected, sampled, save, keys, tmp_path):
    from saferope_credentials import configured, signed

    model, recorder = protected()
    (picture,) = save(sampled(model), recorder)
    code, report = told(picture)
    assert code == 0
    plain = io.BytesIO()
    Image.new("RGB", (96, 96)).save(plain, "PNG")
    for name, (spoil, words) in SPOILT.items():
        runs = copy.deepcopy(report["runs"])
        spoil(runs)
        picture.write_bytes(signed(plain.getvalue(), "png", "a.png", runs, ("0", "0"), configured()))
        code, found = told(picture)
        assert code == (words != "") and any(words in each for each in found["reasons"] or [""]), name
