"""What the tests of layouts share: prompts and latents of random numbers, and the reference that knows the spans."""

from __future__ import annotations

import torch

CPU = torch.device("cpu")
TEXT, LONG = 5, 9  # tokens of a prompt, and of a longer one
METHODS = ["offset", "index", "uxo/uno"]  # "index_timestep_zero" fails in ComfyUI's own FLUX.1 blocks: see FLUX.2


def image_tokens(height, width):
    """Latent rows and columns -> tokens: two by two, padded to even."""
    return -(-height // 2) * -(-width // 2)


def prompt(tokens=TEXT, seed=0, width=32, **more):
    random = torch.Generator().manual_seed(seed)
    hidden, pooled = (torch.randn(shape, generator=random) for shape in ((1, tokens, width), (1, 16)))
    return [[hidden, {"pooled_output": pooled, **more}]]


def latent(height=8, width=8, batch=1, channels=16, seed=3):
    return torch.randn(batch, channels, height, width, generator=torch.Generator().manual_seed(seed))


class Reference:
    """An attn1_patch that rotates by spans looked up in `texts`: number of tokens -> how many of them are text.

    Another number of tokens is a KeyError: the layout is not the one the test thinks of.
    """

    def __init__(self, protection, texts):
        self.protection, self.texts, self.seen = protection, texts, set()

    def __call__(self, q, k, v, pe=None, attn_mask=None, extra_options=None):
        block = (extra_options["block_type"], extra_options["block_index"])
        self.seen.add((q.shape[2], k.shape[2], q.shape[0], q.dtype))
        return {role: self._rotated(x, role, block) for role, x in (("q", q), ("k", k))}

    def _rotated(self, x, role, block):
        text = self.texts[x.shape[2]]
        return self.protection.rotate(x, role, *block, text=(0, text), image=(text, x.shape[2]))


def referring(positive, references, method=None):
    """Conditioning with reference pictures, as ReferenceLatent and FluxKontextMultiReferenceLatentMethod make it."""
    from comfy_extras.nodes_edit_model import ReferenceLatent
    from comfy_extras.nodes_flux import FluxKontextMultiReferenceLatentMethod

    for samples in references:
        positive = ReferenceLatent.execute(positive, {"samples": samples})[0]
    return FluxKontextMultiReferenceLatentMethod.execute(positive, method)[0] if method else positive
