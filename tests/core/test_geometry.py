"""Geometries: rows of the head map, messages, and what is refused."""

import pytest

from saferope_core import BLOCK_TYPES, DOUBLE, FLUX1, SINGLE, Geometry

SMALL = Geometry(double_blocks=2, single_blocks=4, heads=2, head_dim=128)


def test_codes_are_positions_in_block_types():
    assert BLOCK_TYPES[DOUBLE] == "double" and BLOCK_TYPES[SINGLE] == "single"


def test_flux_1():
    assert FLUX1.describe() == "flux: 19 double + 38 single blocks x 24 heads x 128"
    assert (FLUX1.blocks, FLUX1.row("single", 0), FLUX1.row("single", 37)) == (57, 19, 56)


def test_rows_number_all_blocks_once():
    rows = [SMALL.row("double", i) for i in range(2)] + [SMALL.row("single", i) for i in range(4)]
    assert rows == list(range(SMALL.blocks))


@pytest.mark.parametrize(
    ("block", "message"),
    [
        (("double", 2), "double block 2 asked for, but the model is flux: 2 double"),
        (("single", 4), "single block 4"),
        (("single", -1), "single block -1"),
        (("triple", 0), "block type 'triple', expected one of"),
    ],
)
def test_row_refuses_what_the_model_does_not_have(block, message):
    with pytest.raises(ValueError, match=message):
        SMALL.row(*block)


def test_require_names_both_geometries():
    SMALL.require(Geometry(2, 4, 2, 128), "concept 'star'")
    with pytest.raises(
        ValueError, match=r"concept 'star' was made for FLUX\.1, .* the model is the tiny world\. Use a model"
    ):
        SMALL.require(FLUX1, "concept 'star'")
    with pytest.raises(ValueError, match="made for chroma: 2 double"):
        SMALL.require(Geometry(2, 4, 2, 128, family="chroma"), "concept 'star'")


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({"heads": 0}, "heads is 0, expected an integer from 1 to 96"),
        ({"heads": 2.0}, "heads is 2.0, expected an integer"),
        ({"heads": True}, "heads is True, expected an integer"),
        ({"head_dim": 10**9}, "head_dim is 1000000000"),
        ({"double_blocks": -1}, "double_blocks is -1"),
        ({"double_blocks": 0, "single_blocks": 0}, "0 double and 0 single blocks, expected 1 to 128 blocks in all"),
        ({"double_blocks": 65, "single_blocks": 64}, "65 double and 64 single blocks, expected 1 to 128 blocks in all"),
        ({"double_blocks": 129}, "double_blocks is 129, expected an integer from 0 to 128"),
        ({"heads": 97}, "heads is 97, expected an integer from 1 to 96"),
        ({"head_dim": 513}, "head_dim is 513, expected an integer from 2 to 512"),
        ({"family": "Flux 1"}, "family is 'Flux 1'"),
        ({"family": "flux\n"}, "family is"),
        ({"family": 7}, "family is 7"),
    ],
)
def test_impossible_geometries_are_refused(numbers, message):
    with pytest.raises(ValueError, match=message):
        Geometry(**{"double_blocks": 2, "single_blocks": 4, "heads": 2, "head_dim": 128, **numbers})


@pytest.mark.parametrize(
    "numbers", [(60, 0, 24, 128), (8, 48, 48, 128), (0, 28, 48, 128), (0, 34, 18, 256), (64, 64, 96, 512)]
)
def test_the_largest_known_models_are_taken(numbers):
    """Qwen-Image, FLUX.2-dev, Krea 2, Ideogram 4; and the limits themselves."""
    assert Geometry(*numbers).blocks == numbers[0] + numbers[1]


def test_known_models_have_names():
    tiny = Geometry(2, 4, 2, 128)
    assert (FLUX1.title(), tiny.title()) == ("FLUX.1", "the tiny world")
    other = Geometry(19, 38, 24, 128, family="chroma")
    assert other.title() == other.describe(), "the same numbers in another family are another model"
