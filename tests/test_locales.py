"""Texts in Chinese and Japanese: other nodes go by the names seen in that language, and no family is left out."""

import json
import re

import pytest

from dev.comfyui import ROOT

FLUX_ALONE = {"guidance", "description of TinyWorld"}  # FluxGuidance is FLUX's; the tiny world is a FLUX


def faults(nodes):
    """Places that name a node of ours in English, or say FLUX where other families work too."""
    found = []
    for node, text in nodes.items():
        places = {f"description of {node.removeprefix('SafeRoPE_')}": text["description"]}
        places |= {name: each["tooltip"] for name, each in text["inputs"].items()}
        for name, said in places.items():
            others = "FLUX" in said and "Z-Image" not in said and name not in FLUX_ALONE
            if others or re.search(r"SafeRoPE (Apply|Load|Risk|Save|Combine|Inspect|Calibrate)", said):
                found.append((node, name))
    return found


@pytest.mark.parametrize("language", ["zh", "ja"])
def test_texts_name_nodes_as_they_are_seen_and_no_family_alone(language):
    nodes = json.loads((ROOT / "locales" / language / "nodeDefs.json").read_text(encoding="utf-8"))
    assert len(nodes) > 8 and faults(nodes) == []
    for said in ("FLUX 模型", "SafeRoPE Apply"):
        nodes["SafeRoPE_Apply"]["inputs"]["model"]["tooltip"] = said
        assert faults(nodes) == [("SafeRoPE_Apply", "model")], "control"
