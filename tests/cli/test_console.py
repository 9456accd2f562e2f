"""What a terminal gets: every character it can say, and none that it obeys. In real processes,
whose consoles are real."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from dev.comfyui import ROOT
from saferope import cli
from saferope_training.console import plain
from tinyworld.model import WEIGHTS

STAR = WEIGHTS.parent / "concepts" / "star.safetensors"
NAME = "вых 星"


def process(*command: str, encoding: str = "cp1252") -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONIOENCODING": encoding, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *command], capture_output=True, env=environment, cwd=ROOT, timeout=300)


COMMANDS = """
import sys
from saferope import cli
for sys.argv[1:] in {!r}:
    try:
        cli.main()
        print(0)
    except SystemExit as end:
        print(end.code or 0)
"""


def test_a_console_that_lacks_letters_gets_their_numbers(tmp_path):
    """The work was done, and then the command failed for a word on where it lies."""
    path, out = tmp_path / f"{NAME}.safetensors", tmp_path / NAME
    path.write_bytes(STAR.read_bytes())
    prompts = ["prompts", "star", "--out", str(out), "--unsafe-prompts", "4", "--benign-prompts", "4"]
    inspect, missing = ["inspect", str(path)], ["inspect", str(tmp_path / f"no {NAME}.safetensors")]
    done = process("-c", COMMANDS.format([prompts, inspect, missing, ["prompts", "--help"]]))
    told = done.stdout.decode("cp1252")
    assert [line for line in told.splitlines() if line.isdecimal()] == ["0", "0", "2", "0"], done.stderr
    assert (out / "prompts.jsonl").is_file()
    assert told.count(r"\u0432\u044b\u0445 \u661f") == 2 and "sha256" in told and "Usage" in told
    assert rb"saferope: " in done.stderr and rb"\u661f.safetensors" in done.stderr


def test_such_a_console_is_one_that_fails():
    """The control of the test above."""
    done = process("-c", f"print({NAME!r})")
    assert done.returncode == 1 and b"can't encode" in done.stderr


EVIL = "\x1b]0;owned\x07\u202e"
LIBRARIES = f"""
import logging, warnings
from saferope_training.console import guarded
evil = {EVIL!r}
def work():
    logging.getLogger('diffusers').warning('%s', evil)
    logging.getLogger('transformers').error(evil)
    warnings.warn(evil)
    raise RuntimeError(evil)
"""


def test_libraries_and_tracebacks_print_no_control_characters():
    done = process("-c", f"{LIBRARIES}guarded(work)", encoding="utf-8")
    assert done.returncode == 1
    told = done.stderr.decode()
    assert told.count("\\x1b]0;owned\\x07\\u202e") >= 4 and "Traceback" in told
    assert all(letter.isprintable() or letter == "\n" for letter in told)


def test_by_themselves_they_do():
    """The control of the test above."""
    done = process("-c", f"{LIBRARIES}work()", encoding="utf-8")
    assert done.stderr.decode().count(EVIL) >= 3


def test_a_model_folder_s_words_reach_the_terminal_escaped(tmp_path):
    lie = f"X{EVIL}\nsaferope: concept file written\n" + "y" * 100_000
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": lie}))
    arguments = ["extract", "star", "--model", str(tmp_path), "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(cli.app, arguments)
    assert result.exit_code == 2 and len(result.output) < 6000
    assert all(letter.isprintable() or letter == "\n" for letter in result.output)
    assert len([line for line in result.output.splitlines() if line.startswith("saferope: ")]) == 1


@pytest.mark.parametrize(
    ("text", "told"),
    [("a\nb", "a\nb"), ("a\tb\r", "a\\tb\\r"), ("\ud800", "\\ud800"), ("[red]x[/red] Δ", "[red]x[/red] Δ")],
)
def test_plain(text, told):
    assert plain(text) == told


def test_a_stage_s_name_is_no_markup(capsys):
    from saferope.commands.common import progress_bars

    with progress_bars() as progress:
        progress("[red]a\x1b[/red]", 1, 2)
        progress("train", 1, 2, "about 1 h 01 min left in all")
        progress("extract", 1, 2, "about 2 min left in all")
        progress("extract", 2, 2, "about 1 min left in all")
    told = capsys.readouterr().err
    assert "about 1 h 01 min left in all" in told
    assert "about 1 min" not in told and "about 2 min" not in told, "over"
    assert "[red]a\\x1b[/red]" in told
