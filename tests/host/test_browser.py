"""The nodes on ComfyUI's own page, in a headless Chromium: found, linked, run, explained, translated.

    SAFEROPE_SCREENSHOTS=docs make test PYTEST_ARGS=tests/host/test_browser.py

draws the documentation's pictures anew. Where no Chromium is to be found these tests are skipped, with a warning.
"""

from __future__ import annotations

import io
import json
import os
import warnings
from pathlib import Path

import pytest
from PIL import Image, ImageChops

from dev.comfyui import ROOT
from dev.workflow import BUNDLED, EXAMPLES, api_prompt, fill, in_tiny_world
from tests.support.browser import SMALL, NoBrowser, open_browser, open_editor

pytestmark = pytest.mark.host

SCREENSHOTS = os.environ.get("SAFEROPE_SCREENSHOTS")
SHARPNESS = 1.5 if SCREENSHOTS else 1  # the documentation's pictures stay below 300 kB
SIDE = 96  # pixels of a picture of the tiny world


@pytest.fixture(scope="module")
def browser():
    try:
        with open_browser() as browser:
            yield browser
    except NoBrowser as missing:
        warnings.warn(str(missing), stacklevel=1)
        pytest.skip(str(missing))


@pytest.fixture
def open_page(browser, comfyui):
    """open_page(**settings): a context manager with the editor as somebody finds it who comes for the first time."""
    return lambda **settings: open_editor(browser, comfyui.address, SHARPNESS, **settings)


@pytest.fixture
def editor(open_page):
    with open_page() as editor:
        yield editor


@pytest.fixture
def shoot(tmp_path):
    """shoot(editor, name, **of a screenshot) saves it, and fails where nothing but one colour is to be seen."""
    folder = Path(SCREENSHOTS or tmp_path)

    def save(editor, name, **options):
        editor.page.wait_for_timeout(500 if SCREENSHOTS else 0)  # a tooltip or a notice may be on its way out
        picture = Image.open(io.BytesIO(editor.page.screenshot(**options))).convert("RGB")
        assert picture.getcolors(maxcolors=100) is None
        picture.quantize(256).save(folder / name, optimize=True)

    return save


def node_named(editor, title):
    return editor.page.evaluate("title => app.graph.nodes.find(node => node.getTitle() === title).id", title)


def picture_in(editor, title, nodes_2):
    """The picture that a Preview Image node shows once it is there; painted on the canvas,
    or an element of the page."""
    find = {
        True: "document.querySelector(`[data-node-id='${id}'] img`)",
        False: "app.graph.getNodeById(id).imgs?.at(-1)",
    }[nodes_2]
    look = f"id => {{ const image = {find}; return image?.complete && image.naturalWidth && image.src }}"
    source = editor.page.wait_for_function(look, arg=node_named(editor, title)).json_value()
    return Image.open(io.BytesIO(editor.page.request.get(source).body())).convert("RGB")


def test_no_browser_says_how_to_get_one(monkeypatch, tmp_path):
    monkeypatch.delenv("CHROMIUM_PATH", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("PLAYWRIGHT_BROWSERS_PATH", str(tmp_path))
    with pytest.raises(NoBrowser, match="apt install chromium"), open_browser():
        pass
    monkeypatch.setenv("CHROMIUM_PATH", str(tmp_path / "gone"))
    with pytest.raises(ValueError, match="gone"), open_browser():
        pass


@pytest.mark.parametrize("nodes_2", [False, True])
def test_template_opens_and_shows_two_pictures(open_page, comfyui, shoot, nodes_2):
    with open_page(Comfy__VueNodes__Enabled=nodes_2) as editor:
        editor.open_template("SafeRoPE", "SafeRoPE tiny world")
        editor.run()
        shown = [picture_in(editor, title, nodes_2) for title in ("Unprotected", "Protected")]
        assert [picture.size for picture in shown] == [(SIDE, SIDE)] * 2
        assert ImageChops.difference(*shown).getbbox()
        assert editor.complaints() == []
        graph = [node_named(editor, title) for title in ("Read me", "Protect the model", "Unprotected", "Protected")]
        shoot(editor, "comfyui-nodes2.png" if nodes_2 else "comfyui.png", clip=editor.box(graph))
    made = comfyui.images(comfyui.get("/history?max_items=1").popitem()[1]["outputs"])
    assert [ImageChops.difference(*pair).getbbox() for pair in zip(shown, made, strict=True)] == [None, None]


LOAD = "async workflow => { await app.loadGraphData(workflow); return (await app.graphToPrompt()).output }"
STAR = "a red star in the center on a pink background"
MOST_CLICKS = 6  # to a concept of one's own, or to a picture of the app
APP, MAKE, MAKE_TINY = (
    json.loads((EXAMPLES / f"SafeRoPE {name}.json").read_text(encoding="utf-8"))
    for name in ("Safe FLUX app", "make a concept for your FLUX", "make a concept, tiny world")
)


def test_a_concept_is_made_from_a_preset_applied_and_compared(open_page, comfyui):
    with open_page(size=SMALL) as editor:
        editor.open_template("SafeRoPE", "SafeRoPE make a concept, tiny world")
        editor.run()
        strip = picture_in(editor, "Before and after", False)
        assert editor.complaints() == [] and 0 < editor.clicks() <= MOST_CLICKS
    assert strip.width == 700 and strip.getcolors(maxcolors=100) is None
    made = sorted((comfyui.base / "output" / "saferope").glob("my_star_*.safetensors"))[-1].name
    graph = api_prompt(json.loads(BUNDLED.read_text(encoding="utf-8")), comfyui.object_info())

    def painted(strength):
        return comfyui.images(comfyui.run(fill(graph, STAR, 7, made, strength)))

    (plain, protected), (again, off) = painted(1.0), painted(0.0)
    assert ImageChops.difference(plain, protected).getbbox()
    assert not ImageChops.difference(again, off).getbbox(), "control: at strength 0 it changes nothing"


def steps_of(workflow, comfyui):
    """Classes of a workflow's nodes in order, and what is linked to what."""
    graph = api_prompt(workflow, comfyui.object_info())
    names = {number: node["class_type"] for number, node in graph.items()}
    ends = {
        (names[value[0]], value[1], names[number], name)
        for number, node in graph.items()
        for name, value in node["inputs"].items()
        if isinstance(value, list)
    }
    return sorted(names.values()), ends


def test_a_flux_gets_its_concept_as_the_tiny_world_does(comfyui):
    """The template for FLUX cannot run here: with the embedded model in it, it is the one that runs."""
    assert steps_of(in_tiny_world(MAKE), comfyui) == steps_of(MAKE_TINY, comfyui)
    assert steps_of(in_tiny_world(APP), comfyui) != steps_of(MAKE_TINY, comfyui), "control"


def test_the_app_opens_as_one_and_gives_picture_and_verdict(open_page, shoot):
    with open_page(size=SMALL) as editor:
        editor.open_template("SafeRoPE", "SafeRoPE Safe FLUX app")
        for label in ("prompt", "concept", "strength", "seed"):
            editor.page.get_by_text(label, exact=True).first.wait_for()
        assert not editor.page.locator("#graph-canvas").is_visible()
        clicks = editor.clicks()
        editor.page.evaluate(LOAD, in_tiny_world(APP))
        editor.run()
        shown = "[...document.images].map(image => image.naturalWidth)"
        editor.page.wait_for_function(
            f"() => {{ const wide = {shown}; return wide.includes(96) && wide.includes(700) }}"
        )
        assert editor.complaints() == [] and editor.clicks() == clicks + 1 <= MOST_CLICKS
        shoot(editor, "comfyui-app.png")


MOST_WIDTH = 1100  # canvas units: what a laptop shows beside an open side bar
RUN_HERE = ["SafeRoPE tiny world", "SafeRoPE several concepts", "SafeRoPE probe and refuse", "SafeRoPE risk map"]


def moved(workflow, place):
    """With its last node elsewhere."""
    return workflow | {"nodes": [*workflow["nodes"][:-1], workflow["nodes"][-1] | {"pos": place}]}


@pytest.mark.parametrize("nodes_2", [False, True])
def test_templates_open_near_enough_to_be_read_on_a_laptop(open_page, nodes_2):
    files = sorted(EXAMPLES.glob("*.json"))
    graphs = {file.stem: json.loads(file.read_text(encoding="utf-8")) | {"extra": {}} for file in files}
    with open_page(size=SMALL, Comfy__VueNodes__Enabled=nodes_2) as editor:
        for name, workflow in graphs.items():
            editor.page.evaluate(LOAD, workflow)
            editor.settle()
            assert (editor.blurred(), editor.overlaps(), editor.width() <= MOST_WIDTH) == (False, [], True), name
        first = next(iter(graphs.values()))
        editor.page.evaluate(LOAD, moved(first, first["nodes"][0]["pos"]))
        editor.settle()
        assert editor.overlaps() != [], "control"
        editor.page.evaluate(LOAD, moved(first, [4000, 0]))
        editor.page.wait_for_function("app.canvas.low_quality")  # control
        assert editor.width() > MOST_WIDTH


def test_nodes_that_grow_with_their_pictures_keep_apart(open_page):
    """In Nodes 2.0: what a run shows makes nodes taller."""
    with open_page(size=SMALL, Comfy__VueNodes__Enabled=True) as editor:
        for name in RUN_HERE:
            editor.page.evaluate(LOAD, json.loads((EXAMPLES / f"{name}.json").read_text(encoding="utf-8")))
            editor.run()
            editor.page.wait_for_function("document.querySelector('[data-node-id] img')?.naturalWidth")
            editor.settle()
            assert editor.overlaps() == [], name


def test_inputs_for_experts_are_folded(editor):
    """In the classic renderer, which needs our script for it."""
    editor.open_blank()
    apply = editor.add("SafeRoPE Apply", 500, 300)
    assert editor.widgets(apply) == ["strength"]
    editor.show_advanced(apply)
    shown = editor.widgets(apply)
    assert len(shown) == 9 and {"gate", "blocks", "record"} < set(shown)
    assert editor.complaints() == []


OFFERED = """([id, name]) => {
    const { options } = app.graph.getNodeById(id).widgets.find(widget => widget.name === name)
    return options.values.map(value => options.getOptionLabel(value))
}"""


@pytest.mark.parametrize("nodes_2", [False, True])
def test_lists_tell_the_model_of_a_file_and_speak_the_users_language(open_page, nodes_2):
    with open_page(Comfy__Locale="zh", Comfy__VueNodes__Enabled=nodes_2) as editor:
        editor.page.evaluate(LOAD, json.loads(BUNDLED.read_text(encoding="utf-8")))
        load, apply = (node_named(editor, title) for title in ("What to suppress", "Protect the model"))
        offered = editor.page.evaluate(OFFERED, [load, "concept"])
        assert {"star · 微型世界", "swirl · 微型世界"} <= set(offered)
        assert editor.page.evaluate(OFFERED, [apply, "streams"]) == ["两者", "文本", "图像"]
        if nodes_2:
            editor.page.locator(f"[data-node-id='{load}']").get_by_text("star · 微型世界").wait_for()
        else:
            label = "id => app.graph.getNodeById(id).widgets.find(widget => widget.name === 'concept')._displayValue"
            assert editor.page.evaluate(label, load) == "star · 微型世界"
        sent = editor.page.evaluate("async () => (await app.graphToPrompt()).output")
        assert (sent[str(load)]["inputs"]["concept"], sent[str(apply)]["inputs"]["streams"]) == (
            "star.safetensors",
            "both",
        )
        assert editor.complaints() == []


def test_nodes_are_found_linked_and_explained(editor, shoot):
    editor.open_blank()
    load = editor.add("SafeRoPE Load Concept", 500, 300)
    apply = editor.add("SafeRoPE Apply", 950, 300)
    editor.connect(load, "description", apply, "concept")
    assert editor.links() == []  # a text is no concept
    editor.connect(load, "concept", apply, "concept")
    assert editor.links() == [[load, 0, apply, 1, "SAFEROPE_CONCEPT"]]
    text = editor.help(apply)
    assert text.startswith("SafeRoPE Apply") and "The node never fails in silence." in text
    assert editor.complaints() == []
    shoot(editor, "comfyui-help.png", clip={"x": 340, "y": 40, "width": 1260, "height": 780})


def test_an_error_reaches_the_person(editor):
    """Also what shows that `complaints` would tell."""
    editor.open_template("SafeRoPE", "SafeRoPE tiny world")
    editor.show_advanced(node_named(editor, "Protect the model"))
    editor.type_into(node_named(editor, "Protect the model"), "blocks", "nonsense")
    editor.run()
    overlay = editor.page.get_by_test_id("error-overlay")
    overlay.wait_for()
    assert "Protect the model failed" in "".join(editor.complaints())
    overlay.get_by_role("button", name="View details").click()
    editor.page.get_by_text("blocks: got 'nonsense', expected").first.wait_for()


@pytest.mark.parametrize("language", ["zh", "ja"])
def test_names_are_shown_in_the_users_language(open_page, language):
    texts = json.loads((ROOT / "locales" / language / "nodeDefs.json").read_text(encoding="utf-8"))
    name, output = (texts["SafeRoPE_LoadConcept"][key] for key in ("display_name", "outputs"))
    with open_page(Comfy__Locale=language) as editor:
        editor.open_blank()
        node = editor.add(name, 500, 300)
        shown = "[node.type, node.getTitle(), node.outputs[0].localized_name]"
        look = f"id => {{ const node = app.graph.getNodeById(id); return {shown} }}"
        assert editor.page.evaluate(look, node) == ["SafeRoPE_LoadConcept", name, output["0"]["name"]]
        assert name != "SafeRoPE Load Concept"
        assert editor.complaints() == []


def test_the_page_sends_example_workflows_as_our_converter_does(editor, comfyui):
    """What the other tests run is what a person gets who presses Run."""
    files = sorted(EXAMPLES.glob("*.json"))
    assert len(files) > 5
    for file in files:
        workflow = json.loads(file.read_text(encoding="utf-8"))
        sent, ours = editor.page.evaluate(LOAD, workflow), api_prompt(workflow, comfyui.object_info())
        parts = [{key: (node["class_type"], node["inputs"]) for key, node in prompt.items()} for prompt in (sent, ours)]
        assert parts[0] == parts[1] and len(ours) > 3, file.stem
