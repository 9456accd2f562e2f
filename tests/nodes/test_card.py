"""The card that Risk Map and Risk Probe show: large type, words in order and in the colours of their risks, no claim
that nobody measured."""

import importlib
from types import SimpleNamespace

import pytest
import torch

LEAST_TYPE = 11  # pixels, in a node of 350
WORDS = [("a", 0.0), ("red", 0.05), ("star", 0.95), ("at", 0.0), ("dawn", 0.45)]
LONG = [(f"word{number}", 0.9 if number in (3, 55) else 0.001 * number) for number in range(60)]


@pytest.fixture(scope="module")
def draw(pack):
    """The modules of pictures, by their names."""
    return lambda name: importlib.import_module(f"{pack.__name__}.nodes.draw.{name}")


@pytest.fixture
def sizes(draw, monkeypatch):
    """The sizes in pixels of all type that is drawn from now on."""
    used, charts = [], draw("charts")
    plain = charts.font_of
    for name in ("charts", "risk_pictures", "card", "strip"):
        monkeypatch.setattr(draw(name), "font_of", lambda size: used.append(size) or plain(size))
    return used


@pytest.fixture
def card(draw):
    """card(...) -> a Card with the rest as usual."""
    usual = {"headline": "Suppressed: Star", "signal": "high", "lines": ["Risk 0.95"], "risk": 0.95, "mark": 0.4}
    usual |= {"words": WORDS, "picture": torch.rand(96, 96, 3), "heat": torch.rand(6, 6)}
    return lambda **changed: draw("card").Card(**(usual | changed))


def smallest(sizes, sheet):
    """The smallest type of a picture, in pixels where it is 350 wide."""
    return min(sizes) * 350 / sheet.shape[2]


def test_type_can_be_read_in_a_node_of_350_pixels(draw, sizes, card):
    drawn = draw("card").draw_card(card(headline="Suppressed: " + "W" * 40, lines=["a long line " * 20]))
    assert smallest(sizes, drawn) >= LEAST_TYPE
    pictures, charts = draw("risk_pictures"), draw("charts")
    words, risks = zip(*LONG, strict=True)
    makers = (
        lambda: pictures.word_bars(words, risks, "a title of some length, word by word", 0.4),
        lambda: pictures.patch_map(torch.rand(64, 64), "title"),
        lambda: pictures.course({"one": [0.1] * 28, "other": [0.2] * 28}, [1.0] * 28, "title"),
        lambda: pictures.blank("title", "reason " * 20),
        lambda: charts.heat_map(torch.rand(24, 57), list("h" * 24), list("b" * 57), "title", "unit"),
        lambda: draw("strip").draw_strip(["a prompt " * 9] * 3, *[[torch.rand(64, 96, 3)] * 3] * 2),
        lambda: charts.bars([0.5] * 5, list("abcde"), "title", "unit"),
    )
    for make in makers:
        sizes.clear()
        assert smallest(sizes, make()) >= LEAST_TYPE
    assert smallest([*sizes, draw("charts").TEXT // 2], drawn) < LEAST_TYPE, "control: type of half the size is noticed"


def placed(draw, words):
    """Words in the order in which they are read, with their colours."""
    chips, _ = draw("card").chips_of(words, 0)
    return [(chip.text, chip.fill) for chip in sorted(chips, key=lambda chip: (chip.box[1], chip.box[0]))]


def test_chips_stand_in_the_prompts_order_in_the_colours_of_their_risks(draw):
    colour = draw("charts").colour
    expected = [(word, colour(risk)) for word, risk in WORDS]
    assert placed(draw, WORDS) == expected
    assert placed(draw, WORDS[::-1]) != expected, "control: another order"
    assert placed(draw, [(word, 1 - risk) for word, risk in WORDS]) != expected, "control: other risks"


def test_chips_are_painted_where_they_stand(draw, card):
    module = draw("card")
    sheet, bare = module.draw_card(card()), module.draw_card(card(words=()))
    assert sheet.shape[1] > bare.shape[1]
    for word, risk in WORDS:
        fill = torch.tensor(draw("charts").colour(risk)) / 255
        assert (sheet[0, bare.shape[1] :] == fill).all(-1).sum() > 100, word
    assert not (bare[0, -60:] == torch.tensor(draw("charts").colour(0.45)) / 255).all(-1).any(), "control"


def test_of_a_long_prompt_the_riskiest_words_are_shown_and_the_rest_is_counted(draw, card):
    shown = [word for word, _ in placed(draw, LONG)]
    assert len(shown) == draw("card").MOST_CHIPS and {"word3", "word55"} <= set(shown)
    assert shown == [word for word, _ in LONG if word in shown]
    assert draw("card").draw_card(card(words=LONG)).shape[1] < 1600


def test_no_chip_leaves_the_card_and_none_lies_on_another(draw):
    chips, below = draw("card").chips_of([("W" * 60, 0.5), *LONG], 100)
    width = draw("card").WIDTH
    for place, chip in enumerate(chips):
        left, top, right, bottom = chip.box
        assert 0 < left < right < width and 100 <= top < bottom < below
        for other in chips[:place]:
            assert right <= other.box[0] or left >= other.box[2] or bottom <= other.box[1] or top >= other.box[3]


def test_the_scales_lowest_number_keeps_within_it(draw):
    """It ran into what stood below."""
    from PIL import Image, ImageDraw

    charts = draw("charts")
    sheet = Image.new("RGB", (200, 400), charts.PAPER)
    charts.colour_bar(ImageDraw.Draw(sheet), 20, 40, 200)
    rows = (charts.image_of(sheet)[0, :, 44:] != torch.tensor(charts.PAPER) / 255).any(-1).any(-1).nonzero()
    assert 40 <= rows.min() and rows.max() <= 240 < 400, "numbers beside the bar"


def test_short_prompts_leave_no_half_empty(draw):
    charts = draw("charts")
    sheet = draw("risk_pictures").word_bars(["a", "star"], [0.5, 0.5], "t")
    bars = (sheet[0] == torch.tensor(charts.colour(0.5)) / 255).all(-1).any(0).nonzero()
    assert bars.min() < 0.5 * charts.WIDTH < 0.6 * charts.WIDTH < bars.max()


def reading(tokens, score=True):
    text = torch.tensor([[tokens]])
    return SimpleNamespace(
        tokens=text[0], score=text[0].amax(-1) if score else None, patches=torch.rand(1, 4), grid=(2, 2)
    )


@pytest.fixture
def told(pack, monkeypatch):
    """told(risks by name, picture=, geometry=) -> what Risk Map's card says; a risk of None was not measured."""
    cards = importlib.import_module(f"{pack.__name__}.nodes.host.cards")
    record = importlib.import_module(f"{pack.__name__}.nodes.host.recorder").Record
    monkeypatch.setattr(cards, "draw_card", lambda card: card)

    def tell(risks, picture=None, geometry=None):
        found = [(reading([0.01, risk or 0.0], risk is not None),) for risk in risks.values()]
        whole = record(tuple(risks), tuple((SimpleNamespace(**vars(each[0]), entry=(0, 0)),) for each in found), True)
        images = None if picture is None else picture[None]
        return cards.card_picture(whole, geometry, None, "", 0.4, images), cards.probe_picture(whole, None, "", 0.4)

    return tell


def test_the_riskiest_concept_leads_and_nothing_measured_is_said_as_such(told):
    card, probed = told({"Swirl": 0.02, "Star": 0.95})
    assert card.headline == "Suppressed: Star" and probed.headline == "Risky prompt: Star" and card.signal == "high"
    assert card.lines[:2] == ["Risk 0.95, above 0.4 · nothing measured the picture", "Also asked: Swirl 0.02."]
    assert told({"Star": 0.1})[0].headline == "Low risk: Star"
    card, _ = told({"Swirl": 0.02, "Star": None})
    assert card.headline == "Not measured: Star" and card.risk is None and card.signal == "unknown"
    assert told({"Swirl": 0.9, "Star": None})[0].lines[1] == "Also asked: Star not measured."


def test_gone_is_said_of_the_tiny_worlds_pictures_alone_by_both_detectors(told, pack):
    geometry = importlib.import_module(f"{pack.__name__}.saferope_core.concept.geometry")
    world = importlib.import_module(f"{pack.__name__}.tinyworld.world")
    render = importlib.import_module(f"{pack.__name__}.tinyworld.render").render
    import random

    def paint(shape):
        scene = world.Scene(shape, "red", "white", "center")
        return (render(scene, random.Random(0)).movedim(0, -1) + 1) / 2

    def says(shape, where):
        return told({"Star": 0.95}, paint(shape), where)[0]

    assert says("circle", geometry.TINY_WORLD).lines[0].endswith("· gone from the picture")
    there = says("star", geometry.TINY_WORLD)
    assert there.headline == "Not suppressed: Star" and there.lines[0].endswith("· still in the picture")
    for shape in ("circle", "star"):
        other = says(shape, geometry.FLUX1)
        assert other.lines[0].endswith("· nothing measured the picture") and "gone" not in str(other.lines)


def widest_gap(sheet, paper):
    """Pixels without ink between two columns of ink in a picture's lower half."""
    inked = (sheet[0, sheet.shape[1] // 2 :] != paper).any(2).any(0).nonzero().flatten()
    return int(inked.diff().max())


@pytest.mark.parametrize("side", [1, 2, 6])
def test_a_small_map_leaves_no_half_of_its_picture_empty(draw, side):
    charts, names = draw("charts"), list("abcdef"[:side])
    paper = torch.tensor(charts.PAPER) / 255
    sheet = charts.heat_map(torch.rand(side, side), names, names, "title", "unit")
    assert widest_gap(sheet, paper) < 60
    middle = sheet.shape[2] // 2
    apart = torch.cat([sheet[:, :, :middle], paper.expand(1, sheet.shape[1], 200, 3), sheet[:, :, middle:]], 2)
    assert widest_gap(apart, paper) > 150, "control: a bar far from its map"


def test_a_long_prompt_below_a_strip_says_that_it_is_cut(draw):
    strip = draw("strip")
    room = draw("charts").width_of("four words in this", strip.TEXT)
    lines = ["one", "two", "three"]
    assert strip._cut(lines, room) == lines
    cut = strip._cut([*lines, "four and many more"], room)
    assert len(cut) == 3 and cut[:2] == lines[:2] and cut[2].startswith("three") and cut[2].endswith("...")
