"""Every case on file with the exit code of the real command. `test_audit_cases.py` tells why, beside honest twins.

A case came from a real ComfyUI 0.30.0: either the audit let it through though its picture was bit for bit unprotected,
or it refused a workflow whose picture was protected.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from saferope import cli
from tests.support.workflows import editor, protected
from workflow_lint.file import sorted_out
from workflow_lint.verdict import Required, audit_file

CASES = Path(__file__).parents[1] / "files" / "audit"
ASKS, DOES_NOT = 0, 1
EXPECTED = {
    # once let through: what runs is not what the file seems to ask for
    "merge_value_api": DOES_NOT,  # a constant over a link in front of the sampler
    "decoy_orthogonalise_api": DOES_NOT,  # a decoy in front of the concept leaves it nothing to turn
    "primitive_editor": DOES_NOT,  # the front end runs another value than the primitive shows
    "odd_names_editor": DOES_NOT,  # the front end cleans names, and connects another model
    "nested_editor": DOES_NOT,  # the inner strength is 0, the outer instance shows 1
    "dual_cfg_positive_only_api": DOES_NOT,  # positive only, under a guider that numbers prompts otherwise
    "denoise_api": DOES_NOT,  # the second sampler runs in the unprotected tail alone
    "own_loop_api": DOES_NOT,  # a sampler with a loop of its own over the network
    "private_api": DOES_NOT,  # a node with a private forward
    "pipe_api": DOES_NOT,  # a pipe beside a protected sampler
    "pipe_editor": DOES_NOT,
    "own_type_api": DOES_NOT,  # a model under a type of its own
    "own_type_editor": DOES_NOT,
    # once refused: honest
    "depth_api": ASKS,
    "florence_api": ASKS,
    "lama_api": ASKS,
    "upscale_api": ASKS,
    "win_api": ASKS,
    # their links are not in the editor's file: refused still, with advice
    "setget_editor": DOES_NOT,
    "context_editor": DOES_NOT,
}


def audit(name, *options):
    result = CliRunner().invoke(cli.app, ["audit", str(CASES / f"{name}.json"), "--json", *options])
    return result.exit_code, json.loads(result.output)[0]


@pytest.mark.parametrize("name", EXPECTED)
def test_a_case_has_its_exit_code(name):
    code, told = audit(name)
    assert code == EXPECTED[name], told
    reasons = told["opaque"] or [sampler["failures"] for sampler in told["samplers"] if sampler["failures"]]
    assert bool(reasons) is (code == DOES_NOT), "what is refused is told why, what asks has nothing against it"


@pytest.mark.parametrize("name", [name for name, code in EXPECTED.items() if code == DOES_NOT])
def test_no_pin_talks_a_case_through(name):
    assert audit(name, "--require-sha256", "ab" * 32)[0] == DOES_NOT


def test_no_case_is_left_out():
    assert {path.stem for path in CASES.glob("*.json")} == set(EXPECTED)


def test_a_bypassed_loader_gives_no_model():
    """ComfyUI stops there: nothing is known of what would be drawn."""
    for modes, answer in (({}, True), ({"1": 4}, False), ({"1": 2}, False)):
        verdict = audit_file(sorted_out(editor(protected(), modes)), Required())
        assert verdict.protected is answer
