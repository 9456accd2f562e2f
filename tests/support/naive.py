"""The rotation of a concept as docs/concept-file.md says it, head by head, in float64, without a line of the core's."""

from __future__ import annotations

import torch

from tests.support import concepts as flat


def rows_of(concept, role, kind, index):
    """(row of the concept, head of the role) of a block; where keys are grouped, the first row of a group."""
    group, done = concept.geometry.group if role == "k" else 1, set()
    for row, (block_type, block, head) in enumerate(concept.heads.tolist()):
        if (("double", "single")[block_type], block) == (kind, index) and head // group not in done:
            done.add(head // group)
            yield row, head // group


def risk_of(vectors, basis):
    """‖Uᵀx‖² / ‖x‖²."""
    return (vectors @ basis).square().sum(-1) / vectors.square().sum(-1)


def transcribed(concept, x, role, kind, index, text):
    """Queries or keys x [B, H, L, D] of a block, turned; the first `text` tokens are text, the others image tokens."""
    result = x.double().clone()
    for row, head in rows_of(concept, role, kind, index):
        basis = flat.field(concept, f"basis_{role}")[row].double()
        for stream, span in (("text", slice(0, text)), ("image", slice(text, None))):
            generator = flat.field(concept, f"generator_{stream}")[row].double()
            vectors = result[:, head, span]
            inside, risk = vectors @ basis, risk_of(vectors, basis)
            scale = torch.where(risk > concept.threshold, risk.clamp(max=1), torch.zeros_like(risk))
            turn = torch.matrix_exp(scale[..., None, None] * generator) - torch.eye(len(generator))
            result[:, head, span] += (turn @ inside[..., None])[..., 0] @ basis.T
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


class NaiveCount(NaivePatch):
    """Turns nothing, and counts the gates that text tokens pass: `passed` [B, text] of `gates`."""

    def __init__(self, concept, texts):
        super().__init__(concept, texts)
        self.passed, self.gates = 0, 0

    def turned(self, q, k, kind, index):
        self.seen.add((kind, index))
        for role, x in (("q", q), ("k", k)):
            for row, head in rows_of(self.concept, role, kind, index):
                basis = flat.field(self.concept, f"basis_{role}")[row].double()
                risk = risk_of(x[:, head, : self.texts[q.shape[2]]].double(), basis)
                self.passed = self.passed + (risk > self.concept.threshold).double()
                self.gates += 1
        return q, k

    @property
    def risk(self):
        """Of the riskiest token of any picture."""
        return (self.passed / self.gates).max().item()
