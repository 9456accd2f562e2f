"""The rotation of a concept as docs/concept-file.md says it, head by head, in float64, without a line of the core's."""

from __future__ import annotations

import torch

from tests.support import concepts as flat


def transcribed(concept, x, role, kind, index, text):
    """Queries or keys x [B, H, L, D] of a block, turned; the first `text` tokens are text, the others image tokens."""
    group, done = concept.geometry.group if role == "k" else 1, set()
    code = {"double": 0, "single": 1}[kind]
    result = x.double().clone()
    for row, (block_type, block, head) in enumerate(concept.heads.tolist()):
        if (block_type, block) != (code, index) or head // group in done:
            continue
        done.add(head // group)
        basis = flat.field(concept, f"basis_{role}")[row].double()
        for stream, span in (("text", slice(0, text)), ("image", slice(text, None))):
            generator = flat.field(concept, f"generator_{stream}")[row].double()
            vectors = result[:, head // group, span]
            inside = vectors @ basis
            risk = inside.square().sum(-1) / vectors.square().sum(-1)
            scale = torch.where(risk > concept.threshold, risk.clamp(max=1), torch.zeros_like(risk))
            turn = torch.matrix_exp(scale[..., None, None] * generator) - torch.eye(len(generator))
            result[:, head // group, span] += (turn @ inside[..., None])[..., 0] @ basis.T
    return result.to(x.dtype)


class NaivePatch:
    """An attn1_patch that rotates by `transcribed`. `texts`: number of queries -> how many of them are text; another
    number is a KeyError, a layout that the test does not think of. `seen` has the blocks that called.
    """

    def __init__(self, concept, texts):
        self.concept, self.texts, self.seen = concept, texts, set()

    def __call__(self, q, k, v, pe=None, attn_mask=None, extra_options=None):
        block = extra_options["block_type"], extra_options["block_index"]
        return dict(zip("qk", self.turned(q, k, *block), strict=True))

    def turned(self, q, k, kind, index):
        self.seen.add((kind, index))
        text = self.texts[q.shape[2]]
        return [transcribed(self.concept, x, role, kind, index, text) for role, x in (("q", q), ("k", k))]
