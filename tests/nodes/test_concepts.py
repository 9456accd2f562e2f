"""Concept files in ComfyUI: which are listed, which are refused, when one is read again."""

import importlib
import os

import pytest
import torch

pytestmark = pytest.mark.host


@pytest.fixture(scope="session")
def node(node_classes):
    return node_classes["SafeRoPE_LoadConcept"]


@pytest.fixture
def folder(pack, tmp_path, monkeypatch):
    """An empty folder, the only one in which concept files are looked for."""
    import folder_paths

    monkeypatch.setitem(folder_paths.folder_names_and_paths, "saferope", ([str(tmp_path)], {".safetensors"}))
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    return tmp_path


@pytest.fixture
def star(folder, core, concept):
    core.save_concepts(folder / "star.safetensors", [concept])
    return folder / "star.safetensors"


def test_reads_a_file(node, star, concept):
    [loaded], text = node.execute("star.safetensors").args
    assert torch.equal(loaded.text.basis.k, concept.text.basis.k)
    assert (
        "concept star: star\n  | random\n" in text
        and "4 safety-critical heads" in text
        and concept.geometry.title() in text
    )


def test_a_files_words_cannot_pass_for_its_sha256(node, folder, core, make_concept):
    """Nor fill the screen: it is the first line, and the only one that begins so."""
    lie = f"sha256 {'0' * 64}"
    concept = make_concept(slug="sha256", name=lie, description=f"fine\n{lie}" + "\n" * 15_000 + lie)
    core.save_concepts(folder / "x.safetensors", [concept, make_concept(slug="moon", description="")])
    lines = node.execute("x.safetensors").args[1].split("\n")
    assert lines[0] == f"sha256 {core.sha256(folder / 'x.safetensors')}" and len(lines) < 40
    assert [line for line in lines if line.startswith("sha256")] == lines[:1]
    assert f"concept sha256: {lie}" in lines and f"  | {lie}" in lines and "  | ... and 14982 lines more" in lines
    assert lines[-4] == "concept moon: moon", "a concept without a description has no line for it"


def test_lists_safetensors_only(pack, node, star):
    (star.parent / "evil.pt").write_bytes(b"")
    node_class = importlib.import_module(f"{pack.__name__}.nodes.load").LoadConcept
    assert node_class.define_schema().inputs[0].options == ["star.safetensors"]


@pytest.mark.parametrize("name", ["gone.safetensors", "../star.safetensors", "/etc/passwd", "evil.pt", ""])
def test_any_other_name_is_refused(node, star, name):
    (star.parent / "evil.pt").write_bytes(b"")
    with pytest.raises(
        FileNotFoundError, match=r"was not found\. Expected one of \['star\.safetensors'\].* Put the file"
    ):
        node.execute(name)


def test_a_broken_file_is_refused_by_its_name(node, star, core):
    """Clients of a server learn no folder of it."""
    star.write_bytes(star.read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"^Concept file 'star\.safetensors' cannot be used: .*damaged or cut") as told:
        node.execute("star.safetensors")
    assert str(star.parent) not in str(told.value)
    with pytest.raises(ValueError, match=r"damaged") as whole:
        core.load_concepts(star)
    assert str(star.parent) in str(whole.value), "control: the command line tells the path"
    with pytest.raises(FileNotFoundError) as told:
        node.execute("gone.safetensors")
    assert str(star.parent) not in str(told.value)


@pytest.mark.parametrize("form", ["{}", "sha256:{}", " SHA256 {} ", "sha256: {}"])
def test_a_pin_may_say_what_it_is(node, star, core, form):
    digest = core.sha256(star)
    assert node.execute("star.safetensors", sha256=form.format(digest)).args[0]
    for wrong in (form.format("0" * 64), "sha256:", form.format(digest[:-1])):
        with pytest.raises(ValueError, match="has the sha256"):
            node.execute("star.safetensors", sha256=wrong)


def test_the_content_decides_whether_it_is_read_again(node, star, core, make_concept):
    first = node.fingerprint_inputs("star.safetensors")
    os.utime(star, (0, 0))
    assert node.fingerprint_inputs("star.safetensors") == first
    core.save_concepts(star, [make_concept(seed=1)])
    assert node.fingerprint_inputs("star.safetensors") != first


def test_registering_finds_the_users_folders_first_and_can_be_repeated(pack, comfy):
    import folder_paths

    module = importlib.import_module(f"{pack.__name__}.nodes.host.files")
    module.register_folders()
    module.register_folders()
    paths, extensions = folder_paths.folder_names_and_paths["saferope"]
    ends = [os.path.join("models", "saferope"), os.path.join("output", "saferope")]
    ends.append(os.path.join("tinyworld", "concepts"))
    assert [path[-len(end) :] for path, end in zip(paths, ends, strict=True)] == ends
    assert extensions == {".safetensors"}
