"""Combine, Save and Inspect Concept, and the pin of Load Concept, inside a real ComfyUI."""

from __future__ import annotations

import importlib

import pytest
import torch

from dev.comfyui import ROOT
from tests.support import concepts as flat

pytestmark = pytest.mark.host


@pytest.fixture
def folder(pack, tmp_path, monkeypatch):
    """ComfyUI's output folder, empty; concept files are looked for in its `saferope` alone."""
    import folder_paths

    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path))
    home = tmp_path / "saferope"
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "saferope", ([str(home)], {".safetensors"}))
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    return home


def run(node_classes, node, /, **inputs):
    return node_classes[f"SafeRoPE_{node}"].execute(**inputs).args


def test_combined_concepts_come_in_order_with_distinct_slugs(node_classes, make_concept):
    star, other = make_concept(), make_concept(seed=1)
    found, report, picture = run(
        node_classes, "CombineConcepts", concepts={"concept0": [star], "concept1": [other, make_concept(slug="moon")]}
    )
    assert [each.slug for each in found] == ["star", "star-2", "moon"]
    assert "star / star: overlap" in report and report.count("overlap") == 3
    assert picture.shape[0] == 1 and picture.shape[3] == 3 and 0 <= picture.min() < picture.max() <= 1


@pytest.fixture
def compared(pack, monkeypatch):
    """The pairs whose overlap is asked for."""
    combine, pairs = importlib.import_module(f"{pack.__name__}.nodes.combine"), []
    overlap = combine.overlap
    monkeypatch.setattr(combine, "overlap", lambda *pair: pairs.append(pair) or overlap(*pair))
    return pairs


@pytest.fixture
def progress(comfy):
    """(value, total) as ComfyUI shows them; `each` may be given something to do."""
    import comfy.model_management
    import comfy.utils

    class Progress(list):
        each = staticmethod(lambda: None)

        def __call__(self, value, total, *rest, **more):
            self.append((value, total))
            self.each()

    before, seen = comfy.utils.PROGRESS_BAR_HOOK, Progress()
    comfy.utils.set_progress_bar_global_hook(seen)
    yield seen
    comfy.utils.set_progress_bar_global_hook(before)
    comfy.model_management.interrupt_current_processing(False)


def test_more_concepts_than_a_file_may_hold_are_refused_before_they_are_compared(node_classes, make_concept, compared):
    """32 inputs of 64 concepts would be two million pairs."""
    many = [make_concept()] * 33
    with pytest.raises(ValueError, match=r"hold 66 concepts, expected 1 to 64.*Take inputs away"):
        run(node_classes, "CombineConcepts", concepts={"concept0": many, "concept1": many})
    assert not compared
    found, *_ = run(node_classes, "CombineConcepts", concepts={"concept0": many, "concept1": many[:31]})
    assert len(found) == 64 and len(compared) == 64 * 63 // 2, "control: as many as a file may hold"
    with pytest.raises(ValueError, match="hold 0 concepts"):
        run(node_classes, "CombineConcepts", concepts={"concept0": []})


def test_combining_shows_progress_and_can_be_cancelled(node_classes, make_concept, compared, progress):
    import comfy.model_management

    concepts = {"concept0": [make_concept(seed=seed) for seed in range(4)]}
    run(node_classes, "CombineConcepts", concepts=concepts)
    assert progress[-1] == (6, 6) and len(compared) == 6
    progress.clear()
    compared.clear()
    progress.each = comfy.model_management.interrupt_current_processing  # at the first pair, which is always shown
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        run(node_classes, "CombineConcepts", concepts=concepts)
    assert len(compared) == 1


def test_a_strength_that_is_held_is_reported(node_classes, make_concept, core):
    """4.2 rad, past half a turn: more than strength 1 would be less."""
    generators = {f"generator_{stream}": core.fixed_generator(4, 4.2, 4) for stream in ("text", "image")}
    concepts = [make_concept(slug=slug, seed=seed, strength=2.0 - seed, **generators) for seed, slug in enumerate("ab")]
    report = run(node_classes, "CombineConcepts", concepts={"concept0": concepts})[1]
    assert "concept 'a': strength 2 acts as 1." in report and "concept 'b'" not in report


def test_saved_concepts_are_found_again_and_never_overwritten(node_classes, make_concept, folder):
    concept = make_concept(description="for the test")
    for number in (1, 2):
        (digest,) = run(node_classes, "SaveConcept", concept=[concept], name="mine", half=False, license="cc0-1.0")
        assert (folder / f"mine_{number:05d}.safetensors").is_file()
        [loaded], text = run(
            node_classes, "LoadConcept", concept=f"mine_{number:05d}.safetensors", sha256=digest.upper()
        )
        assert torch.equal(loaded.text.basis.k, concept.text.basis.k) and digest in text


@pytest.mark.parametrize("name", ["../x", "a/b", "a\\b", "", "x.pt", "C:x", "\\\\host\\x", "a" * 81, "x\n"])
def test_no_name_leads_out_of_the_output_folder(node_classes, make_concept, folder, name):
    with pytest.raises(ValueError, match=r"name is .*expected 1 to 80 letters"):
        run(node_classes, "SaveConcept", concept=[make_concept()], name=name)
    assert not folder.exists()


@pytest.mark.parametrize("license", ["", "a b", "x" * 61, "<b>"])
def test_odd_licences_are_refused(node_classes, make_concept, folder, license):
    with pytest.raises(ValueError, match="expected an SPDX name"):
        run(node_classes, "SaveConcept", concept=[make_concept()], name="x", license=license)


def test_a_file_that_is_not_the_pinned_one_is_refused(node_classes, make_concept, folder):
    run(node_classes, "SaveConcept", concept=[make_concept()], name="mine")
    for pin in ("0" * 64, "abc"):
        with pytest.raises(ValueError, match=r"has the sha256 [0-9a-f]{64}, expected '.*fetch that one"):
            run(node_classes, "LoadConcept", concept="mine_00001.safetensors", sha256=pin)


def test_a_files_own_strength_is_a_factor(node_classes, make_concept, folder):
    run(node_classes, "SaveConcept", concept=[make_concept(strength=0.5)], name="mine")
    [loaded], _ = run(node_classes, "LoadConcept", concept="mine_00001.safetensors", strength=0.5)
    assert loaded.strength == 0.25
    for strength in (-0.1, 2.1, float("nan")):
        with pytest.raises(ValueError, match="expected a number from 0 to 2"):
            run(node_classes, "LoadConcept", concept="mine_00001.safetensors", strength=strength)


def told(node_classes):
    """What the list of Load Concept says of its files."""
    spec = node_classes["SafeRoPE_LoadConcept"].INPUT_TYPES()["required"]["concept"][1]
    return spec["options"], spec["made_for"]


def test_the_list_tells_which_model_a_file_is_made_for(node_classes, make_concept, folder):
    run(node_classes, "SaveConcept", concept=[make_concept()], name="mine")
    (folder / "bad.safetensors").write_bytes(b"no concept")
    star = (ROOT / "tinyworld" / "concepts" / "star.safetensors").read_bytes()
    (folder / "star.safetensors").write_bytes(star)
    assert told(node_classes) == (
        ["bad.safetensors", "mine_00001.safetensors", "star.safetensors"],  # none is hidden
        {"mine_00001.safetensors": "flux", "star.safetensors": "tiny world"},
    )
    (folder / "mine_00001.safetensors").write_bytes(star)
    assert told(node_classes)[1]["mine_00001.safetensors"] == "tiny world", "a replaced file is looked at again"


def test_inspection_shows_heads_spectrum_and_provenance(node_classes, make_concept):
    one = make_concept(training={"settings": {"model": "tinyworld", "seed": 3}, "versions": {"torch": "2.13"}})
    other = flat.changed(one, slug="moon", name="moon", singular_values=torch.rand(4, 4))
    heads, spectrum, text = run(node_classes, "InspectConcept", concept=[one, other])
    assert heads.shape[0] == spectrum.shape[0] == 2
    assert "made with model tinyworld, seed 3" in text and "by torch 2.13" in text and text.count("flux: 2 double") == 2
    assert not torch.equal(spectrum[0], spectrum[1])


@pytest.mark.parametrize(
    ("size", "squared"), [(torch.finfo(torch.float32).max, float("inf")), (1e25, float("inf")), (1e-25, 0.0)]
)
def test_a_spectrum_of_any_size_is_drawn_as_what_it_is(pack, make_concept, size, squared):
    """A file may say 3e38: squared as it is that is infinite, and 1e-25 is nothing; neither reaches the picture."""
    inspect = importlib.import_module(f"{pack.__name__}.nodes.draw.concept_pictures")
    values = torch.tensor([1.0, 0.5, 0.25, 0.0]).repeat(4, 1)
    large, plain, flat = (
        inspect.spectrum(make_concept(singular_values=each)) for each in (values * size, values, torch.ones(4, 4))
    )
    assert torch.equal(large, plain)
    assert not torch.equal(flat, plain), "control: another spectrum is another picture"
    assert (values * size).square().max() == squared, "control: it would break"


def test_maps_show_what_they_are_given(pack):
    pictures = importlib.import_module(f"{pack.__name__}.nodes.draw.charts")
    low, high = (pictures.heat_map(torch.full((2, 3), v), ["a", "b"], list("xyz"), "t", "u") for v in (0.0, 1.0))
    assert low.shape == high.shape and not torch.equal(low, high)
    framed = pictures.heat_map(torch.zeros(2, 3), ["a", "b"], list("xyz"), "t", "u", torch.eye(2, 3, dtype=torch.bool))
    assert not torch.equal(framed, low)
    unknown = pictures.heat_map(torch.full((2, 3), float("nan")), ["a", "b"], list("xyz"), "t", "u", numbers=True)
    assert not torch.equal(unknown, low) and not torch.equal(unknown, high)
    assert pictures.colour(-1) == pictures.colour(0) and pictures.colour(2) == pictures.colour(1)
    short, long = (pictures.bars([v], ["x"], "t", "u") for v in (0.1, 0.9))
    assert short.shape == long.shape and not torch.equal(short, long)


def test_pictures_and_text_of_a_concept_are_bounded(node_classes, pack, core, make_concept, monkeypatch):
    """The largest geometry, a subspace as wide as a head, names and words without end, more concepts than are drawn."""
    inspect = importlib.import_module(f"{pack.__name__}.nodes.inspect")
    monkeypatch.setattr(inspect, "MOST_DRAWN", 2)
    geometry = core.Geometry(64, 64, 96, 128)
    flat, basis = torch.zeros(1, 128, 128), torch.eye(128)[None]
    wide = {"basis_q": basis, "basis_k": basis, "generator_text": flat, "generator_image": flat}
    wide |= {"heads": torch.zeros(1, 3, dtype=torch.int32), "singular_values": torch.ones(1, 128)}
    words = {"name": "W" * 200, "description": "a\n" * 10_000, "training": {"versions": {"x" * 50_000: "y"}}}
    maps, spectra, text = run(node_classes, "InspectConcept", concept=[make_concept(geometry, **wide, **words)] * 3)
    assert len(maps) == len(spectra) == 2 and "1 more are not drawn" in text
    assert maps.shape[1] <= 2424 and maps.shape[2] <= 2200 and spectra.shape[1] <= 2600 and spectra.shape[2] == 700
    assert max(map(len, text.split("\n"))) < 1100 and text.count("\n") < 3 * 40
    plain = run(node_classes, "InspectConcept", concept=[make_concept(), make_concept(slug="moon")])
    assert len(plain[0]) == 2 and "not drawn" not in plain[2], "control: as many as are drawn"


def test_no_name_decides_how_large_a_picture_is(pack):
    pictures = importlib.import_module(f"{pack.__name__}.nodes.draw.charts")
    name = "W" * 200
    sheet = pictures.heat_map(torch.zeros(2, 2), [name, name], [name, name], name, name)
    assert pictures.width_of(name, pictures.TITLE) > 3000 > sheet.shape[2], "control: the name itself is wider"
    assert sheet.shape[1] < 500


def test_the_node_says_what_a_file_is_for_and_its_identity(node_classes, pack, monkeypatch, make_concept):
    """In slugs alone: the page takes the line for HTML."""
    module = importlib.import_module(f"{pack.__name__}.nodes.load")
    said = []
    monkeypatch.setattr(module, "passing", said.append)
    description = node_classes["SafeRoPE_LoadConcept"].execute("star.safetensors").args[1]
    assert said == [f"star, for the tiny world, sha256 {description[7:19]}"]
    many = [make_concept(slug=f"s{number}", name="<b>") for number in range(5)]
    told = module._in_short(many, "f" * 64)
    assert told.startswith("s0, s1, s2 and 2 more, for ") and "<" not in told and told.endswith(f"sha256 {'f' * 12}")
