"""`saferope audit` on what nobody has thought of: random files, broken workflows, and random graphs against all their
paths.
"""

from __future__ import annotations

import copy
import json

from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from dev.workflow import BUNDLED
from tests.support.workflows import PIN, STAR, editor, inside, node, protected
from workflow_lint.file import Unreadable, read, sorted_out
from workflow_lint.report import as_json, as_text
from workflow_lint.verdict import Required, audit_file

FEW = settings(max_examples=100, deadline=None, derandomize=True)


def exit_code(value):
    """0, 1 or 2, as the command has it; told in both ways."""
    try:
        verdict = audit_file(sorted_out(value), Required((PIN,), full=True))
        verdict = audit_file(sorted_out(value), Required())
    except Unreadable as error:
        assert str(error)
        return 2
    assert all(line.isprintable() for line in as_text("f", verdict).split("\n"))
    return json.loads(json.dumps(as_json("f", verdict), allow_nan=False))["exit_code"]


# --- random JSON -----------------------------------------------------------------------------------------------------
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
WORDS = st.sampled_from(
    ["nodes", "links", "inputs", "outputs", "id", "type", "mode", "link", "class_type", "definitions", "subgraphs"]
)
JSON = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=5) | st.dictionaries(WORDS | st.text(max_size=3), inner, max_size=5)
)


@FEW
@given(JSON)
def test_any_json_has_an_exit_code(value):
    assert exit_code(value) in (1, 2)


# --- workflows with a part replaced, removed or doubled --------------------------------------------------------------
def places(value, path=()):
    """Paths to all that a JSON value holds."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*path, key)
        yield from places(inner, (*path, key))


def at(value, path):
    for key in path:
        value = value[key]
    return value


def link_of(kind):
    primitive = {"2": node("PrimitiveFloat", value=1.0), "7": node("SafeRoPE_LoadConcept", concept=STAR)}
    wide = protected(strength=("2", 0), concept=("7", 0)) | primitive
    return kind(editor(wide, objects=True))


STARTS = [protected(), editor(protected()), link_of(inside), link_of(lambda w: inside(inside(w), name="x"))]
STARTS.append(json.loads(BUNDLED.read_text(encoding="utf-8")))
PLACES = [list(places(start)) for start in STARTS]


@settings(max_examples=250, deadline=None, derandomize=True)
@given(st.data())
def test_any_damage_has_an_exit_code(data):
    number = data.draw(st.integers(0, len(STARTS) - 1))
    value = copy.deepcopy(STARTS[number])
    for _ in range(data.draw(st.integers(1, 4))):
        path = data.draw(st.sampled_from(PLACES[number]))
        try:
            holder, key = at(value, path[:-1]), path[-1]
            if data.draw(st.booleans()):
                del holder[key]
            else:
                other = data.draw(st.sampled_from(PLACES[number]))
                holder[key] = data.draw(SCALARS | st.just(copy.deepcopy(at(value, other))))
        except (KeyError, IndexError, TypeError):
            continue  # an earlier damage took it away
    assert exit_code(json.loads(json.dumps(value))) in (0, 1, 2)


# --- random bytes ----------------------------------------------------------------------------------------------------
def pictures(folder):
    info, exif = PngImagePlugin.PngInfo(), Image.Exif()
    info.add_text("prompt", json.dumps(protected()), zip=True)
    info.add_itxt("workflow", json.dumps(editor(protected())), zip=True)
    exif[0x0110] = "prompt:" + json.dumps(protected())
    Image.new("RGB", (4, 4)).save(folder / "a.png", pnginfo=info)
    Image.new("RGB", (4, 4)).save(folder / "a.webp", exif=exif)
    return [(folder / name).read_bytes() for name in ("a.png", "a.webp")] + [
        b"\x89PNG\r\n\x1a\n",
        b"RIFF\0\0\0\0WEBPEXIF",
    ]


def test_any_bytes_are_read_or_refused(tmp_path):
    starts = pictures(tmp_path)

    @settings(max_examples=200, deadline=None, derandomize=True)
    @given(
        st.sampled_from(starts),
        st.lists(st.tuples(st.integers(0, 5000), st.binary(min_size=1, max_size=6)), max_size=4),
        st.binary(),
    )
    def check(start, changes, tail):
        data = bytearray(start + tail)
        for place, new in changes:
            place %= len(data)
            data[place : place + len(new)] = new
        (tmp_path / "b").write_bytes(data)
        try:
            audit_file(read(tmp_path / "b"), Required())
        except Unreadable:
            pass

    check()


# --- random graphs against a list of all their paths -----------------------------------------------------------------
KINDS = {
    "UNETLoader": (),
    "CheckpointLoaderSimple": (),
    "StrangeLoader": (),
    "LoraLoader": ("model",),
    "StrangeLora": ("model",),
    "ModelMergeSimple": ("model1", "model2"),
    "SafeRoPE_Apply": ("model",),
    "BasicGuider": ("model",),
    "DualModelGuider": ("model", "model_negative"),
    "KSampler": ("model",),
    "StrangeSampler": ("model",),
    "SamplerCustomAdvanced": ("guider",),
}
GUIDERS, SAMPLERS = {"BasicGuider", "DualModelGuider"}, {"KSampler", "StrangeSampler", "SamplerCustomAdvanced"}


@st.composite
def graphs(draw):
    """A graph whose links all lead back, as API form; concepts 1 (pinned), 2 and 3 (off) come before it."""
    pins = ({"sha256": PIN}, {}, {"strength": 0.0})
    prompt = {str(i + 1): node("SafeRoPE_LoadConcept", concept=STAR, **pin) for i, pin in enumerate(pins)}
    models, guiders, between = [], [], [kind for kind in KINDS if kind not in SAMPLERS]
    count, samplers = draw(st.integers(1, 9)), draw(st.integers(1, 2))
    for number in range(10, 10 + count + samplers):
        kinds = between if number < 10 + count or not models else sorted(SAMPLERS)
        usable = [kind for kind in kinds if not KINDS[kind] or (guiders if "guider" in KINDS[kind] else models)]
        known = [kind for kind in usable if not strange(kind)]
        more = ["SafeRoPE_Apply"] * (30 * ("SafeRoPE_Apply" in usable))
        kind = draw(st.sampled_from([*usable, *known * 8, *more]))
        inputs = {slot: (draw(latest(guiders if slot == "guider" else models)), 0) for slot in KINDS[kind]}
        if kind == "SafeRoPE_Apply":
            inputs |= {
                "concept": (draw(st.sampled_from("1" * 10 + "23")), 0),
                "strength": draw(st.sampled_from([1.0] * 5 + [0.5, 0.0])),
            }
            inputs |= draw(st.sampled_from([{}] * 5 + [{"end_percent": 0.0}, {"streams": "text"}]))
        prompt[str(number)] = node(kind, **inputs)
        if kind not in SAMPLERS:
            (guiders if kind in GUIDERS else models).append(str(number))
    return prompt


def latest(keys):
    """One of them, more often the last, so that graphs grow long."""
    return st.sampled_from([*keys, *keys[-1:] * len(keys)])


def all_paths(prompt, key):
    sources = [prompt[key]["inputs"][slot][0] for slot in KINDS[prompt[key]["class_type"]]]
    if not sources:
        return [[key]]
    return [[*path, key] for source in sources for path in all_paths(prompt, source)]


def expected(prompt, pin, full):
    """By listing every path. Concepts 1 and 2 are files of one name, so that two Applies in a row may turn too far."""

    def acts(key):
        given = prompt[key]["inputs"]
        off = prompt[key]["class_type"] != "SafeRoPE_Apply" or given["strength"] == 0 or given["concept"][0] == "3"
        return not off and given.get("end_percent") != 0

    def holds(key, pinned):
        given = prompt[key]["inputs"]
        if not acts(key) or (full and (given["strength"] < 1 or "streams" in given)):
            return False
        return not pinned or given["concept"][0] == "1"

    answers = []
    for key, entry in prompt.items():
        if entry["class_type"] not in SAMPLERS:
            continue
        paths = all_paths(prompt, key)
        steps = [[step for step in path if acts(step)] for path in paths]
        safe = all(any(holds(step, pinned) for step in path) for path in paths for pinned in {False, pin})
        safe &= not pin or all(prompt[step]["inputs"]["concept"][0] == "1" for path in steps for step in path)
        safe &= max(map(len, steps)) < 2
        answers.append(safe and not any(strange(prompt[step]["class_type"]) for path in paths for step in path))
    takers = [kind for entry in prompt.values() if strange(kind := entry["class_type"]) and KINDS[kind]]
    return bool(answers) and all(answers) and not takers


def strange(kind):
    return kind.startswith("Strange")


def test_the_verdict_is_that_of_all_paths():
    answers = []

    @settings(max_examples=250, deadline=None, derandomize=True)
    @given(graphs(), st.booleans(), st.booleans())
    def check(prompt, pin, full):
        required = Required((PIN,) if pin else (), full)
        answers.append(expected(prompt, pin, full))
        for form in (prompt, editor(prompt), inside(editor(prompt))):
            found = audit_file(sorted_out(json.loads(json.dumps(form))), required)
            assert found.protected is answers[-1], as_text("f", found)

    check()
    assert 0.1 < sum(answers) / len(answers) < 0.9, (
        f"{sum(answers)} of {len(answers)}: else the comparison would say nothing"
    )
