"""ComfyUI's own web page in a headless Chromium, used as a person would: by mouse and keyboard.

    with open_browser() as browser, open_editor(browser, server.address) as editor:
        editor.open_template("SafeRoPE", "SafeRoPE tiny world")
        editor.run()
        editor.page.screenshot(path="picture.png")

Whatever changes something goes through the mouse or the keyboard, settings excepted. Scripts in the page only look: the
graph is painted on a canvas, which tells nobody where its nodes are or how they are linked.
"""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import Browser, Page, ViewportSize, sync_playwright
from playwright.sync_api import TimeoutError as PageTimeout

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
NO_BROWSER = (
    "No Chromium found: nobody looked at the nodes in ComfyUI's page. Install one (Debian: apt install chromium; "
    "elsewhere: .venv/bin/playwright install chromium), or set CHROMIUM_PATH to a Chromium or Chrome."
)
SIZE: ViewportSize = {"width": 1600, "height": 1000}
SMALL: ViewportSize = {"width": 1366, "height": 768}  # a laptop's
COUNT_CLICKS = "window.clicks = 0; addEventListener('pointerdown', event => { clicks += event.isTrusted }, true)"
WAIT_MS = 180_000  # for anything to appear: 5 s at most on an idle machine, minutes where trainings run beside it
RUN_SECONDS = 600  # for the tiny world's two pictures: 3 s on two idle cores
POLL_MS = 200
SETTLED_MS = 1000  # without a change
CLICKS = 12  # a busy page may miss one, or take a double click for two single ones; a person clicks again
PRESS_MS = 40  # a click without any duration is not always one to the canvas
SETTINGS = {  # of somebody who has been here before; everything else as ComfyUI has it
    "Comfy.TutorialCompleted": True,
    "Comfy.Minimap.Visible": False,
    "Comfy.RightSidePanel.IsOpen": False,
    "Comfy.VueNodes.Enabled": False,
    "Comfy.Locale": "en",
}
SEARCH = "[role=combobox][aria-controls=results-list]"
OWN_LANGUAGE = re.compile(r"/docs/\w+/[a-z-]+\.md")  # the help page in the user's language is asked for first
ON_SCREEN = """([x, y]) => {
    const [left, top] = app.canvas.ds.convertOffsetToCanvas([x, y]), box = app.canvas.canvas.getBoundingClientRect()
    return [left + box.left, top + box.top]
}"""
BOXES = """() => app.graph.nodes.map(node => {
    const scale = app.canvas.ds.scale, element = document.querySelector(`[data-node-id="${node.id}"]`)
    if (!element) return [`${node.type} ${node.id}`, [...node.boundingRect]]
    const box = element.getBoundingClientRect()
    return [`${node.type} ${node.id}`, [box.x, box.y, box.width, box.height].map(length => length / scale)]
})"""  # Nodes 2.0 has elements, the classic renderer has none
SPAN = """() => {
    const boxes = [...app.graph.nodes, ...app.graph.groups].map(each => [...each.boundingRect])
    return Math.max(...boxes.map(box => box[0] + box[2])) - Math.min(...boxes.map(box => box[0]))
}"""
SHOWN = """id => {
    const node = app.graph.getNodeById(id)
    return node.widgets.filter(widget => node.isWidgetVisible(widget)).map(widget => widget.name)
}"""
NODE = "id => { const node = app.graph.getNodeById(id); return %s }"
SLOT = """([id, side, name]) => {
    const node = app.graph.getNodeById(id), index = node[side].findIndex(slot => slot.name === name)
    return [...(side === "inputs" ? node.getInputPos(index) : node.getOutputPos(index))]
}"""


class NoBrowser(RuntimeError):
    """There is no Chromium here; the message says how to get one."""


@contextmanager
def open_browser() -> Iterator[Browser]:
    """The Chromium of CHROMIUM_PATH, else of the PATH, else Playwright's own.

    NoBrowser where there is none; ValueError where CHROMIUM_PATH names no file.
    """
    named = os.environ.get("CHROMIUM_PATH")
    if named and not Path(named).is_file():
        raise ValueError(
            f"CHROMIUM_PATH is {named!r}, but no such file is there. Name a Chromium or Chrome, or unset it."
        )
    with sync_playwright() as playwright:
        found = named or next(filter(None, map(shutil.which, NAMES)), None)
        if not Path(found or playwright.chromium.executable_path).is_file():
            raise NoBrowser(NO_BROWSER)
        browser = playwright.chromium.launch(executable_path=found)
        yield browser
        browser.close()


@contextmanager
def open_editor(
    browser: Browser, address: str, sharpness: float = 1, size: ViewportSize = SIZE, **settings: object
) -> Iterator[Editor]:
    """ComfyUI's page, loaded, with nothing remembered but SETTINGS and yours. sharpness: pixels of a screenshot per
    pixel of the page. Dots in the names of settings are written as `__`."""
    context = browser.new_context(viewport=size, device_scale_factor=sharpness)
    context.add_init_script(COUNT_CLICKS)
    context.set_default_timeout(WAIT_MS)
    wanted = SETTINGS | {name.replace("__", "."): value for name, value in settings.items()}
    context.request.post(f"{address}/api/settings", data=wanted)
    editor = Editor(context.new_page(), address)
    editor.page.goto(address)
    editor.page.wait_for_function("window.app?.vueAppReady")
    yield editor
    context.close()


class Editor:
    """What a person does on the page, in canvas units and by the names on the screen, and what that
    person then sees."""

    def __init__(self, page: Page, address: str):
        self.page, self.address = page, address
        self.errors: list[str] = []  # of the page itself, and whatever names this pack in the console
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("console", lambda message: self._note(message.type, message.text, message.location.get("url", "")))

    def _note(self, kind: str, text: str, url: str) -> None:
        if kind == "error" and "saferope" in (text + url).lower() and not OWN_LANGUAGE.search(url):
            self.errors.append(f"{text} ({url})")

    def open_template(self, pack: str, name: str) -> None:
        self.page.get_by_role("button", name="Templates").click()
        dialog = self.page.get_by_role("dialog")
        dialog.get_by_text(pack, exact=True).click()
        dialog.get_by_text(name, exact=True).first.click()
        dialog.wait_for(state="hidden")
        self.page.wait_for_function("name => document.title.includes(name)", arg=name)

    def open_blank(self) -> None:
        self.page.locator(".new-blank-workflow-button").click()
        self.page.wait_for_function("app.graph.nodes.length === 0")

    def search(self, text: str, x: float, y: float) -> str:
        """Double click on the free canvas at (x, y) of the page, type; what the first entry then says."""
        box = self.page.locator(SEARCH)
        self._insist(lambda: self.page.mouse.dblclick(x, y, delay=PRESS_MS), f"document.querySelector('{SEARCH}')")
        box.fill("")
        self.page.keyboard.type(text)
        first = self.page.locator("#results-list [role=option]").first
        first.filter(has_text=text).wait_for()
        return first.inner_text()

    def add(self, name: str, x: float, y: float) -> str:
        """Puts the first node that the search finds to (x, y) of the page. Returns its id."""
        before = self.page.evaluate("app.graph.nodes.length")
        self.search(name, x, y)
        self.page.keyboard.press("Enter")
        self.page.wait_for_function("before => app.graph.nodes.length > before", arg=before)
        self.page.locator(SEARCH).wait_for(state="hidden")  # while it fades, it takes the clicks
        self.page.mouse.move(x + 20, y + 20)  # the node hangs at the mouse ...
        self.page.mouse.move(x, y, steps=4)
        put_down = "!app.graph.nodes.at(-1).flags.ghost"
        self._insist(lambda: self.page.mouse.click(x, y, delay=PRESS_MS), put_down)  # ... until a click puts it down
        return self.page.evaluate("app.graph.nodes.at(-1).id")

    def _insist(self, act: Callable[[], None], seen: str) -> None:
        """Acts until that is seen on the page, CLICKS times at most; then TimeoutError."""
        for left in reversed(range(CLICKS)):
            act()
            try:
                self.page.wait_for_function(seen, timeout=WAIT_MS / CLICKS)
                return
            except PageTimeout:
                if not left:
                    raise

    def connect(self, source: str, output: str, target: str, input: str) -> None:
        """Drags from an output to an input; what comes of it is in `links`."""
        start = self._slot(source, "outputs", output)
        end = self._slot(target, "inputs", input)
        self.page.mouse.move(*start)
        self.page.mouse.down()
        self.page.mouse.move(*end, steps=12)
        self.page.mouse.up()

    def links(self) -> list[list]:
        """[source id, output's index, target id, input's index, type] of every link."""
        fields = "[link.origin_id, link.origin_slot, link.target_id, link.target_slot, link.type]"
        return self.page.evaluate(f"[...app.graph.links.values()].map(link => {fields})")

    def help(self, node: str) -> str:
        """Selects a node and asks what it is: the text of the page at the side."""
        self.page.mouse.click(*self.at(node, 80, -15), delay=PRESS_MS)
        self.page.get_by_test_id("info-button").click()
        page = self.page.locator(".node-help-content")
        page.locator("li").first.wait_for()
        return page.inner_text()

    def type_into(self, node: str, widget: str, text: str) -> None:
        """Fills a text widget of one line."""
        where = f"node.widgets.find(widget => widget.name === '{widget}').y"
        self.page.mouse.click(*self.at(node, 100, self._ask(node, where) + 10), delay=PRESS_MS)
        self.page.locator(".graphdialog input").fill(text)
        self.page.keyboard.press("Enter")

    def run(self) -> None:
        """Presses Run; returns when that is done, well or not. TimeoutError after RUN_SECONDS."""
        before = self._jobs_done()
        of_graph = self.page.get_by_test_id("queue-button")
        of_app = self.page.get_by_role("button", name="Run", exact=True).last
        (of_graph if of_graph.is_visible() else of_app).click()
        deadline = time.monotonic() + RUN_SECONDS
        while self._jobs_done() == before:
            if time.monotonic() > deadline:
                raise TimeoutError(f"Run was pressed, and nothing came of it in {RUN_SECONDS} s.")
            self.page.wait_for_timeout(POLL_MS)

    def _jobs_done(self) -> int:
        return len(self.page.request.get(f"{self.address}/history").json())

    def clicks(self) -> int:
        """How often the person has pressed the mouse since the page was opened."""
        return self.page.evaluate("clicks")

    def blurred(self) -> bool:
        """Whether the canvas is too far away for ComfyUI to draw texts: its cut for details."""
        return self.page.evaluate("app.canvas.low_quality")

    def width(self) -> float:
        """Of the graph with its groups, in canvas units."""
        return self.page.evaluate(SPAN)

    def settle(self) -> None:
        """Waits until no node appears, moves or grows any more."""
        seen: list = []
        while (now := self.page.evaluate(BOXES)) != seen:
            seen = now
            self.page.wait_for_timeout(SETTLED_MS)

    def overlaps(self) -> list[tuple[str, str]]:
        """Pairs of nodes of which one lies on the other, as large as the page draws them."""
        boxes = self.page.evaluate(BOXES)
        return [(a, b) for place, (a, one) in enumerate(boxes) for b, other in boxes[:place] if _meet(one, other)]

    def widgets(self, node: str) -> list[str]:
        """Names of the widgets that the classic renderer shows."""
        return self.page.evaluate(SHOWN, node)

    def show_advanced(self, node: str) -> None:
        """In the classic renderer: by the node's menu."""
        self.page.mouse.click(*self.at(node, 80, -15), button="right", delay=PRESS_MS)
        self.page.get_by_text("Show Advanced", exact=True).click()

    def complaints(self) -> list[str]:
        """All that speaks of an error on the screen or in the console: none where all is well."""
        seen = self.page.locator("[data-testid=error-overlay], .p-toast-message-error, [role=dialog]:visible")
        return [*seen.all_inner_texts(), *self.errors]

    def box(self, nodes: list[str], margin: float = 24) -> dict[str, float]:
        """The part of the page that holds these nodes, as a screenshot's `clip`."""
        bounds = [self._ask(node, "[...node.boundingRect]") for node in nodes]
        left, top = self._on_screen(min(b[0] for b in bounds), min(b[1] for b in bounds))
        right, bottom = self._on_screen(max(b[0] + b[2] for b in bounds), max(b[1] + b[3] for b in bounds))
        size = {"width": right - left + 2 * margin, "height": bottom - top + 2 * margin}
        return {"x": left - margin, "y": top - margin} | size

    def at(self, node: str, x: float, y: float) -> list[float]:
        """Where (x, y) of a node, from its upper left corner below the title, is on the page."""
        left, top = self._ask(node, "[...node.pos]")
        return self._on_screen(left + x, top + y)

    def _slot(self, node: str, side: str, name: str) -> list[float]:
        return self._on_screen(*self.page.evaluate(SLOT, [node, side, name]))

    def _on_screen(self, x: float, y: float) -> list[float]:
        return self.page.evaluate(ON_SCREEN, [x, y])

    def _ask(self, node: str, expression: str):
        return self.page.evaluate(NODE % expression, node)


def _meet(one: list[float], other: list[float]) -> bool:
    """Whether two boxes (left, top, width, height) share more than an edge, which may be drawn half a pixel off."""
    return all(one[k] + 1 < other[k] + other[k + 2] and other[k] + 1 < one[k] + one[k + 2] for k in (0, 1))
