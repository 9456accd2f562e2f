"""Parts of a concept: which blocks a text means, and what is left of the rotation."""

import pytest
import torch

from saferope_core import FLUX1, Protection, parse_blocks, restricted


@pytest.mark.parametrize(
    ("text", "count"), [("", 57), (" ", 57), ("d0-18,s0-37", 57), ("d0", 1), ("D3, s5-6", 3), ("s0-3,s2-5", 6)]
)
def test_blocks_are_counted(text, count):
    assert len(parse_blocks(text, FLUX1)) == count


@pytest.mark.parametrize("text", ["d19", "s38", "d3-2", "0-3", "d0,,s1", "d1.5", "dd1", "s0-99999", "d٣"])
def test_anything_else_is_refused(text):
    with pytest.raises(ValueError, match="blocks: got"):
        parse_blocks(text, FLUX1)


def test_what_is_left_turns_as_before_and_the_rest_not_at_all(make_concept, geometry):
    concept, x = make_concept(), torch.randn(1, 3, 9, 32)
    only = restricted(concept, parse_blocks("s1", geometry), "text")
    whole, part = Protection([concept], geometry), Protection([only], geometry)
    spans = ((0, 4), (4, 9))
    expected = whole.rotate(x, "q", "single", 1, *spans)
    found = part.rotate(x, "q", "single", 1, *spans)
    torch.testing.assert_close(found[:, :, :4], expected[:, :, :4])  # products of fewer heads may round otherwise
    assert not torch.equal(found[:, :, :4], x[:, :, :4])
    assert torch.equal(found[:, :, 4:], x[:, :, 4:])
    assert part.rotate(x, "q", "double", 0, *spans) is x


def test_nothing_left_is_none(make_concept, geometry):
    assert restricted(make_concept(heads=[(0, 0, 0)]), parse_blocks("s0", geometry)) is None
    still = make_concept(generator_image=torch.zeros(6, 5, 5))
    assert restricted(still, parse_blocks("", geometry), "image") is None
