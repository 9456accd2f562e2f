"""What concepts do: counted by turning vectors, not read from what a file says of itself."""

from __future__ import annotations

import pytest
import torch

from saferope_core import Geometry, Protection, effect_of, moved, undone
from saferope_core.concept.strength import opposed
from saferope_core.run import effect, protection
from saferope_core.run.effect import LEAST_TURN
from tests.support import concepts as flat

GROUPED = Geometry(0, 2, 6, 32, "krea2", key_heads=2)


def test_a_random_concept_turns_in_all_heads(make_concept):
    effect = effect_of(make_concept(threshold=0.1))
    assert effect.turning == effect.heads == 6 and effect.angle > 0.5
    assert effect.gates == pytest.approx((0.1, 0.1))
    assert str(effect).startswith("turns in 6 of 6 heads, by ")


@pytest.mark.parametrize("flat_changes", [{"threshold": 1.0}, {"strength": 0.0}, {"strength": 1e-4}])
def test_gates_of_1_and_no_strength_are_no_effect(make_concept, flat_changes):
    assert effect_of(make_concept(**flat_changes)).turning == 0


def test_generators_near_zero_are_no_effect(make_concept):
    concept = make_concept(threshold=0.0)
    tiny = {name: 1e-4 * flat.field(concept, name) for name in ("generator_text", "generator_image")}
    assert effect_of(flat.changed(concept, **tiny)).turning == 0 < effect_of(concept).turning


def test_a_turn_in_the_reach_alone_is_an_effect_where_gates_are_low(make_concept):
    """As the fixed turn of a concept whose risk is relative to harmless tokens."""
    turn = torch.zeros(6, 7, 7)
    turn[:, 3, 4], turn[:, 4, 3] = -2.0, 2.0
    more = {"rank": 7, "reach": 4, "generator_text": turn, "generator_image": turn}
    gates, full = (
        {f"{kind}_{role}": torch.full((6,), value) for role in "qk"} for kind, value in (("gate", 0.02), ("full", 0.1))
    )
    shut = {name: torch.full((6,), 0.9999) for name in gates}
    assert effect_of(make_concept(**more, **gates, **full)).turning == 6
    assert effect_of(make_concept(**more, **shut, **full)).turning == 0
    assert effect_of(make_concept(**more, **gates)).turning == 0, (
        "where nearly all of a risky vector is in the subspace"
    )


def test_heads_that_share_keys_have_the_effect_of_their_key_head(make_concept):
    rows = ((1, 0, 1), (1, 0, 2), (1, 1, 4))
    concept = make_concept(heads=rows, geometry=GROUPED, acts_on="k", threshold=0.1)
    assert effect_of(concept).turning == 3
    still = flat.field(concept, "generator_text").clone()
    still[0] = 0.0  # the first of the two heads that share a key head decides for both
    first = flat.changed(concept, generator_text=still, generator_image=torch.zeros_like(still))
    assert effect_of(first).turning == 1


def test_the_inverse_turn_is_told(make_concept, geometry):
    concept = make_concept(threshold=0.1)
    back = {name: -flat.field(concept, name) for name in ("generator_text", "generator_image")}
    other = flat.changed(concept, slug="other", **back)
    told = undone([Protection([concept], geometry), Protection([other], geometry)])
    assert any("'star' is turned back by 'other' in 6 of its 6 heads" in sentence for sentence in told), told
    apart = make_concept("zappy", rank=4, threshold=0.1)
    assert undone([Protection([concept, apart], geometry)]) == []


def told_slowly(chain):
    """`undone` by its definition: every chain made anew, nothing kept."""
    concepts, found = [concept for protection in chain for concept in protection.concepts], []
    for each in concepts:
        alone = moved(each, only(chain, [each])) >= LEAST_TURN
        lost, who = alone & (moved(each, chain) < LEAST_TURN), []
        for other in concepts:
            if other is not each and opposed(each, other):
                heads = alone & (moved(each, only(chain, [each, other])) < LEAST_TURN)
                lost, who = lost | heads, who + [repr(other.slug)] * bool(heads.any())
        if lost.any():
            by = f" by {', '.join(who[:4])}" if who else ""
            found.append(f"concept {each.slug!r} is turned back{by} in {int(lost.sum())} of its {len(lost)} heads")
    return found


def only(chain, wanted):
    def part(protection):
        rows = zip(protection.concepts, protection.effective, protection.thresholds, strict=True)
        kept = [row for row in rows if any(row[0] is each for each in wanted)]
        strengths = [effective / concept.strength for concept, effective, _ in kept]
        return Protection([row[0] for row in kept], protection.geometry, strengths, [row[2] for row in kept])

    return [part(protection) for protection in chain]


def test_undone_tells_the_same_as_its_slow_definition(make_concept, geometry):
    first, second = make_concept("first", threshold=0.1), make_concept("second", threshold=0.1, strength=0.7)
    sign = torch.tensor([-1.0, -1.0, -1.0, 1.0, 1.0, 0.5])[:, None, None]  # the inverse turn in some heads alone
    names = ("generator_text", "generator_image")
    against = [
        flat.changed(each, slug=f"no-{each.slug}", **{name: sign * flat.field(each, name) for name in names})
        for each in (first, second)
    ]
    every = [first, second, *against]
    chains = [
        [Protection(every, geometry)],
        [Protection([first, second], geometry), Protection(against, geometry, [1.0, 0.9])],
        [Protection([each], geometry) for each in every],
        [Protection([first], geometry), Protection([second, first], geometry, [1.0, -1.0])],
        [Protection([first, against[0]], geometry, thresholds=[0.1, 0.5])],
    ]
    told = [undone(chain) for chain in chains]
    assert told == [told_slowly(chain) for chain in chains]
    assert sum(map(bool, told)) >= 4 and len({str(each) for each in told}) > 2, "concepts that turn each other back"
    assert undone([Protection([first, second], geometry)]) == [], "control"


def test_what_is_kept_is_used_again(make_concept, geometry, monkeypatch):
    """Probes once a concept; planes folded once alone and once together, for two that turn each other back."""
    concept = make_concept(threshold=0.1)
    back = {name: -flat.field(concept, name) for name in ("generator_text", "generator_image")}
    pair = [concept, flat.changed(concept, slug="other", **back)]
    calls = {"_probed": 0, "plans_of": 0}

    def counted(module, name):
        real = getattr(module, name)

        def count(*given):
            calls[name] += 1
            return real(*given)

        monkeypatch.setattr(module, name, count)

    counted(effect, "_probed"), counted(protection, "plans_of")
    assert undone([Protection(pair, geometry)])
    assert calls == {"_probed": 2, "plans_of": 3}
    assert told_slowly([Protection(pair, geometry)])
    assert calls["plans_of"] > 3 + 3, "control"
