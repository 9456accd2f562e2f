"""SafeRoPE Save Image and `saferope verify`, on pictures that a real ComfyUI draws with the tiny world."""

import importlib
import io
import json
import random

import pytest
from PIL import Image
from typer.testing import CliRunner

from tests.support import concepts as flat
from tests.support.signing import RAN

pytestmark = pytest.mark.host
FORMATS = ["PNG", "JPEG", "WEBP"]


def apply(node_classes, model, concepts, strength=1.0, **settings):
    return node_classes["SafeRoPE_Apply"].execute(model, concepts, strength, **settings).args


def verify(*args):
    """Exit code and the one report of `saferope verify --json`."""
    from saferope.cli import app

    result = CliRunner().invoke(app, ["verify", "--json", *map(str, args)])
    return result.exit_code, json.loads(result.stdout)[0] if result.stdout.startswith("[") else result.output


@pytest.fixture
def picture(node_classes, world, star, sampled, save, keys):
    def draw(format="PNG", **more):
        model, recorder = apply(node_classes, world[0], star)
        return save(sampled(model), recorder, format=format, **more)[0]

    return draw


@pytest.mark.parametrize("format", FORMATS)
def test_a_signed_picture_is_verified_and_a_changed_byte_refused(picture, star, keys, tmp_path, format):
    file = picture(format)
    digest = star[0].source
    code, report = verify(file, "--require-full", "--require-concept", digest)
    assert (code, report["verdict"], report["reasons"]) == (0, "protected", [])
    assert report["runs"][0][0]["asked"]["concepts"][0]["sha256"] == digest and "a test" in report["signer"]
    data, changed = file.read_bytes(), tmp_path / "changed"
    Image.open(io.BytesIO(data)).load()
    start, random_ = data.index(b"jumb") - 16, random.Random(0)
    places = [*random_.sample(range(len(data)), 40), *range(start, start + 260, 13)]
    for place in places:  # pixels, metadata, manifest, its frame and its padding
        bad = bytearray(data)
        bad[place] ^= 1 << random_.randrange(8)
        changed.write_bytes(bad)
        code, report = verify(changed)
        assert code in (1, 2) and report["reasons"], f"byte {place}"
    code, report = verify(file, "--require-concept", "0" * 64)
    assert code == 1 and "did not turn the concept" in report["reasons"][0], "control: another concept"


def test_one_pixel_metadata_and_manifest_are_named(picture, tmp_path):
    data, changed = picture().read_bytes(), tmp_path / "changed.png"
    places = {"dataHash": data.index(b"IDAT") + 40, "mismatch": data.index(b"class_type"), "org.saferope": None}
    for reason, place in places.items():
        place = place or data.index(b'"concepts"')
        changed.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        code, report = verify(changed)
        assert code == 1 and any(reason in each for each in report["reasons"]), report


def test_comfyui_s_metadata_is_in_the_picture(picture):
    png, webp = Image.open(picture()), Image.open(picture("WEBP"))
    assert json.loads(png.text["prompt"]) == RAN and json.loads(png.text["workflow"]) == {"nodes": []}
    assert json.loads(webp.getexif()[0x0110].partition(":")[2]) == RAN


def test_who_signed_decides(picture, keys, tmp_path, monkeypatch):
    from saferope.cli import app

    file = picture()
    monkeypatch.setenv("SAFEROPE_KEYS", str(tmp_path / "other"))
    code, told = verify(file)
    assert code == 2 and "No signer is trusted" in told
    CliRunner().invoke(app, ["keys", "init"])
    code, report = verify(file)
    assert code == 1 and "signingCredential.untrusted" in report["reasons"][0]
    assert verify(file, "--trust", keys / "authority.pem")[0] == 0


def test_a_renewed_signer_is_trusted_as_before(picture, keys):
    from saferope.cli import app

    old = (keys / "signer.pem").read_bytes()
    assert CliRunner().invoke(app, ["keys", "init"]).exit_code == 2, "never over keys that are there"
    assert CliRunner().invoke(app, ["keys", "init", "--renew"]).exit_code == 0
    assert (keys / "signer.pem").read_bytes() != old and verify(picture())[0] == 0
    for name in ("signer.key", "authority.key"):
        assert (keys / name).stat().st_mode & 0o777 == 0o600


def test_without_a_key_nothing_is_saved(node_classes, world, star, sampled, save, monkeypatch, tmp_path):
    monkeypatch.setenv("SAFEROPE_KEYS", str(tmp_path / "none"))
    model, recorder = apply(node_classes, world[0], star)
    with pytest.raises(ValueError, match=r"no key to sign with.*saferope keys init"):
        save(sampled(model), recorder)
    assert not list(tmp_path.glob("*.png"))


def test_without_the_library_it_says_how_to_get_it(picture, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "c2pa", None)
    with pytest.raises(ImportError, match="pip install c2pa-python"):
        picture()


def test_a_key_elsewhere_signs_by_a_callback(picture, keys, monkeypatch):
    inner = importlib.import_module("saferope_credentials.keys").configured(keys).sign
    module = type(importlib)("a_key_in_hardware")
    module.sign = lambda data: inner(data)
    monkeypatch.setitem(__import__("sys").modules, module.__name__, module)
    told = {"certificates": "signer.pem", "callback": "a_key_in_hardware:sign", "algorithm": "es256"}
    (keys / "signing.json").write_text(json.dumps(told))
    assert verify(picture())[0] == 0


@pytest.mark.parametrize("told", ["{}", "[]", '{"certificates": "signer.pem", "key": "none"}', '{"more": "1"}'])
def test_a_configuration_that_is_none_is_refused(picture, keys, told):
    (keys / "signing.json").write_text(told)
    with pytest.raises(ValueError, match=r"signing\.json cannot be used"):
        picture()


REFUSED = {
    "another latent": (lambda s, m, p: {"samples": s(m)["samples"] + 1e-3}, "No receipt covers this latent"),
    "the plain model": (lambda s, m, p: s(p), "No receipt covers this latent"),
    "a second sampler": (lambda s, m, p: s(p, s(m), 0.5), "No receipt covers this latent"),
    "a sampler before": (lambda s, m, p: s(m, s(p), 0.5), "began with a latent that no receipt covers"),
}


@pytest.mark.parametrize("way", REFUSED)
def test_what_no_receipt_covers_is_not_signed(node_classes, world, star, sampled, save, keys, tmp_path, way):
    make, words = REFUSED[way]
    model, recorder = apply(node_classes, world[0], star)
    with pytest.raises(ValueError, match=words):
        save(make(sampled, model, world[0]), recorder)
    assert not list(tmp_path.glob("*.png"))


def test_two_protected_samplers_are_signed_together(node_classes, world, star, sampled, save, keys):
    (first, one), (second, two) = (apply(node_classes, world[0], star) for _ in range(2))
    out = sampled(second, sampled(first), 0.5)
    with pytest.raises(ValueError, match="no receipt covers"):
        save(out, two)
    code, report = verify(save(out, one, two)[0], "--require-full")
    assert code == 0 and len(report["runs"]) == 2


def test_a_skipped_block_is_not_signed(node_classes, world, star, sampled, save, keys):
    model, recorder = apply(node_classes, world[0], star)
    clone, calls = model.clone(), []

    def cache(args, more):
        calls.append(1)
        return {"img": args["img"], "txt": args["txt"]} if len(calls) > 1 else more["original_block"](args)

    clone.set_model_patch_replace(cache, "dit", "double_block", 0)
    with pytest.raises(ValueError, match="forwards left out protected blocks"):
        save(sampled(clone), recorder, require="in part")


@pytest.mark.parametrize(
    "settings",
    [
        {"strength": 0.5},
        {"end_percent": 0.1},
        {"blocks": "s0-3"},
        {"streams": "text"},
        {"conditionings": "positive only"},
    ],
)
def test_protection_in_part_is_signed_as_such_alone(node_classes, world, star, sampled, save, keys, settings):
    model, recorder = apply(node_classes, world[0], star, **settings)
    out = sampled(model)
    with pytest.raises(ValueError, match="protected in part"):
        save(out, recorder)
    file = save(out, recorder, require="in part")[0]
    code, report = verify(file)
    assert (code, report["verdict"]) == (0, "protected in part") and report["left_out"]
    code, report = verify(file, "--require-full")
    assert code == 1 and "not in full" in report["reasons"][0]


@pytest.mark.parametrize(
    "settings",
    [
        {"strength": 0.0},
        {"strength": 1e-9},
        {"gate": "fixed", "threshold": 1.0},
        {"start_percent": 0.999},
        {"start_percent": 0.5, "end_percent": 0.5},
    ],
)
def test_no_effect_is_not_signed(node_classes, world, star, sampled, save, keys, settings):
    model, recorder = apply(node_classes, world[0], star, **settings)
    with pytest.raises(ValueError, match=r"no concept turned anything|the strength is 0|are both 0\.5"):
        save(sampled(model), recorder, require="in part")


def test_an_inverse_is_not_signed(node_classes, world, star, sampled, save, keys):
    texts = {f"generator_{each}": -star[0].generator(each) for each in ("text", "image")}
    decoy = flat.changed(star[0], slug="decoy", **texts)
    model, recorder = apply(node_classes, world[0], [star[0], decoy])
    with pytest.raises(ValueError, match=r"'star' is turned back by 'decoy'"):
        save(sampled(model), recorder, require="in part")


def test_a_receipt_for_another_picture_is_not_believed(picture, keys, tmp_path):
    """Whoever cuts the credentials out and puts them elsewhere is noticed; a picture without any has none."""
    data = picture().read_bytes()
    start = data.index(b"caBX") - 4
    size = int.from_bytes(data[start : start + 4], "big") + 12
    plain = tmp_path / "plain.png"
    plain.write_bytes(data[:start] + data[start + size :])
    code, report = verify(plain)
    assert code == 1 and "no content credentials" in report["reasons"][0]
    other = io.BytesIO()
    Image.new("RGB", (96, 96)).save(other, "PNG")
    plain.write_bytes(other.getvalue()[:33] + data[start : start + size] + other.getvalue()[33:])
    assert verify(plain)[0] == 1
    (tmp_path / "text.png").write_text("no picture")
    assert verify(tmp_path / "text.png")[0] == 2


def test_every_picture_of_a_batch_is_signed(node_classes, world, star, sampled, save, keys):
    model, recorder = apply(node_classes, world[0], star)
    files = save(sampled(model, batch=2), recorder)
    assert len(files) == 2 and all(verify(file)[0] == 0 for file in files)


def test_others_see_our_assertion_and_an_untrusted_root_alone(picture):
    """What any C2PA validator says of the file without our certificate."""
    import c2pa

    reader = c2pa.Reader(str(picture()))
    told = json.loads(reader.json())
    (manifest,) = told["manifests"].values()
    labels = {each["label"] for each in manifest["assertions"]}
    assert {"org.saferope.protection", "c2pa.actions.v2"} <= labels and "thumbnail" not in manifest
    codes = {each["code"] for each in told["validation_results"]["activeManifest"]["failure"]}
    assert codes == {"signingCredential.untrusted"}
