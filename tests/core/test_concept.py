"""A concept checks itself once, owns its tensors, and says what is wrong with others."""

import dataclasses

import pytest
import torch

from saferope_core import Geometry
from tests.support import concepts as flat

NAN = float("nan")


def test_takes_over_float32_copies(make_concept):
    basis = torch.linalg.qr(torch.randn(6, 32, 5, dtype=torch.float64))[0].requires_grad_()
    concept = make_concept(basis_q=basis, heads=[(0, 0, 0), (0, 0, 2), (0, 1, 1), (1, 1, 0), (1, 1, 1), (1, 1, 2)])
    assert concept.text.basis.q.dtype == torch.float32 and concept.heads.dtype == torch.int32
    assert not concept.text.basis.q.requires_grad and concept.rank == 5
    before = concept.text.basis.q.clone()
    basis.data.zero_()
    assert torch.equal(concept.text.basis.q, before)
    with pytest.raises(dataclasses.FrozenInstanceError):
        concept.strength = 2.0


def test_made_in_inference_mode_it_may_still_be_trained_through(make_concept):
    with torch.inference_mode():
        concept = make_concept()
    assert not concept.text.basis.q.is_inference() and not concept.heads.is_inference()


def test_gate_falls_back_to_the_threshold(make_concept):
    own = torch.linspace(0.1, 0.9, 6)
    concept = make_concept(gate_k=own, threshold=0.3)
    assert torch.equal(concept.gate("k"), own)
    assert torch.equal(concept.gate("q"), torch.full((6,), 0.3))
    assert concept.basis("k") is concept.text.basis.k and concept.basis("q") is concept.text.basis.q


def test_training_is_kept_as_json_would(make_concept):
    facts = {"steps": 200, "loss": [0.5, 0.25], "seeds": (1, 2)}
    concept = make_concept(training=facts)
    facts["steps"] = 0
    assert concept.training == {"steps": 200, "loss": [0.5, 0.25], "seeds": [1, 2]}


def test_replace_checks_again(make_concept):
    concept = make_concept()
    assert flat.changed(concept, strength=1.7).strength == 1.7
    with pytest.raises(ValueError, match="strength is -1"):
        flat.changed(concept, strength=-1.0)


def changed(name, change):
    """A field made by changing the one of a good concept."""
    return lambda concept: {name: change(flat.field(concept, name).clone())}


def with_nan(tensor):
    tensor.view(-1)[0] = NAN
    return tensor


BROKEN = {
    "slug": ({"slug": "Star"}, "slug is 'Star'"),
    "slug newline": ({"slug": "star\n"}, "slug is"),
    "slug empty": ({"slug": ""}, "slug is ''"),
    "slug type": ({"slug": 5}, "slug is 5"),
    "name empty": ({"name": " "}, "name is empty"),
    "name long": ({"name": "x" * 201}, "name: got 201 characters"),
    "name control": ({"name": "sta\x1b[2Jr"}, "name: holds control characters"),
    "name two lines": ({"name": "sta\nr"}, "name: holds control characters"),
    "name reversed": ({"name": "sta\u202er"}, "name: holds control characters"),
    "name surrogate": ({"name": "sta\ud800r"}, "name: holds control characters"),
    "name type": ({"name": None}, "name: got NoneType"),
    "description": ({"description": "a\x00b"}, "description: holds control characters"),
    "description separator": ({"description": "a\u2028b"}, "description: holds control characters"),
    "description type": ({"description": 3}, "description: got int"),
    "acts_on": ({"acts_on": "kq"}, "acts_on is 'kq', expected one of"),
    "acts_on_image": ({"acts_on_image": "v"}, "acts_on_image is 'v', expected one of"),
    "acts_on type": ({"acts_on": ["q"]}, "acts_on is"),
    "mode": ({"mode": "magic"}, "mode is 'magic'"),
    "geometry": ({"geometry": None}, "geometry: got NoneType"),
    "threshold": ({"threshold": 1.2}, "threshold is 1.2, expected a number from 0 to 1"),
    "threshold nan": ({"threshold": NAN}, "threshold is nan"),
    "threshold bool": ({"threshold": True}, "threshold is True"),
    "strength": ({"strength": -0.5}, "strength is -0.5"),
    "strength inf": ({"strength": float("inf")}, "strength is inf"),
    "strength text": ({"strength": "1"}, "strength is '1'"),
    "training type": ({"training": []}, "training: got list"),
    "training nan": ({"training": {"loss": NAN}}, "training: cannot be written as JSON"),
    "training object": ({"training": {"loss": torch.ones(1)}}, "training: cannot be written as JSON"),
    "heads dtype": (changed("heads", lambda t: t.float()), "heads: got torch.float32, expected an int32"),
    "heads type": ({"heads": [[0, 0, 0]]}, "heads: got list"),
    "heads shape": (changed("heads", lambda t: t[:, :2]), r"heads: shape is \(6, 2\)"),
    "heads none": (changed("heads", lambda t: t[:0]), "protects from nothing"),
    "heads unsorted": (changed("heads", lambda t: t.flip(0)), "not sorted or not unique"),
    "heads twice": (changed("heads", lambda t: t[[0, 0, 2, 3, 4, 5]]), "not sorted or not unique"),
    "heads block type": (changed("heads", lambda t: t + torch.tensor([2, 0, 0])), r"heads: no block \(2, 0\)"),
    "heads block": (changed("heads", lambda t: t + torch.tensor([0, 5, 0])), r"heads: no block \(0, 5\)"),
    "heads head": (changed("heads", lambda t: t + torch.tensor([0, 0, 9])), "heads: no head 9"),
    "heads negative": (changed("heads", lambda t: t - torch.tensor([0, 0, 1])), "heads: no head -1"),
    "basis type": ({"basis_q": None}, "basis_q: got NoneType"),
    "basis axes": (changed("basis_q", lambda t: t[0]), r"basis_q: got \(32, 5\)"),
    "basis rank 1": (changed("basis_q", lambda t: t[..., :1]), "rank is 1, expected 2"),
    "basis too wide": (changed("basis_q", lambda t: torch.rand(6, 32, 33)), "rank is 33"),
    "basis width": (changed("basis_q", lambda t: t[:, :31]), r"basis_q: shape is \(6, 31, 5\), expected \(6, 32, 5\)"),
    "basis dtype": (changed("basis_k", lambda t: t.int()), "basis_k: got torch.int32"),
    "basis complex": (changed("basis_k", lambda t: t.to(torch.complex64)), "basis_k: got torch.complex64"),
    "basis nan": (changed("basis_k", with_nan), "basis_k: holds NaN or infinity"),
    "basis long columns": (changed("basis_q", lambda t: t * 1.001), "basis_q: columns are not orthonormal"),
    "basis skewed": (changed("basis_k", lambda t: t[..., [0, 0, 2, 3, 4]]), "basis_k: columns are not orthonormal"),
    "basis range": (changed("basis_q", lambda t: t * 9), "basis_q: reaches from"),
    "reach type": ({"reach": 1.0}, "reach is 1.0, expected 0 to 4"),
    "reach negative": ({"reach": -1}, "reach is -1"),
    "reach leaves no risk": ({"reach": 5}, "reach is 5, expected 0 to 4"),
    "singular values of the reach": ({"reach": 2, "singular_values": torch.ones(6, 5)}, "singular_values: shape"),
    "image basis alone": (
        {"basis_image_k": torch.eye(32)[:, :5].repeat(6, 1, 1)},
        "basis_image_k: without basis_image_q",
    ),
    "image gate alone": ({"gate_image_q": torch.rand(6)}, "gate_image_q: without basis_image_q"),
    "ranks differ": (changed("basis_k", lambda t: t[..., :4]), r"basis_k: shape is \(6, 32, 4\)"),
    "generator shape": (changed("generator_text", lambda t: t[:, :4]), r"generator_text: shape is \(6, 4, 5\)"),
    "generator skew": (changed("generator_text", lambda t: t + 1e-3), "generator_text: not skew"),
    "generator image skew": (changed("generator_image", lambda t: t + torch.eye(5)), "generator_image: not skew"),
    "generator range": (changed("generator_text", lambda t: t * 1e3), "generator_text: reaches from"),
    "generator nan": (changed("generator_image", with_nan), "generator_image: holds NaN"),
    "discrimination shape": (changed("discrimination", lambda t: t.T), r"discrimination: shape is \(3, 5\)"),
    "discrimination range": (changed("discrimination", lambda t: t + 2), "discrimination: reaches from"),
    "gate shape": ({"gate_q": torch.rand(5)}, r"gate_q: shape is \(5,\), expected \(6,\)"),
    "gate range": ({"gate_k": torch.full((6,), 1.5)}, "gate_k: reaches from 1.5 to 1.5, expected 0 to 1"),
    "gate nan": ({"gate_k": torch.full((6,), NAN)}, "gate_k: holds NaN"),
    "gate number": ({"gate_k": 0.7}, "gate_k: got float"),
    "singular values": ({"singular_values": -torch.ones(6, 5)}, "singular_values: reaches from -1"),
    "singular values shape": ({"singular_values": torch.ones(6, 4)}, "singular_values: shape"),
}


@pytest.mark.parametrize(("fields", "message"), BROKEN.values(), ids=BROKEN.keys())
def test_broken_fields_are_refused(make_concept, fields, message):
    good = make_concept(singular_values=torch.rand(6, 5), gate_q=torch.rand(6))
    fields = fields(good) if callable(fields) else fields
    with pytest.raises(ValueError, match=message):
        flat.changed(good, **fields)


def test_geometry_decides_which_heads_exist(make_concept):
    small = Geometry(1, 0, 1, 8)
    assert make_concept(heads=[(0, 0, 0)], geometry=small, rank=2).rank == 2
    with pytest.raises(ValueError, match=r"no block \(1, 0\)"):
        make_concept(heads=[(1, 0, 0)], geometry=small, rank=2)
