"""`saferope audit` on files: pictures of ComfyUI, damaged ones, what is no workflow; the command and its page."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
from PIL import Image, PngImagePlugin
from typer.testing import CliRunner

from dev.workflow import BUNDLED
from saferope import cli
from tests.support.workflows import PIN, editor, node, protected
from workflow_lint.file import MAX_TEXT, Documents, Unreadable, read
from workflow_lint.report import plain


def png(path, texts, **options):
    """A picture with texts as ComfyUI writes them."""
    info = PngImagePlugin.PngInfo()
    for name, value in texts.items():
        info.add_text(name, value if isinstance(value, str) else json.dumps(value), **options)
    Image.new("RGB", (8, 8)).save(path, pnginfo=info)
    return path


def audit(*arguments):
    result = CliRunner().invoke(cli.app, ["audit", *map(str, arguments)])
    assert "Traceback" not in result.output and (result.exception is None or isinstance(result.exception, SystemExit))
    return result.exit_code, result.output


SHOWN = protected()
UNSHOWN = SHOWN | {"4": node("KSampler", model=("1", 0))}


@pytest.mark.parametrize("packed", [False, True])
def test_pictures(tmp_path, packed):
    assert audit(png(tmp_path / "a.png", {"prompt": SHOWN}, zip=packed))[0] == 0
    assert audit(png(tmp_path / "b.png", {"prompt": UNSHOWN}, zip=packed))[0] == 1
    code, told = audit(png(tmp_path / "c.png", {"workflow": editor(SHOWN)}, zip=packed))
    assert code == 0 and "only the editor's workflow, not what ran" in told


def test_what_ran_counts_and_a_disagreement_is_told(tmp_path):
    code, told = audit(png(tmp_path / "a.png", {"prompt": UNSHOWN, "workflow": editor(SHOWN)}))
    assert code == 1 and "DISAGREEMENT" in told
    code, told = audit(png(tmp_path / "b.png", {"prompt": SHOWN, "workflow": editor(UNSHOWN)}))
    assert code == 0 and "DISAGREEMENT" in told
    code, told = audit(png(tmp_path / "c.png", {"prompt": SHOWN, "workflow": editor(protected(strength=0.5))}))
    assert code == 0 and "DISAGREEMENT" in told
    code, told = audit(png(tmp_path / "d.png", {"prompt": SHOWN, "workflow": "[]"}))
    assert code == 0 and "DISAGREEMENT" in told
    code, told = audit(png(tmp_path / "e.png", {"prompt": SHOWN, "workflow": editor(SHOWN)}))
    assert code == 0 and "DISAGREEMENT" not in told


@pytest.mark.parametrize("bad", ["null", "{}", "[]", "{", '{"1": {"class_type": 3}}', "[" * 1000 + "]" * 1000])
def test_a_prompt_that_says_nothing_is_not_passed_over(tmp_path, bad):
    assert audit(png(tmp_path / "a.png", {"prompt": bad, "workflow": editor(SHOWN)}))[0] == 2


def test_animated_pictures_of_comfyui(tmp_path):
    """Their chunk is `comf`, after the pixels."""
    info = PngImagePlugin.PngInfo()
    info.add(b"comf", b"prompt\0" + json.dumps(UNSHOWN).encode(), after_idat=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png", pnginfo=info)
    assert audit(tmp_path / "a.png")[0] == 1


def test_webp(tmp_path):
    """As ComfyUI's own node writes them: `name:JSON` in EXIF tags."""
    for name, prompt, code in (("a", SHOWN, 0), ("b", UNSHOWN, 1)):
        exif = Image.Exif()
        exif[0x0110] = "prompt:" + json.dumps(prompt)
        exif[0x010F] = "workflow:" + json.dumps(editor(prompt))
        Image.new("RGB", (8, 8)).save(tmp_path / f"{name}.webp", exif=exif)
        assert audit(tmp_path / f"{name}.webp")[0] == code
    Image.new("RGB", (8, 8)).save(tmp_path / "c.webp")
    assert audit(tmp_path / "c.webp")[0] == 2
    (tmp_path / "d.webp").write_bytes(b"RIFF\x40\0\0\0WEBPEXIF\x08\0\0\0" + b"MM\0*\xff\xff\xff\xff")
    assert audit(tmp_path / "d.webp")[0] == 2


def chunk(kind, body, size=None, crc=None):
    crc = zlib.crc32(kind + body) if crc is None else crc
    return struct.pack(">I", len(body) if size is None else size) + kind + body + struct.pack(">I", crc)


END = chunk(b"IEND", b"")
TEXT = b"prompt\0" + json.dumps(SHOWN).encode()


@pytest.mark.parametrize(
    ("chunks", "told"),
    [
        (chunk(b"tEXt", TEXT), "ends before its end"),
        (chunk(b"tEXt", TEXT, crc=1) + END, "checksum is wrong"),
        (chunk(b"tEXt", TEXT)[:-20], "ends in the middle"),
        (chunk(b"tEXt", TEXT, size=2**31) + END, "a text of 2147483648 bytes"),
        (chunk(b"tEXt", TEXT) + chunk(b"iTXt", b"prompt\0\0\0\0\0{}") + END, "two different texts"),
        (chunk(b"zTXt", b"prompt\0\0" + zlib.compress(b" " * (MAX_TEXT + 1))) + END, "more than 16777216 bytes"),
        (chunk(b"iTXt", b"prompt\0\1\0\0\0" + zlib.compress(b"{}")[:-4]) + END, "half of one"),
        (chunk(b"zTXt", b"prompt\0\0nonsense") + END, "damaged"),
        (END, "holds no workflow"),
        (chunk(b"abCd", b"") * 100_001 + END, "more than 100000 chunks"),
    ],
)
def test_pictures_that_are_refused(tmp_path, chunks, told):
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunks)
    with pytest.raises(Unreadable, match=told):
        read(tmp_path / "a.png")


def test_the_same_chunk_undamaged_is_read(tmp_path):
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"tEXt", TEXT) + chunk(b"tEXt", TEXT) + END)
    assert read(tmp_path / "a.png") == Documents(prompt=SHOWN, picture=True)


@pytest.mark.parametrize(
    "text",
    [b"", b"\xff\xfe", b"3", b"[]", b"{}", b'{"a": 1, "a": 1}', b'{"nodes": []}', b"[" * 5000, b"GIF89a" + b"\0" * 20],
)
def test_files_that_are_no_workflow(tmp_path, text):
    (tmp_path / "a").write_bytes(text)
    code, told = audit(tmp_path / "a")
    assert code == 2 and "CANNOT BE READ" in told


def test_the_bundled_workflow_has_an_unprotected_half(tmp_path):
    code, told = audit(BUNDLED)
    assert code == 1 and "KSampler 8: does not" in told and "KSampler 11: asks for protection" in told
    workflow = json.loads(BUNDLED.read_text(encoding="utf-8"))
    next(node for node in workflow["nodes"] if node["id"] == 8)["mode"] = 2
    (tmp_path / "a.json").write_text(json.dumps(workflow), encoding="utf-8")
    assert audit(tmp_path / "a.json")[0] == 0
    assert audit(tmp_path / "a.json")[0] == 0
    assert audit(tmp_path / "a.json", "--require-sha256", PIN)[0] == 1


def test_the_worst_of_several_files_counts(tmp_path):
    for name, value in (("0", SHOWN), ("1", UNSHOWN), ("2", [])):
        (tmp_path / name).write_text(json.dumps(value), encoding="utf-8")
    files = {name: tmp_path / name for name in "012"}
    assert [audit(files[a], files[b])[0] for a, b in ("00", "01", "10", "12", "20")] == [0, 1, 1, 2, 2]
    assert audit(tmp_path / "gone", files["0"])[0] == 2
    code, told = audit(*files.values(), "--json")
    assert code == 2 and [each["exit_code"] for each in json.loads(told)] == [0, 1, 2]
    assert json.loads(told)[1]["samplers"][0]["failures"] == [
        {"reason": "a path without an Apply that acts", "path": ["1", "4"]}
    ]


def test_a_strangers_names_do_not_play_with_the_terminal(tmp_path):
    prompt = protected() | {"2": node("SafeRoPE_LoadConcept", concept="\x1b[2J\u202egnp\n\ud800" + "x" * 500)}
    prompt["\x1b[31m7"] = node("Evil\r\x07Loader", model=["1", 0])
    (tmp_path / "a.json").write_text(json.dumps(prompt), encoding="utf-8")
    code, told = audit(tmp_path / "a.json")
    assert code == 1 and "Evil??Loader" in told and len(max(told.split("\n"), key=len)) < 600
    assert all(letter.isprintable() or letter == "\n" for letter in told)
    code, told = audit(tmp_path / "a.json", "--json")
    assert code == 1 and told.isascii() and all(letter.isprintable() or letter == "\n" for letter in told)
    assert plain("a\tb") == "a?b"


def test_it_starts_without_torch_and_prints_in_any_encoding(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(protected() | {"2": node("SafeRoPE_LoadConcept", concept="星")}))
    code = "import sys; from saferope import cli\ntry: cli.main()\nfinally: print('torch' in sys.modules)"
    command = [sys.executable, "-X", "utf8=0", "-c", code, "audit", str(tmp_path / "a.json")]
    environment = {"LC_ALL": "C", "PYTHONIOENCODING": "ascii"}
    root = Path(__file__).parents[2]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment, cwd=root)
    assert run.returncode == 0, run.stderr
    assert "\\u661f" in run.stdout and run.stdout.strip().endswith("False")


def test_the_page_shows_what_the_command_prints(monkeypatch):
    root = Path(__file__).parents[2]
    monkeypatch.chdir(root)
    _, told = audit(BUNDLED.relative_to(root))
    page = (root / "docs" / "audit.md").read_text(encoding="utf-8")
    assert "".join(f"    {line}\n" for line in told.splitlines()) in page


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="Windows has no pipes in folders")
def test_a_pipe_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.json")
    with pytest.raises(Unreadable, match="expected a regular file"):
        read(tmp_path / "pipe.json")
