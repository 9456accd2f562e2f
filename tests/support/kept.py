"""Results that no change of the code's arrangement may change, as JSON.

    python -m tests.support.kept        # from a checkout; writes tests/files/kept_results.json

It uses public names alone, so that an earlier checkout can run it too. A number that another CPU may round in another
way is kept as a number, everything else as it is or as its SHA-256.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import torch

import saferope_core as core

ROOT = Path(__file__).resolve().parents[2]
FILE = Path("tests") / "files" / "kept_results.json"
CONCEPTS = ("star", "swirl")
EXAMPLES = ("v1-plain.safetensors", "v1-whole.safetensors")
TOKENS = 6  # text tokens, and as many image tokens


def concept(slug: str, root: Path = ROOT) -> core.Concept:
    """A concept that 0.1.0 brought along: other releases may bring another one."""
    (found,) = core.load_concepts(root / "tests" / "files" / f"{slug}-0.1.0.safetensors")
    return found


def queries(geometry: core.Geometry, basis: torch.Tensor) -> torch.Tensor:
    """x [1, H, L, D] of small whole numbers; a third of the tokens lies in the subspace of the block's first head."""
    count = geometry.heads * 2 * TOKENS * geometry.head_dim
    x = torch.arange(count).remainder(13).sub(6).float().view(1, geometry.heads, 2 * TOKENS, geometry.head_dim)
    x[:, :, ::3] = 8 * basis[:, 0].expand(1, geometry.heads, x[:, :, ::3].shape[2], -1)
    return x


def rotated(found: core.Concept, strength: float) -> dict[str, object]:
    """For each block and role: which tokens turned, and the mean of what they became."""
    protection, told = core.Protection([found], found.geometry, [strength]), {}
    blocks = [("double", i) for i in range(found.geometry.double_blocks)]
    blocks += [("single", i) for i in range(found.geometry.single_blocks)]
    for row, (kind, index) in enumerate(blocks):
        for role in "qk":
            x = queries(found.geometry, found.basis(role)[2 * row])
            y = protection.rotate(x, role, kind, index, (0, TOKENS), (TOKENS, 2 * TOKENS))
            turned = (x != y).any(-1)[0].int().tolist()
            told[f"{kind} {index} {role}"] = {"turned": turned, "sums": (y * x).sum(-1)[0].tolist()}
    return told


def files(folder: Path) -> dict[str, str]:
    """SHA-256 of the tensors of float32 example files, saved again in either dtype.

    Float32 comes back bit for bit on every CPU, and rounds to float16 alike. Metadata hold a version and a date.
    """
    told = {}
    for name in EXAMPLES:
        for dtype in (torch.float32, torch.float16):
            path = folder / f"{name}.{dtype}"
            found = core.load_concepts(ROOT / "tests" / "files" / name)
            core.save_concepts(path, found, dtype, created="2026-11-26T00:00:00+00:00")
            data = path.read_bytes()
            told[path.name] = hashlib.sha256(data[8 + int.from_bytes(data[:8], "little") :]).hexdigest()
    return told


def merged(one: core.Concept, other: core.Concept) -> dict[str, object]:
    """Overlaps."""
    found = core.overlap(one, other)
    overlaps = [found.of(stream) for stream in ("text", "image")]
    return {"overlap": overlaps}


def parts(found: core.Concept) -> dict[str, object]:
    """Heads and moving heads of selections."""
    told = {}
    for text, stream in (("", "both"), ("d0", "both"), ("s1-2", "text"), ("d0-1,s3", "image")):
        part = core.restricted(found, core.parse_blocks(text, found.geometry), stream)
        told[f"{text} {stream}"] = None if part is None else part.heads.tolist()
    return told


def audits() -> dict[str, str]:
    """The audit's words on every workflow of the tests and examples."""
    module = "saferope" if (ROOT / "saferope").is_dir() else "training"
    names = sorted([*Path("tests/files/audit").glob("*.json"), *Path("example_workflows").glob("SafeRoPE [r-t]*.json")])
    command = [sys.executable, "-m", module, "audit", "--json", *map(str, names)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return {entry["file"]: hashlib.sha256(json.dumps(entry).encode()).hexdigest() for entry in json.loads(done.stdout)}


def results(folder: Path) -> dict[str, object]:
    star, swirl = (concept(slug) for slug in CONCEPTS)
    return {
        "rotated": {f"{found.slug} {s}": rotated(found, s) for found in (star, swirl) for s in (1.0, 0.5)},
        "files": files(folder),
        "merged": merged(star, swirl),
        "parts": parts(star),
        "audits": audits(),
    }


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as scratch:
        (ROOT / FILE).write_text(json.dumps(results(Path(scratch))) + "\n", encoding="utf-8")
