"""Seeds, example concepts, and the rotation of the paper written out in loops, to compare with."""

import pytest
import torch

import saferope_core
from saferope_core import DOUBLE, SINGLE, Geometry, skew
from tests.support import concepts as flat
from tests.support.hostile import seeds

GEOMETRY = Geometry(double_blocks=2, single_blocks=3, heads=3, head_dim=32)
# By how much an LRS in float32 may be off, 2 (D + 2) (√R + 2) u as in `screen`, for D = 32 and R = 8: examples whose
# tokens stand this clear of their gates leave nothing for rounding to decide.
CLEAR = 2e-5
HEADS = [(DOUBLE, 0, 0), (DOUBLE, 0, 2), (DOUBLE, 1, 1), (SINGLE, 1, 0), (SINGLE, 1, 1), (SINGLE, 1, 2)]


@pytest.fixture(autouse=True)
def _seeded():
    """The same random numbers for every test, and one thread: these tensors are too small to share out."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(20240)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def geometry():
    return GEOMETRY


@pytest.fixture
def make_concept():
    return example_concept


@pytest.fixture
def clear():
    return CLEAR


@pytest.fixture
def naive_turn():
    return turn_in_loops


@pytest.fixture
def naive_protection():
    return protect_in_loops


@pytest.fixture
def path(tmp_path):
    return tmp_path / "star.safetensors"


@pytest.fixture
def good():
    """The bytes of a concept file, a small one."""
    return seeds()[0]


def random_basis(count, head_dim, rank, dtype=torch.float32):
    return torch.linalg.qr(torch.randn(count, head_dim, rank, dtype=torch.float64))[0].to(dtype)


def example_concept(slug="star", rank=5, heads=tuple(HEADS), geometry=GEOMETRY, **fields):
    """A random concept on a small geometry; any field can be given."""
    count, width = len(heads), geometry.head_dim
    fields = {
        "name": slug.title(),
        "description": "An example.",
        "basis_q": random_basis(count, width, rank),
        "basis_k": random_basis(count, width, rank),
        "generator_text": skew(torch.randn(count, rank, rank)),
        "generator_image": skew(torch.randn(count, rank, rank)),
        "discrimination": torch.rand(geometry.blocks, geometry.heads) * 2 - 1,
        "threshold": 0.15,  # about the mean LRS of a random vector here: some tokens pass, some do not
        **fields,
    }
    return flat.concept_of(
        saferope_core, slug=slug, geometry=geometry, heads=torch.tensor(heads, dtype=torch.int32), **fields
    )


def turn_in_loops(x, basis, generator, scale):
    """R(x) x = U exp(s A) Uᵀ x + (I − U Uᵀ) x, one head and token after the other, in float64."""
    x, basis, generator, scale = (t.double() for t in (x, basis, generator, scale))
    result = torch.empty_like(x)
    for b in range(x.shape[0]):
        for h in range(x.shape[1]):
            u = basis[h]
            for t in range(x.shape[2]):
                outside = torch.eye(len(u), dtype=torch.float64) - u @ u.T
                matrix = u @ torch.matrix_exp(scale[b, h, t] * generator[h]) @ u.T + outside
                result[b, h, t] = matrix @ x[b, h, t]
    return result


def protect_in_loops(concepts, x, role, block, text, image, strengths=None, thresholds=None):
    """What a Protection should answer, from the paper's equations; block is (block type code, block index)."""
    original, result = x.double(), x.double().clone()
    for number, concept in enumerate(concepts):
        strength = concept.strength * (strengths[number] if strengths else 1.0)
        for n, (block_type, index, head) in enumerate(concept.heads.tolist()):
            if (block_type, index) != block:
                continue
            for stream, generators, span in (
                ("", concept.text.generator, text),
                ("image_", concept.image.generator, image),
            ):
                acts = concept.image.acts_on if stream and concept.image.acts_on else concept.text.acts_on
                if role not in acts:
                    continue
                owner = stream if concept.image.basis is not None else ""
                own_gate = flat.field(concept, f"gate_{owner}{role}")
                gate = concept.threshold if own_gate is None else own_gate[n].item()
                if thresholds and thresholds[number] is not None:
                    gate = thresholds[number]
                own_full = flat.field(concept, f"full_{owner}{role}")
                full = 1.0 if own_full is None else own_full[n].item()
                u = flat.field(concept, f"basis_{owner}{role}").double()[n]
                risky = u.shape[1] - concept.reach
                generator = generators[n].double()
                for b in range(x.shape[0]):
                    for t in range(*span):
                        vector = original[b, head, t]
                        risk = (u[:, :risky].T @ vector).norm() ** 2 / vector.norm() ** 2
                        assert abs(risk - gate) > CLEAR, "choose other examples: here rounding decides who turns"
                        if risk > gate:
                            inside = u.T @ result[b, head, t]
                            turned = torch.matrix_exp(min(1.0, strength * risk / full) * generator) @ inside
                            result[b, head, t] += u @ (turned - inside)
    return result
