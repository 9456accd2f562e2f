"""The public door for Python: `from saferope import protect`, on the tiny world and on a random FLUX, with real
diffusers.
"""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline

import saferope
from dev.comfyui import ROOT
from saferope import load_concepts, protect
from saferope_core import Geometry
from tests.support import concepts as flat
from tests.support.diffusers_models import TINY
from tinyworld.model import TEXT_LENGTH, WEIGHTS, load_pipeline

STAR = WEIGHTS.parent / "concepts" / "star.safetensors"
PAGE = ROOT / "docs" / "python.md"
PROMPT = "a red star in the center on a pink background"
FEW = {"num_inference_steps": 4, "height": 96, "width": 96, "max_sequence_length": TEXT_LENGTH, "output_type": "np"}


@pytest.fixture(scope="module")
def pipe():
    pipe = load_pipeline()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe):
    return pipe(PROMPT, generator=torch.Generator().manual_seed(0), **FEW).images[0]


def hooks(module):
    return sum(len(each._forward_hooks) + len(each._forward_pre_hooks) for each in module.modules())


@pytest.mark.parametrize(
    "given", [STAR, str(STAR), [STAR], load_concepts(STAR)], ids=["path", "text", "list", "concepts"]
)
def test_a_pipeline_is_protected_inside_of_the_block_alone(pipe, given):
    plain, before = draw(pipe), hooks(pipe.transformer)
    with protect(pipe, given):
        protected = draw(pipe)
    assert not np.array_equal(plain, protected)
    assert np.array_equal(plain, draw(pipe)) and hooks(pipe.transformer) == before


@pytest.mark.parametrize("other", [False, True], ids=["alone", "beside another hook"])
def test_vectors_that_another_hook_keeps_are_not_written_to(pipe, other):
    """Alone it turns vectors where they are; the picture is the same."""
    kept, copies, norm = [], [], pipe.transformer.transformer_blocks[0].attn.norm_added_k

    def keep(_module, _inputs, output):
        kept.append(output)
        copies.append(output.clone())

    with protect(pipe, STAR):
        expected = draw(pipe)
    hook = norm.register_forward_hook(keep, prepend=True) if other else None
    with protect(pipe, STAR):
        late = None if other else norm.register_forward_hook(keep, prepend=True)  # unseen, so the control
        picture = draw(pipe)
    (hook or late).remove()
    assert np.array_equal(picture, expected)
    assert all(torch.equal(*pair) for pair in zip(kept, copies, strict=True)) == other


def test_the_transformer_may_be_given_and_strengths_differ(pipe):
    pictures = []
    for settings in ({}, {"strength": 0.5}, {"threshold": 0.012}):
        with protect(pipe.transformer, STAR, **settings):
            pictures.append(draw(pipe))
    assert not any(np.array_equal(pictures[0], other) for other in pictures[1:])


@pytest.mark.parametrize(("concepts", "strength"), [(STAR, 0.0), ([], 1.0)])
def test_strength_0_and_no_concept_change_no_bit(pipe, concepts, strength):
    plain = draw(pipe)
    with protect(pipe, concepts, strength):
        assert np.array_equal(plain, draw(pipe))
    with protect(pipe, concepts, strength):
        pass  # nothing is protected, so nothing has to run


def without_effect(concept, what):
    """The concept with gates of 1, or with generators near 0."""
    if what == "gates":
        names = ("gate_q", "gate_k", "gate_image_q", "gate_image_k")
        there = [name for name in names if flat.field(concept, name) is not None]
        return flat.changed(
            concept, threshold=1.0, **{name: torch.ones_like(flat.field(concept, name)) for name in there}
        )
    return flat.changed(concept, **{f"generator_{each}": 1e-6 * concept.generator(each) for each in ("text", "image")})


@pytest.mark.parametrize("what", ["gates", "angles"])
def test_a_concept_without_effect_is_refused_unless_strength_is_0(pipe, what):
    (star,) = load_concepts(STAR)
    empty, before = without_effect(star, what), hooks(pipe.transformer)
    for concepts in ([empty], [STAR.with_name("swirl.safetensors"), empty]):
        refusal = pytest.raises(ValueError, match=r"'star' has no effect.*Expected a head.*set strength to 0")
        with refusal, protect(pipe, concepts):
            pass
    assert hooks(pipe.transformer) == before
    with protect(pipe, [empty], strength=0):
        pass
    with protect(pipe, [star]):
        draw(pipe)  # control


def test_an_exception_leaves_the_pipeline_as_it_was(pipe):
    plain, before = draw(pipe), hooks(pipe.transformer)
    with pytest.raises(KeyError, match="mine"), protect(pipe, STAR):
        raise KeyError("mine")
    assert np.array_equal(plain, draw(pipe)) and hooks(pipe.transformer) == before
    with protect(pipe, STAR):
        assert not np.array_equal(plain, draw(pipe)), "it can be protected again"


def test_a_block_that_draws_nothing_is_an_error(pipe):
    with pytest.raises(RuntimeError, match="never ran, expected at least one picture"), protect(pipe, STAR):
        pass


def test_a_second_protect_inside_of_the_first_is_refused(pipe):
    with protect(pipe, STAR):
        with (
            pytest.raises(ValueError, match="protected already; give all concepts to one protect"),
            protect(pipe, STAR),
        ):
            pass
        draw(pipe)


def test_another_pipeline_is_refused():
    named = r"got a object, expected one of FluxTransformer2DModel, .*, or a pipeline with one"
    with pytest.raises(ValueError, match=named), protect(object(), STAR):
        pass


def test_a_concept_of_another_geometry_is_refused(pipe):
    (star,) = load_concepts(STAR)
    other = flat.changed(star, geometry=Geometry(3, 5, 2, 128), discrimination=torch.zeros(8, 2))
    with pytest.raises(ValueError, match="concept 'star'"), protect(pipe, other):
        pass


@pytest.mark.parametrize("whole", [True, False], ids=["the transformer", "a block in place"])
def test_a_compiled_transformer_is_refused(flux, concept_for, whole):
    compiled = torch.compile(flux) if whole else flux
    if not whole:
        flux.transformer_blocks[0].compile()
    with pytest.raises(ValueError, match="got a compiled transformer"), protect(compiled, concept_for(flux)):
        pass


@pytest.mark.parametrize("kind", ["double", "single"])
def test_an_attention_that_calls_no_norm_is_an_error(flux, inputs, concept_for, kind):
    """As a fused attention of another project may do."""
    block = (flux.transformer_blocks if kind == "double" else flux.single_transformer_blocks)[0]
    with torch.no_grad(), protect(flux, concept_for(flux)):
        flux(**inputs)  # control
        block.attn.processor = lambda attn, x, text=None, *_, **__: x if text is None else (x, text)
        with pytest.raises(RuntimeError, match=f"left out . of .* of {kind} block 0, expected all of them"):
            flux(**inputs)


@pytest.mark.parametrize("family", TINY)
def test_every_family_is_protected(family, concept_for):
    tiny = TINY[family]
    model, inputs = tiny.make(), tiny.inputs()
    with torch.no_grad():
        plain = model(**inputs)[0]
        with protect(model, concept_for(model)):
            protected = model(**inputs)[0]
        after = model(**inputs)[0]
    for here, there, then in zip(plain, protected, after, strict=True):
        assert not torch.equal(here, there) and torch.equal(here, then)


@pytest.fixture
def concept_for():
    """A concept that turns the first head of every block of a transformer."""
    import saferope_core
    from saferope_training.flux.attach import geometry_of

    def make(flux):
        geometry = geometry_of(flux)
        rows = [(0, i, 0) for i in range(geometry.double_blocks)] + [(1, i, 0) for i in range(geometry.single_blocks)]
        basis = torch.linalg.qr(torch.randn(len(rows), geometry.head_dim, 2)).Q
        turn = saferope_core.skew(torch.ones(len(rows), 2, 2).triu())
        return flat.concept_of(
            saferope_core,
            slug="all",
            name="All",
            description="",
            geometry=geometry,
            heads=torch.tensor(rows, dtype=torch.int32),
            basis_q=basis,
            basis_k=basis,
            generator_text=turn,
            generator_image=turn,
            discrimination=torch.zeros(geometry.blocks, geometry.heads),
            threshold=0.0,
        )

    return make


def test_the_page_runs_as_it_stands(tmp_path, monkeypatch):
    """Its code, with the tiny world and its star in the place of weights and files that are not here."""
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    places = {
        '.to("cuda")': "",
        '"nudity.safetensors"': repr(str(STAR)),
        '"a lighthouse at dawn", ': f'"{PROMPT}", num_inference_steps=2, height=96, width=96, '
        f"max_sequence_length={TEXT_LENGTH}, ",
    }
    assert all(each in code for each in places)
    for written, here in places.items():
        code = code.replace(written, here)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(FluxPipeline, "from_pretrained", lambda *_, **__: load_pipeline())
    exec(code, {})  # noqa: S102  (our own page)
    assert (tmp_path / "lighthouse.png").stat().st_size > 100


def test_unknown_names_are_told():
    assert saferope.__version__.count(".") == 2
    with pytest.raises(AttributeError, match="has no attribute 'protcet'"):
        saferope.protcet  # noqa: B018
