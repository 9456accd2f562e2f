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


HELP = ROOT / "web" / "docs"
OTHER = {"SafeRoPE", "节点从不静默失败。", "黙って失敗することはありません。"}  # bold, and no label


def labels(nodes, name):
    """All that a person sees on a node in that language, and the names of all nodes."""
    seen = {each["display_name"] for each in nodes.values()} | OTHER
    here = nodes[name]
    seen |= {each["name"] for each in here["inputs"].values()} | {each["name"] for each in here["outputs"].values()}
    return seen | {word for each in here["inputs"].values() for word in each.get("options", {}).values()}


def unseen(page, nodes, name):
    """Bold words of a help page that stand nowhere on the node."""
    bold = set(re.findall(r"\*\*(.+?)\*\*", page))
    return sorted(bold - labels(nodes, name))


@pytest.mark.parametrize("language", ["zh", "ja"])
def test_help_pages_use_the_labels_that_are_seen(language):
    nodes = json.loads((ROOT / "locales" / language / "nodeDefs.json").read_text(encoding="utf-8"))
    for name, texts in nodes.items():
        page = (HELP / name / f"{language}.md").read_text(encoding="utf-8")
        assert page.startswith(f"# {texts['display_name']}\n") and unseen(page, nodes, name) == [], name
        assert (HELP / f"{name}.md").is_file()
    assert unseen("**strength**: 0 switches the protection off", nodes, "SafeRoPE_Apply") == ["strength"], "control"


@pytest.mark.parametrize("language", ["zh", "ja"])
def test_help_of_apply_passes_over_no_input(language):
    nodes = json.loads((ROOT / "locales" / language / "nodeDefs.json").read_text(encoding="utf-8"))
    told = (HELP / "SafeRoPE_Apply" / f"{language}.md").read_text(encoding="utf-8")
    inputs = {
        each["name"] for key, each in nodes["SafeRoPE_Apply"]["inputs"].items() if key not in ("model", "concept")
    }
    assert len(inputs) == 9 and [each for each in inputs if f"**{each}**" not in told] == []
